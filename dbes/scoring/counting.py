"""One pass over a trace makes all that is needed of its tokens: sums per document and layer, facts of the texts, a sample.

The sums of a piece of the trace go to rows that are kept layer by layer, in memory or, where they are many, in temporary files: memory
follows one layer, whatever the number of layers. Windows inside expert groups need the mass of whole domains first, so the primary
expert of every token is kept until then.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np

from dbes.errors import DbesError, TraceError
from dbes.scoring.counts import Counts
from dbes.scoring.layer_counts import WIDE, LayerCounts, domain_sums, layer_of, one_layer
from dbes.scoring.metrics import NGRAM_SIZES, expert_group
from dbes.scoring.sampling import Sampler
from dbes.scoring.stored import COUNTS, COUNTS_FOLDER, save_counts
from dbes.scoring.sums import Piece, group_sums, of_phase, sums_of
from dbes.scoring.texts import TextReader, Texts
from dbes.scoring.workers import WORKERS
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, PHASES, PROMPT, TokenRoutes, document_starts, pieces_of, storage_dtype

MEMORY_BYTES = 1 << 26
"""Rows of more bytes than this go to a temporary file."""

STRETCH_TOKENS = 1 << 17
"""Tokens of which the windows inside expert groups are counted at a time."""


class Rows:
    """Rows of numbers for each layer: written a piece at a time for all layers, read a layer at a time.

    Args:
        shape: (layers, rows, ...).
        most: bytes that are held in memory; more go to a file.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic], *, most: int) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.row = int(np.prod(shape[2:], dtype=np.int64)) * self.dtype.itemsize
        size = shape[0] * shape[1] * self.row
        self.array: np.ndarray | None = np.zeros(shape, dtype) if size <= most else None
        self.file: IO[bytes] | None = None
        self.lock = Lock()
        if self.array is None:
            self.file = tempfile.TemporaryFile(prefix="dbes-counts-")  # noqa: SIM115 (as long as the rows)
            self.file.truncate(size)
            weakref.finalize(self, self.file.close)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write [rows, layers, ...] to ascending rows."""
        if self.array is not None:
            self.array[:, rows] = np.moveaxis(values, 1, 0)
            return
        runs = _runs(rows)
        for layer, content in enumerate(np.ascontiguousarray(np.moveaxis(values, 1, 0), self.dtype)):
            self._to_file(layer, runs, content)

    def write_layer(self, layer: int, rows: np.ndarray, values: np.ndarray) -> None:
        """Write [rows, ...] of one layer to ascending rows."""
        if self.array is not None:
            self.array[layer, rows] = values
        else:
            self._to_file(layer, _runs(rows), np.ascontiguousarray(values, self.dtype))

    def _to_file(self, layer: int, runs: list[tuple[int, int, int]], content: np.ndarray) -> None:
        assert self.file is not None
        with self.lock:
            for row, start, end in runs:
                self.file.seek((layer * self.shape[1] + row) * self.row)
                self.file.write(content[start:end].data)

    def layer(self, column: int) -> np.ndarray:
        """The rows of a layer, [rows, ...]."""
        if self.array is not None:
            return self.array[column]
        assert self.file is not None
        with self.lock:
            self.file.seek(column * self.shape[1] * self.row)
            content = self.file.read(self.shape[1] * self.row)
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:])


def _runs(rows: np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of neighbours among ascending rows: the first row of each, and where it begins and ends among the rows."""
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return [(int(rows[start]), start, end) for start, end in zip([0, *breaks], [*breaks, len(rows)], strict=True)]


def count_routes(trace: Trace, *, phase: int | None = None, plain: bool = False) -> Counts:
    """The counts of a trace (without its control), from one reading of its shards.

    Args:
        phase: count only tokens of this phase (``PROMPT`` or ``GENERATED``); None counts all.
        plain: sums only, without expert groups, texts and sample: what a control and the ideal router need.

    Raises:
        TraceError: a shard is missing, altered or inconsistent.
    """
    counting = _Pass(trace, phase, plain=plain)
    with ThreadPoolExecutor(WORKERS) as pool:
        pieces = counting.pieces()
        while batch := list(islice(pieces, 2 * WORKERS)):
            counting.add(batch, list(pool.map(counting.sum_up, batch)))
        if counting.primary is not None:
            counting.make_group_rows()
            list(pool.map(counting.count_groups, range(len(trace.shape.layers))))
    return counting.counts()


def count_parts(
    trace: Trace, parts: Callable[[TokenRoutes], Sequence[np.ndarray]], number: int, *, phase: int | None = None
) -> list[Counts]:
    """The plain counts of so many parts of the tokens of a trace, from one reading of its shards.

    Args:
        parts: gives the rows of each part, int [rows], of routes that are whole documents (of the phase).
        phase, errors: as in ``count_routes``.
    """
    passes = [_Pass(trace, phase, plain=True) for _ in range(number)]
    with ThreadPoolExecutor(WORKERS) as pool:
        for routes in trace:
            chosen = routes.take(np.flatnonzero(of_phase(routes, phase)))
            rows = parts(chosen) if len(chosen) else ()
            jobs = [(each, piece) for each, part in zip(passes, rows, strict=False) if len(part) for piece in pieces_of(chosen.take(part))]
            list(pool.map(lambda job: job[0].sum_up(job[1]), jobs))
    return [each.counts() for each in passes]


class _Pass:
    """What a trace has told so far."""

    def __init__(self, trace: Trace, phase: int | None, *, plain: bool) -> None:
        self.trace, self.phase, self.shape = trace, phase, trace.shape
        self.documents, self.layers = len(self.shape.document_domain), len(self.shape.layers)
        wide = 4 * self.documents * self.layers * self.shape.width * len(WIDE)
        self.most = MEMORY_BYTES if wide <= MEMORY_BYTES else 0
        self.tokens = np.zeros(self.documents, np.int64)
        self.phase_tokens = [0, 0]
        self.rows: dict[str, Rows] = {}
        self.groups: dict[int, np.ndarray] = {}
        self.texts = None if plain else TextReader(self.shape, phase)
        self.sampler = None if plain else Sampler(trace, phase)
        self.plain = plain
        self.making = Lock()
        self.primary: Rows | None = None
        self.counted = 0
        self.follows: list[np.ndarray] = []
        self.document: list[np.ndarray] = []

    def pieces(self) -> Iterator[TokenRoutes]:
        for routes in self.trace:
            for code in (PROMPT, GENERATED):
                self.phase_tokens[code] += int(of_phase(routes, code).sum())
            if self.texts is not None:
                self.texts.add(routes)
            wanted = of_phase(routes, self.phase)
            chosen = routes if wanted.all() else routes.take(np.flatnonzero(wanted))
            if len(chosen):
                yield from pieces_of(chosen)

    def sum_up(self, routes: TokenRoutes) -> Piece:
        """Write the sums of a piece to the rows of its documents. No other piece has these, so pieces can be summed up side by side."""
        piece = sums_of(routes, self.shape)
        self.tokens[piece.documents] = piece.tokens
        for name, sums in piece.sums.items():
            with self.making:
                if name not in self.rows:
                    dtype = np.float32 if name in WIDE else np.float64
                    self.rows[name] = Rows((self.layers, self.documents, *sums.shape[2:]), dtype, most=self.most)
            self.rows[name].write(piece.documents, sums)
        return replace(piece, sums={})

    def add(self, batch: list[TokenRoutes], pieces: list[Piece]) -> None:
        """Keep what is needed of the tokens of pieces, in the order of their documents."""
        if self.plain:
            return
        assert self.sampler is not None
        for routes, piece in zip(batch, pieces, strict=True):
            self.sampler.add(routes, piece.primary)
            self._keep_primaries(routes, piece)

    def _keep_primaries(self, routes: TokenRoutes, piece: Piece) -> None:
        if piece.primary is not None:
            if self.primary is None:
                self.primary = Rows((self.layers, self.trace.tokens), storage_dtype(self.shape.width), most=self.most)
            # one higher, so that rows which are never written have no primary expert
            self.primary.write(np.arange(self.counted, self.counted + len(routes)), piece.primary + 1)
        self.counted += len(routes)
        self.follows.append(piece.follows)
        self.document.append(routes.document)

    def make_group_rows(self) -> None:
        for name, last in (("in_group", ()), ("grouped", (len(NGRAM_SIZES),))):
            self.rows[name] = Rows((self.layers, self.documents, *last), np.float64, most=self.most)

    def count_groups(self, column: int) -> None:
        """Count the windows inside the expert groups of one layer."""
        assert self.primary is not None
        groups = expert_group(domain_sums(self.rows["mass"].layer(column), self.shape))
        self.groups[column] = groups
        primary = self.primary.layer(column)
        start = 0
        for document, follows in self._stretches():
            rows = primary[start : start + len(document)].astype(np.int32) - 1
            starts = document_starts(document)
            found = group_sums(rows, follows, self.shape.document_domain[document], groups, starts)
            for name, sums in found.items():
                self.rows[name].write_layer(column, document[starts], sums)
            start += len(document)

    def _stretches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Document of each token and whether it follows the one before, for whole documents of about ``STRETCH_TOKENS`` together."""
        first, tokens = 0, 0
        for index, document in enumerate(self.document):
            tokens += len(document)
            if tokens >= STRETCH_TOKENS or index == len(self.document) - 1:
                yield np.concatenate(self.document[first : index + 1]), np.concatenate(self.follows[first : index + 1])
                first, tokens = index + 1, 0

    def counts(self) -> Counts:
        trace, shape, rows, tokens, groups = self.trace, self.shape, self.rows, self.tokens, self.groups
        if "hits" not in rows:  # not a single token
            rows["hits"] = Rows((self.layers, self.documents, shape.width), np.float32, most=self.most)

        def read(column: int) -> LayerCounts:
            arrays = {name: values.layer(column) for name, values in rows.items()}
            if column in groups:
                arrays["groups"] = groups[column]
            return layer_of(one_layer(shape, column), tokens, arrays)

        sample = None if self.sampler is None else self.sampler.done(tokens)
        return Counts(
            shape=shape,
            tokens=tokens,
            read=read,
            phase=self.phase,
            phase_tokens=(self.phase_tokens[PROMPT], self.phase_tokens[GENERATED]),
            provenance=trace.provenance,
            vocabulary=trace.vocabulary,
            texts=Texts() if self.texts is None else self.texts.done(),
            sample_of=lambda: sample,
            grouped=not self.plain,
            seal=trace.seal,
        )


def counts_of(source: Trace | Counts, *, phase: int | None = None) -> Counts:
    """The counts of a trace with those of its control: those that lie beside it, or made now and, where the disk allows, kept there.

    Args:
        phase: as in ``count_routes``.

    Raises:
        TraceError: the trace is incomplete, altered or inconsistent; counts of another phase were given.
    """
    if phase not in PHASES:
        raise TraceError(f"phase: expected 0 (prompt), 1 (generated) or None (all tokens), got {phase!r}")
    if isinstance(source, Counts):
        if phase is not None and phase != source.phase:
            raise TraceError(f"phase {PHASES[phase]}: these are the counts of {PHASES[source.phase]} tokens; count the trace again")
        return source
    folder = None if source.path is None or source.seal is None else source.path / COUNTS_FOLDER / PHASES[phase]
    if folder is not None and (found := _kept(folder, source)) is not None:
        return found
    counts = replace(count_routes(source, phase=phase), control=_control_counts(source.control, phase))
    if folder is None or not counts.tokens.any():
        return counts
    try:
        save_counts(counts, folder)
    except DbesError:
        return counts  # on a read-only or full disk
    size = len(counts.tokens) * len(counts.shape.layers) * counts.shape.width * 4 * len(WIDE)
    return Counts.load(folder) if size > MEMORY_BYTES else counts


def _kept(folder: Path, trace: Trace) -> Counts | None:
    """The counts beside a trace when they are of this very trace and control."""
    if not (folder / COUNTS).is_file():
        return None
    try:
        found = Counts.load(folder)
    except DbesError:
        return None  # damaged, or of another version: made again
    seals, expected = ([each.seal for each in (one, *one.controls)] for one in (found, trace))
    return replace(found, vocabulary=trace.vocabulary) if seals == expected and found.grouped else None


def _control_counts(control: Trace | None, phase: int | None) -> Counts | None:
    if control is None:
        return None
    return replace(count_routes(control, phase=phase, plain=True), control=_control_counts(control.control, phase))
