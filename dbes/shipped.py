"""Where the embedded model, the tasks, the benchmark and the training mix lie: beside the package in a clone, inside it in a wheel.

In both, ``tasks`` and ``benchmark_data`` stand in one folder, so that the relative paths of a task hold.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "_shipped" if (PACKAGE / "_shipped").is_dir() else PACKAGE.parent
"""The folder that holds ``tasks`` and ``benchmark_data``."""

TASKS = ROOT / "tasks"
EMBEDDED_MODEL = ROOT / "benchmark_data" / "model"
EMBEDDED_NAME = "dbes-embedded"
EMBEDDED = "embedded"
"""What the embedded model, task and mix are called on the command line and in calls."""

EMBEDDED_MIX = ROOT / "benchmark_data" / "mix"


def located(model: str | Path) -> tuple[str, str | None]:
    """Folder or hub id of a model, and the name it has where that is another: of ``embedded``, the checkpoint that ships with dbes."""
    return (str(EMBEDDED_MODEL), EMBEDDED_NAME) if str(model) == EMBEDDED else (str(model), None)
