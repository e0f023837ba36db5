r"""Chains of experts through the layers that a domain follows more than all domains together, by dynamic programming.

A token's route is read as a walk: from one of its slots in a layer to one of its slots in the next. With p_d(f | e) the domain's
probability of such a step and pbar the mean of all domains' probabilities, a chain's log-lift is

.. math:: \ln\frac{p_d(e_1)}{\bar p(e_1)} + \sum_l \ln\frac{p_d(e_{l+1} | e_l)}{\bar p(e_{l+1} | e_l)}

(pbar is a mean of conditional probabilities: pooling the domains' pairs instead would reward a chain for leaving the domain's own
experts, where few of its tokens are, and coming back). It is a sum over transitions, so the best chain is found exactly (Viterbi
1967). Only transitions count that the domain would make at least ``RARE_HITS`` times if it were like the mixture; the best chain
would else be the rarest.
"""

from __future__ import annotations

import math

import numpy as np

from dbes.paths.evidence import Evidence
from dbes.paths.types import Trajectory
from dbes.scoring.descriptive import random_halves
from dbes.scoring.metrics import usage_of
from dbes.scoring.resampling import jackknife
from dbes.scoring.specialists import RARE_HITS
from dbes.trace.types import TokenRoutes


def log_lifts(transitions: np.ndarray, hits: np.ndarray, domain: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-lift of starting at each expert, [experts], and of each transition, [layers - 1, experts, experts], in nats.

    Minus infinity where the transition is too rare to tell or the domain never makes it.

    Args:
        transitions: [domains, layers - 1, experts, experts], pairs of slots; hits: [domains, layers, experts], used for a
            model of one layer only.
    """
    if not transitions.shape[1]:
        usage = usage_of(hits[:, 0])
        return _log_ratio(usage[domain], _mean(usage), hits[domain, 0].sum()), np.zeros((0, hits.shape[2], hits.shape[2]))
    totals = transitions.sum(axis=(2, 3), keepdims=True)
    origins = transitions.sum(axis=3, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares, starts = np.where(totals > 0, transitions / totals, np.nan), origins[:, 0, :, 0] / totals[:, 0, :, 0]
        steps = np.where(origins > 0, transitions / origins, np.nan)
        common = _mean(shares) * totals[domain] >= RARE_HITS
        lifts = np.where(common, np.log(steps[domain] / _mean(steps)), -np.inf)
    return _log_ratio(starts[domain], _mean(starts), totals[domain, 0, 0, 0]), np.where(np.isnan(lifts), -np.inf, lifts)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over domains of those that are known; NaN where none is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _log_ratio(own: np.ndarray, mixture: np.ndarray, total: float | np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((mixture * total >= RARE_HITS) & (own > 0), np.log(own / mixture), -np.inf)


def best_chain(first: np.ndarray, steps: np.ndarray) -> tuple[tuple[int, ...], float]:
    """The chain of largest sum, and that sum; no experts and minus infinity when there is no possible chain."""
    value, back = first, []
    for step in steps:
        reached = value[:, None] + step
        back.append(reached.argmax(axis=0))
        value = reached.max(axis=0)
    last = int(value.argmax())
    total = float(value[last])
    if not math.isfinite(total):
        return (), -math.inf
    chain = [last]
    for pointer in reversed(back):
        chain.append(int(pointer[chain[-1]]))
    return tuple(reversed(chain)), total


def disjoint_chains(first: np.ndarray, steps: np.ndarray, *, limit: int) -> list[tuple[tuple[int, ...], float]]:
    """The best chain, then the best that shares no cell with those before, and so on; at most ``limit`` of positive sum."""
    first, steps = first.copy(), steps.copy()
    found = []
    while len(found) < limit:
        chain, total = best_chain(first, steps)
        if not chain or total <= 0:
            break
        found.append((chain, total))
        first[chain[0]] = -np.inf
        for layer, expert in enumerate(chain[1:]):
            steps[layer, :, expert] = -np.inf
    return found


def best_through(transitions: np.ndarray, hits: np.ndarray, domain: int) -> np.ndarray:
    """Sum of the best chain through each cell (max-marginal), [layers, experts]; minus infinity where no chain passes."""
    first, steps = log_lifts(transitions, hits, domain)
    forward, backward = [first], [np.zeros_like(first)]
    for step in steps:
        forward.append((forward[-1][:, None] + step).max(axis=0))
    for step in steps[::-1]:
        backward.append((step + backward[-1][None, :]).max(axis=1))
    return np.stack(forward) + np.stack(backward[::-1])


def strongest(evidence: Evidence, domain: int, *, limit: int = 5, seed: int = 0) -> tuple[Trajectory, ...]:
    """The strongest chains of a domain, found on one random half of the texts and measured on the other."""
    shape = evidence.shape
    half = random_halves(shape.document_domain, seed=seed)
    if evidence.routes is None:
        return ()
    halves = [np.flatnonzero(half == side) for side in (0, 1)]
    searched = evidence.transitions_of(half == 0)
    hits = evidence.counts.take(halves[0]).by_domain(lambda sums: sums.hits)
    if not hits[domain].any():
        return ()
    found = disjoint_chains(*log_lifts(searched, hits, domain), limit=limit)
    if not found:
        return ()
    rows = np.flatnonzero(half[evidence.routes.document] == 1)
    routes = evidence.routes.take(rows)
    texts = np.searchsorted(halves[1], routes.document)
    trajectories = []
    for chain, total in found:
        joint, origin, pairs = chain_counts(routes, texts, len(halves[1]), chain)
        value, low, high = measured_lift(joint, origin, pairs, shape.document_domain[halves[1]], len(shape.domains), domain)
        trajectories.append(Trajectory(experts=chain, found=total, log_lift=value, low=low, high=high))
    return tuple(trajectories)


def chain_counts(routes: TokenRoutes, texts: np.ndarray, count: int, chain: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of slots of each text that make the chain's transitions, that start at its experts, and all: each [texts, layers - 1].

    In a model of one layer a slot stands for a pair.
    """
    missing = np.iinfo(routes.ids.dtype).max
    ran = (routes.ids != missing).sum(axis=2).astype(np.float64)
    at = (routes.ids == np.asarray(chain, routes.ids.dtype)[None, :, None]).any(axis=2).astype(np.float64)
    parts = (at, at, ran) if len(chain) == 1 else (at[:, :-1] * at[:, 1:], at[:, :-1] * ran[:, 1:], ran[:, :-1] * ran[:, 1:])
    sums = []
    for part in parts:
        total = np.zeros((count, part.shape[1]))
        np.add.at(total, texts, part)
        sums.append(total)
    return sums[0], sums[1], sums[2]


def measured_lift(
    joint: np.ndarray, origin: np.ndarray, pairs: np.ndarray, document_domain: np.ndarray, domains: int, domain: int
) -> tuple[float | None, float | None, float | None]:
    """Log-lift of a chain, bias-corrected, and its 95 % interval, by the jackknife over texts; None where undefined.

    Args:
        joint, origin, pairs: [texts, layers - 1], see ``chain_counts``.
    """
    columns = np.stack([joint, origin, pairs], axis=-1)
    sums = np.stack([columns[document_domain == index].sum(axis=0) for index in range(domains)])
    value = _log_lift(sums, domain)
    if not math.isfinite(value):
        return None, None, None
    left_out = np.empty(len(columns))
    for index, own in enumerate(document_domain):
        fewer = sums.copy()
        fewer[own] -= columns[index]
        left_out[index] = _log_lift(fewer, domain)
    if not np.isfinite(left_out).all() or (document_domain == domain).sum() < 2:
        return value, None, None
    found = jackknife(np.asarray(value), left_out, document_domain)
    return float(found.corrected), float(found.corrected - found.reach), float(found.corrected + found.reach)


def _log_lift(sums: np.ndarray, domain: int) -> float:
    """From sums [domains, layers - 1, (joint, origin, pairs)]; a domain that is never at an expert is left out of that step's mean."""
    with np.errstate(invalid="ignore", divide="ignore"):
        starts, steps = sums[:, 0, 1] / sums[:, 0, 2], sums[..., 0] / sums[..., 1]
        return float(np.log(starts[domain] / _mean(starts)) + np.log(steps[domain] / _mean(steps)).sum())
