"""How much a random router's n-grams vary with its draw: told from one draw, and seen over many."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dbes.scoring import metrics
from dbes.scoring.draws import DrawSpread, draw_reach, draw_variance, ngram_draw_variance
from dbes.scoring.estimates import NGRAMS
from dbes.scoring.metrics import NGRAM_SIZES
from dbes.scoring.resampling import domain_ratio, jackknife, left_out_ratios
from dbes.scoring.score import score
from dbes.trace.store import Trace

DOMAINS, DOCUMENTS, TOKENS, EXPERTS, WIDTH, LAYERS = 4, 10, 100, 32, 48, 4
DOMAIN = np.repeat(np.arange(DOMAINS), DOCUMENTS)


def representations(random: np.random.Generator) -> np.ndarray:
    """What routers read, [documents, tokens, width]: it drifts along a text, and differs between texts and domains."""
    shift = (
        0.5 * random.normal(size=WIDTH)
        + 0.5 * random.normal(size=(len(DOMAIN), WIDTH))
        + 0.3 * random.normal(size=(DOMAINS, WIDTH))[DOMAIN]
    )
    hidden, state = np.zeros((len(DOMAIN), TOKENS, WIDTH)), random.normal(size=(len(DOMAIN), WIDTH))
    for token in range(TOKENS):
        state = 0.8 * state + 0.6 * random.normal(size=state.shape)
        hidden[:, token] = state
    return shift[:, None] + 0.7 * hidden + 0.5 * random.normal(size=hidden.shape)


def primaries(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The first choices of two frozen random routers on the same representations, each [documents, tokens]."""
    hidden = representations(random)
    return (hidden @ random.normal(size=(WIDTH, EXPERTS))).argmax(-1), (hidden @ random.normal(size=(WIDTH, EXPERTS))).argmax(-1)


def routers(random: np.random.Generator, draws: int) -> list[Trace]:
    """Frozen random routers of top-2 on the same representations, at ``LAYERS`` layers."""
    chosen = []
    for _ in range(LAYERS):
        hidden = representations(random).reshape(-1, WIDTH)
        logits = [hidden @ random.normal(size=(WIDTH, EXPERTS)) / WIDTH**0.5 for _ in range(draws)]
        chosen.append([(ids := each.argpartition(-2)[:, -2:], np.exp(np.take_along_axis(each, ids, axis=1))) for each in logits])
    document = np.repeat(np.arange(len(DOMAIN)), TOKENS)
    about = {"document": document, "domain": DOMAIN, "domains": [f"d{number}" for number in range(DOMAINS)], "layers": range(LAYERS)}
    found = []
    for draw in range(draws):
        ids, weights = (np.stack([layer[draw][part] for layer in chosen], axis=1) for part in (0, 1))
        found.append(Trace.from_arrays(ids, experts=EXPERTS, weights=weights, **about))
    return found


def summed(first: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alike [documents], expected [documents, experts], windows [documents], primaries [documents, experts]."""
    counts = np.eye(EXPERTS)[first].sum(axis=1)
    windows = np.full(len(first), TOKENS - size + 1)
    same = np.lib.stride_tricks.sliding_window_view(first, size, axis=1)
    alike = (same == same[..., :1]).all(axis=-1).sum(axis=1)
    return alike, metrics.shuffled_by_expert(counts, size) * windows[:, None], windows, counts


def by_domain(part: np.ndarray) -> np.ndarray:
    return np.stack([part[np.flatnonzero(np.isin(DOMAIN, domain))].sum(axis=0) for domain in range(DOMAINS)])


def scored(first: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio and chance of the mean over domains, with their left-out values below, [1 + documents]; and the variance of the draw."""
    alike, expected, windows, counts = summed(first, size)
    found = []
    for part in (alike, expected.sum(axis=-1)):
        cells = np.concatenate([domain_ratio(part, windows, DOMAIN, DOMAINS)[None], left_out_ratios(part, windows, DOMAIN, DOMAINS)])
        found.append(cells.mean(axis=1))
    variance = ngram_draw_variance(*(by_domain(part) for part in (alike, expected, windows, counts)), size=size)
    return found[0], found[1], variance[-1]


def covered(size: int, runs: int) -> tuple[float, float]:
    """Share of runs in which the excess of one random router over another covers 0, with and without the variance of the draw."""
    held, bare = [], []
    for run in range(runs):
        random = np.random.default_rng((run, 7))
        layers = [[scored(first, size) for first in primaries(random)] for _ in range(LAYERS)]
        scores = [metrics.above_chance(*(np.mean([each[side][part] for each in layers], axis=0) for part in (0, 1))) for side in (0, 1)]
        difference = scores[0] - scores[1]
        reach = float(jackknife(difference[:1], difference[1:, None], DOMAIN).reach[0])
        draws = 2 * sum(float(each[1][2]) for each in layers) / LAYERS**2
        held.append(abs(difference[0]) <= math.sqrt(reach**2 + 1.96**2 * draws))
        bare.append(abs(difference[0]) <= reach)
    return float(np.mean(held)), float(np.mean(bare))


def test_without_persistence_the_windows_of_an_expert_are_those_of_chance() -> None:
    """Then the score is 0 whichever expert is left out, and does not vary with the draw."""
    expected = np.array([[4.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    variance = ngram_draw_variance(expected.sum(axis=1), expected, np.array([20.0, 30.0]), np.array([[12, 6, 4], [10, 10, 10]]), size=2)
    assert variance == pytest.approx(0, abs=1e-12)


def test_variance_by_hand() -> None:
    """Two tokens, one domain: a = W q (r + (1 - r) q) with q = 1/2, 1/4, 1/4 and r = 1/2."""
    share, windows = np.array([[0.5, 0.25, 0.25]]), np.array([80.0])
    expected, filled = 80 * share**2, 80 * share * (0.5 + 0.5 * share)
    found = ngram_draw_variance(filled.sum(axis=1), expected, windows, 100 * share, size=2)
    scores = []
    for without in range(3):
        rest = [each for each in range(3) if each != without]
        left = 80 * (1 - share[0, without])
        ratio, chance = (part[0, rest].sum() / left for part in (filled, expected))
        scores.append((ratio - chance) / (1 - chance))
    assert found == pytest.approx(draw_variance(np.array(scores)[:, None])[0])
    assert draw_variance(np.array(scores)[:, None])[0] == pytest.approx(2 / 3 * ((np.array(scores) - np.mean(scores)) ** 2).sum())


def test_nothing_filled_and_nothing_known() -> None:
    share = np.array([[50, 25, 25], [0, 0, 0]])
    found = ngram_draw_variance(np.zeros(2), np.zeros((2, 3)), np.array([80.0, 0.0]), share, size=20)
    assert found[0] == 0 and np.isnan(found[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", NGRAM_SIZES)
def test_the_excess_of_a_random_router_over_another_covers_zero(size: int) -> None:
    runs = 100
    held, bare = covered(size, runs)
    assert held >= bare
    assert held * runs >= stats.binom.ppf(0.001, runs, 0.92)


def excess_of_chance(draws: int, runs: int) -> dict[tuple[str, bool], float]:
    """Share of runs in which the excess of a random router over others covers 0: of each metric, for the model and for a layer."""
    held: dict[tuple[str, bool], list[bool]] = {}
    for run in range(runs):
        trace, *drawn = routers(np.random.default_rng((run, 11)), 1 + draws)
        control = None
        for draw in reversed(drawn):
            control = replace(draw, control=control)
        for record in score(replace(trace, control=control), permutations=0).calibrated:
            if record.domain is None and not math.isnan(record.excess):
                covers = record.excess_low <= 0 <= record.excess_high
                held.setdefault((record.metric, record.layer is None), []).append(covers)
    return {key: float(np.mean(found)) for key, found in held.items()}


@pytest.mark.slow
def test_the_excess_of_a_random_router_over_three_draws_covers_zero() -> None:
    runs = 150
    found = excess_of_chance(3, runs)
    assert {metric for metric, _ in found} == {"specialization", "specialization_normalized", "der", "domain_isolation", *NGRAMS}
    # layers of a run share nothing, so that there are more of them than runs; the bound is that of the runs
    assert {key: share for key, share in found.items() if share * runs < stats.binom.ppf(0.001, runs, 0.93)} == {}


def test_more_draws_say_how_large_the_variance_is() -> None:
    """One draw: its own word, twice. Three: scaled so that the sum over layers is the seen one, with t of as many degrees of freedom."""
    one = [DrawSpread(draws=1, one=np.array([0.1, 0.3, 0.2]) * layer, several=None) for layer in (1, 2)]
    expected = np.array([[0.1, 0.2, 0.15 / 2], [0.3, 0.6, 0.45 / 2], [0.2, 0.4, 0.3 / 2]]) * 2 * stats.norm.ppf(0.975) ** 2
    np.testing.assert_allclose(draw_reach(one), expected)
    three = [replace(each, draws=3, several=np.array([0.4, 0.2, 0.5])) for each in one]
    factor = np.array([1.2 / 1.2, 1.2 / 1.2, 1.0 / 0.6])  # domains together, their mean apart
    scale = (4 / 3) * stats.t.ppf(0.975, 4) ** 2 / (2 * stats.norm.ppf(0.975) ** 2)
    np.testing.assert_allclose(draw_reach(three), expected * factor[:, None] * scale)


def test_layers_where_nothing_is_chosen_say_nothing_of_draws() -> None:
    chosen = DrawSpread(draws=3, one=np.array([0.1]), several=np.array([0.2]))
    nothing = DrawSpread(draws=3, one=np.array([np.nan]), several=np.array([np.nan]))
    found = draw_reach([chosen, nothing])
    np.testing.assert_allclose(found[0, 0], 0.2 * (4 / 3) * stats.t.ppf(0.975, 2) ** 2)
    assert np.isnan(found[0, 1:]).all()
    unvaried = DrawSpread(draws=3, one=np.array([0.0]), several=np.array([0.2]))
    np.testing.assert_allclose(draw_reach([unvaried])[0, 0], 0.2 * (4 / 3) * stats.t.ppf(0.975, 2) ** 2)
