"""The ideal router's values: reached by round robin where that is claimed, and exceeded by no router, random or adversarial."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from dbes.scoring import metrics
from dbes.scoring.reference import ideal_values
from dbes.scoring.resampling import domain_scores
from dbes.trace.baselines import baseline_trace, expert_blocks
from dbes.trace.types import RoutingShape

SIZES = [(d, e, k) for d in (2, 3, 8, 30) for e in (8, 9, 60, 256) for k in (1, 2, 5, 8) if k < e]
SMALL = [(8, 8, 2), (4, 7, 2), (3, 4, 2), (5, 8, 3), (4, 6, 4), (6, 9, 6), (10, 8, 1)]


def rows_of(usage: np.ndarray) -> dict[str, np.ndarray]:
    """Every domain metric of usage [..., domains, experts] in infinitely many tokens, rows as the reference has them, [..., rows]."""
    cells = usage[..., :, None, :]
    with_mean = {"specialization": metrics.domain_divergence(cells), "domain_isolation": metrics.isolation_of(metrics.cosines(cells))}
    rows = {name: np.concatenate([found, found.mean(axis=-2, keepdims=True)], axis=-2)[..., 0] for name, found in with_mean.items()}
    return {**rows, "der": metrics.effective_rank(metrics.grams(cells), np.array([usage.shape[-1]]))}


def assert_within(usage: np.ndarray, domains: int, experts: int, k: int) -> None:
    assert usage.max() <= 1 / k + 1e-12
    np.testing.assert_allclose(usage.sum(axis=-1), 1)
    ideal = ideal_values(domains, experts, k)
    for name, found in rows_of(usage).items():
        assert (found <= ideal[name] + 1e-9).all(), name


def capped(weights: np.ndarray, k: int) -> np.ndarray:
    """Usages of some router near ``weights`` [..., experts]: shares of at most 1/k."""
    usage = weights / weights.sum(axis=-1, keepdims=True)
    for _ in range(200):
        over = usage > 1 / k
        room = 1 - over.sum(axis=-1, keepdims=True) / k
        rest = np.where(over, 0.0, usage)
        usage = np.where(over, 1 / k, rest * room / np.maximum(rest.sum(axis=-1, keepdims=True), 1e-300))
        if (usage <= 1 / k + 1e-13).all():
            break
    return usage


def sets(random: np.random.Generator, rows: int, experts: int, k: int, used: int) -> np.ndarray:
    """Each row uses ``used`` of the experts evenly."""
    chosen = np.argsort(random.random((rows, experts)), axis=1)[:, :used]
    usage = np.zeros((rows, experts))
    np.put_along_axis(usage, chosen, 1 / used, axis=1)
    assert used >= k
    return usage


def routers(random: np.random.Generator, domains: int, experts: int, k: int) -> Iterator[np.ndarray]:
    """Usage [domains, experts] of many kinds of router."""
    for used in {k, min(k + 1, experts), min(2 * k, experts), experts}:
        yield sets(random, domains, experts, k, used)
    for groups in {1, 2, max(1, domains // 2), max(1, experts // k)}:  # domains that share their block
        yield sets(random, groups, experts, k, k)[np.arange(domains) % groups]
    disjoint = np.zeros((domains, experts))  # as many blocks as there is room for, dealt again and again
    for domain in range(domains):
        disjoint[domain, domain % (experts // k) * k + np.arange(k)] = 1 / k
    yield disjoint
    alone = np.zeros((domains, experts))  # the first domain by itself, as far as it goes
    alone[0, :k], alone[1:, experts - k :] = 1 / k, 1 / k
    yield alone
    for power in (1, 4, 20):
        yield capped(random.random((domains, experts)) ** power + 1e-6, k)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_router_exceeds_the_ideal_one(size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(size)
    assert_within(np.stack(list(routers(random, *size))), *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_round_robin_reaches_the_ideal_of_specialization_and_isolation(size: tuple[int, int, int]) -> None:
    domains, experts, k = size
    usage = np.zeros((domains, experts))
    for row, block in zip(usage, expert_blocks(*size), strict=True):
        row[block] = 1 / len(block)
    ideal, found = ideal_values(*size), rows_of(usage)
    for name in ("specialization", "domain_isolation"):
        assert found[name][-1] == pytest.approx(ideal[name][-1], abs=1e-12)
    assert ideal["specialization"][-1] <= min(math.log(domains), math.log(experts / k)) + 1e-12
    if domains * k <= experts:
        assert ideal["specialization"] == pytest.approx(math.log(domains)) and ideal["domain_isolation"] == pytest.approx(1)
        assert ideal["der"] == pytest.approx(1)
        sizes = {len(block) for block in expert_blocks(*size)}
        assert found["der"] == pytest.approx(1) if len(sizes) == 1 else found["der"] < 1


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("metric", ["specialization", "domain_isolation", "der"])
def test_climbing_does_not_exceed_the_ideal_router(size: tuple[int, int, int], metric: str) -> None:
    """From a random router, mass is moved between two experts of a domain as long as the metric rises."""
    domains, experts, k = size
    random = np.random.default_rng(1)
    usage = sets(random, domains, experts, k, k)
    best = rows_of(usage)[metric][-1]
    for _ in range(30):
        tries = np.repeat(usage[None], 30, axis=0)
        for each in tries:
            row = each[random.integers(domains)]
            give, take = random.choice(np.flatnonzero(row > 1e-12)), random.choice(np.flatnonzero(row < 1 / k - 1e-12))
            moved = min(row[give], 1 / k - row[take]) * random.choice([1.0, 0.3])
            row[give] -= moved
            row[take] += moved
        assert_within(tries, *size)
        found = rows_of(tries)[metric][..., -1]
        if found.max() > best:
            usage, best = tries[found.argmax()], found.max()
    ideal = ideal_values(*size)[metric][-1]
    assert best >= 0.7 * ideal, "a bound that nobody comes near says nothing"


@pytest.mark.parametrize(("domains", "experts", "k"), [(8, 8, 2), (5, 8, 3), (3, 16, 2)])
def test_plug_in_values_of_few_tokens_do_not_exceed_it_either(domains: int, experts: int, k: int) -> None:
    shape = RoutingShape(
        layers=(0,), experts=(experts,), top_k=(k,), domains=tuple(map(str, range(domains))),
        document_domain=np.arange(domains, dtype=np.int32), document_ids=tuple(map(str, range(domains))),
    )  # fmt: skip
    ideal = ideal_values(domains, experts, k)
    for router in ("uniform", "reference"):
        for tokens in (2, 3, 10):
            (routes,) = tuple(baseline_trace(shape, np.full(domains, tokens), router=router, seed=tokens))
            counts = np.stack([np.bincount(routes.ids[routes.document == d].ravel(), minlength=experts) for d in range(domains)])[:, None]
            found = domain_scores(counts, np.full((domains, 1), float(tokens)))
            assert found.divergence.mean() <= ideal["specialization"][-1] + 1e-9
            assert not np.mean(found.isolation) > ideal["domain_isolation"][-1] + 1e-9
            if router == "reference":
                assert found.divergence.mean() == pytest.approx(ideal["specialization"][-1], abs=1e-9)
            if router == "reference" and domains * k > experts:  # blocks of k leave nothing to chance
                assert np.mean(found.isolation) == pytest.approx(ideal["domain_isolation"][-1], abs=1e-9)


def test_the_values_by_hand() -> None:
    found = ideal_values(8, 8, 2)  # four pairs of experts, each of two domains
    assert found["specialization"] == pytest.approx([math.log(8)] * 8 + [math.log(4)])
    assert found["specialization_normalized"][-1] == pytest.approx(1)
    assert found["domain_isolation"] == pytest.approx([1] * 8 + [6 / 7])
    assert found["der"] == pytest.approx((7 - 1) / 7)  # eigenvalues 1 and 7 times 3/7: 16 / (1 + 9/7) = 7
    three_of_four = ideal_values(3, 4, 3)  # two experts are shared by any two domains, one can be kept to oneself
    assert three_of_four["specialization"][:3] == pytest.approx(math.log(3) / 3)
    assert three_of_four["domain_isolation"] == pytest.approx(1 / 3)
    assert all(np.isnan(values).all() for values in (*ideal_values(1, 8, 2).values(), *ideal_values(4, 8, 8).values()))
