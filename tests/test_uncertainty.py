"""Chance levels and intervals: every shortcut against the plain computation, and small cases by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import naive
import numpy as np
import pytest
import simulate
from scipy import stats

from dbes.scoring.counts import Counts
from dbes.scoring.draws import without_each_expert
from dbes.scoring.metrics import grams
from dbes.scoring.permutation import permuted_labels, permuted_scores
from dbes.scoring.resampling import (
    DomainScores,
    document_scores,
    domain_ratio,
    domain_scores,
    false_discovery_q,
    holm,
    jackknife,
    left_out_ratios,
    pooled_p,
    sign_flip_p,
    studentized_difference,
    usage_variance,
)
from dbes.scoring.specialists import find_specialists

FIELDS = ("divergence", "effective_rank", "isolation")


def drawn(seed: int, *, documents: int = 6, domains: int = 3, layers: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits [documents, layers, experts], routed tokens [documents, layers], domain [documents]."""
    about = simulate.population(seed, domains=domains, layers=layers, experts=12, top_k=3, effect=0.5)
    statistics = simulate.draw_statistics(about, np.random.default_rng(seed), documents=documents, tokens=40)
    return statistics.hits, statistics.active, statistics.shape.document_domain


def null_of(hits: np.ndarray, active: np.ndarray, labels: np.ndarray, domain: np.ndarray, domains: int) -> DomainScores:
    """What the permutations give for each layer, side by side."""
    sums = simulate.of_hits(hits, active[:, 0], domain, domains=domains, top_k=3)
    counts = Counts.of(replace(sums, active=active))
    return DomainScores.stack([permuted_scores(sums, labels) for sums in counts.layers()], axis=-1)


def scores_of(hits: np.ndarray, active: np.ndarray, domain: np.ndarray, domains: int) -> DomainScores:
    """The domain metrics of summed counts, the plain way."""
    counts = np.stack([hits[domain == d].sum(axis=0, dtype=float) for d in range(domains)])
    tokens = np.stack([active[domain == d].sum(axis=0, dtype=float) for d in range(domains)])
    return domain_scores(counts, tokens)


# ------------------------------------------------------------------------------------------------------------ permutation


def test_permuted_labels_keep_the_number_of_documents_of_every_domain() -> None:
    domain = np.array([0, 0, 0, 1, 2, 2])
    labels = permuted_labels(domain, permutations=50, seed=1)
    assert labels.shape == (50, 6)
    assert (np.sort(labels, axis=1) == np.sort(domain)).all()
    assert len(np.unique(labels, axis=0)) > 20
    np.testing.assert_array_equal(labels, permuted_labels(domain, permutations=50, seed=1))


def test_permuted_labels_are_even_over_all_labellings() -> None:
    labels = permuted_labels(np.array([0, 0, 1, 1]), permutations=6000, seed=0)
    _, counts = np.unique(labels, axis=0, return_counts=True)
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(("cells", "many"), [(1 << 22, 16), (200, 16), (1 << 22, 2)])
def test_permuted_scores_are_the_metric_of_every_labelling(monkeypatch: pytest.MonkeyPatch, cells: int, many: int) -> None:
    monkeypatch.setattr("dbes.scoring.resampling.PERMUTATION_CELLS", cells)
    monkeypatch.setattr("dbes.scoring.permutation.MANY_DOMAINS", many)
    hits, active, domain = drawn(1)
    labels = permuted_labels(domain, permutations=9, seed=2)
    found = null_of(hits, active, labels, domain, 3)
    for draw, row in enumerate(labels):
        expected = scores_of(hits, active, row, 3)
        for field in FIELDS:
            np.testing.assert_allclose(getattr(found, field)[draw], getattr(expected, field), rtol=0, atol=1e-9)


def test_the_null_of_many_domains_is_the_same_whether_documents_are_added_up_or_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    hits, active, domain = drawn(2)
    hits[0, :, 0] += 2**23  # so that this column is no longer exact in float32, and is multiplied
    labels = permuted_labels(domain, permutations=40, seed=2)
    multiplied = null_of(hits, active, labels, domain, 3)
    monkeypatch.setattr("dbes.scoring.permutation.MANY_DOMAINS", 3)
    added = null_of(hits, active, labels, domain, 3)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(added, field), getattr(multiplied, field))


def test_without_permutations_there_is_no_draw_and_no_test_of_specialists() -> None:
    hits, active, domain = drawn(1)
    found = null_of(hits, active, permuted_labels(domain, permutations=0, seed=0), domain, 3)
    assert found.divergence.shape == (0, 3, 2)
    table = find_specialists(Counts.of(simulate.of_hits(hits, active[:, 0], domain, domains=3, top_k=3)), permutations=0, seed=0)
    assert np.isnan(table.p).all() and not table.specialist.any()


# -------------------------------------------------------------------------------------------------------------- jackknife


@pytest.mark.parametrize("cells", [1 << 22, 60])
@pytest.mark.parametrize("seed", [1, 2])
def test_left_out_scores_are_those_without_the_document(monkeypatch: pytest.MonkeyPatch, seed: int, cells: int) -> None:
    monkeypatch.setattr("dbes.scoring.resampling.PERMUTATION_CELLS", cells)
    hits, _, domain = drawn(seed)
    _, found = document_scores(hits, domain, 3)
    for document in range(len(domain)):
        rest = np.arange(len(domain)) != document
        expected, _ = document_scores(hits[rest], domain[rest], 3)
        for field in FIELDS:
            np.testing.assert_allclose(getattr(found, field)[document], getattr(expected, field), rtol=0, atol=1e-9)


def test_norms_from_different_documents_are_unbiased_however_documents_differ() -> None:
    about = simulate.population(3, domains=2, layers=1, experts=12, top_k=3, effect=0.0, concentration=2.0)
    found, plain = [], []
    for seed in range(400):
        sums = simulate.draw_statistics(about, np.random.default_rng(seed), documents=4, tokens=40)
        whole, _ = document_scores(sums.hits, sums.shape.document_domain, 2)
        found.append(whole.isolation.mean())
        plain.append(scores_of(sums.hits, sums.active, sums.shape.document_domain, 2).isolation.mean())
    assert np.mean(plain) > 0.08, "norms that take tokens for independent"
    assert abs(np.mean(found)) < 4 * np.std(found) / 20 + 0.02


def test_left_out_scores_of_narrow_layers_are_normalised_by_their_own_experts() -> None:
    hits, _, domain = drawn(4, domains=5)
    hits = hits.copy()
    hits[:, 0, 3:] = 0
    hits[:, 0, :3] += 1
    _, found = document_scores(hits, domain, 5, sizes=np.array([3, 12]))
    _, narrow = document_scores(hits[:, :1, :3], domain, 5)
    np.testing.assert_allclose(found.effective_rank[:, 0], narrow.effective_rank[:, 0], atol=1e-9)


def test_leaving_out_the_only_document_of_a_domain_leaves_nothing_known() -> None:
    hits, _, domain = drawn(1)
    keep = np.r_[0, 6:18]
    whole, found = document_scores(hits[keep], domain[keep], 3)
    assert np.isnan(found.divergence[0]).all() and np.isfinite(found.divergence[1:]).all()
    assert np.isnan(whole.effective_rank).all(), "one document says nothing of how much documents differ"
    none = jackknife(np.zeros((3, 2)), found.divergence, domain[keep])
    assert all(np.isnan(each).all() for each in (none.corrected, none.error, none.reach))


def test_one_domain_has_nothing_to_leave_out_of() -> None:
    hits, _, domain = drawn(1)
    for found in document_scores(hits[:6], domain[:6], 1):
        assert all(np.isnan(getattr(found, field)).all() for field in FIELDS)


def test_jackknife_of_a_mean_is_the_mean_with_its_usual_error() -> None:
    values = np.random.default_rng(0).normal(size=12)
    left_out = (values.sum() - values) / 11
    found = jackknife(np.array(values.mean()), left_out, np.zeros(12, int))
    assert found.corrected == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(12)) and found.freedom == pytest.approx(11)
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.corrected - found.reach, found.corrected + found.reach) == pytest.approx((low, high))


def test_jackknife_of_the_plug_in_variance_is_the_unbiased_variance() -> None:
    values = np.random.default_rng(0).normal(size=9)
    left_out = np.array([np.delete(values, i).var() for i in range(9)])
    assert jackknife(np.array(values.var()), left_out, np.zeros(9, int)).corrected == pytest.approx(values.var(ddof=1))


def test_jackknife_of_a_difference_of_domains_adds_their_variances() -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(size=8), random.normal(size=5)
    values = np.concatenate([first, second])
    left_out = [np.delete(first, i).mean() - second.mean() for i in range(8)] + [
        first.mean() - np.delete(second, i).mean() for i in range(5)
    ]
    found = jackknife(np.array(first.mean() - second.mean()), np.array(left_out), np.repeat([0, 1], [8, 5]))
    assert found.corrected == pytest.approx(first.mean() - second.mean())
    assert found.error == pytest.approx(math.sqrt(first.var(ddof=1) / 8 + second.var(ddof=1) / 5))
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval()  # Welch's degrees of freedom are Satterthwaite's
    assert (found.corrected - found.reach, found.corrected + found.reach) == pytest.approx((low, high))
    assert len(values) == 13


def test_left_out_ratios_are_those_without_the_document() -> None:
    random = np.random.default_rng(0)
    above, below = random.random((7, 2)), random.integers(1, 9, (7, 2)).astype(float)
    domain = np.array([0, 0, 0, 1, 1, 1, 2])
    found = left_out_ratios(above, below, domain, 3)
    for document in range(7):
        rest = np.arange(7) != document
        np.testing.assert_allclose(found[document], domain_ratio(above[rest], below[rest], domain[rest], 3))
    assert np.isnan(found[6, 2]).all()


def test_domain_ratio_by_hand() -> None:
    found = domain_ratio(np.array([1.0, 2, 0]), np.array([2.0, 4, 0]), np.array([0, 0, 1]), 3)
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan])


def test_without_each_expert_drops_one_column() -> None:
    hits, active, domain = drawn(2)
    counts = np.stack([hits[domain == d].sum(axis=0, dtype=float) for d in range(3)])
    tokens = np.stack([active[domain == d].sum(axis=0, dtype=float) for d in range(3)])
    found = without_each_expert(counts, tokens, experts=np.array([12, 12]))
    for expert in range(12):
        fewer = counts.copy()
        fewer[..., expert] = 0
        np.testing.assert_allclose(found.divergence[expert], domain_scores(fewer, tokens).divergence, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- sign flips


def test_sign_flips_of_an_effect_in_every_document_reach_the_least_p() -> None:
    share = np.full((12, 2), 0.1)
    share[:, 1] *= np.where(np.arange(12) % 2, 1, -1)
    p = sign_flip_p(share, np.zeros(12, int), 1, permutations=999, seed=0)
    assert p[0, 0] <= 0.003 and p[0, 1] > 0.3


def test_sign_flips_of_four_documents_are_exhaustive() -> None:
    share, one = np.array([1.0, 2.0, 3.0, 4.0])[:, None], np.zeros(4, int)
    assert sign_flip_p(share, one, 1, permutations=4000, seed=0)[0, 0] == pytest.approx(1 / 16, abs=0.015)
    assert np.isnan(sign_flip_p(np.full((4, 1), np.nan), one, 1, permutations=10, seed=0)).all()


def test_sign_flips_are_the_same_for_domains_layers_and_their_means() -> None:
    domain, draws = np.array([0, 1, 0, 1, 1, 0, 0]), 50
    share = np.random.default_rng(3).normal(0.2, 1, (7, 2, 3))
    signs = np.random.default_rng(5).integers(0, 2, (draws, 7)) * 2 - 1
    found = sign_flip_p(share, domain, 2, permutations=draws, seed=5)
    assert found.shape == (3, 3, 3)
    for size in range(3):
        cells = np.array([[[share[domain == d, layer, size] @ row[domain == d] for row in (np.ones(7), *signs)]
                           for layer in range(2)] for d in range(2)])  # fmt: skip
        for row, column in np.ndindex(3, 3):
            drawn = cells[[row] if row < 2 else [0, 1]][:, [column] if column < 2 else [0, 1]].mean(axis=(0, 1))
            assert found[row, column, size] == pytest.approx((1 + (drawn[1:] >= drawn[0] - 1e-12).sum()) / (1 + draws))


# ------------------------------------------------------------------------------------------------------------ specialists


def test_studentized_difference_by_plain_loops() -> None:
    hits, _, domain = drawn(5)
    layer = hits[:, 0].astype(float)
    slots = layer.sum(axis=1)
    sums = [np.stack([part[domain == d].sum(axis=0) for d in range(3)]) for part in (layer, layer**2, layer * slots[:, None])]
    sizes = [np.array([part[domain == d].sum() for d in range(3)]) for part in (slots, slots**2, slots > 0)]
    z = studentized_difference(*sums, *sizes)
    usage, variance = usage_variance(*sums, *sizes)
    for d in range(3):
        for expert in range(12):
            share, spread = [], []
            for other in range(3):
                members = np.flatnonzero(domain == other)
                p = math.fsum(layer[members, expert]) / math.fsum(slots[members])
                residual = math.fsum((layer[i, expert] - p * slots[i]) ** 2 for i in members)
                share.append(p)
                spread.append(len(members) / (len(members) - 1) * residual / math.fsum(slots[members]) ** 2)
            assert usage[d, expert] == pytest.approx(share[d], abs=1e-12)
            assert variance[d, expert] == pytest.approx(spread[d], abs=1e-12)
            total = (1 - 1 / 3) ** 2 * spread[d] + (sum(spread) - spread[d]) / 9
            assert z[d, expert] == pytest.approx((share[d] - sum(share) / 3) / math.sqrt(total))


def test_studentized_difference_where_nothing_differs_or_nothing_varies() -> None:
    def z_of(layer: np.ndarray, domain: np.ndarray) -> np.ndarray:
        slots = layer.sum(axis=1)
        sums = [np.stack([part[domain == d].sum(axis=0) for d in range(2)]) for part in (layer, layer**2, layer * slots[:, None])]
        return studentized_difference(
            *sums, *(np.array([part[domain == d].sum() for d in range(2)]) for part in (slots, slots**2, slots > 0))
        )

    domain = np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(z_of(np.full((4, 2), 5.0), domain), 0)
    apart = z_of(np.array([[10.0, 0], [10, 0], [0, 10], [0, 10]]), domain)
    assert apart[0, 0] == np.inf and apart[0, 1] == -np.inf
    assert np.isnan(z_of(np.array([[10.0, 0], [4, 6], [0, 10]]), np.array([0, 0, 1]))).all()


def test_pooled_p_by_hand() -> None:
    null = np.arange(20, dtype=np.float32).reshape(5, 2, 2)  # 5 draws, 2 domains, 2 experts: one band each
    p = pooled_p(np.array([[17.0, 100.0], [-1.0, np.nan]]), null, expected=np.array([1.0, 2.0]))
    assert p[0, 0] == pytest.approx((1 + 1) / 11)  # 0, 2, 4, ... 18: one at least 17
    assert p[0, 1] == pytest.approx(1 / 11)
    assert p[1, 0] == pytest.approx(1.0) and np.isnan(p[1, 1])


def test_pooled_p_leaves_out_dead_experts_and_bands_without_draws() -> None:
    p = pooled_p(np.ones((1, 3)), np.zeros((4, 1, 3), np.float32), expected=np.array([0.0, 1.0, 1.0]))
    assert np.isnan(p[0, 0]) and np.isfinite(p[0, 1:]).all()
    assert np.isnan(pooled_p(np.ones((1, 2)), np.zeros((4, 1, 2), np.float32), expected=np.zeros(2))).all()
    assert np.isnan(pooled_p(np.ones((1, 2)), np.full((4, 1, 2), np.nan, np.float32), expected=np.ones(2))).all()


def test_false_discovery_q_is_benjamini_hochberg_over_the_tests_that_were_made() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.5])
    made = [0.01, 0.04, 0.03, 0.5]
    expected = stats.false_discovery_control(made)
    np.testing.assert_allclose(false_discovery_q(p)[[0, 2, 3, 4]], expected)
    assert np.isnan(false_discovery_q(p)[1])
    ranked = sorted(made)
    by_hand = [min(ranked[j] * 4 / (j + 1) for j in range(i, 4)) for i in range(4)]
    np.testing.assert_allclose(np.sort(expected), by_hand)
    assert np.isnan(false_discovery_q(np.full(3, np.nan))).all()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.03, math.nan, 0.01]) == pytest.approx([0.03, math.nan, 0.02], nan_ok=True), "a test that was not made does not count"
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


# ------------------------------------------------------------------------------------------------------------ one domain


def test_domain_scores_of_one_domain_are_undefined() -> None:
    found = domain_scores(np.ones((1, 2, 4)), np.full((1, 2), 4.0))
    assert all(np.isnan(getattr(found, field)).all() for field in FIELDS)
    assert grams(np.ones((1, 2, 4))).shape == (2, 1, 1)


def test_domain_scores_are_those_of_plain_loops() -> None:
    recording = naive.random_recording(2, length=(20, 30))
    hits = np.array(naive.hits(recording))
    active = np.bincount(recording.document, minlength=len(hits))[:, None] * np.ones((1, 3))
    found = scores_of(hits, active, recording.domain, 3)
    table = naive.domain_metrics(recording)
    np.testing.assert_allclose(found.divergence, np.array(table["specialization"])[:-1, :-1], atol=1e-12)
    np.testing.assert_allclose(found.isolation, np.array(table["domain_isolation"])[:-1, :-1], atol=1e-12)
    np.testing.assert_allclose(found.effective_rank, table["der"][0][:-1], atol=1e-12)
