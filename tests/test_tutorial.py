"""The tutorial: the page and the notebook have the same cells, and the notebook runs from start to end."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"


def test_the_notebook_is_the_page_without_outputs() -> None:
    page, notebook = jupytext.read(ROOT / "docs" / "tutorial.md"), nbformat.read(NOTEBOOK, as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (page, notebook)]
    assert cells[0] == cells[1], "run `make notebook`"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises with the traceback of the cell that fails
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    said = "\n".join(printed)
    assert "version 1 is in production" in said
    assert "drift after" in said
    assert "version 2 is in production" in said
    assert "2 tech The new phone runs a faster chip." in said
    assert "in production: 2\nafter the rollback: 1\npromoted again: 2\n" in said
