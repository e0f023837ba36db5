"""What the files of an experiment say, checked as they are read: what it is, and the record of each finished run and mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dbes.errors import InterventionError
from dbes.intervention.masking import MaskJob
from dbes.intervention.runs import RUN_SCHEMA
from dbes.intervention.settings import Arm, InterventionSettings
from dbes.reporting.outcome import PathFacts, Skipped, TrainedModel
from dbes.schema import Open, Real, Whole, read_record

EXPERIMENT_SCHEMA = 1
AGAIN = "remove it and run the same command again"

ByDomain = dict[str, tuple[Real, ...]]
Right = dict[str, tuple[Annotated[int, Field(ge=0, le=1)], ...]]


class Data(Open):
    digest: str
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    boundary: Whole


class Accuracy(Open):
    choices: dict[str, tuple[Annotated[int, Field(ge=1, lt=2**31)], ...]]
    right: Right
    right_per_byte: Right


class Experiment(Open):
    schema_version: Literal[1]
    key: str
    model: TrainedModel
    texts: str
    data: Data
    bytes: dict[str, tuple[Annotated[float, Field(gt=0, lt=1e15)], ...]]
    base: ByDomain
    settings: InterventionSettings
    arms: tuple[Arm, ...]
    masks: tuple[MaskJob, ...]
    paths: dict[str, PathFacts]
    skipped: tuple[Skipped, ...]
    versions: dict[str, str]
    accuracy: Accuracy | None = None

    @model_validator(mode="after")
    def _about_the_same_documents(self) -> Self:
        for name in self.data.domains:
            if not self.bytes.get(name) or len(self.base.get(name, ())) != len(self.bytes[name]):
                raise ValueError(f"base, bytes: expected as many numbers for the documents of domain {name!r}, at least one")
        if missing := {*self.settings.domains} - {*self.data.domains}:
            raise ValueError(f"settings.domains: {min(missing)!r} is none of data.domains")
        if self.accuracy is not None:
            asked = self.accuracy
            for name, choices in asked.choices.items():
                if not choices or not len(choices) == len(asked.right.get(name, ())) == len(asked.right_per_byte.get(name, ())):
                    raise ValueError(f"accuracy: choices, right and right_per_byte of {name!r} differ in length")
        return self


class Point(Open):
    step: Whole
    seconds: Real
    nats: ByDomain
    right: Right | None = None
    right_per_byte: Right | None = None


class RunFacts(Open):
    target: str
    kind: str
    rate: Real
    seed: Whole


class RunState(Open):
    schema_version: Literal[1]
    status: Literal["ok", "failed"]
    error: str | None
    run: RunFacts


class RunRecord(RunState):
    losses: tuple[Real, ...]
    trainable_parameters: Whole | None
    optimizer_bytes: Whole | None
    peak_added_bytes: Whole | None
    training_seconds: Real | None
    steps_without_gradient: Whole | None
    curve: Annotated[tuple[Point, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _measures_its_target(self) -> RunRecord:
        for number, point in enumerate(self.curve):
            if not point.nats.get(self.run.target):
                raise ValueError(f"curve.{number}.nats: nothing of the target {self.run.target!r}")
        return self


class MaskRecord(Open):
    schema_version: Literal[1]
    job: MaskJob
    nats: ByDomain
    controls: Annotated[tuple[ByDomain, ...], Field(min_length=1)]


def read_about(out: Path) -> dict[str, Any]:
    """What an experiment is.

    Raises:
        InterventionError: there is none, of another version, or it contradicts itself.
    """
    path = out / "experiment.json"
    missing = f"{path}: not there; run `dbes intervene --out {out}`"
    return read_record(path, Experiment, error=InterventionError, versions=(EXPERIMENT_SCHEMA,), missing=missing, hint=AGAIN)


def read_run_record(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        run: what it must be the record of.

    Raises:
        InterventionError: missing, damaged, or the record of another run.
    """
    about: dict[str, Any] = {"error": InterventionError, "versions": (RUN_SCHEMA,), "hint": AGAIN}
    found = read_record(path, RunState, **about)
    if found["status"] == "ok":
        found = read_record(path, RunRecord, **about)
    if {name: found["run"].get(name) for name in run} != run:
        raise InterventionError(f"{path}: the record of another run; {AGAIN}")
    return found


def read_mask_record(path: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a finished mask; raises InterventionError as `read_run_record`."""
    found = read_record(path, MaskRecord, error=InterventionError, versions=(RUN_SCHEMA,), hint=AGAIN)
    if found["job"] != job or len(found["controls"]) != len(job["controls"]):
        raise InterventionError(f"{path}: the record of another mask; {AGAIN}")
    return found


def check_curve(path: Path, record: Mapping[str, Any], about: Mapping[str, Any], *, domains: Sequence[str], steps: Sequence[int]) -> None:
    """Refuse a run that measured other documents, domains or steps than its experiment says.

    Args:
        domains: that it must have measured; steps: after which.

    Raises:
        InterventionError: names the file.
    """
    curve = record["curve"]
    if [point["step"] for point in curve] != list(steps):
        raise InterventionError(f"{path}: measured after steps {[point['step'] for point in curve]}, expected {list(steps)}; {AGAIN}")
    asked = (about.get("accuracy") or {}).get("choices", {})
    for point in curve:
        check_documents(path, point["nats"], about["bytes"], domains)
        for kind in ("right", "right_per_byte") if asked else ():
            check_documents(path, point.get(kind) or {}, asked, [name for name in domains if name in asked])


def check_documents(path: Path, found: Mapping[str, Sequence[Any]], sizes: Mapping[str, Sequence[Any]], domains: Sequence[str]) -> None:
    """Refuse measurements that are not one number for each document of each domain."""
    for name in domains:
        if name not in found or len(found[name]) != len(sizes[name]):
            told = f"{len(found.get(name, ()))} numbers for domain {name!r}, expected {len(sizes[name])}"
            raise InterventionError(f"{path}: {told}; {AGAIN}")
