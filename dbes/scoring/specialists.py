"""Which experts serve which domain: lift with an interval, tested over documents, FDR-controlled, replicated in both halves.

The test is the studentized difference of METRICS section 4 with its null pooled over experts of a layer. A delta-method z of
the *log* lift finds specialists in 22-100 % of pure-noise runs; it is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbes.scoring.descriptive import random_halves
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.metrics import usage_of
from dbes.scoring.resampling import NullDraws, false_discovery_q, usage_variance

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


def find_specialists(statistics: LayerCounts, null: NullDraws, *, seed: int) -> SpecialistTable:
    """The specialist test of every expert in every domain."""
    hits = statistics.by_domain(statistics.hits)
    share = usage_of(hits)
    mixture = share.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = share / mixture
    low, high = lift_interval(statistics, lift)
    expected = mixture * hits.sum(axis=-1, keepdims=True)
    layers_experts = np.asarray(statistics.shape.experts)[:, None] > np.arange(hits.shape[-1])
    unknown = (expected < RARE_HITS) | (np.isnan(null.specialist_p) & layers_experts)
    p = np.where(unknown | ~layers_experts, np.nan, null.specialist_p)
    q = false_discovery_q(p)
    half = random_halves(statistics.shape.document_domain, seed=seed)
    replicated = np.ones(hits.shape, bool)
    for side in (0, 1):
        part = usage_of(statistics.by_domain(statistics.hits * (half == side)[:, None, None]))
        replicated &= part > part.mean(axis=0)
    with np.errstate(invalid="ignore"):
        specialist = (q <= FALSE_DISCOVERY_RATE) & (lift > 1) & replicated & ~unknown
    return SpecialistTable(
        hits=hits.astype(np.int64), share=share, lift=lift, lift_low=low, lift_high=high, z=null.z, p=p, q=q,
        replicated=replicated, unknown=unknown & layers_experts, specialist=specialist,
    )  # fmt: skip


def lift_interval(statistics: LayerCounts, lift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""95 % interval of the lift p_d / pbar, both ends [domains, layers, experts].

    .. math:: se^2 = \bigl[(1 - \tfrac{lift}{D})^2 var(p_d) + (\tfrac{lift}{D})^2 \sum_{d' \ne d} var(p_{d'})\bigr] / \bar p^2

    the linearised ratio, with the documents of each domain as clusters; the lower end is not below 0.
    """
    hits, slots = statistics.hits.astype(np.float64), statistics.slots
    ran = slots > 0
    usage, variance = usage_variance(
        np.moveaxis(statistics.by_domain(hits), 0, 1),
        np.moveaxis(statistics.by_domain(hits**2), 0, 1),
        np.moveaxis(statistics.by_domain(hits * slots[..., None]), 0, 1),
        statistics.by_domain(slots).T,
        statistics.by_domain(slots**2).T,
        statistics.by_domain(ran).T,
    )
    usage, variance = np.moveaxis(usage, 1, 0), np.moveaxis(variance, 1, 0)
    part = lift / usage.shape[0]
    total = (1 - part) ** 2 * variance + part**2 * (variance.sum(axis=0) - variance)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(total) / usage.mean(axis=0)
    return np.maximum(lift - 1.96 * error, 0.0), lift + 1.96 * error
