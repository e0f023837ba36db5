"""Blocks of routes as engines yield them, checked and put together to the routes of whole documents: one way for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import DbesError, TraceError
from dbes.trace.shards import KINDS, PER_TOKEN, check_arrays, check_ids, check_values
from dbes.trace.spool import Spool
from dbes.trace.types import GENERATED, NOISE_SCALES, UNKNOWN, TokenRoutes, storage_dtype

STORED = {
    "weights": (np.float16, 0),
    "logit_margins": (np.float16, np.nan),
    "logit_stable": (np.uint8, UNKNOWN),
    "selection_margins": (np.float32, np.nan),
    "scaled_margins": (np.float16, np.nan),
    "kept": (np.uint8, UNKNOWN),
}
"""What an engine may give of a token at a layer besides ids, by its name in ``TokenRoutes``: dtype, and mark where it was not given."""

SPOOL_BYTES = 64 * 2**20
"""Routes of a work unit that are larger than this are put together on disk."""

SKIPPED = -1
"""In the ids of a block: a slot that ran nothing."""

BLOCK_KINDS = {**KINDS, "ids": "iu"}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the blocks of an engine hold.

    Attributes:
        layers: the model's own numbers of its MoE layers, ascending.
        experts, top_k: of each of these layers.
        zero_experts: of each layer; ids in [experts, experts + zero_experts) ran nothing and are stored as missing. None: there are none.
        gives: names of what is given besides ids, of ``STORED``.
        control: draws of the random router whose ids and weights are given too.
        answer: tokens that may follow each text, at most.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    zero_experts: tuple[int, ...] | None = None
    gives: frozenset[str] = frozenset()
    control: int = 0
    answer: int = 0

    @property
    def slots(self) -> int:
        return max(self.top_k)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in a trace, its control included."""
        held = (self.empty(1), *[self.empty(1, control=True)] * self.control)
        return 13 + sum(array.nbytes for given in held for array in given.values())

    def arrays(self, *, control: bool = False) -> dict[str, tuple[tuple[int, ...], Any, Any]]:
        """Shape of what is kept of a token at a layer, mark of what is missing, and dtype, by name; or that of a random router."""
        dtype, last = storage_dtype(max(self.experts)), {"ids": (self.slots,), "weights": (self.slots,), "kept": (len(NOISE_SCALES),)}
        kinds = {"ids": (dtype, np.iinfo(dtype).max), **{name: STORED[name] for name in ({"weights"} if control else self.gives)}}
        return {name: (last.get(name, ()), mark, kind) for name, (kind, mark) in kinds.items()}

    def empty(self, tokens: int, *, control: bool = False, spool: Spool | None = None) -> dict[str, np.ndarray]:
        """Arrays of a trace [tokens, layers, ...] that hold what means missing; or those of a random router.

        Args:
            spool: where they lie, layer after layer; None: in memory.
        """
        layers, wanted = len(self.layers), self.arrays(control=control)
        if spool is None:
            return {name: np.full((tokens, layers, *last), mark, kind) for name, (last, mark, kind) in wanted.items()}
        return {name: spool.full((layers, tokens, *last), mark, kind).swapaxes(0, 1) for name, (last, mark, kind) in wanted.items()}

    def room(self, tokens: int) -> int:
        """Bytes in a spool for all arrays of so many tokens."""
        kept = [each for control in (False, *[True] * self.control) for each in self.arrays(control=control).values()]
        return sum(Spool.needed((len(self.layers), tokens, *last), kind) for last, _, kind in kept)


@dataclass(frozen=True)
class Work:
    """Whole documents that an engine runs at a time.

    Attributes:
        first: index of the first document.
        document_ids: their ids; they name documents in errors.
        texts: int32 [tokens] each, without special tokens.
    """

    first: int
    document_ids: Sequence[str]
    texts: Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Routes of some tokens at some layers, in any order: a batch at all layers, many documents at one layer, a step of generation.

    Attributes:
        document, positions, token_ids, phase: integers [rows], as in ``TokenRoutes``.
        layers: the model's own numbers of the layers.
        routes: "ids", integers [rows, layers, slots] with SKIPPED where nothing ran, and [rows, layers, ...] of what else is given.
            What one layer does not have may be left out, but for weights.
        control: "ids" and "weights" of the random router, [rows, layers, draws, slots].
        nats: of each token, float [rows], 0 where nothing stands before it; None where the engine tells of no loss.
        reduced: tokens or windows that a batch may have since memory ran out; None: as many as were meant.
    """

    document: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray
    phase: np.ndarray
    layers: tuple[int, ...]
    routes: Mapping[str, np.ndarray]
    control: Mapping[str, np.ndarray] = field(default_factory=dict)
    nats: np.ndarray | None = None
    reduced: int | None = None


class Assembly:
    """Takes the blocks of one work unit in any order of rows and layers, and gives the routes of its documents.

    Every token of the texts must come exactly once at every layer. What follows a text must be GENERATED, without a gap.

    Args:
        where: what errors are about.
        folder: on whose disk routes larger than SPOOL_BYTES are put together; None: in memory.
        beside: so many others share these bytes.

    Raises:
        FileError: the disk has not this much room.
    """

    def __init__(
        self,
        contents: Contents,
        work: Work,
        *,
        where: str,
        error: type[DbesError] = TraceError,
        folder: Path | None = None,
        beside: int = 0,
    ) -> None:
        self.contents, self.work, self.where, self.error = contents, work, where, error
        given = np.asarray([len(text) for text in work.texts])
        self._room = given + contents.answer
        self._starts = np.cumsum(self._room) - self._room
        tokens, layers = int(self._room.sum()), len(contents.layers)
        self._document = np.repeat(np.arange(len(given), dtype=np.int32), self._room)
        self._positions = (np.arange(tokens) - self._starts[self._document]).astype(np.int32)
        self._wanted = self._positions < given[self._document]
        self._token_ids = np.full(tokens, -1, np.int32)
        self._token_ids[self._wanted] = np.concatenate([*work.texts, np.zeros(0, np.int32)])
        self._phase = np.where(self._wanted, UNKNOWN, GENERATED).astype(np.uint8)
        self._seen = np.zeros((tokens, layers), bool)
        room = contents.room(tokens)
        self._spool = None if folder is None or room <= SPOOL_BYTES // (1 + beside) else Spool(folder, room)
        self._routes = contents.empty(tokens, spool=self._spool)
        self._controls = [contents.empty(tokens, control=True, spool=self._spool) for _ in range(contents.control)]
        self._control_came = False
        self._nats: np.ndarray | None = None

    def add(self, block: Block) -> int:
        """Take a block.

        Returns:
            tokens x layers that it held.

        Raises:
            error: tokens or layers that are not of this work, or came before; ids, weights or marks that cannot be.
        """
        columns, rows = self._columns(block), self._rows(block)
        whole = columns == list(range(len(self.contents.layers)))
        spots = (rows, slice(None)) if whole else (rows[:, None], np.asarray(columns))
        came, repeated = self._seen[spots], np.ones(len(rows), bool)
        repeated[np.unique(rows, return_index=True)[1]] = False
        came[repeated] = True
        if came.any():
            row, column = np.argwhere(came)[0]
            raise self.error(f"{self.where}: {self._token(int(rows[row]))}, came twice at layer {block.layers[column]}")
        self._seen[spots] = True
        self._token_ids[rows], self._phase[rows] = block.token_ids, block.phase
        self._place(self._routes, block.routes, rows, columns, spots)
        if block.control:
            self._control_came = True
            for draw, control in enumerate(self._controls):
                self._place(control, self._of_draw(block.control, draw), rows, columns, spots)
        if block.nats is not None:
            self._add_nats(rows, block.nats)
        if self._spool is not None:
            self._spool.release()
        return came.size

    def _add_nats(self, rows: np.ndarray, nats: np.ndarray) -> None:
        if not np.isfinite(nats).all():
            row = int(rows[np.flatnonzero(~np.isfinite(nats))[0]])
            raise self.error(f"{self.where}: {self._token(row)}: its loss is NaN or infinite; the logits overflow: try another dtype")
        self._nats = np.zeros(len(self._positions)) if self._nats is None else self._nats
        self._nats[rows] = nats

    def nats(self) -> tuple[float, ...] | None:
        """Of each document, all its tokens added up in their order; None where no block told of them."""
        if self._nats is None:
            return None
        return tuple(float(part.sum()) for part in np.split(self._nats, self._starts[1:]))

    def finish(self) -> tuple[TokenRoutes, tuple[TokenRoutes, ...]]:
        """The routes of all documents; see `parts`."""
        return next(self.parts([(self.work.first, self.work.first + len(self.work.texts))]))

    def parts(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[TokenRoutes, tuple[TokenRoutes, ...]]]:
        """The routes of [first, last + 1) documents, and those of the draws of the random router where blocks had them.

        Raises:
            error: a token did not come at every layer.
        """
        came = self._seen.any(axis=1)
        wanted = self._wanted | came
        gap = np.flatnonzero(wanted[1:] & ~wanted[:-1] & (self._positions[1:] > 0))
        if len(gap):
            raise self.error(f"{self.where}: {self._token(gap[0])}, did not come, but a later one did")
        if (short := wanted & ~self._seen.all(axis=1)).any():
            row = int(np.flatnonzero(short)[0])
            column, lacking = int(np.argmin(self._seen[row])), int((~self._seen[short]).sum())
            raise self.error(
                f"{self.where}: {self._token(row)}, did not come at layer {self.contents.layers[column]}; {lacking} of "
                f"{int(wanted.sum()) * len(self.contents.layers)} tokens x layers are missing"
            )
        controls = self._controls if self._control_came else []
        for low, high in bounds:
            rows = self._rows_of(low - self.work.first, high - self.work.first)
            whole = wanted[rows].all()
            here: slice | np.ndarray = rows if whole else np.flatnonzero(wanted[rows]) + rows.start
            about = {
                "document": self._document[here] + np.int32(self.work.first),
                "positions": self._positions[here],
                "token_ids": self._token_ids[here],
                "phase": self._phase[here],
            }
            routes, *drawn = (
                TokenRoutes(**about, **{name: array[here] for name, array in arrays.items()}) for arrays in (self._routes, *controls)
            )
            yield routes, tuple(drawn)
            if self._spool is not None:
                self._spool.release()

    def _rows_of(self, first: int, end: int) -> slice:
        ends = self._starts + self._room
        return slice(int(self._starts[first]), int(ends[end - 1])) if end > first else slice(0, 0)

    def _of_draw(self, control: Mapping[str, np.ndarray], draw: int) -> dict[str, np.ndarray]:
        for name, array in control.items():
            if array.ndim != 4 or array.shape[2] != self.contents.control:
                raise self.error(
                    f"{self.where}: {name} of the random router of shape {array.shape}, expected [rows, layers, draws, slots] with "
                    f"{self.contents.control} draws"
                )
        return {name: array[:, :, draw] for name, array in control.items()}

    def _token(self, row: int) -> str:
        return f"document {self.work.document_ids[int(self._document[row])]!r}, token {self._positions[row]}"

    def _columns(self, block: Block) -> list[int]:
        places = {layer: column for column, layer in enumerate(self.contents.layers)}
        if len(set(block.layers)) < len(block.layers) or not places.keys() >= set(block.layers):
            raise self.error(f"{self.where}: a block of layers {list(block.layers)}, expected each once and of {list(places)}")
        return [places[layer] for layer in block.layers]

    def _rows(self, block: Block) -> np.ndarray:
        about = {name: getattr(block, name) for name in PER_TOKEN}
        check_arrays(about, (len(block.document), 0, 0), kinds=BLOCK_KINDS, where=self.where, error=self.error)
        check_values(about, self.contents.slots, where=self.where, error=self.error)
        document, last = block.document - self.work.first, len(self.work.texts) - 1
        if document.min(initial=0) < 0 or document.max(initial=0) > last:
            outside = block.document[(document < 0) | (document > last)]
            raise self.error(f"{self.where}: a block of document {outside[0]}, asked were {self.work.first} to {self.work.first + last}")
        beyond = (block.positions < 0) | (block.positions >= self._room[document])
        if beyond.any():
            row = np.flatnonzero(beyond)[0]
            name, room = self.work.document_ids[int(document[row])], self._room[document[row]]
            raise self.error(f"{self.where}: document {name!r}: a token at {block.positions[row]}, expected no more than {room} tokens")
        rows = self._starts[document] + block.positions
        known, phase = self._token_ids[rows], self._phase[rows]
        for name, wrong in (
            ("token id", (known != block.token_ids) & (known >= 0)),
            ("phase", (phase != block.phase) & (phase != UNKNOWN)),
        ):
            if wrong.any():
                raise self.error(f"{self.where}: {self._token(int(rows[np.flatnonzero(wrong)[0]]))}, has another {name} than before")
        return rows

    def _place(
        self, target: dict[str, np.ndarray], given: Mapping[str, np.ndarray], rows: np.ndarray, columns: list[int], spots: tuple
    ) -> None:
        """Check the arrays of a block, and write them where they belong."""
        contents, where, error = self.contents, self.where, self.error
        if given.keys() - target.keys() or {"ids", "weights"} & target.keys() - given.keys():
            raise error(f"{where}: a block of {sorted(given)}, expected {sorted(target)}")
        layers, experts, top_k, zero = (
            [values[column] for column in columns]
            for values in (contents.layers, contents.experts, contents.top_k, contents.zero_experts or [0] * len(contents.layers))
        )
        slots = min(contents.slots, given["ids"].shape[-1])
        check_arrays(given, (len(rows), len(columns), slots), kinds=BLOCK_KINDS, where=where, error=error)
        check_values(given, contents.slots, where=where, error=error)
        classes = [count + more for count, more in zip(experts, zero, strict=True)]
        check_ids(given["ids"], missing=SKIPPED, layers=layers, experts=classes, top_k=top_k, where=where, error=error)
        ran = (given["ids"] != SKIPPED) & (given["ids"] < np.asarray(experts)[:, None])
        for name, array in given.items():
            if name == "ids":
                array = np.where(ran, array, np.iinfo(target["ids"].dtype).max)
            with np.errstate(over="ignore"):
                array = array.astype(target[name].dtype, copy=False)
            if name == "weights":
                if not np.isfinite(array).all():
                    row, column, _ = np.argwhere(~np.isfinite(array))[0]
                    raise error(
                        f"layer {layers[column]}: NaN or infinity in the router's output, in {self._token(int(rows[row]))}; "
                        "the checkpoint is damaged, or overflows in its dtype: try another dtype"
                    )
                array = np.where(ran, array, 0)
            (target[name][..., :slots] if name in ("ids", "weights") else target[name])[spots] = array
