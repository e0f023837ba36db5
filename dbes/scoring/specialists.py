"""Which experts serve which domain: chosen in one half of the documents under false-discovery control, lift measured in the other.

An expert that was chosen because it looked strong looks too strong on the documents that chose it. So both halves of the documents
test every cell by themselves, and a chosen cell's lift comes from the half that did not choose it.

The test is the studentized difference of METRICS section 4 with its null pooled over experts of a layer, from labels permuted inside
each half. A delta-method z of the *log* lift finds specialists in 22-100 % of pure-noise runs; it is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.special import stdtrit
from threadpoolctl import threadpool_limits

from dbes.scoring.counts import Counts
from dbes.scoring.descriptive import random_halves
from dbes.scoring.grouping import SPECIALIST_DRAWS, Grouping
from dbes.scoring.layer_counts import LayerCounts, side_by_side
from dbes.scoring.metrics import usage_of
from dbes.scoring.permutation import domain_sums
from dbes.scoring.resampling import batches, clustered_usage, false_discovery_q, pooled_p, studentized_difference
from dbes.trace.types import RoutingShape

FALSE_DISCOVERY_RATE = 0.05

RARE_HITS = 10.0
"""Where a domain, or the mean of the others, would get fewer hits of an expert than this if all domains were alike, the expert is too
rare to tell."""

LIFTS = (1.0, 1.5, 2.0, 4.0)
"""Lifts at which specialists are counted."""

LEAST_LIFT = 1.5
"""Lift from which an expert is listed as a specialist."""

LISTED_SPECIALISTS = 4000
"""Specialists that a result lists at most, the strongest of every domain alike; the table of expert usage has all."""

HALVES = 2


@dataclass(frozen=True, kw_only=True)
class SpecialistTable:
    """One test per domain, layer and expert; all arrays [domains, layers, experts].

    Attributes:
        hits, share: slots of the domain that chose the expert, and their share p[d,l,e], of all documents.
        lift: p / pbar on the half of the documents that did not choose the cell, with lift_low, lift_high its 95 % interval
            (documents as clusters); the mean of both halves, ends included, where both chose it or none did.
        z, p: the test of the half that speaks more for the cell; p counts that there were two. q: the false-discovery q-value.
        replicated: lift above 1 in both halves of the documents.
        unknown: seen too rarely in the domain or in the others to tell.
        specialist: q <= 5 %, replicated, not unknown, lift at least ``LEAST_LIFT``.
    """

    hits: np.ndarray
    share: np.ndarray
    lift: np.ndarray
    lift_low: np.ndarray
    lift_high: np.ndarray
    z: np.ndarray
    p: np.ndarray
    q: np.ndarray
    replicated: np.ndarray
    unknown: np.ndarray
    specialist: np.ndarray

    def at_least(self, lift: float) -> np.ndarray:
        """Cells that pass the test with at least this lift, bool [domains, layers, experts]."""
        with np.errstate(invalid="ignore"):
            return (self.q <= FALSE_DISCOVERY_RATE) & self.replicated & ~self.unknown & (self.lift >= lift)


@dataclass(frozen=True, kw_only=True)
class HalfTest:
    """What one half of the documents says of every cell, [domains, layers, experts]; ``error``: from the lift to an end of its interval."""

    z: np.ndarray
    p: np.ndarray
    lift: np.ndarray
    error: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LayerTests:
    """What is kept of one layer until all layers are known, [domains, 1, experts]; attributes as in ``SpecialistTable``."""

    hits: np.ndarray
    share: np.ndarray
    unknown: np.ndarray
    halves: tuple[HalfTest, ...]


def find_specialists(counts: Counts, *, permutations: int, seed: int) -> SpecialistTable:
    """The specialist test of every expert in every domain."""
    test = SpecialistTest.of(counts.shape, Grouping.of(counts.shape), permutations=permutations, seed=seed)
    with threadpool_limits(1, "blas"):
        return joined([test.layer(sums) for sums in counts.layers()])


@dataclass(frozen=True, kw_only=True)
class SpecialistTest:
    """What the test needs beside the counts of a layer; the same for all layers.

    Attributes:
        grouping: of the documents, where they are many: its groups stand for documents then.
        half: 0 or 1 for each document, see ``random_halves``.
        labels: [permutations, documents], see ``half_labels``.
    """

    grouping: Grouping | None
    half: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, shape: RoutingShape, grouping: Grouping | None, *, permutations: int, seed: int) -> SpecialistTest:
        domain = shape.document_domain if grouping is None else grouping.shape.document_domain
        half = random_halves(domain, seed=seed)
        draws = permutations if grouping is None else min(permutations, SPECIALIST_DRAWS)
        return cls(grouping=grouping, half=half, labels=half_labels(domain, half, permutations=draws, seed=seed))

    def layer(self, sums: LayerCounts) -> LayerTests:
        """What the test is made of at one layer."""
        return layer_specialists(sums if self.grouping is None else self.grouping.sums(sums), self.half, self.labels)


def half_labels(document_domain: np.ndarray, half: np.ndarray, *, permutations: int, seed: int) -> np.ndarray:
    """Domain labels shuffled over the documents of each half, int16 [permutations, documents]; the second half's follow the first's.

    With D domains, label d is domain d in half 0, and D + d in half 1; every group keeps its number of documents.
    """
    rng = np.random.default_rng(seed)
    labels = np.tile((document_domain + half * (document_domain.max(initial=0) + 1)).astype(np.int16), (permutations, 1))
    for side in range(HALVES):
        members = half == side
        labels[:, members] = rng.permuted(labels[:, members], axis=1)
    return labels


def layer_specialists(sums: LayerCounts, half: np.ndarray, labels: np.ndarray) -> LayerTests:
    """What the specialist test is made of at one layer.

    Args:
        half: 0 or 1 for each document, see ``random_halves``.
        labels: [permutations, documents], see ``half_labels``.
    """
    hits = sums.by_domain(sums.hits)
    share = usage_of(hits)
    mixture, slots = share.mean(axis=0), hits.sum(axis=-1, keepdims=True, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / slots
        others = (len(slots) - 1) ** 2 / (inverse.sum(axis=0) - inverse)  # slots that would tell as much as the mean of the others does
    halves = _half_tests(sums, half, labels)
    unknown = ~(mixture * np.minimum(slots, others) >= RARE_HITS) | np.any([np.isnan(each.p) for each in halves], axis=0)
    return LayerTests(hits=hits.astype(np.int64), share=share, unknown=unknown, halves=halves)


def _half_tests(sums: LayerCounts, half: np.ndarray, labels: np.ndarray) -> tuple[HalfTest, ...]:
    domains, experts = len(sums.shape.domains), sums.shape.width
    columns = _moment_columns(sums.hits[:, 0])
    groups = domain_sums(columns, HALVES * domains)

    def z_of(labels: np.ndarray) -> np.ndarray:
        moments = groups(labels).astype(np.float64).reshape(len(labels), HALVES, domains, -1)
        thirds = (moments[..., index * experts : (index + 1) * experts] for index in range(3))
        return studentized_difference(*thirds, *(moments[..., 3 * experts + index] for index in range(3)))

    z = z_of((sums.shape.document_domain + half * domains)[None])[0]
    null = [z_of(batch).astype(np.float32) for batch in batches(labels, HALVES * domains * (columns.shape[1] + len(columns)))]
    drawn = np.concatenate(null) if null else np.zeros((0, *z.shape), np.float32)
    found = []
    for side in range(HALVES):
        part = sums.take(np.flatnonzero(half == side))
        p = pooled_p(z[side], drawn[:, side], expected=part.hits[:, 0].sum(axis=0, dtype=np.float64))
        lift, error = lift_error(*clustered_usage(part), part.by_domain(part.hits.sum(axis=-1) > 0))
        found.append(HalfTest(z=z[side][:, None], p=p[:, None], lift=lift, error=error))
    return tuple(found)


def _moment_columns(hits: np.ndarray) -> np.ndarray:
    """Columns [documents, 3 experts + 3] whose domain sums give h, h^2, h s, s, s^2 and 1 by one product (h hits, s slots)."""
    hits = hits.astype(np.float32)
    slots = hits.sum(axis=-1, keepdims=True)
    return np.concatenate([hits, hits**2, hits * slots, slots, slots**2, (slots > 0).astype(np.float32)], axis=1)


def joined(layers: list[LayerTests]) -> SpecialistTable:
    """The tests of all layers, decided over all of them; experts that a narrow layer lacks are not tested."""

    def together(name: str, side: int | None = None, fill: float = np.nan) -> np.ndarray:
        return side_by_side([getattr(each if side is None else each.halves[side], name) for each in layers], fill=fill)

    of_halves = {entry.name: np.stack([together(entry.name, side) for side in range(HALVES)]) for entry in fields(HalfTest)}
    unknown, each_p, each_lift = together("unknown", fill=False), of_halves["p"], of_halves["lift"]
    p = np.where(unknown, np.nan, np.minimum(1.0, HALVES * each_p.min(axis=0)))
    q = false_discovery_q(p)
    with np.errstate(invalid="ignore"):
        passed = p[q <= FALSE_DISCOVERY_RATE]
        chose = HALVES * each_p <= passed.max(initial=0.0)
        replicated = np.all(each_lift > 1, axis=0, keepdims=True)[0]
    # A half says how strong a cell is where the other chose it. Both do where both chose, or none: then the ends are averaged too,
    # since two halves that agree on a cell are no longer two independent looks at it.
    asked = chose[::-1] | (chose == chose[::-1])
    lift, error = (np.where(asked, of_halves[name], 0.0).sum(axis=0) / asked.sum(axis=0) for name in ("lift", "error"))
    z = np.take_along_axis(of_halves["z"], np.where(each_p[1] < each_p[0], 1, 0)[None], axis=0)[0]
    table = SpecialistTable(
        hits=together("hits", fill=0), share=together("share", fill=0.0), lift=lift, lift_low=np.maximum(lift - error, 0.0),
        lift_high=lift + error, z=z, p=p, q=q, replicated=replicated, unknown=unknown, specialist=np.zeros(p.shape, bool),
    )  # fmt: skip
    return replace(table, specialist=table.at_least(LEAST_LIFT))


def listed_specialists(table: SpecialistTable) -> np.ndarray:
    """Domain, layer and expert of the specialists that a result lists, by falling lift, int [listed, 3]."""
    found = np.argwhere(table.specialist)
    ranked = found[np.argsort(-table.lift[tuple(found.T)], kind="stable")]
    if len(ranked) <= LISTED_SPECIALISTS:
        return ranked
    domain = ranked[:, 0]
    place = np.empty(len(ranked), np.int64)
    for each in np.unique(domain):
        place[domain == each] = np.arange(np.count_nonzero(domain == each))
    return ranked[np.sort(np.argsort(place, kind="stable")[:LISTED_SPECIALISTS])]


def lift_error(usage: np.ndarray, variance: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""The lift p_d / pbar, and how far the ends of its 95 % interval are from it, both [domains, layers, experts].

    .. math:: se^2 = \bigl[(1 - \tfrac{lift}{D})^2 var(p_d) + (\tfrac{lift}{D})^2 \sum_{d' \ne d} var(p_{d'})\bigr] / \bar p^2

    the linearised ratio, with the documents of each domain as clusters, times Student's t with Satterthwaite's degrees of freedom.

    Args:
        usage, variance: see ``clustered_usage``.
        documents: [domains, layers], how many have tokens.
    """
    mixture = usage.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = usage / mixture
        part = lift / len(usage)
        freedom = (documents - 1)[..., None]
        own, other = (1 - part) ** 2 * variance, part**2
        squares = variance**2 / freedom
        total = own + other * (variance.sum(axis=0) - variance)
        degrees = total**2 / (own**2 / freedom + other**2 * (squares.sum(axis=0) - squares))
        return lift, stdtrit(np.where(total > 0, degrees, 1.0), 0.975) * np.sqrt(total) / mixture
