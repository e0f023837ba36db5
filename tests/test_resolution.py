"""The smallest p of a permutation test, against the enumeration of every labeling."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from report_results import simulated_trace

from dbes.results import DomainFacts, ModelFacts, Result, TaskFacts
from dbes.scoring.equal_usage import TIED, UsageTest
from dbes.scoring.resolution import cannot_tell, smallest_label_p, smallest_p, why_not


def every_labeling(units: tuple[int, ...]) -> list[tuple[int, ...]]:
    return sorted(set(permutations([domain for domain, size in enumerate(units) for _ in range(size)])))


def statistics(units: tuple[int, ...]) -> np.ndarray:
    """The statistic of the test under every labeling, of texts whose expert choices follow no rule: [labelings, domains + 1]."""
    random = np.random.default_rng(sum(units))
    hits = random.integers(1, 1000, (sum(units), 6)).astype(float)
    labels = np.array(every_labeling(units), np.int16)
    test = UsageTest.of(hits.sum(axis=1) / 2, labels[0], domains=len(units), permutations=0, seed=0)
    return replace(test, labels=labels).statistics(test.products(hits))


@pytest.mark.parametrize("units", [(1, 1), (3, 3), (4, 4), (2, 2, 2), (1, 2, 3), (1, 1, 4), (1, 7), (2, 2, 1, 1)])
def test_the_smallest_p_is_that_of_the_largest_value_over_every_labeling(units: tuple[int, ...]) -> None:
    drawn = statistics(units)
    reached = (drawn >= drawn.max(axis=0) - TIED).mean(axis=0)
    assert smallest_label_p(units) == pytest.approx(reached[-1])
    for domain in range(len(units)):
        least = smallest_label_p(units) if len(units) == 2 else smallest_label_p(units, domain=domain)
        assert least == pytest.approx(reached[domain])


def test_of_two_domains_both_differ_from_the_mixture_alike() -> None:
    drawn = statistics((3, 3))
    np.testing.assert_allclose(drawn[:, 0], drawn[:, 1], atol=TIED)
    assert smallest_p(result(3, 3), "domain_isolation", "d0") == smallest_p(result(3, 3)) == pytest.approx(0.1)
    assert smallest_p(result(3, 3), "specialization", "d0") == pytest.approx(0.1)


def test_many_texts_are_counted_by_logarithms_and_agree() -> None:
    assert smallest_label_p([30, 30]) == pytest.approx(2 / math.comb(60, 30))
    assert smallest_label_p([100_000, 100_000]) == 0.0
    assert smallest_label_p([1, 5000]) == pytest.approx(1 / 5001)
    assert smallest_label_p([0, 3, 3]) == pytest.approx(0.1), "a domain without texts takes no part"


def result(*texts: int, permutations: int | None = 1000, distinct: dict[str, int] | None = None) -> Result:
    domains = {f"d{index}": DomainFacts(documents=count, sources=count, tokens=10) for index, count in enumerate(texts)}
    settings = {} if permutations is None else {"permutations": permutations}
    companions = {"distinct_texts": distinct} if distinct else {}
    task = TaskFacts(name="t", domains=domains)
    return Result(status="ok", created="now", model=ModelFacts(name="m"), task=task, settings=settings, companions=companions)


@pytest.mark.parametrize(
    ("found", "least", "why"),
    [
        pytest.param(result(1, 1), 1.0, "too few texts to tell; the smallest possible p is 1", id="one text a domain"),
        pytest.param(result(2, 2, 2), 1 / 15, "too few texts to tell; the smallest possible p is 0.067", id="two a domain"),
        pytest.param(result(4, 4), 1 / 35, None, id="four a domain"),
        pytest.param(result(1, 18), 1 / 19, "too few texts to tell; the smallest possible p is 0.053", id="1 of 19"),
        pytest.param(result(1, 19), 1 / 20, None, id="1 of 20"),
        pytest.param(
            result(4, 4, permutations=10), 1 / 11, "too few permutations to tell; the smallest possible p is 0.091", id="few draws"
        ),
        pytest.param(result(40, 40, permutations=99), 0.01, None, id="99 draws"),
        pytest.param(result(4, 4, permutations=None), 1 / 35, None, id="number of draws unknown"),
        pytest.param(
            result(50, 50, distinct={"d0": 1, "d1": 1}), 1.0, "too few texts to tell; the smallest possible p is 1", id="fifty copies"
        ),
    ],
)
def test_what_a_result_can_tell(found: Result, least: float, why: str | None) -> None:
    assert smallest_p(found) == pytest.approx(least)
    assert cannot_tell(found) == (why is not None)
    if why is not None:
        assert why_not(found) == why


def test_where_nothing_is_known_or_tested_nothing_is_claimed() -> None:
    assert math.isnan(smallest_p(result())) and math.isnan(smallest_p(result(3, 3, permutations=0)))
    assert not cannot_tell(result()) and not cannot_tell(result(3, 3, permutations=0))


def test_signs_are_flipped_by_text() -> None:
    assert smallest_p(result(2, 2), "ngram_expertise_2") == 1 / 16
    assert smallest_p(result(2, 2), "ngram_expertise_2", "d0") == 1 / 4
    assert smallest_p(result(500, 500), "ngram_expertise_2") == 1 / 1001


@pytest.mark.parametrize("documents", [1, 2])
def test_no_p_of_a_score_is_below_the_smallest(documents: int) -> None:
    from dbes.scoring.score import score

    found = score(simulated_trace(documents=documents, domains=("a", "b"), lean=1.0, layers=2), permutations=200)
    for record in found.calibrated:
        if not math.isnan(record.p):
            least = smallest_p(found, record.metric, record.domain)
            assert record.p >= least * 0.5, "drawn at random, so somewhat below is possible"
