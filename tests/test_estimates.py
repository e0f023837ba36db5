"""What the estimates promise: p-values uniform where there is nothing, intervals that hold the truth, scores 0 and 1 at their ends."""

from __future__ import annotations

import math
from functools import cache

import naive
import numpy as np
import pytest
import simulate
from scipy import stats

from dbes.scoring.counting import count_routes
from dbes.scoring.estimates import Z95
from dbes.scoring.layers import score_layers
from dbes.scoring.metrics import effective_rank_of_gram, usage_of
from dbes.scoring.resampling import jackknife, left_out_scores
from dbes.scoring.score import score

DOMAIN_METRICS = ("specialization", "der", "domain_isolation")


def within(count: int, runs: int, share: float, *, tail: float = 0.0005) -> bool:
    """Whether a count is one that ``share`` makes likely in so many runs."""
    return bool(stats.binom.ppf(tail, runs, share) <= count <= stats.binom.ppf(1 - tail, runs, share))


def test_means_are_unweighted_over_domains_and_layers() -> None:
    about = simulate.population(1, domains=3, layers=2, experts=16, top_k=2, effect=0.6)
    statistics = simulate.draw_statistics(about, np.random.default_rng(0), documents=6)
    found = simulate.estimates(statistics, permutations=9, seed=0)["specialization"]
    for array in (found.value, found.null, found.reference):
        np.testing.assert_allclose(array[-1], array[:-1].mean(axis=0))
        np.testing.assert_allclose(array[:, -1], array[:, :-1].mean(axis=1))


def test_rank_interval_runs_from_below_the_lower_to_above_the_higher_of_two_estimates() -> None:
    about = simulate.population(1, domains=3, layers=2, experts=16, top_k=2, effect=0.6)
    statistics = simulate.draw_statistics(about, np.random.default_rng(0), documents=15)
    found = simulate.estimates(statistics, permutations=50, seed=0)["der"]
    domain = statistics.shape.document_domain
    left_out = left_out_scores(statistics.hits, statistics.active, domain, 3).effective_rank
    plain, error = jackknife(found.value[0, :2], left_out, domain)
    usage = usage_of(statistics.by_domain(statistics.hits))
    lower = np.zeros(2)
    for layer in range(2):
        gram = usage[:, layer] @ usage[:, layer].T
        for d in range(3):
            members = statistics.hits[domain == d, layer].astype(float)
            slots = members.sum(axis=1)
            residual = ((members - usage[d, layer] * slots[:, None]) ** 2).sum(axis=0)
            gram[d, d] -= 15 / 14 * residual.sum() / slots.sum() ** 2
        lower[layer] = effective_rank_of_gram(gram[None], 16)[0]
    np.testing.assert_allclose(found.corrected[0, :2], (plain + lower) / 2, atol=1e-9)
    np.testing.assert_allclose(found.ci_high[0, :2], np.maximum(plain, lower) + Z95 * error, atol=1e-9)
    np.testing.assert_allclose(found.ci_low[0, :2], np.minimum(plain, lower) - Z95 * error, atol=1e-9)
    assert (found.p <= 0.05).all()


def test_the_rank_interval_reaches_zero_when_the_test_does_not_reject_it() -> None:
    about = simulate.population(1, effect=0.0)
    found = simulate.estimates(simulate.draw_statistics(about, np.random.default_rng(3), documents=20), permutations=100, seed=0)["der"]
    assert (found.p > 0.05).any()
    assert (found.ci_low[found.p > 0.05] <= 0).all()


def test_the_reference_is_the_largest_value_and_n_grams_are_not_tested_without_sign_flips() -> None:
    recording = naive.random_recording(1, documents=(6, 6, 6), length=(60, 90), experts=12)
    found = score_layers(count_routes(recording.trace()), permutations=20, sign_flips=0, seed=0).estimates
    np.testing.assert_allclose(found["specialization"].reference, math.log(3))
    for metric in ("specialization_normalized", "der", "domain_isolation"):
        np.testing.assert_allclose(found[metric].reference, 1.0)
    assert np.isnan(found["ngram_expertise_2"].p).all()
    normalized = found["specialization_normalized"].value / found["specialization"].value
    np.testing.assert_allclose(normalized, 1 / math.log(3))


def test_ngram_chance_and_value_agree_when_tokens_do_not_persist_and_part_when_they_do() -> None:
    about = simulate.population(5, domains=2, layers=2, experts=8, top_k=2, effect=0.3)
    trace = simulate.draw_trace(about, np.random.default_rng(0), documents=20)
    result = score(trace, permutations=300)
    record = result.record("ngram_expertise_2")
    assert record.score == pytest.approx(0, abs=0.02) and record.p > 0.01
    (routes,) = tuple(trace)
    assert routes.weights is not None
    recording = naive.of_trace(trace)
    ids, weights = recording.ids.copy(), routes.weights.copy()
    ids[1::2], weights[1::2] = ids[:-1:2], weights[:-1:2]  # every second token repeats the one before it
    sticky = naive.Recording(**{**vars(recording), "ids": ids, "weights": weights})
    record = score(sticky.trace(), permutations=300).record("ngram_expertise_2")
    assert record.score > 0.3 and record.p <= 1 / 100


# ------------------------------------------------------------------------------------------------------------- uniformity


@cache
def null_p(runs: int) -> dict[str, np.ndarray]:
    return simulate.null_p(runs=runs, permutations=99 if runs < 400 else 199)


@pytest.mark.parametrize("metric", DOMAIN_METRICS)
def test_p_values_of_shuffled_traces_are_uniform(metric: str) -> None:
    runs = 120
    p = null_p(runs)[metric][:, -1, -1]
    assert within(int((p <= 0.05).sum()), runs, 0.05)
    assert within(int((p <= 0.3).sum()), runs, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("metric", DOMAIN_METRICS)
def test_p_values_of_600_shuffled_traces_are_uniform(metric: str) -> None:
    p = null_p(600)[metric]
    assert 0.03 <= (p[:, -1, -1] <= 0.05).mean() <= 0.07
    assert stats.kstest(p[:, -1, -1], "uniform").pvalue > 0.01
    for cell in np.ndindex(p.shape[1:]):
        assert 0.02 <= (p[(slice(None), *cell)] <= 0.05).mean() <= 0.08


@pytest.mark.slow
def test_ngram_p_values_of_traces_without_persistence_never_reject_too_often() -> None:
    for p in simulate.ngram_p(runs=400).values():
        assert (p[:, -1, -1] <= 0.05).mean() <= 0.07


# --------------------------------------------------------------------------------------------------------------- coverage


def settings_of(effect: str, *, domains: int = 4) -> simulate.Population:
    return simulate.population(7, domains=domains, effect=simulate.EFFECTS[effect])


@pytest.mark.parametrize("effect", simulate.EFFECTS)
def test_intervals_hold_the_truth(effect: str) -> None:
    runs = 60
    for found in simulate.coverage(settings_of(effect), documents=20, runs=runs, permutations=60, tokens=60):
        assert found.model * runs >= stats.binom.ppf(0.0005, runs, 0.95), found


@pytest.mark.slow
@pytest.mark.parametrize("documents", [20, 80])
@pytest.mark.parametrize("effect", simulate.EFFECTS)
def test_intervals_hold_the_truth_in_92_to_98_percent_of_400_runs(effect: str, documents: int) -> None:
    for found in simulate.coverage(settings_of(effect), documents=documents, runs=400, permutations=60):
        assert found.model >= 0.92 and found.layer >= 0.92, found
        if effect != "null" and found.metric != "der":
            assert found.model <= 0.985, found


@pytest.mark.slow
def test_corrected_is_nearly_unbiased() -> None:
    for found in simulate.coverage(settings_of("strong"), documents=20, runs=200, permutations=20):
        if found.metric != "der":
            assert abs(found.mean_corrected - found.true) < 0.2 * abs(found.mean_value - found.true), found
