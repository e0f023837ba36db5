"""Trajectories: the search against all chains, log-lift against plain loops, intervals that hold the truth."""

from __future__ import annotations

import math
from itertools import product

import naive
import numpy as np
import pytest
from scipy import stats

from dbes.paths.evidence import gather
from dbes.paths.trajectories import best_chain, best_through, chain_counts, disjoint_chains, log_lifts, measured_lift, strongest
from dbes.trace.store import Trace


def all_chains(first: np.ndarray, steps: np.ndarray) -> dict[tuple[int, ...], float]:
    experts, layers = len(first), len(steps) + 1
    return {
        chain: first[chain[0]] + sum(steps[layer][chain[layer], chain[layer + 1]] for layer in range(layers - 1))
        for chain in product(range(experts), repeat=layers)
    }


@pytest.mark.parametrize("seed", range(20))
def test_best_chain_against_all_chains(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers, experts = int(random.integers(1, 5)), int(random.integers(1, 5))
    first, steps = random.normal(size=experts), random.normal(size=(layers - 1, experts, experts))
    steps[random.random(steps.shape) < 0.3] = -np.inf
    every = all_chains(first, steps)
    chain, total = best_chain(first, steps)
    best = max(every.values())
    assert total == pytest.approx(best)
    assert (chain == () and best == -math.inf) or every[chain] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_disjoint_chains_against_all_chains(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, steps = random.normal(size=4), random.normal(size=(2, 4, 4))
    every, taken, expected = all_chains(first, steps), [set(), set(), set()], []
    while True:
        free = {c: t for c, t in every.items() if all(c[layer] not in taken[layer] for layer in range(3))}
        if not free or max(free.values()) <= 0:
            break
        chain = max(free, key=free.__getitem__)
        expected.append(chain)
        for layer in range(3):
            taken[layer].add(chain[layer])
    assert [chain for chain, _ in disjoint_chains(first, steps, limit=9)] == expected


def test_best_through_against_all_chains() -> None:
    recording = naive.random_recording(1, documents=(8, 8), length=(150, 200), experts=4, top_k=2, effect=1.0)
    evidence = gather(recording.trace())
    first, steps = log_lifts(evidence.transitions, evidence.hits, 0)
    every = all_chains(first, steps)
    found = best_through(evidence.transitions, evidence.hits, 0)
    for layer in range(3):
        for expert in range(4):
            assert found[layer, expert] == pytest.approx(max(total for chain, total in every.items() if chain[layer] == expert))


def lift_by_loops(recording: naive.Recording, domain: int, chain: tuple[int, ...]) -> float:
    """Log-lift of a chain, counting pairs of slots token by token."""
    domains = len(recording.domains)
    joint, origin, pairs = ([[0.0] * (len(chain) - 1) for _ in range(domains)] for _ in range(3))
    for token, document in enumerate(recording.document):
        own = recording.domain[document]
        for layer in range(len(chain) - 1):
            for here in recording.ids[token, layer]:
                for there in recording.ids[token, layer + 1]:
                    if here >= 0 and there >= 0:
                        pairs[own][layer] += 1
                        origin[own][layer] += here == chain[layer]
                        joint[own][layer] += here == chain[layer] and there == chain[layer + 1]
    total = 0.0
    for layer in range(len(chain) - 1):
        shares = [joint[d][layer] / pairs[d][layer] for d in range(domains)]
        starts = [origin[d][layer] / pairs[d][layer] for d in range(domains)]
        if layer == 0:
            total += math.log(starts[domain] / (sum(starts) / domains))
        steps = [share / start for share, start in zip(shares, starts, strict=True)]
        total += math.log(steps[domain] / (sum(steps) / domains))
    return total


@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_log_lift_by_plain_loops(missing: float) -> None:
    recording = naive.random_recording(3, documents=(8, 6, 7), length=(150, 200), experts=(4, 3, 5), effect=1.0, missing=missing)
    evidence = gather(recording.trace())
    first, steps = log_lifts(evidence.transitions, evidence.hits, 1)
    assert np.isinf(steps[0][:, 3:]).all(), "experts that a narrow layer does not have"
    every = {chain: total for chain, total in all_chains(first, steps).items() if math.isfinite(total)}
    for chain in sorted(every, key=every.__getitem__)[-5:]:
        assert every[chain] == pytest.approx(lift_by_loops(recording, 1, chain))
        counts = chain_counts(evidence.routes, evidence.routes.document, 21, chain)  # pyright: ignore
        value, low, high = measured_lift(*counts, evidence.shape.document_domain, 3, 1)
        assert value == pytest.approx(every[chain], abs=0.1), "corrected for small samples, so near and not equal"
        assert low < value < high  # pyright: ignore[reportOperatorIssue]


def test_jackknife_of_the_lift_leaves_out_one_text_at_a_time() -> None:
    recording = naive.random_recording(3, documents=(4, 5), length=(60, 80), experts=3, effect=0.5)
    evidence = gather(recording.trace())
    chain = (0, 1, 1)
    counts = chain_counts(evidence.routes, evidence.routes.document, 9, chain)  # pyright: ignore
    value, low, high = measured_lift(*counts, evidence.shape.document_domain, 2, 0)
    whole, variance, fourth, corrected = lift_by_loops(recording, 0, chain), 0.0, 0.0, lift_by_loops(recording, 0, chain)
    for members in (range(4), range(4, 9)):
        left = [lift_by_loops(recording.take(np.flatnonzero(recording.document != m)), 0, chain) for m in members]
        mean, count = sum(left) / len(left), len(left)
        corrected += (count - 1) * (whole - mean)
        part = (count - 1) / count * sum((one - mean) ** 2 for one in left)
        variance, fourth = variance + part, fourth + part**2 / (count - 1)
    assert value == pytest.approx(corrected)
    reach = stats.t.ppf(0.975, variance**2 / fourth) * math.sqrt(variance)
    assert (low, high) == pytest.approx((corrected - reach, corrected + reach))


def walks(seed: int, *, bias: float, documents: int = 40) -> Trace:
    """Top-1 routes of two domains; the first one follows experts 0 -> 1 -> 2 with extra probability ``bias`` at every step."""
    random = np.random.default_rng(seed)
    ids, document = [], []
    for number in range(2 * documents):
        own = np.clip(random.normal(bias, 0.05), 0, 1) if number < documents else 0.0
        for _ in range(40):
            ids.append([wanted if random.random() < own else int(random.integers(6)) for wanted in (0, 1, 2)])
            document.append(number)
    return Trace.from_arrays(
        np.array(ids)[:, :, None],
        document=np.array(document),
        domain=np.repeat([0, 1], documents),
        domains=("a", "b"),
        layers=range(3),
        experts=6,
    )


def test_a_planted_chain_is_found_and_its_interval_holds_the_truth() -> None:
    bias, held, runs = 0.3, 0, 40
    share = (1 - bias) / 6
    other, own = 1 / 6, bias + share
    mixture_start = (own + other) / 2
    # experts of one token are independent given the text; the small spread of ``bias`` over texts is left out of the truth
    truth = 3 * math.log(own / mixture_start)
    for run in range(runs):
        found = strongest(gather(walks(run, bias=bias)), 0, limit=1, seed=run)
        assert found[0].experts == (0, 1, 2)
        held += found[0].low <= truth <= found[0].high  # pyright: ignore[reportOperatorIssue]
    assert held >= 33, "95 % intervals over 40 runs: fewer than 33 has probability 0.001"


def test_the_lift_of_a_chain_found_in_noise_is_not_inflated() -> None:
    found = [strongest(gather(walks(run, bias=0.0)), 0, limit=1, seed=run) for run in range(25)]
    chains = [trajectory for one in found for trajectory in one if trajectory.log_lift is not None]
    inflated, measured = np.mean([t.found for t in chains]), np.mean([t.log_lift for t in chains])
    error = np.std([t.log_lift for t in chains]) / math.sqrt(len(chains))
    assert len(chains) >= 20 and inflated > 0.4
    assert abs(measured) < 4 * error


def test_a_model_of_one_layer_has_chains_of_one_expert() -> None:
    recording = naive.random_recording(2, documents=(8, 8), length=(60, 80), layers=1, experts=5, effect=1.0)
    evidence = gather(recording.trace())
    found = strongest(evidence, 0, limit=2)
    assert all(len(trajectory.experts) == 1 for trajectory in found) and found
    through = best_through(evidence.transitions, evidence.hits, 0)[0]
    often = np.isfinite(through)
    assert often.sum() >= 3
    np.testing.assert_allclose(through[often], np.log(evidence.usage[0, 0] / evidence.usage.mean(axis=0)[0])[often])
