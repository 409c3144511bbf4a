"""The Transformers library's own tests of a model: Admin passes what stock Marian passes.

They come with the library's source distribution, which is fetched once into `.cache/`.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from conftest import tiny_model

from admin_hf.residual import SYSTEMS


pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]
CACHE = REPO / ".cache" / "transformers"
ADAPTER = REPO / "tests" / "hf_common" / "test_modeling_admin.py"

# Modules that the tests import but the source distribution lacks; what they would add is left out for Marian too.
MISSING_MODULES = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": 'config_common_kwargs = {"output_hidden_states": True, "dtype": "float16"}\n',
}


@dataclass
class Outcome:
    passed: set[str]
    failed: set[str]
    report: str


@pytest.fixture(scope="module")
def common_tests(tmp_path_factory):
    """A folder whose `tests/` is the library's, with our adapter in it."""
    pytest.importorskip("parameterized", reason="the library's tests need the package parameterized")
    folder = tmp_path_factory.mktemp("transformers")
    tests = folder / "tests"
    with tarfile.open(_source_distribution()) as archive:
        members = [member for member in archive if member.name.split("/")[1:2] == ["tests"]]
        archive.extractall(folder, members, filter="data")
    next(folder.glob("*/tests")).rename(tests)
    for name, text in MISSING_MODULES.items():
        path = tests / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    (tests / "models" / "admin").mkdir(parents=True)
    shutil.copy(ADAPTER, tests / "models" / "admin")
    for package in (tests, *(path for path in tests.rglob("*") if path.is_dir())):
        (package / "__init__.py").touch()
    return folder


def _source_distribution() -> Path:
    path = CACHE / f"transformers-{transformers.__version__}.tar.gz"
    if not path.exists():
        requirement = f"transformers=={transformers.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        fetched = subprocess.run([*pip, "--dest", CACHE, requirement], capture_output=True, text=True)
        if fetched.returncode or not path.exists():
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f"pip cannot fetch the source of {requirement}: {fetched.stderr.strip()[-300:]}")
    return path


@pytest.fixture(scope="module")
def outcomes(common_tests) -> dict[str, Outcome]:
    """Of every case of the adapter, all run in one process, which knows nothing of this one's pytest."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    workers = "0" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    options = ["-q", "-rA", "-n", workers, "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", "."]
    command = [sys.executable, "-m", "pytest", *options, f"tests/models/admin/{ADAPTER.name}"]
    run = subprocess.run(command, cwd=common_tests, env=environment, capture_output=True, text=True)
    results = re.findall(r"^(PASSED|FAILED|ERROR) .*::(\w+)::(\w+)", run.stdout, re.M)
    return {
        case: Outcome(
            {test for state, of, test in results if (state, of) == ("PASSED", case)},
            {test for state, of, test in results if state != "PASSED" and of == case},
            run.stdout,
        )
        for case in ("MarianTest", *CASES)
    }


CASES = [case for case in re.findall(r"^class (\w+)\(.*TestCase\)", ADAPTER.read_text(), re.M) if case != "MarianTest"]


def test_every_residual_system_is_a_case_or_has_the_parameters_of_one():
    def parameters(system):
        model = tiny_model(encoder_residual=system, decoder_residual=system)
        return frozenset(name for name, _ in model.named_parameters())

    cases = re.findall(r'{"encoder_residual": "(\w+)", "decoder_residual": "\1"}', ADAPTER.read_text())
    assert {parameters(name) for name in SYSTEMS} == {parameters(name) for name in cases}
    assert {"admin", "post_ln", "pre_ln", "b2t", "deepnorm", "looklinear", "admin_uniform"} <= set(cases)


@pytest.mark.parametrize("case", CASES)
def test_passes_what_stock_marian_passes(case, outcomes):
    marian, admin = outcomes["MarianTest"], outcomes[case]
    assert not marian.failed and len(marian.passed) >= 102, marian.report
    assert not admin.failed, admin.report
    assert admin.passed == marian.passed
