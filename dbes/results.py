"""The versioned result of one evaluation: what is saved, loaded, compared and reported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from dbes.errors import FileError, ResultError
from dbes.files import write_text
from dbes.measures import Measures
from dbes.result_parts import Companions, NumberKeyed, OwnMetric, Part, Settings, Strata
from dbes.schema import Number, Whole, read_versioned
from dbes.showing import Shown, sizes
from dbes.text import clipped

if TYPE_CHECKING:
    import pandas as pd

RESULT_SCHEMA = 1
METRICS_VERSION = 2
"""Rises when a score comes to mean something else; results of different versions do not stand in one table."""

RESULT_FILE = "result.json"
PAGE_FILE = "report.html"
"""Written from a result, beside it."""


class PublishedMetric(Part):
    """One published metric. ``by_layer`` is empty where the metric is defined over all layers together (NER)."""

    model: Number
    by_domain: dict[str, Number]
    by_layer: Annotated[dict[int, Number], AfterValidator(NumberKeyed)]


BySize = Annotated[dict[int, PublishedMetric], AfterValidator(NumberKeyed)]


class CalibratedRecord(Part):
    """One calibrated value. ``layer`` None: mean over layers; ``domain`` None: all domains.

    Attributes:
        value: of the counts as they are; null: its mean when documents' domain labels are shuffled (chance inside documents for
            n-grams), a line to look at; corrected, ci_low, ci_high: jackknife over documents; reference: the ideal domain router.
        p: one-sided; the domain metrics share the test that domains use the experts alike.
        score: corrected / reference, 0 no better than chance, 1 the ideal router; for stiffness and n-grams
            their own normalised form. score_low, score_high: its 95 % interval.
        control: mean score of the recorded frozen random routers on the same representation; excess: score - control, with its interval.
        lexical: corrected value of a router that looks at the token alone (where settings have ``surrogate`` bigram: at the token and the
            one before it), from other occurrences of the same tokens; contextual,
            contextual_low, contextual_high: what the router shows beyond it on the same tokens; position: as lexical, of one that looks
            at the position in the document alone. NaN where the trace cannot tell, and for metrics that do not compare domains.
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
    lexical: Number = math.nan
    contextual: Number = math.nan
    contextual_low: Number = math.nan
    contextual_high: Number = math.nan
    position: Number = math.nan


class Specialist(Part):
    """An expert that serves a domain at least 1.5 times as much as the mixture, by a document-level test under FDR control, in both halves.

    Attributes:
        hits, share: of all documents of the domain.
        lift, lift_low, lift_high: the domain's share over the mean of all, with its 95 % interval, on the half of the documents that did
            not choose the expert (the mean of both where both did). Where companions have no ``by_lift``: on all documents, and too high.
        z, p, q: the test of the half that speaks more for it; p counts that there were two.
    """

    layer: int
    expert: int
    domain: str
    hits: Whole
    share: Number
    lift: Number
    lift_low: Number
    lift_high: Number
    z: Number
    p: Number
    q: Number
    tokens: tuple[str, ...] = ()


class ModelFacts(Part):
    name: str
    revision: str | None = None
    family: str | None = None
    layers: tuple[Whole, ...] = ()
    experts: tuple[Whole, ...] = ()
    top_k: tuple[Whole, ...] = ()
    parameters: Whole | None = None
    dtype: str | None = None


class DomainFacts(Part):
    """Size of a domain; ``sources``: source texts its documents were cut from, the units of all statistics.

    ``cautions``: what of its texts can pass for a difference between domains, or for evidence; see ``dbes tasks validate``.
    """

    documents: Whole
    sources: Whole
    tokens: Whole
    cautions: tuple[str, ...] = ()


class TaskFacts(Part):
    name: str
    version: Whole | None = None
    fingerprint: str | None = None
    domains: dict[str, DomainFacts] = Field(default_factory=dict)
    separability: Number = math.nan
    note: str | None = None


class RecordingFacts(Part):
    """What was recorded and what it took. Tokens of a chat template are recorded, but not scored. Bytes: of the weights, as the streaming
    engine read them, or left them unread because the last layer ends with its router."""

    documents: Whole
    tokens: Whole
    seconds: Number = math.nan
    tokens_per_second: Number = math.nan
    engine: Literal["memory", "streaming"] | None = None
    template_tokens: Whole | None = None
    bytes_read: Whole | None = None
    bytes_skipped: Whole | None = None


class Result(Shown, Part):
    """Everything one evaluation found, with what is needed to repeat it."""

    schema_version: Literal[1] = RESULT_SCHEMA
    metrics_version: Whole = 1
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
    own_metrics: dict[str, OwnMetric] = Field(default_factory=dict)
    """By name, the metrics of the user's own among the calibrated; empty in results of earlier versions."""
    strata: dict[str, Strata] = Field(default_factory=dict)
    """By kind, where strata were asked for."""
    specialists: tuple[Specialist, ...] = ()
    companions: dict[str, Any] = Field(default_factory=dict)
    measures: Measures | None = None
    files: dict[str, str] = Field(default_factory=dict)
    """Name and sha256 of the tables and matrices that were written beside it; empty in results of earlier versions."""
    _folder: Path | None = PrivateAttr(default=None)

    def about(self) -> tuple[str, dict[str, str]]:
        model, task = self.model, self.task
        facts = {"model": model.name, "router": sizes(len(model.layers), model.experts, model.top_k) if model.layers else ""}
        facts["task"] = f"{task.name}, {len(task.domains)} domains"
        if self.recording is not None:
            facts["task"] += f", {self.recording.documents:,} documents, {self.recording.tokens:,} tokens"
        facts |= {"verdict": self.verdict} if self.status == "ok" else {"error": self.error or "failed"}
        folder = "" if self._folder is None else str(self._folder)
        return "Result", facts | {"notes": f"{len(self.warnings)} in warnings" if self.warnings else "", "folder": folder}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Result) and self.__dict__ == other.__dict__

    @property
    def folder(self) -> Path | None:
        """Where it was written to or read from, beside its tables and, where they were kept, the recorded routes."""
        return self._folder

    @field_validator("settings", "companions")
    @classmethod
    def _what_is_read_has_its_type(cls, content: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        (Settings if info.field_name == "settings" else Companions).model_validate(content)
        return content

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        model, domains = self.model, self.task.domains
        if not len(model.layers) == len(model.experts) == len(model.top_k):
            yield f"model: {len(model.layers)} layers, {len(model.experts)} experts, {len(model.top_k)} top_k; expected as many of each"
        if list(model.layers) != sorted(set(model.layers)):
            yield f"model.layers: expected them ascending and distinct, found {clipped(list(model.layers))}"
        seen = set[tuple[str, int | None, str | None]]()
        for number, record in enumerate(self.calibrated):
            place = (record.metric, record.layer, record.domain)
            if place in seen or (record.layer is not None and record.layer not in model.layers):
                yield f"calibrated.{number}: layer {record.layer} of {clipped(record.metric)} twice, or not a layer of the model"
            if record.domain is not None and record.domain not in domains:
                yield f"calibrated.{number}: domain {clipped(record.domain)}, expected one of the task's domains"
            seen.add(place)
        for number, each in enumerate(self.specialists):
            if each.domain not in domains or each.layer not in model.layers:
                yield f"specialists.{number}: layer {each.layer}, domain {clipped(each.domain)}: the result has no such layer or domain"
        if unknown := {*self.companions.get("specialists", {}).get("by_domain", {})} - {*domains}:
            yield f"companions.specialists.by_domain: {clipped(min(unknown))} is not one of the task's domains"
        if self.measures is not None and (unknown := self.measures.domains - {*domains}):
            yield f"measures: {clipped(min(unknown))} is not one of the task's domains"
        similarity = self.companions.get("similarity", {}).get("mean_over_layers")
        if similarity is not None and [len(row) for row in similarity] != [len(domains)] * len(domains):
            yield f"companions.similarity.mean_over_layers: expected {len(domains)} x {len(domains)} numbers, one for each pair of domains"

    @property
    def documents_known(self) -> bool:
        """False where only counts of whole domains were scored: numbers of documents and source texts are 0 then, and mean nothing."""
        return self.settings.get("documents") != "unknown"

    def by_domain(self, metric: str) -> bool:
        """Whether a metric has a value for each domain, or for all of them together only."""
        return self.own_metrics[metric].per_domain if metric in self.own_metrics else metric != "der"

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
        self._folder = path.parent
        return path


def load_result(path: str | Path) -> Result:
    """The result in a file or in a folder that holds ``result.json``.

    Raises:
        ResultError: missing, not JSON, another schema version, unknown or missing fields.
    """
    path = Path(path)
    path = path / RESULT_FILE if path.is_dir() else path
    missing = f"{path}: there is no result here; run `dbes evaluate` first"
    result = read_versioned(path, Result, error=ResultError, versions=(RESULT_SCHEMA,), missing=missing)
    result._folder = path.parent
    return result


def load_results(path: str | Path) -> list[Result]:
    """Every result below a folder (or the one in a file), in order of path.

    Raises:
        ResultError: nothing found, or one of them cannot be read.
    """
    return [load_result(each) for each in result_files([Path(path)])]


def result_files(paths: Sequence[Path]) -> list[Path]:
    """The result files that the paths are, or that lie below them, in order; each once, by however many paths it is reached.

    Raises:
        ResultError: a path is not there, or there is no result at all.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            inside = [path] if not path.is_dir() else sorted(each for each in path.rglob(RESULT_FILE) if each.exists())
            if not path.exists():
                raise ResultError(f"{path}: no such file or folder")
            for file in inside:
                found.setdefault(file.resolve(), file)
        except (OSError, RuntimeError) as problem:  # RuntimeError: a loop of symbolic links
            raise ResultError(f"{path}: cannot be read ({getattr(problem, 'strerror', None) or problem})") from None
    if not found:
        raise ResultError(f"{', '.join(map(str, paths))}: no {RESULT_FILE} below; run `dbes evaluate` first")
    return list(found.values())
