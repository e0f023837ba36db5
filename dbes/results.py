"""The versioned result of one evaluation: what is saved, loaded, compared and reported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dbes.errors import FileError, ResultError
from dbes.files import write_text

if TYPE_CHECKING:
    import pandas as pd

RESULT_SCHEMA = 1
RESULT_FILE = "result.json"
PAGE_FILE = "report.html"
"""Written from a result, beside it."""


class NumberKeyed(dict[int, Any]):
    """A mapping by whole number that also answers to the number written as text, as JSON has it."""

    def __missing__(self, key: object) -> Any:
        if isinstance(key, str) and key.lstrip("-").isdigit():
            return self[int(key)]
        raise KeyError(key)


def _nan_when_null(number: Any) -> Any:
    return math.nan if number is None else number


Number = Annotated[float, BeforeValidator(_nan_when_null)]
"""A float whose NaN is written as null: strict JSON has no NaN."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class PublishedMetric(_Strict):
    """One published metric. ``by_layer`` is empty where the metric is defined over all layers together (NER)."""

    model: Number
    by_domain: dict[str, Number]
    by_layer: Annotated[dict[int, Number], AfterValidator(NumberKeyed)]


BySize = Annotated[dict[int, PublishedMetric], AfterValidator(NumberKeyed)]


class CalibratedRecord(_Strict):
    """One calibrated value. ``layer`` None: mean over layers; ``domain`` None: all domains.

    Attributes:
        value: the plug-in estimate; null: its mean when documents' domain labels are shuffled (chance inside documents for
            n-grams); corrected, ci_low, ci_high: jackknife over documents; p: one-sided; reference: the ideal domain router.
        score: (value - null) / (reference - null), 0 no better than chance, 1 the ideal router; for stiffness and n-grams
            their own normalised form. score_low, score_high: its 95 % interval.
        control: score of the frozen random router on the same representation; excess: score - control, with its interval.
    """

    metric: str
    layer: int | None
    domain: str | None
    value: Number
    null: Number
    corrected: Number
    ci_low: Number
    ci_high: Number
    p: Number
    reference: Number
    score: Number
    score_low: Number
    score_high: Number
    control: Number = math.nan
    excess: Number = math.nan
    excess_low: Number = math.nan
    excess_high: Number = math.nan


class Specialist(_Strict):
    """An expert that serves a domain more than the mixture, by a document-level test under FDR control, in both halves."""

    layer: int
    expert: int
    domain: str
    hits: int
    share: Number
    lift: Number
    lift_low: Number
    lift_high: Number
    z: Number
    p: Number
    q: Number
    tokens: tuple[str, ...] = ()


class ModelFacts(_Strict):
    name: str
    revision: str | None = None
    family: str | None = None
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    parameters: int | None = None
    dtype: str | None = None


class DomainFacts(_Strict):
    """Size of a domain; ``sources``: source texts its documents were cut from, the units of all statistics."""

    documents: int
    sources: int
    tokens: int


class TaskFacts(_Strict):
    name: str
    version: int | None = None
    fingerprint: str | None = None
    domains: dict[str, DomainFacts] = Field(default_factory=dict)
    separability: Number = math.nan
    note: str | None = None


class RecordingFacts(_Strict):
    documents: int
    tokens: int
    seconds: Number = math.nan
    tokens_per_second: Number = math.nan


class Result(_Strict):
    """Everything one evaluation found, with what is needed to repeat it."""

    schema_version: Literal[1] = RESULT_SCHEMA
    status: Literal["ok", "error"]
    error: str | None = None
    created: str
    model: ModelFacts
    task: TaskFacts
    environment: dict[str, str | None] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    recording: RecordingFacts | None = None
    units: str = "nats"
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    published: dict[str, PublishedMetric | BySize] = Field(default_factory=dict)
    calibrated: tuple[CalibratedRecord, ...] = ()
    specialists: tuple[Specialist, ...] = ()
    companions: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    """Name and sha256 of the tables and matrices that were written beside it; empty in results of earlier versions."""

    def record(self, metric: str, *, layer: int | None = None, domain: str | None = None) -> CalibratedRecord:
        """The calibrated record of a metric; the model's by default.

        Raises:
            KeyError: there is no such record.
        """
        for found in self.calibrated:
            if (found.metric, found.layer, found.domain) == (metric, layer, domain):
                return found
        raise KeyError(f"no calibrated record for metric {metric!r}, layer {layer!r}, domain {domain!r}")

    def to_dataframe(self) -> pd.DataFrame:
        """The calibrated records as a table, one row each."""
        import pandas as pd

        return pd.DataFrame([record.model_dump() for record in self.calibrated], columns=list(CalibratedRecord.model_fields))

    def save(self, folder: str | Path) -> Path:
        """Write ``result.json`` (strict JSON, whole or not at all) and return its path.

        Raises:
            ResultError: it cannot be written.
        """
        path = Path(folder) / RESULT_FILE
        try:
            write_text(path, self.model_dump_json(indent=1) + "\n")
        except FileError as problem:
            raise ResultError(str(problem)) from problem
        return path


def load_result(path: str | Path) -> Result:
    """The result in a file or in a folder that holds ``result.json``.

    Raises:
        ResultError: missing, not JSON, another schema version, unknown or missing fields.
    """
    path = Path(path)
    path = path / RESULT_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ResultError(f"{path}: there is no result here; run `dbes evaluate` first") from None
    except (OSError, ValueError) as problem:
        raise ResultError(f"{path}: cannot be read as JSON ({problem})") from None
    version = content.get("schema_version") if isinstance(content, Mapping) else None
    if version != RESULT_SCHEMA:
        raise ResultError(f"{path}: result schema {version!r}; this dbes reads {RESULT_SCHEMA}")
    try:
        return Result.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ResultError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def load_results(path: str | Path) -> list[Result]:
    """Every result below a folder (or the one in a file), in order of path.

    Raises:
        ResultError: nothing found, or one of them cannot be read.
    """
    path = Path(path)
    found = [path] if path.is_file() else sorted(path.rglob(RESULT_FILE))
    if not found:
        raise ResultError(f"{path}: no {RESULT_FILE} below this folder")
    return [load_result(each) for each in found]
