"""The example notebook runs from top to bottom and shows what its text promises."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "results.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook_runs() -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "specialization" in cells[1]["outputs"][0]["data"]["text/html"]
    assert "<svg" in cells[2]["outputs"][0]["data"]["image/svg+xml"]
    assert "dbes-embedded" in cells[0]["outputs"][0]["data"]["text/plain"]
