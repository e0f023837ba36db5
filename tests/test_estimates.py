"""What the estimates promise: p-values uniform where there is nothing, intervals that hold the truth, scores 0 and 1 at their ends."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import naive
import numpy as np
import pytest
import simulate
from scipy import stats

from dbes import record
from dbes.scoring.counting import count_routes
from dbes.scoring.equal_usage import UsageTest
from dbes.scoring.layers import score_layers
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


def test_the_reference_is_the_largest_value_and_n_grams_are_not_tested_without_sign_flips() -> None:
    recording = naive.random_recording(1, documents=(6, 6, 6), length=(60, 90), experts=12)
    ideal = score(recording.trace(), router="reference", permutations=20)
    for metric in DOMAIN_METRICS:
        record = ideal.record(metric)
        assert record.score == pytest.approx(1.0, abs=0.02) and record.score_low <= 1 + 1e-9
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


@pytest.mark.parametrize("effect", [pytest.param(name, marks=pytest.mark.slow) if name == "weak" else name for name in simulate.EFFECTS])
def test_intervals_hold_the_truth(effect: str) -> None:
    runs = 60
    for found in simulate.coverage(settings_of(effect), documents=20, runs=runs, tokens=60):
        assert found.model * runs >= stats.binom.ppf(0.0005, runs, 0.95), found


EFFECTS_SIZES = {"none": 0.0, "small": 0.15, "middle": 0.4, "large": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["equal", "30 to 1,500"])
@pytest.mark.parametrize("documents", [8, 20, 80])
@pytest.mark.parametrize("effect", EFFECTS_SIZES)
def test_intervals_hold_the_truth_in_400_runs(effect: str, documents: int, spread: str) -> None:
    """Between 92 and 98 %, with 8 documents 90 and 99 %; give or take what 400 runs allow (three standard errors).

    Where there is nothing, intervals are wider than they need be: the jackknife counts the products of two documents twice.
    """
    about = simulate.population(7, layers=1, effect=EFFECTS_SIZES[effect])
    low, high = (0.90, 0.99) if documents < 20 else (0.92, 0.98)
    for found in simulate.coverage(about, documents=documents, runs=400, spread=spread):
        assert found.model >= low - 3 * math.sqrt(low * (1 - low) / 400), found
        if EFFECTS_SIZES[effect] > 0.3:
            assert found.model <= high + 3 * math.sqrt(high * (1 - high) / 400), found


@pytest.mark.slow
@pytest.mark.parametrize("spread", simulate.LENGTHS)
@pytest.mark.parametrize("concentration", [1e6, 6.0])
@pytest.mark.parametrize(("domains", "documents"), [(4, 20), (2, 8), (20, 8), (4, 80)])
def test_equal_usage_is_rejected_in_5_percent_of_400_runs(domains: int, documents: int, concentration: float, spread: str) -> None:
    """Whatever lengths and however documents differ: 3 to 7 % (with 8 documents 2 to 10 %), give or take three standard errors.

    Known to fail: two domains of 8 documents that differ very much, ten times longer in one domain. There 11 to 19 % are rejected
    (plug-in: nearly all), and a warning says so.
    """
    about = simulate.population(3, domains=domains, layers=2, experts=32, top_k=4, concentration=concentration)
    low, high = (0.02, 0.10) if documents < 20 else (0.03, 0.07)
    if domains == 2 and concentration < 10 and spread in ("60 or 600 by domain", "one domain ten times shorter"):
        high = 0.19
    runs = 400 if documents < 80 and domains < 20 else 150
    model, layers, by_domain = simulate.rejections(about, documents=documents, runs=runs, spread=spread)
    for share, count in ((model, runs), (layers.mean(), runs), (by_domain.mean(), runs)):
        assert low - 3 * math.sqrt(low * (1 - low) / count) <= share <= high + 3 * math.sqrt(high * (1 - high) / count), share


@pytest.mark.slow
def test_equal_usage_of_one_domain_split_at_random_is_rejected_in_5_percent_though_one_half_is_thinned(tmp_path: Path) -> None:
    """Real routes: texts of one domain of the embedded benchmark in two random halves, one of which keeps a tenth of its tokens."""
    trace = record(model="embedded", tasks="embedded", limit=30, output_path=tmp_path)
    shape = trace.shape
    found = []
    documents = np.flatnonzero(shape.document_domain == 0)
    hits = np.zeros((2, len(shape.document_domain), len(shape.layers), shape.width))  # of all tokens, and of every tenth
    for routes in trace:
        for part, rows in enumerate((np.arange(len(routes)), np.arange(0, len(routes), 10))):
            for slot in range(routes.ids.shape[2]):
                for layer in range(len(shape.layers)):
                    np.add.at(hits[part], (routes.document[rows], layer, routes.ids[rows, layer, slot]), 1)
    for run in range(300):
        label = np.random.default_rng(run).permutation(np.arange(len(documents)) % 2)
        own = np.where(label[:, None, None] == 0, hits[0, documents], hits[1, documents])
        test = UsageTest.of(own[:, 0].sum(axis=1), label, domains=2, permutations=199, seed=run)
        found.append(test.p(np.sum([test.products(own[:, layer]) for layer in range(len(shape.layers))], axis=0))[-1])
    share = np.mean(np.array(found) <= 0.05)
    assert 0.03 - 3 * math.sqrt(0.03 * 0.97 / 300) <= share <= 0.07 + 3 * math.sqrt(0.07 * 0.93 / 300), share


@pytest.mark.slow
@pytest.mark.parametrize("spread", simulate.LENGTHS)
def test_a_true_effect_is_found_whatever_the_lengths(spread: str) -> None:
    about = simulate.population(3, layers=1, effect=0.3)
    model, layers, _ = simulate.rejections(about, documents=20, runs=100, spread=spread)
    assert model >= 0.95 and layers.min() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("concentration", "specialization"), [(60.0, 0.03), (12.0, 0.12)], ids=["ordinary texts", "texts that differ much"]
)
def test_scores_do_not_move_with_the_number_of_texts(concentration: float, specialization: float) -> None:
    """8, 13 and 40 texts a domain: within 3 % of the truth, where the plug-in moves by half or more.

    Known to fail for specialization where texts differ much and are few: 10 % too high at 8 and 13 texts (plug-in: 147 and 98 %), the
    second order of the bias, which one jackknife leaves.
    """
    about = simulate.population(7, layers=1, effect=0.3, concentration=concentration)
    for documents in (8, 13, 40):
        for found in simulate.coverage(about, documents=documents, runs=400):
            share = specialization if found.metric == "specialization" else 0.03
            noise = 3 * found.width / 4 / 20  # three standard errors of 400 runs: an interval is about four of one run wide
            assert abs(found.mean_corrected - found.true) <= share * found.true + noise, found
            assert found.metric != "specialization" or documents > 8 or found.mean_value > 1.3 * found.true


@pytest.mark.slow
def test_corrected_is_nearly_unbiased() -> None:
    for found in simulate.coverage(settings_of("strong"), documents=20, runs=200):
        assert abs(found.mean_corrected - found.true) < 0.2 * abs(found.mean_value - found.true) + found.width / 20, found
