"""Runs the tutorial, and keeps what it prints and draws: `python -m website.tutorial`, after a change of a cell."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[1] / "docs/tutorial.ipynb"


def executed() -> nbformat.NotebookNode:
    """The notebook with the outputs of a new run, without warnings, which name folders of the machine."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, record_timing=False)
    metadata = notebook.metadata.copy()
    client.execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
