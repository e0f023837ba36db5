"""Surrogates against plain loops, their invariances, and what the contextual part says of routers whose truth is known."""

import numpy as np
import pytest
from scipy.stats import binom
from simulate_tokens import contextual_coverage, explained_runs

from dbes.scoring import surrogates
from dbes.scoring.contextual import contextual_estimates
from dbes.scoring.sampling import TokenSample
from dbes.scoring.surrogates import keys_of, position_bins, surrogate_of
from dbes.trace.types import RoutingShape, TokenRoutes

EXPERTS, TOP_K, DOMAINS = 6, 2, 3


def drawn(seed: int, *, tokens: int = 70, units: int = 9, missing: float = 0.0) -> tuple[TokenSample, RoutingShape]:
    random = np.random.default_rng(seed)
    domain = random.permutation(np.arange(units) % DOMAINS)
    document = np.sort(random.integers(0, units, tokens))
    token_ids = random.geometric(0.25, tokens) + 5 * (domain[document] * (random.random(tokens) < 0.3))
    ids = np.argsort(random.random((tokens, 2, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint8)
    ids[random.random(ids.shape) < missing] = 255
    positions = np.arange(tokens) - np.searchsorted(document, document)
    routes = TokenRoutes(
        ids=ids, document=document.astype(np.int32), positions=positions.astype(np.int32), token_ids=token_ids.astype(np.int32)
    )
    return TokenSample(routes=routes), shape_of(domain)


def shape_of(domain: np.ndarray, *, layers: int = 2, experts: int = EXPERTS, source: tuple[str, ...] | None = None) -> RoutingShape:
    return RoutingShape(
        layers=tuple(range(layers)),
        experts=(experts,) * layers,
        top_k=(TOP_K,) * layers,
        domains=tuple(f"domain{number}" for number in range(domain.max() + 1)),
        document_domain=domain,
        document_ids=tuple(map(str, range(len(domain)))),
        document_source=source,
    )


def by_loops(sample: TokenSample, shape: RoutingShape, key: str, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Routed and surrogate hits [units, experts] and tokens [units], from the formula alone."""
    keys, ids, unit = keys_of(sample.routes, key), sample.routes.ids[:, column], shape.units[sample.routes.document]
    domain = dict(zip(shape.units.tolist(), shape.document_domain.tolist(), strict=True))
    profile = [np.bincount(row[row < EXPERTS], minlength=EXPERTS).astype(float) for row in ids]
    routed, surrogate = np.zeros((2, unit.max() + 1, EXPERTS))
    tokens = np.zeros(unit.max() + 1)
    ran = [t for t in range(len(unit)) if profile[t].any()]
    for t in ran:
        means = []
        for number in range(DOMAINS):
            donors = [profile[x] for x in ran if keys[x] == keys[t] and unit[x] != unit[t] and domain[unit[x]] == number]
            means += [np.mean(donors, axis=0)] if donors else []
        if means:
            tokens[unit[t]] += 1
            routed[unit[t]] += profile[t]
            surrogate[unit[t]] += np.mean(means, axis=0)
    return routed, surrogate, tokens


@pytest.mark.parametrize("key", ["lexical", "position", "bigram"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_hits_are_those_of_plain_loops(key: str, missing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        monkeypatch.setattr(surrogates, "TABLE_CELLS", 1 << 20 if seed % 2 else 64)
        sample, shape = drawn(seed, missing=missing)
        found = surrogate_of(sample, shape, key)
        for column in (0, 1):
            layer = found.layer(column)
            for ours, theirs in zip((layer.routed, layer.surrogate, layer.tokens), by_loops(sample, shape, key, column), strict=True):
                np.testing.assert_allclose(ours, theirs[found.units], atol=1e-12, rtol=0)


def test_documents_of_one_source_are_no_donors_to_each_other() -> None:
    sample, shape = drawn(1)
    source = tuple(f"source{number % 2}" for number in range(9))
    together = shape_of(shape.document_domain, source=source)
    found = surrogate_of(sample, together, "lexical")
    _, surrogate, tokens = by_loops(sample, together, "lexical", 0)
    np.testing.assert_allclose(found.layer(0).surrogate, surrogate[found.units], atol=1e-12, rtol=0)
    np.testing.assert_array_equal(found.tokens, tokens[found.units])
    assert len(found.units) <= 6


def test_what_units_bring_adds_up_to_the_sums() -> None:
    sample, shape = drawn(2)
    layer = surrogate_of(sample, shape, "lexical").layer(0)
    routed, surrogate = layer.by_domain(layer.routed), layer.by_domain(layer.surrogate)
    brought = sum((surrogate - part.surrogate).sum(axis=0) for part in layer.without_each())
    np.testing.assert_allclose(brought, surrogate, atol=1e-9)
    np.testing.assert_allclose(sum((routed - part.routed).sum(axis=0) for part in layer.without_each()), routed, atol=1e-9)


def test_a_table_of_tokens_is_its_own_surrogate() -> None:
    sample, shape = drawn(3, tokens=300)
    table = np.argsort(np.random.default_rng(0).random((100, 2, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint8)
    routes = sample.routes
    lookup = TokenSample(
        routes=TokenRoutes(ids=table[routes.token_ids], document=routes.document, positions=routes.positions, token_ids=routes.token_ids)
    )
    for estimate in contextual_estimates(lookup, shape).metrics.values():
        for values in (estimate.contextual, estimate.contextual_low, estimate.contextual_high):
            assert (values == 0).all()


def test_names_of_tokens_experts_and_documents_mean_nothing() -> None:
    sample, shape = drawn(4, tokens=200)
    routes, random = sample.routes, np.random.default_rng(1)
    expert, token, document = random.permutation(EXPERTS), random.permutation(100), random.permutation(9)
    order = np.argsort(document[routes.document], kind="stable")
    renamed = TokenRoutes(
        ids=expert[routes.ids].astype(np.uint8)[order],
        document=document[routes.document].astype(np.int32)[order],
        positions=routes.positions[order],
        token_ids=token[routes.token_ids].astype(np.int32)[order],
    )
    domain = np.empty(9, np.int64)
    domain[document] = shape.document_domain
    first, second = contextual_estimates(sample, shape), contextual_estimates(TokenSample(routes=renamed), shape_of(domain))
    for key, covered in first.covered.items():
        np.testing.assert_allclose(covered, second.covered[key])
    for name, estimate in first.metrics.items():
        for values, others in zip(vars(estimate).values(), vars(second.metrics[name]).values(), strict=True):
            np.testing.assert_allclose(values, others, atol=1e-9)


def test_shares_covered_and_traces_without_token_ids() -> None:
    sample, shape = drawn(5)
    routes = sample.routes
    alone = TokenRoutes(ids=routes.ids, document=routes.document, positions=routes.positions)
    found = contextual_estimates(TokenSample(routes=alone), shape)
    assert np.isnan(found.covered["lexical"]).all() and (found.covered["position"] > 0).all()
    assert np.isnan(found.metrics["der"].contextual).all() and np.isfinite(found.metrics["der"].position).all()
    assert found.metrics["specialization"].position.shape == (DOMAINS + 1, 3)
    assert found.metrics["der"].position.shape == (1, 3)
    lonely = TokenRoutes(
        ids=routes.ids, document=routes.document, positions=routes.positions, token_ids=np.arange(len(routes), dtype=np.int32)
    )
    nobody = contextual_estimates(TokenSample(routes=lonely), shape)
    assert (nobody.covered["lexical"] == 0).all() and np.isnan(nobody.metrics["specialization"].contextual).all()


def test_positions_are_told_apart_finely_at_the_beginning_only() -> None:
    bins = position_bins(np.arange(4096))
    assert (bins[:17] == np.arange(17)).all() and (np.diff(bins) >= 0).all() and bins[-1] == 16 + 8 * 8 - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "key", "settings"),
    [
        ("noisy", "lexical", {}),
        ("documents", "lexical", {}),
        ("noisy", "lexical", {"experts": 64, "top_k": 4, "types": 3000}),
        ("documents", "lexical", {"experts": 16, "zipf": 1.3, "lean": 0.5}),
        ("position", "position", {"experts": 16}),
    ],
)
def test_intervals_of_the_part_beyond_the_key_cover_zero(router: str, key: str, settings: dict) -> None:
    """A true coverage of 92 to 98 % gives shares of 400 runs within these bounds all but once in ten thousand."""
    runs = 400
    low, high = binom.ppf(1e-4, runs, 0.92) / runs, binom.ppf(1 - 1e-4, runs, 0.98) / runs
    for metric, share in contextual_coverage(router, key=key, runs=runs, **settings).items():
        assert low <= share <= high, metric


@pytest.mark.slow
def test_a_true_effect_given_the_token_keeps_its_size() -> None:
    """Where all domains have the same words, all there is lies beyond the words; a table of words has nothing beyond them.

    To 2 %: a text is no donor of its own tokens, so that the surrogate lies a little below 0 (here by 1 % of the effect).
    """
    found = explained_runs("domains", key="lexical", runs=100, lean=0.0, effect=0.8)["specialization"]
    routed, beyond = (np.array([getattr(each, part)[-1, -1] for each in found]) for part in ("routed", "beyond"))
    assert abs((beyond - routed).mean()) < 0.02 * routed.mean()
    assert all(each.low[-1, -1] > 0 for each in found)
    assert set(contextual_coverage("lookup", runs=20, burst=100.0, lean=1.5).values()) == {1.0}
