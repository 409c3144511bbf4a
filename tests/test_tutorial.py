"""The tutorial notebook runs as it stands, and is published with what it prints and draws."""

import re
from pathlib import Path

import pytest


REPO = Path(__file__).parents[1]
for package in ("nbclient", "ipykernel"):
    pytest.importorskip(package, reason="the tutorial needs admin-hf[docs]")

import nbformat  # noqa: E402

from website.tutorial import NOTEBOOK, executed  # noqa: E402


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert int(re.search(r"(\d+) of 100 sentences", text)[1]) >= 95
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not re.search(r"/(home|root|tmp|Users)/|site-packages", nbformat.writes(notebook))


def test_the_notebook_is_published_with_its_outputs_and_no_path_of_a_machine():
    check_outputs(nbformat.read(NOTEBOOK, as_version=4))
    assert NOTEBOOK.stat().st_size < 100_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    check_outputs(executed())
