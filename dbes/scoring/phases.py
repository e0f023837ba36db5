"""Prompt and generated text of one recording side by side, and whether they differ, paired by document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from dbes.results import Result
from dbes.scoring.decoding import Z95
from dbes.scoring.resampling import jackknife
from dbes.scoring.score import REPLICATED, Scores


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A difference of two scores on the same documents, with its 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def paired(value: float, left_out: np.ndarray, domain: np.ndarray, *, drawn: float = 0.0) -> Paired:
    """The test of a difference.

    Args:
        left_out: [documents], the difference without each document.
        domain: int [documents].
        drawn: variance of what is drawn besides; it belongs to the interval.
    """
    found = jackknife(np.asarray(value), left_out, domain)
    error, reach = math.hypot(float(found.error), drawn**0.5), math.hypot(float(found.reach), Z95 * drawn**0.5)
    if math.isnan(error):
        p = math.nan
    elif error > 0:
        p = float(2 * student.sf(abs(value) / error, found.freedom))
    else:
        p = 1.0 if value == 0 else 0.0
    return Paired(difference=value, low=value - reach, high=value + reach, p=p)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A score, the same without each of its documents [documents], their ids and domains."""

    score: float
    left_out: np.ndarray
    documents: Sequence[str]
    domain: np.ndarray


def phase_test(prompt: Side, generated: Side) -> Paired:
    """Generated minus prompt. A document that has tokens of one phase only (its answer is empty, or was left out) is a unit all the same:
    without it the score of the other phase is what it is."""
    places: dict[tuple[str, int], int] = {}
    for side in (prompt, generated):
        for key in zip(side.documents, side.domain.tolist(), strict=True):
            places.setdefault(key, len(places))
    left = []
    for side in (prompt, generated):
        scores = np.full(len(places), side.score)
        scores[[places[key] for key in zip(side.documents, side.domain.tolist(), strict=True)]] = side.left_out
        left.append(scores)
    domain = np.asarray([key[1] for key in places], np.int64)
    return paired(generated.score - prompt.score, left[1] - left[0], domain)


def model_score(result: Result, metric: str) -> float | None:
    """The model's score, or None where a domain or a layer is missing in it: no mean is taken over a gap."""
    rows = [record for record in result.calibrated if record.metric == metric]
    by_domain = [record for record in rows if record.domain is not None]
    missing = {record.domain for record in by_domain} != set(result.task.domains) if by_domain else metric != "der"
    if missing or {record.layer for record in rows} != {*result.model.layers, None} or any(math.isnan(record.score) for record in rows):
        return None
    return result.record(metric).score


def phase_facts(prompt: Scores, generated: Scores) -> dict[str, Any]:
    """What a result says of its phases: tokens and documents of each, and both scores and their difference by metric."""
    sides = {"prompt": prompt, "generated": generated}
    merged = any("groups" in scores.result.settings for scores in sides.values())
    found: dict[str, Any] = {}
    for name, scores in sides.items():
        domains = scores.result.task.domains
        sizes = {size: sum(getattr(facts, size) for facts in domains.values()) for size in ("tokens", "documents")}
        found[name] = {**sizes, "without": [domain for domain, facts in domains.items() if not facts.tokens]}
    metrics: dict[str, dict[str, float | None]] = {}
    for metric in REPLICATED:
        row: dict[str, float | None] = {}
        for name, scores in sides.items():
            if model_score(scores.result, metric) is not None:
                record = scores.result.record(metric)
                row |= {name: record.score, f"{name}_low": _known(record.score_low), f"{name}_high": _known(record.score_high)}
        if sides.keys() <= row.keys() and not merged:
            test = phase_test(_side(prompt, metric), _side(generated, metric))
            row |= {key: _known(getattr(test, key)) for key in ("difference", "low", "high", "p")}
        metrics[metric] = row
    return {**found, "metrics": metrics}


def _side(scores: Scores, metric: str) -> Side:
    shape = scores.left_out
    left_out = scores.replicates[metric][:, -1].astype(np.float64)
    return Side(
        score=scores.result.record(metric).score, left_out=left_out, documents=shape.document_ids, domain=np.asarray(shape.document_domain)
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
