"""Where two recordings of the same tokens chose other experts: sums per document, in two passes of a shard at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbes.comparison.alignment import Common, Left, same_tokens
from dbes.trace.store import Trace
from dbes.trace.types import PIECE_TOKENS, document_starts

MARGINS = ("scaled_margins", "selection_margins", "logit_margins")
"""Margins of the weakest chosen expert over the strongest rejected one, the first of them that a recording holds is used."""

BANDS = 10
"""Parts of equally many tokens that the tokens of a layer are cut into by their margin."""

CODES = 1 << 15
"""Numbers that a margin is rounded down to: the upper 16 bits of a float32 that is not negative, 128 to every doubling."""


@dataclass(frozen=True, kw_only=True)
class Margins:
    """How the tokens of each layer are cut into bands by the first recording's margin.

    Attributes:
        name: which margin, of ``MARGINS``.
        band: uint8 [layers, codes], band of every margin; equal margins are never cut apart.
        upper: [layers, bands], the largest margin of each band, NaN where it is empty.
    """

    name: str
    band: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Sums over the tokens that both recordings hold; the documents are those of the first.

    Attributes:
        tokens: int64 [documents].
        compared: int64 [documents, layers], tokens with at least one slot that ran in both.
        missing: int64 [layers], tokens that are left out because only one recording (or none) has a slot that ran.
        differing: [documents, layers], compared tokens whose expert sets are not equal.
        slots, kept: [documents, layers], slots of the first recording that ran, and those whose expert the second ran too.
        agreed: [documents, layers], compared tokens whose sets were equal at all earlier layers.
        started: [documents, layers], those of them whose sets are not equal here.
        banded, banded_differing: [documents, bands], (token, layer) pairs with a margin in each band, and those that differ; None
            without margins.
        layer_banded, layer_banded_differing: the same over all documents, [layers, bands].
    """

    tokens: np.ndarray
    compared: np.ndarray
    missing: np.ndarray
    differing: np.ndarray
    slots: np.ndarray
    kept: np.ndarray
    agreed: np.ndarray
    started: np.ndarray
    margins: Margins | None
    banded: np.ndarray
    banded_differing: np.ndarray
    layer_banded: np.ndarray
    layer_banded_differing: np.ndarray


def find_margins(trace: Trace, common: Common) -> Margins | None:
    """Bands of the margins of the documents in common, in one pass; None where the recording holds no margin."""
    counts, found = np.zeros((len(trace.shape.layers), CODES), np.int64), None
    for routes in trace.with_columns(*MARGINS):
        name = next((name for name in MARGINS if getattr(routes, name) is not None), None)
        if name is None or (found is not None and name != found):
            return None
        found = name
        margins = getattr(routes, name)[common.second_of[routes.document] >= 0]
        for column in range(margins.shape[1]):
            known = margins[:, column][~np.isnan(margins[:, column])]
            counts[column] += np.bincount(codes_of(known), minlength=CODES)
    total = counts.sum(axis=1, keepdims=True)
    if found is None or not total.any():
        return None
    # The band of a code is that of the middle of its tokens, so that ties stay together and bands are as even as they can be.
    middle = np.cumsum(counts, axis=1) - counts / 2
    band = np.clip((middle / np.maximum(total, 1) * BANDS).astype(np.int64), 0, BANDS - 1).astype(np.uint8)
    upper = np.full((len(counts), BANDS), np.nan)
    values = (np.arange(CODES, dtype=np.uint32) << 16).view(np.float32)
    for column, number in ((column, number) for column in range(len(counts)) for number in range(BANDS)):
        here = np.flatnonzero((counts[column] > 0) & (band[column] == number))
        if len(here):
            upper[column, number] = values[here[-1]]
    return Margins(name=found, band=band, upper=upper)


def codes_of(margins: np.ndarray) -> np.ndarray:
    """Margins, without NaN, rounded down to ``CODES`` numbers; below 0, where the router chose by something else, counts as 0."""
    return (np.maximum(margins.astype(np.float32), 0).view(np.uint32) >> 16).astype(np.int64)


def count_disagreement(first: Trace, second: Trace, common: Common, margins: Margins | None, left: Left) -> Disagreement:
    """The sums of all tokens that both recordings hold; memory follows a shard, and documents x layers.

    Raises:
        TraceError: a token has another id in one than in the other, or a recording is altered.
    """
    documents, layers = len(first.shape.document_ids), len(first.shape.layers)
    per_layer = ("compared", "differing", "slots", "kept", "agreed", "started")
    sums = {name: np.zeros((documents, layers), np.int64) for name in per_layer}
    tokens, missing = np.zeros(documents, np.int64), np.zeros(layers, np.int64)
    banded = {name: np.zeros((documents, BANDS), np.int64) for name in ("banded", "banded_differing")}
    layered = {name: np.zeros((layers, BANDS), np.int64) for name in ("layer_banded", "layer_banded_differing")}
    columns = () if margins is None else (margins.name,)
    for one, other in same_tokens(first, second, common, columns=columns, left=left):
        tokens += np.bincount(one.document, minlength=documents)
        for begin in range(0, len(one), PIECE_TOKENS):
            rows = slice(begin, begin + PIECE_TOKENS)
            found = compared_rows(one.ids[rows], other.ids[rows])
            starts = document_starts(one.document[rows])
            there = one.document[rows][starts]
            for name in per_layer:
                sums[name][there] += np.add.reduceat(found[name], starts, axis=0, dtype=np.int64)
            missing += (~found["compared"]).sum(axis=0)
            if margins is not None:
                values = getattr(one, margins.name)[rows]
                _add_bands(banded, layered, values, found, one.document[rows], margins)
    return Disagreement(tokens=tokens, missing=missing, margins=margins, **sums, **banded, **layered)


def compared_rows(one: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """What is summed of some tokens, from their ids [tokens, layers, slots]: arrays [tokens, layers] by name, see ``Disagreement``."""
    if one.dtype != other.dtype:
        one, other = _widened(one), _widened(other)
    mark = np.iinfo(one.dtype).max
    ours, theirs = (np.ascontiguousarray(np.moveaxis(ids, 2, 0)) for ids in (one, other))
    absent, absent_there = ((ids == mark).sum(axis=0, dtype=np.int32) for ids in (ours, theirs))
    kept = np.zeros(ours.shape[1:], np.uint8 if len(ours) * len(theirs) < 256 else np.uint16)
    for mine in ours:
        for yours in theirs:
            kept += mine == yours
    kept = kept - absent * absent_there  # every pair of slots that did not run was counted as a slot that was kept
    slots, slots_there = len(ours) - absent, len(theirs) - absent_there
    compared = (slots > 0) & (slots_there > 0)
    differing = compared & ((kept < slots) | (slots_there != slots))
    ever = np.logical_or.accumulate(differing, axis=1)
    before = np.zeros_like(ever)
    before[:, 1:] = ever[:, :-1]
    return {
        "compared": compared,
        "differing": differing,
        "slots": np.where(compared, slots, 0),
        "kept": np.where(compared, kept, 0),
        "agreed": compared & ~before,
        "started": differing & ~before,
    }


def _widened(ids: np.ndarray) -> np.ndarray:
    """The ids as int32 whose largest value marks a slot that did not run."""
    return np.where(ids == np.iinfo(ids.dtype).max, np.iinfo(np.int32).max, ids.astype(np.int32))


def _add_bands(
    banded: dict[str, np.ndarray], layered: dict[str, np.ndarray], values: np.ndarray, found: dict[str, np.ndarray],
    document: np.ndarray, margins: Margins,
) -> None:  # fmt: skip
    """Adds the (token, layer) pairs of some tokens to the bands of their margins."""
    layers = values.shape[1]
    known = found["compared"] & ~np.isnan(values)
    band = margins.band[np.arange(layers), codes_of(np.where(known, values, 0))]
    first = int(document[0])
    within = int(document[-1]) - first + 1
    for differing, suffix in ((known, ""), (known & found["differing"], "_differing")):
        rows, columns = np.nonzero(differing)
        bands = band[rows, columns]
        counted = np.bincount((document[rows] - first) * BANDS + bands, minlength=within * BANDS)
        banded[f"banded{suffix}"][first : first + within] += counted.reshape(within, BANDS)
        layered[f"layer_banded{suffix}"] += np.bincount(columns * BANDS + bands, minlength=layers * BANDS).reshape(layers, BANDS)
