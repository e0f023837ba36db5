"""The sums of a piece of a trace: a run of whole documents, from tokens to numbers per document and layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbes.scoring.metrics import NGRAM_SIZES, consecutive
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, PROMPT, TEMPLATE, RoutingShape, TokenRoutes, document_starts

NO_SCORE = 255
"""Value of ``TokenRoutes.kept`` for a token without a selection score."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The sums of some documents.

    Attributes:
        documents: [documents], which; ascending.
        tokens: int64 [documents].
        sums: arrays [documents, layers, ...] by the names of ``LayerCounts``, ``NgramSums`` and ``StiffnessSums``; what the routes
            do not tell is missing.
        primary: int32 [tokens, layers], see ``primary_experts``.
        follows: bool [tokens], see ``follows_previous``.
    """

    documents: np.ndarray
    tokens: np.ndarray
    sums: dict[str, np.ndarray]
    primary: np.ndarray | None
    follows: np.ndarray


def sums_of(routes: TokenRoutes, shape: RoutingShape) -> Piece:
    """The sums of the documents of some routes."""
    reduce = Reduce(document_starts(routes.document))
    slots = np.ascontiguousarray(np.moveaxis(routes.ids, 2, 0))
    present = slots != np.iinfo(routes.ids.dtype).max
    tally = _Tally(routes, shape)
    cells = tally.cells(slots, present)
    sums = {"active": reduce(present.any(axis=0)), "hits": tally.count(cells, None)}
    follows = follows_previous(routes)
    sums |= _overlaps(slots, present, follows, np.asarray(shape.top_k), reduce)
    if routes.weights is not None:
        weights = _slot_planes(routes.weights)
        weights[~present] = 0
        total = weights.sum(axis=0)
        total[~(total > 0)] = np.inf  # no slot ran, or none with weight: no mass
        weights /= total
        sums["mass"] = tally.count(cells, weights)
    primary = primary_experts(routes)
    if primary is not None:
        sums["primaries"] = tally.count(tally.cells(primary[None], primary[None] >= 0), None)
        if routes.weights is None:
            sums["mass"] = sums["primaries"]  # k = 1: the only slot carries the whole weight
        sums |= _windows(routes, primary, follows, reduce)
    sums |= _stiffness(routes, np.asarray(shape.top_k), reduce)
    tokens = reduce(np.ones(len(routes), np.int64))
    return Piece(documents=routes.document[reduce.starts], tokens=tokens, sums=sums, primary=primary, follows=follows)


def group_sums(
    primary: np.ndarray, follows: np.ndarray, domain: np.ndarray, groups: np.ndarray, starts: np.ndarray
) -> dict[str, np.ndarray]:
    """Tokens of one layer whose primary lies in the expert group of their domain, and windows of such tokens.

    Args:
        primary: int [tokens], -1 where there is none; follows: bool [tokens]; domain: int [tokens].
        groups: bool [domains, experts].
        starts: rows at which a document begins.
    Returns:
        ``in_group`` [documents] and ``grouped`` [documents, NGRAM_SIZES].
    """
    reduce = Reduce(starts)
    inside = groups[domain, np.maximum(primary, 0)] & (primary >= 0)
    grouped = [reduce(consecutive(inside, size) & consecutive(follows, size - 1)) for size in NGRAM_SIZES]
    return {"in_group": reduce(inside), "grouped": np.stack(grouped, axis=1)}


def primary_experts(routes: TokenRoutes) -> np.ndarray | None:
    """Expert with the largest weight, int32 [tokens, layers]; -1 where no slot ran; None where weights are unknown.

    Slots are not sorted in several runtimes, so the first slot is not the primary. Equal weights: the lower expert id.
    """
    ids = routes.ids
    missing = np.iinfo(ids.dtype).max
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


def follows_previous(routes: TokenRoutes) -> np.ndarray:
    """Whether a row is the very next token of the same document as the row before, bool [tokens]."""
    follows = np.zeros(len(routes), bool)
    follows[1:] = (np.diff(routes.document) == 0) & (np.diff(routes.positions) == 1)
    return follows


def of_phase(routes: TokenRoutes, phase: int | None) -> np.ndarray:
    """Rows of a phase, bool [tokens]; None: of all text. Routes without phases are all given text."""
    phases = np.full(len(routes), PROMPT, np.uint8) if routes.phase is None else routes.phase
    return phases != TEMPLATE if phase is None else phases == phase


class Reduce:
    """Sums rows over the documents of a piece."""

    def __init__(self, starts: np.ndarray) -> None:
        self.starts = starts

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        dtype = np.float64 if np.issubdtype(rows.dtype, np.floating) else np.int64
        return np.add.reduceat(rows, self.starts, axis=0, dtype=dtype)


class _Tally:
    """Counts slots by document of the piece, layer and expert."""

    def __init__(self, routes: TokenRoutes, shape: RoutingShape) -> None:
        local = np.cumsum(np.r_[0, np.diff(routes.document) != 0])
        self.shape = (int(local[-1]) + 1, len(shape.layers), shape.width)
        self.size = int(np.prod(self.shape))
        self.base = (local[:, None] * self.shape[1] + np.arange(self.shape[1])) * self.shape[2]

    def cells(self, slots: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Flat index of each slot; one further index for slots that did not run."""
        cells = slots.astype(np.int64)
        cells += self.base
        if not present.all():
            cells[~present] = self.size
        return cells

    def count(self, cells: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        counts = np.bincount(cells.reshape(-1), None if weights is None else weights.reshape(-1), minlength=self.size + 1)
        return counts[: self.size].reshape(self.shape).astype(np.float32)


def _overlaps(slots: np.ndarray, present: np.ndarray, follows: np.ndarray, top_k: np.ndarray, reduce: Reduce) -> dict[str, np.ndarray]:
    ran = np.asarray(present.any(axis=0))
    both = follows[1:, None] & ran[1:] & ran[:-1]
    shared = np.zeros(slots.shape[1:], np.uint8)
    for now in slots:
        for before in slots:
            shared[1:] += now[1:] == before[:-1]
    if not present.all():
        # Two missing slots are equal numbers but no shared expert.
        absent = (~present).sum(axis=0, dtype=np.uint8)
        shared[1:] -= absent[1:] * absent[:-1]
    shared[1:] *= both
    pairs = np.zeros(slots.shape[1:], bool)
    pairs[1:] = both
    return {"neighbours": reduce(pairs), "overlap_any": reduce(shared > 0), "overlap_share": reduce(shared) / top_k}


def _windows(routes: TokenRoutes, primary: np.ndarray, follows: np.ndarray, reduce: Reduce) -> dict[str, np.ndarray]:
    known = primary >= 0
    same = np.zeros(primary.shape, bool)
    same[1:] = (primary[1:] == primary[:-1]) & known[1:] & follows[1:, None]
    found: dict[str, list[np.ndarray]] = {"windows": [], "alike": []}
    repeated = None
    if routes.token_ids is not None:
        found |= {"distinct_windows": [], "distinct_alike": []}
        repeated = np.zeros(len(routes), bool)
        repeated[1:] = (routes.token_ids[1:] == routes.token_ids[:-1]) & follows[1:]
    for size in NGRAM_SIZES:
        whole = consecutive(follows, size - 1)[:, None] & (known if known.all() else consecutive(known, size))
        alike = consecutive(same, size - 1)
        found["windows"].append(reduce(whole))
        found["alike"].append(reduce(alike))
        if repeated is not None:
            varied = ~consecutive(repeated, size - 1)[:, None]
            found["distinct_windows"].append(reduce(whole & varied))
            found["distinct_alike"].append(reduce(alike & varied))
    return {name: np.stack(parts, axis=2) for name, parts in found.items()}


def _stiffness(routes: TokenRoutes, top_k: np.ndarray, reduce: Reduce) -> dict[str, np.ndarray]:
    sums: dict[str, np.ndarray] = {}
    if routes.logit_margins is not None:
        sums["logit_margin"], sums["logit_count"] = _finite_sums(routes.logit_margins, reduce)
    if routes.logit_stable is not None and routes.logit_margins is not None:
        known = ~np.isnan(routes.logit_margins)
        sums["stable_count"] = reduce(known)
        stable = [reduce(((routes.logit_stable >> index) & 1).astype(bool) & known) for index in range(len(LOGIT_NOISE))]
        sums["logit_stable"] = np.stack(stable, axis=2)
    if routes.selection_margins is not None and routes.scaled_margins is not None:
        sums["selection_margin"], sums["selection_count"] = _finite_sums(routes.selection_margins, reduce)
        sums["scaled_margin"], _ = _finite_sums(routes.scaled_margins, reduce)
    if routes.kept is not None:
        ran = (routes.ids != np.iinfo(routes.ids.dtype).max).sum(axis=2)
        whole = bool((ran == top_k).all())
        known = (routes.kept[:, :, 0] != NO_SCORE) & (ran > 0)
        sums["kept_count"] = reduce(known)
        unchanged, shares = [], []
        for index in range(len(NOISE_SCALES)):
            kept = np.where(known, routes.kept[:, :, index], 0)
            unchanged.append(reduce((kept == ran) & known))
            shares.append(reduce(kept) / top_k if whole else reduce(kept / np.maximum(ran, 1)))
        sums["unchanged"], sums["kept"] = np.stack(unchanged, axis=2), np.stack(shares, axis=2)
    return sums


def _finite_sums(margins: np.ndarray, reduce: Reduce) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(margins)
    return reduce(np.where(known, margins.astype(np.float64), 0.0)), reduce(known)
