"""What is published: its version, what it needs, and that the wheel works where nothing else of this project is."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_model
from transformers import MarianMTModel

import admin_hf
from admin_hf.__main__ import build_parser


REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


NEEDED = names(PROJECT["dependencies"])
EXTRAS = {name: names(of) for name, of in PROJECT["optional-dependencies"].items()}


def test_the_library_imports_what_it_says_that_it_needs():
    """Figures and the page of a run need the extra `analysis`; Triton comes with PyTorch for a GPU.

    Adapters of PEFT and folders of CTranslate2 are read where these packages are at hand.
    """
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (REPO / "admin_hf").rglob("*.py"))
    found = {name for tree in trees for node in ast.walk(tree) for name in imported(node)}
    assert found - sys.stdlib_module_names == NEEDED | EXTRAS["analysis"] | {"triton", "peft", "ctranslate2"}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {node.module.partition(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


def test_the_citation_is_of_this_version():
    citation = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == admin_hf.__version__


@pytest.mark.parametrize("called", ["bin/admin-hf", "admin-hf.exe", "admin_hf/__main__.py"])
def test_help_names_the_command_as_it_was_called(called, monkeypatch):
    name = "python -m admin_hf" if called.endswith(".py") else "admin-hf"
    monkeypatch.setattr(sys, "argv", [called])
    assert build_parser().format_usage().startswith(f"usage: {name} ")


# --- the wheel ------------------------------------------------------------------------------------


def pip(python: Path | str, *arguments: object) -> None:
    """Run pip; skip the test where its index cannot be reached or lacks a version."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"pip cannot fetch a package: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPO / "admin_hf", folder / "source" / "admin_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / "source")
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone_and_is_small(wheel):
    assert wheel.name == f"admin_hf-{admin_hf.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 250_000
    inside = set(zipfile.ZipFile(wheel).namelist())
    about = f"admin_hf-{admin_hf.__version__}.dist-info"
    assert {name.partition("/")[0] for name in inside} == {"admin_hf", about}
    sources = {str(path.relative_to(REPO)) for path in (REPO / "admin_hf").rglob("*") if path.suffix != ".pyc"}
    files = {name for name in sources if (REPO / name).is_file()}
    assert inside - {name for name in inside if name.startswith(about)} == files
    assert f"{about}/licenses/LICENSE" in inside


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    """With the packages that it needs and no others: the import, the command's help, and a fold."""
    model = randomize(tiny_model())
    model.save_pretrained(tmp_path / "model")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    binaries = tmp_path / "fresh" / ("Scripts" if sys.platform == "win32" else "bin")
    pip(binaries / "python", "install", "-c", REPO / "constraints.txt", wheel)

    def run(*command: object) -> str:
        done = subprocess.run([binaries / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("python", "-I", "-c", "import admin_hf; print(admin_hf.__version__)").strip() == admin_hf.__version__
    assert run("admin-hf", "--help").startswith("usage: admin-hf ")
    assert run("python", "-I", "-m", "admin_hf", "--help").startswith("usage: python -m admin_hf ")
    assert "MarianMTModel" in run("admin-hf", "export", "model", "vanilla")
    ids = torch.tensor([[3, 4, 5, 0]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        logits = MarianMTModel.from_pretrained(tmp_path / "vanilla")(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
