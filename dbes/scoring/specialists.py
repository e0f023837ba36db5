"""Which experts serve which domain: lift with an interval, tested over documents, FDR-controlled, replicated in both halves.

The test is the studentized difference of METRICS section 4 with its null pooled over experts of a layer. A delta-method z of
the *log* lift finds specialists in 22-100 % of pure-noise runs; it is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from dbes.scoring.counts import Counts
from dbes.scoring.descriptive import random_halves
from dbes.scoring.layer_counts import LayerCounts, side_by_side
from dbes.scoring.metrics import usage_of
from dbes.scoring.resampling import NullDraws, clustered_usage, false_discovery_q, permutation_null, permuted_labels

FALSE_DISCOVERY_RATE = 0.05

RARE_HITS = 10.0
"""An expert that would get fewer hits than this in a domain, if the domain were like the mixture, is too rare to tell."""


@dataclass(frozen=True, kw_only=True)
class SpecialistTable:
    """One test per domain, layer and expert; all arrays [domains, layers, experts].

    Attributes:
        hits, share: slots of the domain that chose the expert, and their share p[d,l,e].
        lift: p / pbar, with lift_low, lift_high its 95 % interval (documents as clusters).
        z, p, q: the test and its false-discovery q-value.
        replicated: lift above 1 in both halves of the documents.
        unknown: seen too rarely to tell.
        specialist: q <= 5 %, lift > 1, replicated, not unknown.
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


def find_specialists(counts: Counts, *, permutations: int, seed: int) -> SpecialistTable:
    """The specialist test of every expert in every domain."""
    labels = permuted_labels(counts.shape.document_domain, permutations=permutations, seed=seed)
    half = random_halves(counts.shape.document_domain, seed=seed)
    return joined([layer_specialists(sums, permutation_null(sums, labels), half, *clustered_usage(sums)) for sums in counts.layers()])


def layer_specialists(sums: LayerCounts, null: NullDraws, half: np.ndarray, usage: np.ndarray, variance: np.ndarray) -> SpecialistTable:
    """What the specialist test is made of at one layer: its table but for what needs all layers, ``q`` and ``specialist``.

    Args:
        half: 0 or 1 for each document, see ``random_halves``.
        usage, variance: see ``clustered_usage``.
    """
    hits = sums.by_domain(sums.hits)
    mixture = usage.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = usage / mixture
    low, high = lift_interval(usage, variance)
    unknown = (mixture * hits.sum(axis=-1, keepdims=True) < RARE_HITS) | np.isnan(null.specialist_p)
    replicated = np.ones(hits.shape, bool)
    for side in (0, 1):
        part = usage_of(sums.take(np.flatnonzero(half == side)).totals().hits)
        replicated &= part > part.mean(axis=0)
    p = np.where(unknown, np.nan, null.specialist_p)
    return SpecialistTable(
        hits=hits.astype(np.int64), share=usage, lift=lift, lift_low=low, lift_high=high, z=null.z, p=p, q=np.full(p.shape, np.nan),
        replicated=replicated, unknown=unknown, specialist=np.zeros(p.shape, bool),
    )  # fmt: skip


def joined(tables: list[SpecialistTable]) -> SpecialistTable:
    """The tables of all layers as one, with the test decided over all of them; experts that a narrow layer lacks are not tested."""
    empty = {"hits": 0, "share": 0.0, "replicated": False, "unknown": False, "specialist": False}
    names = [entry.name for entry in fields(SpecialistTable)]
    table = SpecialistTable(**{n: side_by_side([getattr(each, n) for each in tables], fill=empty.get(n, np.nan)) for n in names})
    q = false_discovery_q(table.p)
    with np.errstate(invalid="ignore"):
        specialist = (q <= FALSE_DISCOVERY_RATE) & (table.lift > 1) & table.replicated & ~table.unknown
    return replace(table, q=q, specialist=specialist)


def lift_interval(usage: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""95 % interval of the lift p_d / pbar, both ends [domains, layers, experts].

    .. math:: se^2 = \bigl[(1 - \tfrac{lift}{D})^2 var(p_d) + (\tfrac{lift}{D})^2 \sum_{d' \ne d} var(p_{d'})\bigr] / \bar p^2

    the linearised ratio, with the documents of each domain as clusters; the lower end is not below 0.

    Args:
        usage, variance: see ``clustered_usage``.
    """
    mixture = usage.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = usage / mixture
        part = lift / len(usage)
        total = (1 - part) ** 2 * variance + part**2 * (variance.sum(axis=0) - variance)
        error = np.sqrt(total) / mixture
    return np.maximum(lift - 1.96 * error, 0.0), lift + 1.96 * error
