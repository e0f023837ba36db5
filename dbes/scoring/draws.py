"""How much a random router's scores vary with the draw of it.

One draw tells it by its experts: they are independent, so each is left out in turn. Several recorded draws show the spread itself, but
few of them at one layer: so what the experts say of a layer is scaled by how much larger the spread was at all layers. Stiffness has no
such variance: no scores are recorded of a random router, and the stability of a *set* is no sum over experts that one could be left out of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from dbes.scoring.metrics import above_chance
from dbes.scoring.resampling import CONFIDENCE, PERMUTATION_CELLS, DomainScores, domain_scores

BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class DrawSpread:
    """Variance of one metric's score over draws of a random router at one layer, [rows].

    Attributes:
        draws: how many were recorded.
        one: as the experts of one draw tell it.
        several: as the recorded draws have it; None of one.
    """

    draws: int
    one: np.ndarray
    several: np.ndarray | None


def draw_reach(layers: Sequence[DrawSpread]) -> np.ndarray:
    """How far the excess over the mean of the recorded draws may be off, squared, [rows, layers + 1]: half of 95 %, last of all layers.

    A model counts as a draw of its own: an excess has to be larger than what another draw of the random router would show against
    the recorded ones, or an untrained model would "exceed" its control: :math:`1 + 1/R` times the variance of one of R draws.

    Args:
        layers: of one metric. Rows are the domains and their mean, or this alone.
    """
    variance = np.stack([layer.one for layer in layers], axis=-1)
    draws, quantile = layers[0].draws, norm.ppf((1 + CONFIDENCE) / 2)
    several = [layer.several for layer in layers if layer.several is not None]
    if several:
        found = np.stack(several, axis=-1)
        known, last = ~np.isnan(found[-1]), np.arange(len(found)) == len(found) - 1
        quantile = student.ppf((1 + CONFIDENCE) / 2, (draws - 1) * max(1, known.sum()))
        for rows in (last, ~last):  # the domains share a draw, so that their mean is a row of its own
            seen, told = (np.nansum(part[rows][:, known]) for part in (found, variance))
            variance[rows] = variance[rows] * (seen / told) if told > 0 else seen / max(1, rows.sum() * known.sum())
    model = variance.mean(axis=-1, keepdims=True) / variance.shape[-1]
    return np.concatenate([variance, model], axis=-1) * (1 + 1 / draws) * quantile**2


def without_each_expert(counts: np.ndarray, tokens: np.ndarray, *, experts: np.ndarray) -> DomainScores:
    """The domain metrics with each expert's column dropped in turn: a leading [experts] axis.

    The experts of a random router are independent draws, so the spread of these values tells how much its scores would differ
    with other draws, which one recorded control cannot show by itself.

    Args:
        counts: [domains, layers, experts]; tokens: [domains, layers]; experts: [layers].
    """
    width = counts.shape[-1]
    size = max(1, PERMUTATION_CELLS // counts.size)
    parts = []
    for start in range(0, width, size):
        dropped = np.arange(start, min(start + size, width))
        fewer = np.repeat(counts[None], len(dropped), axis=0)
        fewer[np.arange(len(dropped)), :, :, dropped] = 0
        parts.append(domain_scores(fewer, np.repeat(tokens[None], len(dropped), axis=0), experts=experts))
    return DomainScores.stack(parts, axis=0)


def draw_variance(fewer: np.ndarray) -> np.ndarray:
    """Variance over draws of a random router, [rows], by the jackknife over its experts: [experts, rows] without each."""
    return (len(fewer) - 1) / len(fewer) * ((fewer - fewer.mean(axis=0)) ** 2).sum(axis=0)


def ngram_draw_variance(alike: np.ndarray, expected: np.ndarray, windows: np.ndarray, primaries: np.ndarray, *, size: int) -> np.ndarray:
    r"""Variance of the n-gram score over draws of a random router, by domain and, last, of their mean: [domains + 1].

    Counts say how many windows one expert filled, not which. A token is taken to keep the expert of the one before with a probability
    :math:`\rho` that is the same for all experts of a domain, and else to get it as chance has it, so that expert e with share q_e of the
    primaries, and x_e of W windows by chance, fills

    .. math:: a_e = W q_e (\rho + (1 - \rho) m_e)^{n-1}, \qquad x_e = W q_e m_e^{n-1}, \qquad \sum_e a_e = a

    windows. Without expert e, its windows and the share of windows that begin with it are left out of ratio and chance. Frozen routers
    against each other: the excess over 5, 10 and 20 tokens covers 0 in 92-100 %, over 2 tokens in 82-92 % only, since experts differ in how
    long they keep a token; only several draws show that.

    Args:
        alike, windows: [domains], of one size; expected: [domains, experts], see ``metrics.shuffled_by_expert``.
        primaries: [domains, experts], tokens whose primary the expert is.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        share = primaries / primaries.sum(axis=-1, keepdims=True)
        begun = windows[:, None] * share
        repeat = np.where(begun > 0, (expected / begun) ** (1 / (size - 1)), 0.0)
        filled = _filled(alike, begun, repeat, size)
        ratio, chance = ((part.sum(axis=-1, keepdims=True) - part) / (windows[:, None] - begun) for part in (filled, expected))
    return draw_variance(above_chance(*(np.concatenate([cells, cells.mean(axis=0, keepdims=True)]) for cells in (ratio, chance))).T)


def _filled(alike: np.ndarray, begun: np.ndarray, repeat: np.ndarray, size: int) -> np.ndarray:
    """Windows that each expert filled, [domains, experts], by bisection for the probability to stay."""
    low, high = np.zeros((len(alike), 1)), np.ones((len(alike), 1))

    def filled(stay: np.ndarray) -> np.ndarray:
        return begun * (stay + (1 - stay) * repeat) ** (size - 1)

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = filled(middle).sum(axis=-1, keepdims=True) >= alike[:, None]
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return filled(high)
