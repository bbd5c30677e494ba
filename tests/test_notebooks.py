"""Every notebook runs from its first cell to its last, and is small enough to read and to keep."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Of this checkout, a home, an environment or a temporary folder.
LOCAL_PATH = re.compile(
    rf"{re.escape(str(FOLDER.parent))}|(?<![\w.:/-])/(?:home|root|Users|tmp|usr|opt|var)/"
)


@pytest.mark.slow
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reads_as_a_lesson(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert path.stat().st_size < 1_000_000
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.splitlines()[0].endswith("?")
    assert cells[-1].cell_type == "markdown"
    assert cells[-1].source.startswith("## Answer\n")
    assert "google.colab" in code[0].source
    assert code[0].metadata.jupyter.source_hidden
    assert "remove-cell" in code[0].metadata.tags
    assert code[0].outputs == []
    outputs = str([cell.outputs for cell in code]).replace("\\n", "\n")
    assert LOCAL_PATH.findall(outputs) == []


def test_numbers_give_the_order():
    assert NOTEBOOKS
    assert [path.stem[:3] for path in NOTEBOOKS] == [
        f"{n:02}_" for n in range(1, len(NOTEBOOKS) + 1)
    ]
