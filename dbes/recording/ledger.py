"""What of a recording is done, by work unit: shards on disk and beside them, in `units/`, one file that says what each unit holds.

A unit is done when its file is there, whoever wrote it: this process, one that ran beside it, or one that was killed. The manifest is
written once, at the end, from these files, which then go. So it makes no difference how many processes recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ModelWrapValidatorHandler, model_validator

from dbes.errors import DbesError, TraceError
from dbes.files import discard, sha256_of, write_json
from dbes.recording.units import Unit
from dbes.schema import Strict, read_versioned
from dbes.trace.manifest import MANIFEST, SEAL, ShardEntry, digest, unsealed
from dbes.trace.store import CONTROL, Trace
from dbes.trace.types import UNKNOWN, RoutingShape, TokenRoutes
from dbes.trace.vocabulary import TokenText
from dbes.trace.writer import TraceWriter, write_shard

Parts = tuple[TokenRoutes, tuple[TokenRoutes, ...]]

UNITS = "units"
"""Folder inside that of a trace while it is recorded."""


class Tally(Strict):
    """What is known only when tokens have been seen.

    Attributes:
        tokens: how many there are.
        seen: token ids that occur, ascending.
        idle, unscored, unmargined: per layer, slots that ran nothing, tokens without selection score, and without router logits.
    """

    tokens: int
    seen: tuple[int, ...]
    idle: tuple[int, ...]
    unscored: tuple[int, ...]
    unmargined: tuple[int, ...]

    @classmethod
    def of(cls, routes: TokenRoutes) -> Tally:
        assert routes.token_ids is not None
        kept, margins = routes.kept, routes.logit_margins
        unscored, unmargined = np.zeros((2, routes.ids.shape[1]), np.int64)
        if kept is not None and margins is not None:
            unscored, unmargined = (kept[:, :, 0] == UNKNOWN).sum(axis=0), np.isnan(margins).sum(axis=0)
        return cls(
            tokens=len(routes),
            seen=tuple(np.unique(routes.token_ids).tolist()),
            idle=tuple((routes.ids == np.iinfo(routes.ids.dtype).max).sum(axis=(0, 2)).tolist()),
            unscored=tuple(unscored.tolist()),
            unmargined=tuple(unmargined.tolist()),
        )

    @classmethod
    def together(cls, tallies: Sequence[Tally]) -> Tally:
        def added(name: str) -> tuple[int, ...]:
            return tuple(map(sum, zip(*(getattr(each, name) for each in tallies), strict=True)))

        return cls(
            tokens=sum(each.tokens for each in tallies),
            seen=tuple(sorted({token for each in tallies for token in each.seen})),
            idle=added("idle"),
            unscored=added("unscored"),
            unmargined=added("unmargined"),
        )


class UnitRecord(Strict):
    """What is to be known of a work unit that is done.

    Attributes:
        recording: sha256 of what is recorded, of which the unit is a part.
        shards: those of the trace, then those of each draw of the random router.
        reduced: what a batch could hold since memory ran out, see `dbes.trace.blocks.Block`.
        nats: of each of its documents, where the loss is recorded too.
    """

    schema_version: int = 1
    recording: str
    unit: int
    shards: tuple[tuple[ShardEntry, ...], ...]
    tally: Tally
    reduced: int | None = None
    nats: tuple[float, ...] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _as_written(cls, content: Any, handler: ModelWrapValidatorHandler[UnitRecord]) -> UnitRecord:
        return unsealed(content, handler, hint="it is recorded again")


class Ledger:
    """The units of one recording that are done, in a trace folder with those of its controls, or in memory.

    Attributes:
        folder: of the trace; None: in memory.
        done: by number of the unit, what is known of it.

    Args:
        first: of the processes that record; another one finds the recording begun.

    Raises:
        TraceError: the folder holds another recording, or none for one that is not the first.
    """

    def __init__(
        self, folder: Path | None, shape: RoutingShape, facts: Mapping[str, Any], *, draws: int, units: Sequence[Unit], first: bool = True
    ) -> None:
        self.folder, self.units, self.done = folder, units, dict[int, UnitRecord]()
        self._shape, self._facts, self._draws = shape, dict(facts), draws
        self._kept: dict[int, list[tuple[TokenRoutes, ...]]] = {}
        self._trusted: set[int] = set()
        self._writer = None if folder is None else TraceWriter(folder, shape, facts, begin=first)
        self._recording = "" if self._writer is None else self._writer.identity
        if first and folder is not None:
            (folder / UNITS).mkdir(exist_ok=True)
            self._check()
        self.look()

    def _check(self) -> None:
        """Take away what is said of units that are not as they were written: they are recorded again."""
        self.look()
        for number in list(self.done):
            if self._wrong(self.done[number]) is not None:
                discard(self.file(number))
                del self.done[number]
        self._trusted |= self.done.keys()

    def file(self, number: int, kind: str = "json") -> Path:
        assert self.folder is not None
        return self.folder / UNITS / f"unit-{number:05d}.{kind}"

    def look(self) -> bool:
        """See which units are done by now, by any process; True where all are."""
        for unit in self.units if self.folder is not None else ():
            if unit.number not in self.done and (found := self._read(unit)) is not None:
                self.done[unit.number] = found
        return len(self.done) == len(self.units)

    def _read(self, unit: Unit) -> UnitRecord | None:
        """What is said of a unit; None where nothing is, or of another recording or another cut of this one."""
        path = self.file(unit.number)
        with suppress(DbesError):
            if path.is_file():
                found = read_versioned(path, UnitRecord, error=TraceError)
                wanted = [(f"shard-{unit.first_shard + place:05d}.safetensors", *bounds) for place, bounds in enumerate(unit.shards)]
                cut = [[(entry.name, entry.first_document, entry.last_document + 1) for entry in part] for part in found.shards]
                if (found.recording, found.unit) == (self._recording, unit.number) and cut == [wanted] * len(cut):
                    return found
        return None

    def _folders(self) -> Iterator[Path]:
        """Of the trace, and of each draw of the random router, each inside the one before."""
        assert self.folder is not None
        inner = self.folder
        for _ in range(1 + self._draws):
            yield inner
            inner = inner / CONTROL

    def _wrong(self, record: UnitRecord) -> Path | None:
        """A shard of a unit that is not as it was written."""
        for folder, entries in zip(self._folders(), record.shards, strict=False):
            for entry in entries:
                if not (folder / entry.name).is_file() or sha256_of(folder / entry.name) != entry.sha256:
                    return folder / entry.name
        return None

    def keep(self, unit: Unit, parts: Iterator[Parts], *, reduced: int | None, nats: tuple[float, ...] | None) -> None:
        """Write the shards of a unit, each with those of its controls, and then that the unit is done."""
        tallies: list[Tally] = []
        written: list[list[ShardEntry]] = []
        for place, (bounds, (routes, controls)) in enumerate(zip(unit.shards, parts, strict=True)):
            tallies.append(Tally.of(routes))
            if self.folder is None:
                self._kept.setdefault(unit.number, []).append((routes, *controls))
                continue
            each = zip(self._folders(), (routes, *controls), strict=False)
            written.append([write_shard(folder, unit.first_shard + place, part, documents=bounds) for folder, part in each])
        record = UnitRecord(
            recording=self._recording,
            unit=unit.number,
            shards=tuple(zip(*written, strict=True)),
            tally=Tally.together(tallies),
            reduced=reduced,
            nats=nats,
        )
        if self.folder is not None:
            content = record.model_dump(mode="json")
            write_json(self.file(unit.number), {**content, SEAL: digest(content)})
        self.done[unit.number] = record
        self._trusted.add(unit.number)

    @property
    def tokens(self) -> int:
        """Of all units that are done."""
        return sum(record.tally.tokens for record in list(self.done.values()))

    def tally(self) -> Tally:
        return Tally.together([self.done[unit.number].tally for unit in self.units])

    def reduced(self) -> dict[str, int]:
        """Of units where memory ran out: what a batch could hold, by the first document."""
        return {str(unit.documents[0]): found for unit in self.units if (found := self.done[unit.number].reduced) is not None}

    def nats(self) -> np.ndarray | None:
        """Of every document, float64 [documents], all units being done; None where the loss was not recorded."""
        found = [self.done[unit.number].nats for unit in self.units]
        return None if None in found else np.asarray([nats for each in found for nats in each or ()])

    def _control_facts(self, draw: int) -> dict[str, Any]:
        return {**self._facts, "router": "random", "draw": draw}

    def finish(self, *, vocabulary: Mapping[int, TokenText], provenance: Mapping[str, Any]) -> Trace:
        """The trace, all units being done.

        Raises:
            TraceError: a shard is not as the process that recorded it says.
        """
        if self._writer is None:
            loaded, *controls = zip(*(parts for unit in self.units for parts in self._kept[unit.number]), strict=True)
            control = None
            for draw, routes in reversed(list(enumerate(controls))):
                control = Trace(shape=self._shape, provenance=self._control_facts(draw), control=control, loaded=routes)
            facts = {**self._facts, **provenance}
            return Trace(shape=self._shape, provenance=facts, control=control, vocabulary=vocabulary, loaded=loaded)
        records = [self.done[unit.number] for unit in self.units]
        for record in records:
            if record.unit not in self._trusted and (wrong := self._wrong(record)) is not None:
                discard(self.file(record.unit))
                raise TraceError(f"{wrong}: is not as the process that recorded it says; start the same command again to record it again")
        folder, *inner = self._folders()
        parts = [[entry for entries in column for entry in entries] for column in zip(*(record.shards for record in records), strict=True)]
        for draw, (place, entries) in reversed(list(enumerate(zip(inner, parts[1:], strict=False)))):
            discard(place / MANIFEST)  # of a run that was killed after this
            control = TraceWriter(place, self._shape, self._control_facts(draw))
            control.keep(entries)
            control.finish()
        self._writer.keep(parts[0])
        self._writer.finish(vocabulary=vocabulary, provenance=provenance)
        discard(folder / UNITS)
        return Trace.load(folder)
