"""Groups of documents: who is in which, what they leave as it was, and how often their intervals hold the truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import simulate
from scipy.stats import binom
from simulate_tokens import contextual_coverage

from dbes.scoring import grouping
from dbes.scoring.counts import Counts
from dbes.scoring.estimates import measure_layer
from dbes.scoring.grouping import Grouping, Groups
from dbes.scoring.layers import score_layers
from dbes.scoring.placebo import Placebos
from dbes.scoring.score import score_tables
from dbes.scoring.specialists import find_specialists


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundred documents are many."""
    monkeypatch.setattr(grouping, "MANY_DOCUMENTS", 100)


def drawn(seed: int = 0, *, documents: int = 150, domains: int = 3, effect: float = 0.6) -> simulate.LayerCounts:
    about = simulate.population(seed, domains=domains, layers=2, effect=effect)
    return simulate.draw_statistics(about, np.random.default_rng(seed), documents=documents, tokens=40)


def test_few_documents_are_left_out_one_by_one() -> None:
    shape = drawn(documents=grouping.MANY_DOCUMENTS // 3).shape
    assert Grouping.of(shape) is None
    more = replace(shape, document_domain=np.append(shape.document_domain, [0, 0, 0]), document_ids=tuple(map(str, range(2001))))
    assert Grouping.of(more) is not None


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("domains", "documents", "most"), [(3, 150, 50), (30, 25, 33), (60, 25, 20), (30, 4, 4)])
def test_groups_lie_inside_domains_and_differ_by_one_document_at_most(domains: int, documents: int, most: int) -> None:
    shape = drawn(domains=domains, documents=documents).shape
    found = Grouping.of(shape)
    assert found is not None
    np.testing.assert_array_equal(found.groups.label[found.groups.group], shape.document_domain)
    assert (np.bincount(found.groups.label) == min(most, documents)).all()
    sizes = np.bincount(found.groups.group, minlength=len(found.groups.label))
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
    assert len(set(found.shape.document_ids)) == len(found.shape.document_ids)


@pytest.mark.usefixtures("many")
def test_the_order_of_documents_does_not_tell_their_groups() -> None:
    shape = drawn().shape
    order = np.random.default_rng(1).permutation(len(shape.document_ids))
    moved = replace(shape, document_domain=shape.document_domain[order], document_ids=tuple(shape.document_ids[index] for index in order))
    one, other = Grouping.of(shape), Grouping.of(moved)
    assert one is not None and other is not None
    assert one.shape.document_ids == other.shape.document_ids
    np.testing.assert_array_equal(one.groups.group[order], other.groups.group)


@pytest.mark.usefixtures("many")
def test_other_documents_make_other_names() -> None:
    shape = drawn().shape
    one, other = Grouping.of(shape), Grouping.of(replace(shape, document_ids=(*shape.document_ids[:-1], "another")))
    assert one is not None and other is not None
    assert sum(a != b for a, b in zip(one.shape.document_ids, other.shape.document_ids, strict=True)) >= 1


@pytest.mark.usefixtures("many")
def test_groups_are_sums_of_their_documents() -> None:
    sums = drawn()
    found = Grouping.of(sums.shape)
    assert found is not None
    grouped = found.sums(sums)
    for group in (0, 7, len(found.groups.label) - 1):
        np.testing.assert_array_equal(grouped.hits[group], sums.hits[found.groups.group == group].sum(axis=0))
        np.testing.assert_array_equal(grouped.active[group], sums.active[found.groups.group == group].sum(axis=0))
    assert grouped.tokens.sum() == sums.tokens.sum()


def test_groups_of_one_document_are_the_documents() -> None:
    sums = drawn(documents=12)
    documents = np.arange(len(sums.tokens))
    single = Grouping(groups=Groups(group=documents, label=sums.shape.document_domain), rank=documents, most=50, shape=sums.shape)
    plain, grouped = (measure_layer(sums.column(0), None, grouping=each)[0] for each in (None, single))
    for metric, found in plain.items():
        np.testing.assert_allclose(grouped[metric].left_out, found.left_out, rtol=0, atol=1e-13, equal_nan=True)


def test_values_and_tests_are_those_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only intervals and corrections, the chance level and the specialists' null are made of groups."""
    about = simulate.population(5, domains=3, layers=2, effect=0.5)
    trace = simulate.draw_trace(about, np.random.default_rng(0), documents=60, tokens=40)
    one = score_tables(trace, permutations=100)
    monkeypatch.setattr(grouping, "MANY_DOCUMENTS", 100)
    monkeypatch.setattr(grouping, "ALL_GROUPS", 60)
    other = score_tables(trace, permutations=100)
    assert "groups" not in one.result.settings and other.result.settings["groups"] == 60
    for metric, replicates in other.replicates.items():
        assert replicates.shape == (60, 3), metric
    assert other.left_out.document_domain.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    for a, b in zip(one.result.calibrated, other.result.calibrated, strict=True):
        assert (a.metric, a.layer, a.domain) == (b.metric, b.layer, b.domain)
        for name in ("value", "p", "reference") if not a.metric.startswith("ngram") else ("value", "null", "reference"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(mine) and math.isnan(theirs)), (a, b)
        if not math.isnan(a.ci_high) and a.metric == "specialization" and a.domain is None:
            assert b.ci_low < a.corrected < b.ci_high and 0.5 < (b.ci_high - b.ci_low) / (a.ci_high - a.ci_low) < 2


@pytest.mark.usefixtures("many")
def test_specialists_of_a_score_are_those_that_paths_take() -> None:
    counts = Counts.of(drawn(effect=1.0))
    alone, scored = find_specialists(counts, permutations=60, seed=3), score_layers(counts, permutations=60, seed=3).specialists
    assert alone.specialist.sum() > 0
    np.testing.assert_array_equal(alone.specialist, scored.specialist)
    np.testing.assert_array_equal(alone.q, scored.q)


# --------------------------------------------------------------------------------------------------------------- coverage


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["equal", "30 to 1,500"])
@pytest.mark.parametrize("groups", [20, 50])
@pytest.mark.parametrize("effect", [0.0, 0.15, 0.4])
def test_intervals_over_groups_hold_the_truth(monkeypatch: pytest.MonkeyPatch, effect: float, groups: int, spread: str) -> None:
    """A true coverage of 90 to 98 % gives shares of 300 runs within these bounds all but once in ten thousand.

    Where there is nothing, intervals are wider than they need be, with groups as with documents.
    """
    monkeypatch.setattr(grouping, "MANY_DOCUMENTS", 100)
    monkeypatch.setattr(grouping, "ALL_GROUPS", 4 * groups)
    about = simulate.population(7, layers=1, effect=effect)
    runs = 300
    low, high = binom.ppf(1e-4, runs, 0.90) / runs, binom.ppf(1 - 1e-4, runs, 0.98) / runs
    for found in simulate.coverage(about, documents=150, runs=runs, spread=spread):
        assert found.model >= low, found
        assert effect == 0 or found.model <= high, found


@pytest.mark.usefixtures("many")
@pytest.mark.slow
def test_halves_of_one_population_show_nothing_with_groups() -> None:
    runs, held = 200, 0
    for run in range(runs):
        sums = drawn(run, documents=150, domains=2)
        placebos = Placebos(
            sums.tokens, sums.shape.document_domain, sums.shape.domains, permutations=0, seed=run, grouping=Grouping.of(sums.shape)
        )
        for layer in Counts.of(sums).layers():
            placebos.add(layer)
        found = placebos.found()["random"]
        held += found.score_low <= 0 <= found.score_high
    assert held / runs >= binom.ppf(1e-4, runs, 0.90) / runs


@pytest.mark.slow
@pytest.mark.parametrize("router", ["noisy", "documents"])
def test_intervals_of_the_part_beyond_the_key_cover_zero_with_groups(router: str) -> None:
    runs = 300
    low = binom.ppf(1e-4, runs, 0.90) / runs
    for metric, share in contextual_coverage(router, runs=runs, documents=60, grouped=3).items():
        assert share >= low, metric
