"""The example notebook goes the whole round from top to bottom and shows what its text promises."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "round.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook_runs() -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [
        output["data"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell["outputs"]
        if output["output_type"] == "execute_result" or (output["output_type"] == "display_data" and "image/svg+xml" in output["data"])
    ]
    model, scores, chart, path, losses, comparison = shown
    assert "dbes-embedded" in model["text/plain"] and "specialization" in scores["text/html"] and "<svg" in chart["image/svg+xml"]
    assert "share of law's tokens" in path["text/plain"] and "after" in losses["text/html"]
    assert "law-model" in comparison["text/html"] and "dbes-embedded" in comparison["text/html"]
