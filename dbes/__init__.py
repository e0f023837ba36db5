"""dbes: do the experts of a Mixture-of-Experts language model specialize, in what, and is that more than chance?

>>> result = dbes.evaluate("embedded")
>>> result.published["rs"].by_domain["law"], result.record("specialization").score

The names below are imported on first use, so that ``import dbes`` and ``dbes --help`` load neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dbes.errors import (
    DbesError,
    FileError,
    FinetuneError,
    InterventionError,
    MixError,
    ModelError,
    PathError,
    RecordingError,
    ResultError,
    SettingError,
    SourceError,
    TaskError,
    TraceError,
)

if TYPE_CHECKING:
    from dbes.comparison.agreement import Agreement, agreement
    from dbes.comparison.compare import Comparison, compare
    from dbes.comparison.pruning import Pruning, prune
    from dbes.evaluation.callback import SpecializationCallback
    from dbes.evaluation.pipeline import evaluate, record
    from dbes.exporting.export import export
    from dbes.finetuning.output import merge
    from dbes.finetuning.run import finetune
    from dbes.finetuning.settings import FinetuneSettings
    from dbes.importing.importing import import_routing
    from dbes.intervention.grid import intervene
    from dbes.intervention.settings import InterventionSettings
    from dbes.models.doctor import Diagnosis, examine
    from dbes.models.load import LoadedModel, load_model
    from dbes.paths.placement import Placement, place
    from dbes.paths.search import find_path
    from dbes.paths.types import ExpertPath
    from dbes.reporting.report import report
    from dbes.results import Result, load_result, load_results
    from dbes.scoring.counts import Counts
    from dbes.scoring.own import Metric
    from dbes.scoring.score import score
    from dbes.tasks.task import Task, list_tasks, load_task
    from dbes.testbed.report import run_testbed
    from dbes.trace.store import Trace

_HOMES = {
    "evaluate": "dbes.evaluation.pipeline",
    "record": "dbes.evaluation.pipeline",
    "import_routing": "dbes.importing.importing",
    "score": "dbes.scoring.score",
    "load_result": "dbes.results",
    "load_results": "dbes.results",
    "compare": "dbes.comparison.compare",
    "agreement": "dbes.comparison.agreement",
    "report": "dbes.reporting.report",
    "export": "dbes.exporting.export",
    "find_path": "dbes.paths.search",
    "place": "dbes.paths.placement",
    "prune": "dbes.comparison.pruning",
    "finetune": "dbes.finetuning.run",
    "merge": "dbes.finetuning.output",
    "intervene": "dbes.intervention.grid",
    "run_testbed": "dbes.testbed.report",
    "examine": "dbes.models.doctor",
    "load_model": "dbes.models.load",
    "load_task": "dbes.tasks.task",
    "list_tasks": "dbes.tasks.task",
    "Result": "dbes.results",
    "Trace": "dbes.trace.store",
    "Counts": "dbes.scoring.counts",
    "Metric": "dbes.scoring.own",
    "SpecializationCallback": "dbes.evaluation.callback",
    "Task": "dbes.tasks.task",
    "ExpertPath": "dbes.paths.types",
    "Comparison": "dbes.comparison.compare",
    "Agreement": "dbes.comparison.agreement",
    "Placement": "dbes.paths.placement",
    "Pruning": "dbes.comparison.pruning",
    "Diagnosis": "dbes.models.doctor",
    "FinetuneSettings": "dbes.finetuning.settings",
    "InterventionSettings": "dbes.intervention.settings",
    "LoadedModel": "dbes.models.load",
}

__all__ = [
    "Agreement",
    "Comparison",
    "Counts",
    "DbesError",
    "Diagnosis",
    "ExpertPath",
    "FileError",
    "FinetuneError",
    "FinetuneSettings",
    "InterventionError",
    "InterventionSettings",
    "LoadedModel",
    "Metric",
    "MixError",
    "ModelError",
    "PathError",
    "Placement",
    "Pruning",
    "RecordingError",
    "Result",
    "ResultError",
    "SettingError",
    "SourceError",
    "SpecializationCallback",
    "Task",
    "TaskError",
    "Trace",
    "TraceError",
    "agreement",
    "compare",
    "evaluate",
    "examine",
    "export",
    "find_path",
    "finetune",
    "import_routing",
    "intervene",
    "list_tasks",
    "load_model",
    "load_result",
    "load_results",
    "load_task",
    "merge",
    "place",
    "prune",
    "record",
    "report",
    "run_testbed",
    "score",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dbes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
