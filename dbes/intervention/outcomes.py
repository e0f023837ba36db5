r"""What arms gained and what they forgot, with intervals over seeds and documents.

Gain of a domain is the bits per byte saved on its held-out documents, :math:`\sum_i (n_i^{base} - n_i) / \ln 2 / \sum_i bytes_i`, mean over
seeds; forgetting is minus the mean gain of the other domains. Every figure is recomputed with one seed left out and with one
document left out in turn; its variance is the sum over the strata (seeds; documents of each domain) of

.. math:: \frac{n-1}{n} \sum_i (\theta_{(i)} - \bar\theta_{(\cdot)})^2

which counts what seeds and documents share twice and so errs on the wide side. Intervals use Student's t with Satterthwaite's
degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The trajectory of one arm on held-out documents.

    Attributes:
        nats: by domain, [seeds, points, documents].
        seconds: of training until each point, [seeds, points].
    """

    nats: Mapping[str, np.ndarray]
    seconds: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Gain and forgetting of an arm at every point, replicate by replicate; a point 0 of no training comes first.

    Attributes:
        gain: [replicates, 1 + points]; forgetting: the same, mean of the other domains; worst: of the worst of them.
    """

    gain: np.ndarray
    forgetting: np.ndarray
    worst: np.ndarray


def strata_of(*sizes: int) -> np.ndarray:
    """Which stratum each replicate leaves a unit of, int [replicates]; -1 for the first, the whole sample.

    Args:
        sizes: of the strata: seeds, then documents by domain. One of a single unit cannot be left out and has no replicate.
    """
    return np.concatenate([[-1], *(np.full(size, index) for index, size in enumerate(sizes) if size > 1)]).astype(int)


def curves_of(
    measured: Measured, target: str, others: Sequence[str], *, base: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray]
) -> Curves:
    """The curves of an arm with every seed and every document left out in turn, in the order of ``strata_of``.

    Args:
        base: nats of the documents before training, by domain; sizes: their bytes.
    """
    names = (target, *others)
    saved = {name: (base[name] - measured.nats[name]) / math.log(2) for name in names}
    gains = replicates_of(saved, names, sizes=sizes)
    gains = np.concatenate([np.zeros((*gains.shape[:2], 1)), gains], axis=2)
    return Curves(gain=gains[:, 0], forgetting=-gains[:, 1:].mean(axis=1), worst=-gains[:, 1:].min(axis=1))


def replicates_of(saved: Mapping[str, np.ndarray], names: Sequence[str], *, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
    """The total of every domain with every seed and every unit (document or item) left out in turn, [replicates, domains, points].

    The total is the mean over seeds of the sum over units of ``saved`` [seeds, points, units] by the sum of their ``sizes`` [units].
    Replicates are in the order of ``strata_of`` for the seeds and then the units of each of ``names``.
    """
    totals = {name: saved[name].sum(axis=-1) / sizes[name].sum() for name in names}  # [seeds, points]
    seeds = len(totals[names[0]])

    def table(gains: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([gains[name] for name in names])  # [domains, points]

    mean = {name: totals[name].mean(axis=0) for name in names}
    rows = [table(mean)]
    if seeds > 1:
        rows += [table({name: np.delete(totals[name], seed, axis=0).mean(axis=0) for name in names}) for seed in range(seeds)]
    for name in names:
        by_document = saved[name].mean(axis=0)  # [points, documents]
        count = by_document.shape[1]
        for document in range(count if count > 1 else 0):
            rest = (by_document.sum(axis=1) - by_document[:, document]) / (sizes[name].sum() - sizes[name][document])
            rows.append(table({**mean, name: rest}))
    return np.stack(rows)


def accuracy_changes(
    right: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], target: str, others: Sequence[str]
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Change of accuracy in the target and in the other domains (their mean), [replicates, points] each, and the strata behind it.

    None for the target or for the others without items.

    Args:
        right: by domain of those that have items, whether each was answered rightly: [seeds, points, items]; base: [items], before
            training.
    """
    names = [name for name in (target, *others) if name in right]
    saved = {name: right[name].astype(np.float64) - base[name] for name in names}
    changes = replicates_of(saved, names, sizes={name: np.ones(len(base[name])) for name in names})
    strata = strata_of(len(saved[names[0]]), *(len(base[name]) for name in names))
    first = int(target in right)
    return changes[:, 0] if first else None, changes[:, first:].mean(axis=1) if len(names) > first else None, strata


def accuracy_figure(replicates: np.ndarray, strata: np.ndarray) -> Figure:
    """As ``figure``, but without an interval where no seed and no item differs from another: the spread is unknown then, not 0."""
    if np.ptp(replicates) < 1e-12:
        return Figure(value=float(replicates[0]), low=None, high=None, p=None)
    return figure(replicates, strata)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value, its 95 % interval, and the two-sided p that it is 0; None where too little was measured."""

    value: float
    low: float | None
    high: float | None
    p: float | None

    def as_json(self) -> dict[str, float | None]:
        digits = {"value": self.value, "low": self.low, "high": self.high, "p": self.p}
        return {name: None if one is None or not math.isfinite(one) else float(f"{one:.5g}") for name, one in digits.items()}


def figure(replicates: np.ndarray, strata: np.ndarray) -> Figure:
    """A figure from its replicates [replicates]; NaN in any of them: no interval."""
    value = float(replicates[0])
    terms, degrees = [], []
    for stratum in np.unique(strata[1:]):
        left = replicates[strata == stratum]
        count = len(left)
        terms.append((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
        degrees.append(count - 1)
    variance = sum(terms)
    if not terms or not np.isfinite(replicates).all():
        return Figure(value=value, low=None, high=None, p=None)
    if variance == 0:
        return Figure(value=value, low=value, high=value, p=1.0 if value == 0 else 0.0)
    freedom = variance**2 / sum(term**2 / degree for term, degree in zip(terms, degrees, strict=True))
    error = math.sqrt(variance)
    half = float(student.ppf(0.975, freedom)) * error
    return Figure(value=value, low=value - half, high=value + half, p=float(2 * student.sf(abs(value) / error, freedom)))


def log_ratio(above: np.ndarray, below: np.ndarray, strata: np.ndarray) -> Figure | None:
    """Ratio of two replicated values with its interval on the log scale, p that it is 1; None unless both are positive throughout."""
    if not (np.isfinite(above).all() and np.isfinite(below).all() and (above > 0).all() and (below > 0).all()):
        return None
    found = figure(np.log(above / below), strata)
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return Figure(value=math.exp(found.value), low=ends[0], high=ends[1], p=found.p)


def best_within(curves: Curves, forgetting: np.ndarray) -> np.ndarray:
    """Largest gain along a trajectory while forgetting at most so much, [replicates]: training stopped early at its best point.

    Between two points the trajectory is a straight line. It starts at no gain and no forgetting, so the result is at least 0.

    Args:
        forgetting: [replicates], not negative.
    """
    f0, f1 = curves.forgetting[:, :-1], curves.forgetting[:, 1:]
    g0, g1 = curves.gain[:, :-1], curves.gain[:, 1:]
    limit = forgetting[:, None]
    at_points = np.where(curves.forgetting <= limit, curves.gain, -np.inf).max(axis=1)
    crosses = (f0 - limit) * (f1 - limit) < 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(crosses, (limit - f0) / (f1 - f0), 0.0)
    between = np.where(crosses, g0 + share * (g1 - g0), -np.inf).max(axis=1)
    return np.maximum(at_points, between)


def matched(one: Curves, *others: Curves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains of an arm and of the best of others when all forget equally much: (one, others, forgetting), [replicates] each.

    The forgetting is the smaller of the two sides' at their end (not below 0), so that neither side is extrapolated.
    """
    end = np.max([other.forgetting[:, -1] for other in others], axis=0)
    level = np.maximum(0.0, np.minimum(one.forgetting[:, -1], end))
    return best_within(one, level), np.max([best_within(other, level) for other in others], axis=0), level


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point (gain, forgetting) gains at least as much and forgets at most as much, one of them strictly."""
    return [
        not any(g >= gain and f <= lost and (g > gain or f < lost) for g, f in points)
        for gain, lost in points
    ]  # fmt: skip
