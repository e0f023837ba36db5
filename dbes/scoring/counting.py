"""One pass over a trace: its sums per document, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Lock

import numpy as np

from dbes.scoring.counts import Counts, LayerCounts, NgramSums, StiffnessSums, domain_sums
from dbes.scoring.metrics import NGRAM_SIZES, consecutive, expert_group
from dbes.trace.store import Trace
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, PROMPT, RoutingShape, TokenRoutes

WORKERS = min(os.cpu_count() or 1, 8)

PIECE_TOKENS = 4_096
"""Tokens worked on at a time: bounds the memory of the pass and keeps them in the cache; changes no value."""

NO_SCORE = 255
"""Value of ``TokenRoutes.kept`` for a token without a selection score."""


def count_routes(trace: Trace, *, phase: int | None = None, groups: bool = True) -> Counts:
    """The counts of a trace.

    Args:
        phase: count only tokens of this phase (``PROMPT`` or ``GENERATED``); None counts all.
        groups: count windows inside the expert groups too.

    Raises:
        TraceError: a shard is missing, altered or inconsistent.
    """
    shape = trace.shape
    sums = _Sums(shape)
    _each(_pieces(trace, phase), sums.add)
    ngrams = None
    if sums.primaries is not None and sums.mass is not None:
        members = expert_group(domain_sums(sums.mass, shape)) if groups else None
        if members is not None:
            _each(_pieces(trace, phase, "weights", "phase"), lambda piece: sums.add_groups(piece, members))
        ngrams = NgramSums(
            primaries=sums.primaries,
            windows=sums.windows,
            alike=sums.alike,
            distinct_windows=sums.distinct_windows,
            distinct_alike=sums.distinct_alike,
            grouped=sums.grouped if groups else None,
            in_group=sums.in_group if groups else None,
            groups=members,
        )
    whole = LayerCounts(
        shape=shape,
        tokens=sums.tokens,
        hits=sums.hits,
        active=sums.active,
        mass=sums.mass,
        neighbours=sums.neighbours,
        overlap_any=sums.overlap_any,
        overlap_share=sums.overlap_share,
        ngrams=ngrams,
        stiffness=StiffnessSums(**sums.stiffness),
    )
    return Counts.of(whole, phase=phase, provenance=trace.provenance)


def primary_experts(routes: TokenRoutes, missing: int) -> np.ndarray | None:
    """Expert with the largest weight, int32 [tokens, layers]; -1 where no slot ran; None where weights are unknown.

    Slots are not sorted in several runtimes, so the first slot is not the primary. Equal weights: the lower expert id.
    """
    ids = routes.ids
    if ids.shape[2] == 1:
        only = ids[:, :, 0].astype(np.int32)
        only[ids[:, :, 0] == missing] = -1
        return only
    if routes.weights is None:
        return None
    # Slot by slot on contiguous [tokens, layers] planes: a reduction over a last axis of k would be several times slower.
    experts = np.ascontiguousarray(np.moveaxis(ids, 2, 0))
    best = np.full(ids.shape[:2], missing, ids.dtype)
    largest = np.full(ids.shape[:2], -np.inf, np.float32)
    for expert, weight in zip(experts, _slot_planes(routes.weights), strict=True):
        better = weight > largest
        better |= (weight == largest) & (expert < best)
        better &= expert != missing
        np.copyto(best, expert, where=better)
        np.copyto(largest, weight, where=better)
    primary = best.astype(np.int32)
    primary[best == missing] = -1
    return primary


def _slot_planes(weights: np.ndarray) -> np.ndarray:
    """Gate weights as float32 [slots, tokens, layers], contiguous, a copy."""
    return np.ascontiguousarray(np.moveaxis(weights, 2, 0)).astype(np.float32)


def pieces_of(routes: TokenRoutes, tokens: int = PIECE_TOKENS) -> Iterator[TokenRoutes]:
    """The routes in pieces of whole documents, of at least one document and at most about ``tokens`` tokens."""
    starts = document_starts(routes.document)
    begin = 0
    for end in [*starts[1:], len(routes)]:
        following = starts[np.searchsorted(starts, end) :]
        until = following[1] if len(following) > 1 else len(routes)
        if end == len(routes) or until - begin > tokens:
            yield routes.take(slice(begin, end))
            begin = end


def document_starts(document: np.ndarray) -> np.ndarray:
    """Rows at which a document begins."""
    return np.flatnonzero(np.r_[True, document[1:] != document[:-1]]) if len(document) else np.zeros(0, np.int64)


def follows_previous(routes: TokenRoutes) -> np.ndarray:
    """Whether a row is the very next token of the same document as the row before, bool [tokens]."""
    follows = np.zeros(len(routes), bool)
    follows[1:] = (np.diff(routes.document) == 0) & (np.diff(routes.positions) == 1)
    return follows


def of_phase(routes: TokenRoutes, phase: int | None) -> np.ndarray:
    """Rows of a phase, bool [tokens]; None: all. Routes without phases are all given text."""
    phases = np.full(len(routes), PROMPT, np.uint8) if routes.phase is None else routes.phase
    return np.ones(len(routes), bool) if phase is None else phases == phase


def _pieces(trace: Trace, phase: int | None, *columns: str) -> Iterator[TokenRoutes]:
    for routes in trace.with_columns(*columns) if columns else trace:
        chosen = routes if phase is None else routes.take(np.flatnonzero(of_phase(routes, phase)))
        if len(chosen):
            yield from pieces_of(chosen)


def _each(pieces: Iterator[TokenRoutes], add: Callable[[TokenRoutes], None]) -> None:
    """Add up the pieces on all cores. A document lies in one piece only, so no two threads write to the same sums."""
    with ThreadPoolExecutor(WORKERS) as pool:
        while batch := list(islice(pieces, 2 * WORKERS)):
            list(pool.map(add, batch))


class _Sums:
    """Accumulates the statistics piece by piece."""

    def __init__(self, shape: RoutingShape) -> None:
        self._first = Lock()
        documents, layers, sizes = len(shape.document_domain), len(shape.layers), len(NGRAM_SIZES)
        self.shape = shape
        self.top_k = np.asarray(shape.top_k)
        self.tokens = np.zeros(documents, np.int64)
        self.hits = np.zeros((documents, layers, shape.width), np.float32)
        self.active = np.zeros((documents, layers))
        self.mass: np.ndarray | None = None
        self.primaries: np.ndarray | None = None
        self.neighbours = np.zeros((documents, layers))
        self.overlap_any = np.zeros((documents, layers))
        self.overlap_share = np.zeros((documents, layers))
        self.windows = np.zeros((documents, layers, sizes))
        self.alike = np.zeros((documents, layers, sizes))
        self.distinct_windows: np.ndarray | None = None
        self.distinct_alike: np.ndarray | None = None
        self.grouped = np.zeros((documents, layers, sizes))
        self.in_group = np.zeros((documents, layers))
        flat = ("logit_margin", "logit_count", "stable_count", "selection_margin", "scaled_margin", "selection_count", "kept_count")
        self.stiffness: dict[str, np.ndarray] = {name: np.zeros((documents, layers)) for name in flat}
        self.stiffness["logit_stable"] = np.zeros((documents, layers, len(LOGIT_NOISE)))
        self.stiffness["unchanged"] = np.zeros((documents, layers, len(NOISE_SCALES)))
        self.stiffness["kept"] = np.zeros((documents, layers, len(NOISE_SCALES)))

    def add(self, routes: TokenRoutes) -> None:
        documents, reduce = _reducer(routes)
        missing = int(np.iinfo(routes.ids.dtype).max)
        slots = np.ascontiguousarray(np.moveaxis(routes.ids, 2, 0))
        present = slots != missing
        self.tokens[documents] += reduce(np.ones(len(routes), np.int64))
        self.active[documents] += reduce(present.any(axis=0))
        cells = self._cells(routes, slots, present, len(documents))
        self.hits[documents] += self._tally(cells, None, len(documents))
        self._add_overlaps(routes, slots, present, documents, reduce)
        if routes.weights is not None:
            mass = self._made("mass", self.hits)
            weights = _slot_planes(routes.weights)
            weights[~present] = 0
            total = weights.sum(axis=0)
            total[~(total > 0)] = np.inf  # no slot ran, or none with weight: no mass
            weights /= total
            mass[documents] += self._tally(cells, weights, len(documents))
        self._add_windows(routes, missing, documents, reduce)
        self._add_stiffness(routes, documents, reduce)

    def _made(self, name: str, like: np.ndarray) -> np.ndarray:
        """An array that only some traces need, made when the first piece needs it."""
        with self._first:
            if getattr(self, name) is None:
                setattr(self, name, np.zeros_like(like))
        return getattr(self, name)

    def add_groups(self, routes: TokenRoutes, groups: np.ndarray) -> None:
        """Second pass: windows whose primaries lie in the expert group of the document's domain."""
        documents, reduce = _reducer(routes)
        primary = primary_experts(routes, int(np.iinfo(routes.ids.dtype).max))
        assert primary is not None
        domain = self.shape.document_domain[routes.document]
        layers = np.arange(primary.shape[1])
        inside = groups[domain[:, None], layers, np.maximum(primary, 0)] & (primary >= 0)
        self.in_group[documents] += reduce(inside)
        follows = follows_previous(routes)
        for index, size in enumerate(NGRAM_SIZES):
            whole = consecutive(follows, size - 1)[:, None]
            self.grouped[documents, :, index] += reduce(consecutive(inside, size) & whole)

    def _cells(self, routes: TokenRoutes, slots: np.ndarray, present: np.ndarray, documents: int) -> np.ndarray:
        """Flat index (document of the piece, layer, expert) of each slot; one further index for slots that did not run."""
        layers, width = len(self.shape.layers), self.shape.width
        local = np.cumsum(np.r_[0, np.diff(routes.document) != 0])
        base = (local[:, None] * layers + np.arange(layers)) * width
        cells = slots.astype(np.int64)
        cells += base
        if not present.all():
            cells[~present] = documents * layers * width
        return cells

    def _tally(self, cells: np.ndarray, weights: np.ndarray | None, documents: int) -> np.ndarray:
        layers, width = len(self.shape.layers), self.shape.width
        size = documents * layers * width
        counts = np.bincount(cells.reshape(-1), None if weights is None else weights.reshape(-1), minlength=size + 1)
        return counts[:size].reshape(documents, layers, width).astype(np.float32)

    def _add_overlaps(self, routes: TokenRoutes, slots: np.ndarray, present: np.ndarray, documents: np.ndarray, reduce: _Reduce) -> None:
        ran = np.asarray(present.any(axis=0))
        follows = follows_previous(routes)[1:, None] & ran[1:] & ran[:-1]
        shared = np.zeros(slots.shape[1:], np.uint8)
        for now in slots:
            for before in slots:
                shared[1:] += now[1:] == before[:-1]
        if not present.all():
            # Two missing slots are equal numbers but no shared expert.
            absent = (~present).sum(axis=0, dtype=np.uint8)
            shared[1:] -= absent[1:] * absent[:-1]
        shared[1:] *= follows
        pairs = np.zeros(slots.shape[1:], bool)
        pairs[1:] = follows
        self.neighbours[documents] += reduce(pairs)
        self.overlap_any[documents] += reduce(shared > 0)
        self.overlap_share[documents] += reduce(shared) / self.top_k

    def _add_windows(self, routes: TokenRoutes, missing: int, documents: np.ndarray, reduce: _Reduce) -> None:
        primary = primary_experts(routes, missing)
        if primary is None:
            return
        known = primary >= 0
        cells = self._cells(routes, primary[None], known[None], len(documents))
        tally = self._tally(cells, None, len(documents))
        self._made("primaries", self.hits)[documents] += tally
        if routes.weights is None:
            self._made("mass", self.hits)[documents] += tally  # k = 1: the only slot carries the whole weight
        follows = follows_previous(routes)
        same = np.zeros(primary.shape, bool)
        same[1:] = (primary[1:] == primary[:-1]) & known[1:] & follows[1:, None]
        repeated = None
        if routes.token_ids is not None:
            repeated = np.zeros(len(routes), bool)
            repeated[1:] = (routes.token_ids[1:] == routes.token_ids[:-1]) & follows[1:]
        for index, size in enumerate(NGRAM_SIZES):
            whole = consecutive(follows, size - 1)[:, None] & (known if known.all() else consecutive(known, size))
            alike = consecutive(same, size - 1)
            self.windows[documents, :, index] += reduce(whole)
            self.alike[documents, :, index] += reduce(alike)
            if repeated is not None:
                varied = ~consecutive(repeated, size - 1)[:, None]
                self._made("distinct_windows", self.windows)[documents, :, index] += reduce(whole & varied)
                self._made("distinct_alike", self.windows)[documents, :, index] += reduce(alike & varied)

    def _add_stiffness(self, routes: TokenRoutes, documents: np.ndarray, reduce: _Reduce) -> None:
        sums = self.stiffness
        if routes.logit_margins is not None:
            total, count = _finite_sums(routes.logit_margins, reduce)
            sums["logit_margin"][documents] += total
            sums["logit_count"][documents] += count
        if routes.logit_stable is not None and routes.logit_margins is not None:
            known = ~np.isnan(routes.logit_margins)
            sums["stable_count"][documents] += reduce(known)
            for index in range(len(LOGIT_NOISE)):
                sums["logit_stable"][documents, :, index] += reduce(((routes.logit_stable >> index) & 1).astype(bool) & known)
        if routes.selection_margins is not None and routes.scaled_margins is not None:
            total, count = _finite_sums(routes.selection_margins, reduce)
            scaled, _ = _finite_sums(routes.scaled_margins, reduce)
            sums["selection_margin"][documents] += total
            sums["scaled_margin"][documents] += scaled
            sums["selection_count"][documents] += count
        if routes.kept is not None:
            ran = (routes.ids != np.iinfo(routes.ids.dtype).max).sum(axis=2)
            whole = bool((ran == self.top_k).all())
            known = (routes.kept[:, :, 0] != NO_SCORE) & (ran > 0)
            sums["kept_count"][documents] += reduce(known)
            for index in range(len(NOISE_SCALES)):
                kept = np.where(known, routes.kept[:, :, index], 0)
                sums["unchanged"][documents, :, index] += reduce((kept == ran) & known)
                sums["kept"][documents, :, index] += reduce(kept) / self.top_k if whole else reduce(kept / np.maximum(ran, 1))


class _Reduce:
    """Sums rows over the documents of a piece."""

    def __init__(self, starts: np.ndarray) -> None:
        self.starts = starts

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        dtype = np.float64 if np.issubdtype(rows.dtype, np.floating) else np.int64
        return np.add.reduceat(rows, self.starts, axis=0, dtype=dtype)


def _reducer(routes: TokenRoutes) -> tuple[np.ndarray, _Reduce]:
    starts = document_starts(routes.document)
    return routes.document[starts], _Reduce(starts)


def _finite_sums(margins: np.ndarray, reduce: _Reduce) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(margins)
    return reduce(np.where(known, margins.astype(np.float64), 0.0)), reduce(known)
