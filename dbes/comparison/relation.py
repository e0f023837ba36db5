"""Whether models, or domains within a model, that are more specialized have a lower loss or a higher accuracy: rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from dbes.comparison.entries import LeaderboardEntry
from dbes.results import Result
from dbes.scoring.decoding import Z95

LEAST = 4
"""Models, or domains, below which a rank correlation says nothing."""

Of = Literal["loss", "accuracy"]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Spearman's correlation of specialization with loss or accuracy; NaN where too few models have it.

    Attributes:
        models: that have both; rho, low, high: over them, with its 95 % interval.
        within: mean over models of the correlation over their domains, with its interval over models; within_models: that have enough.
    """

    of: Of
    models: int
    rho: float = math.nan
    low: float = math.nan
    high: float = math.nan
    within_models: int = 0
    within: float = math.nan
    within_low: float = math.nan
    within_high: float = math.nan


def relations(entries: Sequence[LeaderboardEntry], scores: Sequence[float | None]) -> tuple[Relation, ...]:
    """The correlations with what at least one of the models has.

    Args:
        scores: specialization of each entry, None where it has none.
    """
    models = [(entry, score) for entry, score in zip(entries, scores, strict=True) if not entry.baseline and score is not None]
    found = []
    for of in ("loss", "accuracy"):
        pairs = [(score, value) for entry, score in models if (value := getattr(entry, of)) is not None]
        if pairs:
            rhos = [rho for entry, _ in models if (rho := _within(entry.result, of)) is not None]
            found.append(_relation(of, np.asarray(pairs), np.asarray(rhos)))
    return tuple(found)


def _relation(of: Of, pairs: np.ndarray, rhos: np.ndarray) -> Relation:
    rho, low, high = spearman(pairs[:, 0], pairs[:, 1])
    within = within_low = within_high = math.nan
    if len(rhos) >= LEAST:
        within = float(rhos.mean())
        reach = float(student.ppf(norm.cdf(Z95), len(rhos) - 1) * rhos.std(ddof=1) / math.sqrt(len(rhos)))
        within_low, within_high = max(within - reach, -1.0), min(within + reach, 1.0)
    return Relation(
        of=of, models=len(pairs), rho=rho, low=low, high=high,
        within_models=len(rhos), within=within, within_low=within_low, within_high=within_high,
    )  # fmt: skip


def spearman(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    r"""Spearman's rank correlation with its 95 % interval; NaN for fewer than `LEAST` pairs, or where one side is constant.

    .. math:: \tanh\Bigl(\operatorname{artanh} r \pm 1.96 \sqrt{\tfrac{1 + r^2 / 2}{n - 3}}\Bigr)

    Bonett and Wright (2000), doi:10.1007/BF02294183.
    """
    if len(one) < LEAST or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan, math.nan, math.nan
    rho = float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
    inside = min(max(rho, -1 + 1e-12), 1 - 1e-12)
    reach = Z95 * math.sqrt((1 + rho**2 / 2) / (len(one) - 3))
    return rho, math.tanh(math.atanh(inside) - reach), math.tanh(math.atanh(inside) + reach)


def _within(result: Result, of: Of) -> float | None:
    """The correlation over the domains of one model; None where too few have both."""
    measures = result.measures
    if measures is None:
        return None
    if of == "loss":
        values = {name: each.bits_per_byte.value for name, each in measures.loss.items()}
    else:
        values = {name: each.accuracy.value for name, each in measures.accuracy.items()}
    scores = {record.domain: record.score for record in result.calibrated if record.metric == "specialization" and record.layer is None}
    both = [(scores[name], value) for name, value in values.items() if name in scores and not math.isnan(scores[name])]
    rho = spearman(np.asarray([score for score, _ in both]), np.asarray([value for _, value in both]))[0]
    return None if math.isnan(rho) else rho
