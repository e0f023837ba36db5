"""The excess of a model over its random router, with what its tests are made of: the documents, and the draw of that router."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from dbes.comparison.entries import LeaderboardEntry
from dbes.scoring.resampling import CONFIDENCE, jackknife
from dbes.scoring.score import EXCESS


@dataclass(frozen=True, kw_only=True)
class Excess:
    """``left_out``: [documents], without each document; ``draw_variance``: what another draw of the random router would change."""

    value: float
    left_out: np.ndarray
    draw_variance: float


def excess_of(entry: LeaderboardEntry, metric: str) -> Excess | None:
    """The model's excess, mean over its layers; None where it has no random router, or was written before its excess was kept."""
    found = None if entry.replicates is None else entry.replicates.by_metric.get(f"{metric}{EXCESS}")
    if found is None or entry.replicates is None:
        return None
    record = entry.result.record(metric)
    if math.isnan(record.excess_low) or np.isnan(found[:, -1]).any():
        return None
    left_out = found[:, -1].astype(np.float64)
    # The interval of an excess is of both; what the documents leave of it is the draw of the router.
    documents = float(jackknife(np.asarray(record.excess), left_out, entry.replicates.document_domain).reach)
    rest = max((record.excess_high - record.excess) ** 2 - documents**2, 0.0)
    return Excess(value=record.excess, left_out=left_out, draw_variance=rest / float(norm.ppf((1 + CONFIDENCE) / 2)) ** 2)


def any_has_excess(entries: Sequence[LeaderboardEntry], metric: str) -> bool:
    """Whether entries can be ranked by excess; those without stand below these, since what their routers add is not known."""
    return any(excess_of(entry, metric) is not None for entry in entries)
