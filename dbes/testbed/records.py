"""What a grid's files say, checked as they are read: its plan, and the record of each finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dbes.errors import MixError
from dbes.schema import Open, Real, Whole, read_record, read_versioned
from dbes.text import clipped

RUN_SCHEMA = GRID_SCHEMA = 1

Identity = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Part of a path below the grid's folder: a name, never a way out of it."""


class PlannedRun(Open):
    arm: str
    seed: Whole
    identity: Identity


class GridFile(Open):
    schema_version: Literal[1]
    preset: str
    mix: str
    mix_digest: str
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    experiments: dict[str, tuple[str, ...]]
    cells: tuple[PlannedRun, ...]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({(run.arm, run.seed) for run in self.cells}) != len(self.cells):
            raise ValueError("cells: an arm with the same seed is named twice")
        return self


class Companions(Open):
    utilization: Real | None
    max_violation: Real | None
    dead_experts: Real | None


class AsTrainedSpecialization(Open):
    corrected: Real | None


class AsTrained(Open):
    specialization_normalized: AsTrainedSpecialization
    utilization: Real | None


class Levels(Open):
    topic: Annotated[tuple[Real | None, ...], Field(min_length=1)]
    syntax: Annotated[tuple[Real | None, ...], Field(min_length=1)]


class Forking(Open):
    forking: Real | None
    others: Real | None


class Probe(Open):
    input: tuple[Real | None, ...]
    experts: tuple[Real | None, ...]
    chance: tuple[Real | None, ...]

    @model_validator(mode="after")
    def _by_layer(self) -> Self:
        if not len(self.input) == len(self.experts) == len(self.chance):
            raise ValueError("input, experts and chance: expected one number of each by layer")
        return self


class RunSettings(Open):
    mix: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]


class RunFacts(Open):
    settings: RunSettings


class RunState(Open):
    schema_version: Literal[1]
    status: Literal["ok", "failed"]
    error: str | None
    identity: Identity
    cell: RunFacts


class Measured(RunState):
    parameters: Whole
    tokens: Whole
    cpu_seconds: Annotated[Real, Field(gt=0)]
    training_loss: Real
    dropped: Real
    bits_per_byte: Annotated[dict[str, Real], Field(min_length=1)]
    nats_per_token: Annotated[dict[str, Real], Field(min_length=1)]
    calibrated: dict[str, dict[str, Real | None]]
    published: dict[str, Real | None]
    as_trained: AsTrained | None = None
    companions: Companions
    information: Levels
    forking: Forking
    probe: Probe | None

    @model_validator(mode="after")
    def _has_what_is_told(self) -> Self:
        if "corrected" not in self.calibrated.get("specialization_normalized", {}):
            raise ValueError("calibrated.specialization_normalized.corrected: missing")
        for name, found in self.calibrated.items():
            if name not in ("by_layer", "specialization") and "score" not in found:
                raise ValueError(f"calibrated.{name}.score: missing")
        return self


class MixFile(Open):
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    boundary: Whole
    digest: str

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.domains)) != len(self.domains):
            raise ValueError("domains: a name is given twice")
        return self


def read_grid_file(path: Path) -> dict[str, Any]:
    """What ``grid.json`` says.

    Raises:
        MixError: there is none, of another version, or damaged.
    """
    missing = f"{path.parent}: no testbed run here; start one with `dbes testbed run --out {path.parent}`"
    return read_record(path, GridFile, error=MixError, versions=(GRID_SCHEMA,), missing=missing)


def read_run(path: Path, *, identity: str | None = None) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        identity: of the run it must be, if known.

    Raises:
        MixError: not a run record of this version, damaged, or of another run.
    """
    hint = "remove it to train this run again"
    state = read_versioned(path, RunState, error=MixError, versions=(RUN_SCHEMA,), hint=hint)
    if identity is not None and state.identity != identity:
        raise MixError(f"{path}: the record of another run ({state.identity}); {hint}")
    record = read_record(path, Measured if state.status == "ok" else RunState, error=MixError, versions=(RUN_SCHEMA,), hint=hint)
    return record


def same_fields(records: Mapping[str, Mapping[str, Any]], *names: str) -> None:
    """Refuse runs of one grid whose mappings do not name the same things.

    Args:
        records: by file.

    Raises:
        MixError: names the file that differs from the first.
    """
    first: dict[str, set[str]] = {}
    for where, record in records.items():
        for name in names:
            if (known := first.setdefault(name, set(record[name]))) != set(record[name]):
                told = f"{name} has {clipped(sorted(record[name]))}, other runs have {clipped(sorted(known))}"
                raise MixError(f"{where}: {told}; remove it to train this run again")
