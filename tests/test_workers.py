"""Layers that are worked on several at a time: the same results, in order, and never more of them in memory than workers."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from dbes.scoring import workers
from dbes.scoring.counts import Counts
from dbes.scoring.layers import Design, put_together, score_layer, score_layers


@pytest.fixture(params=[1, 2, 5])
def several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(workers, "WORKERS", request.param)
    return request.param


def test_results_come_in_the_order_of_the_items(several: int) -> None:
    gates = [threading.Event() for _ in range(4)]

    def last_first(item: int) -> int:
        if item < several - 1 and several > 1 and item < 3:  # waits for one that began later
            assert gates[item + 1].wait(20)
        gates[min(item, 3)].set()
        return item * item

    assert list(workers.in_order(last_first, range(9), size=workers.SMALL)) == [item * item for item in range(9)]


def test_no_more_items_are_taken_ahead_than_there_are_workers(several: int) -> None:
    taken, given = [], []

    def items():
        for item in range(12):
            taken.append(item)
            assert len(taken) - len(given) <= several
            yield item

    for item in workers.in_order(lambda item: item, items(), size=workers.SMALL):
        given.append(item)
    assert given == taken == list(range(12))


@pytest.mark.usefixtures("several")
def test_an_error_reaches_the_caller_and_small_work_stays_in_its_thread() -> None:
    def failing(item: int) -> float:
        return 1 / item

    with pytest.raises(ZeroDivisionError):
        list(workers.in_order(failing, [2, 1, 0, 5], size=workers.SMALL))
    seen = list(workers.in_order(lambda _: threading.current_thread(), range(3), size=workers.SMALL - 1))
    assert seen == [threading.current_thread()] * 3


@pytest.mark.usefixtures("several")
def test_what_numpy_does_about_errors_holds_in_the_workers() -> None:
    with np.errstate(divide="raise"):
        found = workers.in_order(lambda item: np.float64(1) / item, np.array([1.0, 0.0]), size=workers.SMALL)
        with pytest.raises(FloatingPointError):
            list(found)


def test_scores_do_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    hits = random.multinomial(40, random.dirichlet(np.full(64, 0.3), (1100, 3)))
    counts = Counts.from_arrays(hits, domains=["a", "b"], document_domain=np.arange(1100) % 2, top_k=2, tokens=np.full(1100, 40))
    assert len(counts.tokens) * counts.shape.width >= workers.SMALL
    found = []
    for number in (1, 3):
        monkeypatch.setattr(workers, "WORKERS", number)
        found.append(score_layers(counts, permutations=50, seed=3))
    for metric, one in found[0].estimates.items():
        other = found[1].estimates[metric]
        for name in ("value", "null", "p", "replicates"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{metric} {name}")


def test_what_layers_leave_out_in_turn_is_not_kept_from_one_layer_to_the_next() -> None:
    """[documents, documents] of every layer would be layers x documents^2 in memory."""
    random, documents = np.random.default_rng(5), 300
    hits = random.multinomial(40, random.dirichlet(np.full(8, 0.3), (documents, 8)))
    domain = np.arange(documents) % 2
    counts = Counts.from_arrays(hits, domains=["a", "b"], document_domain=domain, top_k=2, tokens=np.full(documents, 40))
    design = Design.of(counts, permutations=20, seed=0)
    held, large = [], []

    def layers():
        for sums in counts.layers():
            layer = score_layer(sums, (), design)
            large.append(layer.products.nbytes)
            yield layer
            del layer
            held.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        put_together(layers(), design.usage, design.left_out, sign_flips=20, seed=0)
    finally:
        tracemalloc.stop()
    assert large == [documents**2 * 8] * 8
    assert max(np.diff(held[2:])) < large[0] / 2
