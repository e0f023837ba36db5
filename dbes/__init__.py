"""dbes: do the experts of a Mixture-of-Experts language model specialize, in what, and is that more than chance?

>>> result = dbes.evaluate("embedded")
>>> result.published["rs"].by_domain["law"], result.record("specialization").score

The names below are imported on first use, so that ``import dbes`` and ``dbes --help`` load neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbes.evaluation.pipeline import evaluate, record
    from dbes.results import Result, load_result, load_results
    from dbes.scoring.score import score
    from dbes.trace.store import Trace

_HOMES = {
    "Result": "dbes.results",
    "Trace": "dbes.trace.store",
    "evaluate": "dbes.evaluation.pipeline",
    "load_result": "dbes.results",
    "load_results": "dbes.results",
    "record": "dbes.evaluation.pipeline",
    "score": "dbes.scoring.score",
}

__all__ = ["Result", "Trace", "evaluate", "load_result", "load_results", "record", "score"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dbes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
