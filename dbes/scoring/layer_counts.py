"""The sums of one layer per document, from which all scores are computed; nothing here grows with the tokens.

All sums are per document, because the document is the unit of every permutation, jackknife and split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from dbes.scoring.metrics import NGRAM_SIZES
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, RoutingShape

OPTIONAL_WINDOWS = ("distinct_windows", "distinct_alike", "grouped", "in_group")
"""Sums of ``NgramSums`` that may be unknown."""


WIDE = ("hits", "mass", "primaries")
"""Sums for each expert: whole numbers below 2^24, and masses, in float32. All others are float64."""

FLAT = ("active", "neighbours", "overlap_any", "overlap_share")

LAST_AXIS = {
    **dict.fromkeys(("windows", "alike", "distinct_windows", "distinct_alike", "grouped"), (len(NGRAM_SIZES),)),
    **dict.fromkeys(("unchanged", "kept"), (len(NOISE_SCALES),)),
    "logit_stable": (len(LOGIT_NOISE),),
}
"""Length of the last axis of sums that are neither for each expert nor single numbers."""


@dataclass(frozen=True, kw_only=True)
class StiffnessSums:
    """Sums over tokens of the router-margin statistics; ``count`` arrays say over how many tokens each sum runs.

    Attributes (all [documents, layers] with an optional last axis):
        logit_margin, logit_count: router-logit margins (RSS).
        logit_stable [.., len(LOGIT_NOISE)], stable_count: tokens whose choice survived the published noise.
        selection_margin, scaled_margin, selection_count: margins of the selection score.
        unchanged, kept [.., len(NOISE_SCALES)], kept_count: tokens with an unchanged set, and the summed share |S and S'|/k.
    """

    logit_margin: np.ndarray
    logit_count: np.ndarray
    logit_stable: np.ndarray
    stable_count: np.ndarray
    selection_margin: np.ndarray
    scaled_margin: np.ndarray
    selection_count: np.ndarray
    unchanged: np.ndarray
    kept: np.ndarray
    kept_count: np.ndarray


@dataclass(frozen=True, kw_only=True)
class NgramSums:
    """Counts of windows of consecutive tokens; last axis: NGRAM_SIZES.

    Attributes:
        primaries: [documents, layers, experts], tokens whose primary (largest-weight) expert is e.
        windows, alike: [documents, layers, sizes], windows, and those whose primaries are all the same expert.
        distinct_windows, distinct_alike: the same without windows made of one repeated token id; None without token ids.
        grouped: [documents, layers, sizes], windows whose primaries all lie in the domain's expert group.
        in_group: [documents, layers], tokens whose primary lies in the group.
        groups: bool [domains, layers, experts], the groups. None, as the two before, where they were not asked for.
    """

    primaries: np.ndarray
    windows: np.ndarray
    alike: np.ndarray
    distinct_windows: np.ndarray | None
    distinct_alike: np.ndarray | None
    grouped: np.ndarray | None
    in_group: np.ndarray | None
    groups: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """The sums of one layer, with an axis of layers of length 1 so that all metrics pass through; or of several, side by side.

    Attributes:
        shape: sizes and domains.
        tokens: int64 [documents].
        hits: float32 [documents, layers, experts], (token, slot) pairs that chose the expert (exact: below 2^24 per document).
        active: float64 [documents, layers], tokens with at least one slot that ran.
        mass: float32 [documents, layers, experts], gate weight, normalised to 1 per token; None without weights.
        neighbours, overlap_any, overlap_share: [documents, layers], pairs of consecutive tokens, pairs that share an expert,
            summed share |S_t and S_t+1| / k.
        ngrams: None without weights (primaries are unknown), unless k = 1.
        stiffness: sums of margins; zero counts where the trace has no scores.
    """

    shape: RoutingShape
    tokens: np.ndarray
    hits: np.ndarray
    active: np.ndarray
    mass: np.ndarray | None
    neighbours: np.ndarray
    overlap_any: np.ndarray
    overlap_share: np.ndarray
    ngrams: NgramSums | None
    stiffness: StiffnessSums

    @property
    def slots(self) -> np.ndarray:
        """(token, slot) pairs that ran, float64 [documents, layers]."""
        return self.hits.sum(axis=-1, dtype=np.float64)

    def by_domain(self, per_document: np.ndarray) -> np.ndarray:
        """Sums over the documents of each domain: [documents, ...] to float64 [domains, ...]."""
        return domain_sums(per_document, self.shape)

    def take(self, documents: np.ndarray) -> LayerCounts:
        """The sums of chosen documents, distinct and ascending (the expert groups stay those of all)."""
        if len(documents) == len(self.tokens):
            return self
        return replace(per_document(self, lambda rows: rows[documents]), shape=shape_of(self.shape, documents))

    def by_unit(self) -> LayerCounts:
        """The sums with documents cut from one source text added up into one, in order of first appearance."""
        first, order, starts = units_of(self.shape)
        if len(first) == len(order):
            return self
        return replace(per_document(self, lambda rows: np.add.reduceat(rows[order], starts, axis=0)), shape=shape_by_unit(self.shape))

    def totals(self) -> LayerCounts:
        """The sums over the documents of each domain, float64, as if each domain were one document."""
        shape = replace(
            self.shape,
            document_domain=np.arange(len(self.shape.domains), dtype=np.int32),
            document_ids=self.shape.domains,
            document_source=None,
        )
        return replace(per_document(self, self.by_domain), shape=shape)

    def column(self, index: int) -> LayerCounts:
        """One layer of several, as wide as it has experts."""
        width = self.shape.experts[index]

        def cut(rows: np.ndarray) -> np.ndarray:
            return rows[:, index : index + 1] if rows.ndim > 1 else rows

        found = per_document(self, cut)
        ngrams = found.ngrams
        if ngrams is not None:
            groups = None if ngrams.groups is None else ngrams.groups[:, index : index + 1, :width]
            ngrams = replace(ngrams, primaries=ngrams.primaries[..., :width], groups=groups)
        mass = None if found.mass is None else found.mass[..., :width]
        return replace(found, shape=one_layer(self.shape, index), hits=found.hits[..., :width], mass=mass, ngrams=ngrams)


def one_layer(shape: RoutingShape, column: int) -> RoutingShape:
    """The shape of one layer alone."""
    layers, experts, top_k = shape.layers[column], shape.experts[column], shape.top_k[column]
    return replace(shape, layers=(layers,), experts=(experts,), top_k=(top_k,))


def side_by_side(parts: Sequence[np.ndarray], fill: float = 0) -> np.ndarray:
    """Arrays [..., 1, experts] (or [..., 1]) of single layers as one [..., layers, experts], filled up to the widest.

    The axis of layers is the second of each array.
    """
    if parts[0].ndim > 2 and len({part.shape[-1] for part in parts}) > 1:
        width = max(part.shape[-1] for part in parts)
        parts = [np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, width - part.shape[-1])], constant_values=fill) for part in parts]
    return np.concatenate(parts, axis=1)


def joined_layers(parts: list[Sums]) -> Sums:
    """The sums of single layers side by side."""
    joined = {}
    for entry in fields(parts[0]):
        values = [getattr(part, entry.name) for part in parts]
        first = values[0]
        if isinstance(first, np.ndarray):
            first = side_by_side(values) if first.ndim > 1 else first
        elif isinstance(first, NgramSums | StiffnessSums):
            first = joined_layers(values)
        elif isinstance(first, RoutingShape):
            sizes = {name: tuple(getattr(shape, name)[0] for shape in values) for name in ("layers", "experts", "top_k")}
            first = replace(first, **sizes)
        joined[entry.name] = first
    return type(parts[0])(**joined)


def units_of(shape: RoutingShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First document of each unit of sampling, the documents in order of units, and where each unit begins among these."""
    units = shape.units
    first = np.unique(units, return_index=True)[1]
    order = np.argsort(units, kind="stable")
    return first, order, np.searchsorted(units[order], np.arange(len(first)))


def shape_of(shape: RoutingShape, documents: np.ndarray) -> RoutingShape:
    ids, sources = shape.document_ids, shape.document_source
    return replace(
        shape,
        document_domain=shape.document_domain[documents],
        document_ids=tuple(ids[index] for index in documents),
        document_source=None if sources is None else tuple(sources[index] for index in documents),
    )


def shape_by_unit(shape: RoutingShape) -> RoutingShape:
    first = units_of(shape)[0]
    sources = shape.document_source or shape.document_ids
    names = tuple(sources[index] for index in first)
    return replace(shape, document_domain=shape.document_domain[first], document_ids=names, document_source=None)


Sums = TypeVar("Sums", bound=LayerCounts | NgramSums | StiffnessSums)


def per_document(sums: Sums, change: Callable[[np.ndarray], np.ndarray]) -> Sums:
    """The same sums with every per-document array changed; every array but the expert groups has the documents first."""
    chosen = {}
    for entry in fields(sums):
        value = getattr(sums, entry.name)
        if isinstance(value, np.ndarray) and entry.name != "groups":
            value = change(value)
        elif isinstance(value, NgramSums | StiffnessSums):
            value = per_document(value, change)
        chosen[entry.name] = value
    return replace(sums, **chosen)


def domain_sums(per_document: np.ndarray, shape: RoutingShape) -> np.ndarray:
    """Sums over the documents of each domain: [documents, ...] to float64 [domains, ...]."""
    sums = np.zeros((len(shape.domains), *per_document.shape[1:]), np.float64)
    for domain in range(len(shape.domains)):
        sums[domain] = per_document[shape.document_domain == domain].sum(axis=0, dtype=np.float64)
    return sums


def arrays_of(sums: LayerCounts) -> dict[str, np.ndarray]:
    """The arrays of one layer by name, [documents, ...]; ``groups`` is [domains, experts]."""
    found: dict[str, np.ndarray] = {}
    for part in (sums, sums.ngrams, sums.stiffness):
        for entry in fields(part) if part is not None else ():
            array = getattr(part, entry.name)
            if isinstance(array, np.ndarray) and entry.name != "tokens":
                found[entry.name] = array[:, 0]
    return found


def layer_of(shape: RoutingShape, tokens: np.ndarray, arrays: Mapping[str, np.ndarray]) -> LayerCounts:
    """The sums of one layer from its arrays, see ``arrays_of``; what is missing is 0, or None where it may be unknown.

    Args:
        shape: of the layer alone.
    """
    width = shape.width

    def one(name: str) -> np.ndarray:
        return arrays[name][:, None] if name in arrays else np.zeros((len(tokens), 1, *LAST_AXIS.get(name, ())))

    def wide(name: str) -> np.ndarray | None:
        return arrays[name][:, None, :width] if name in arrays else None

    primaries, hits = wide("primaries"), wide("hits")
    assert hits is not None
    ngrams = None
    if primaries is not None:
        known = {name: one(name) if name in arrays else None for name in OPTIONAL_WINDOWS}
        ngrams = NgramSums(primaries=primaries, windows=one("windows"), alike=one("alike"), groups=wide("groups"), **known)
    stiffness = StiffnessSums(**{entry.name: one(entry.name) for entry in fields(StiffnessSums)})
    flat = {name: one(name) for name in FLAT}
    return LayerCounts(shape=shape, tokens=tokens, hits=hits, mass=wide("mass"), ngrams=ngrams, stiffness=stiffness, **flat)


def shapes_of(shape: RoutingShape, documents: int) -> dict[str, tuple[int, ...]]:
    """The shape that each array of one layer has, see ``arrays_of``."""
    narrow = (*FLAT, *(entry.name for entry in fields(StiffnessSums)), *(entry.name for entry in fields(NgramSums)))
    found = {name: (documents, *LAST_AXIS.get(name, ())) for name in narrow}
    return found | dict.fromkeys(WIDE, (documents, shape.width)) | {"groups": (len(shape.domains), shape.width)}
