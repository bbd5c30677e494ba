"""Every notebook runs from its first cell to its last, as a reader would run it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
pytestmark = pytest.mark.slow
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, smollm2_folder):
    notebook = nbformat.read(path, as_version=4)
    committed = [len(cell.get("outputs", [])) for cell in notebook.cells]
    NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}, kernel_name="python3"
    ).execute()
    # As many outputs as were committed: a cell that went silent would be noticed.
    assert [len(cell.get("outputs", [])) > 0 for cell in notebook.cells] == [
        n > 0 for n in committed
    ]
    assert sum(committed) > 0


def test_there_are_some():
    assert NOTEBOOKS
