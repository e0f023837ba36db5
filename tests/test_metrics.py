"""The metrics as pure functions: values by hand, independent references, the extremes of a router, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations, product

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr
from sklearn.metrics import mutual_info_score
from sklearn.metrics.pairwise import cosine_similarity

from dbes.scoring import metrics
from dbes.scoring.metrics import NGRAM_SIZES

LN2, LN3 = math.log(2), math.log(3)
quick = settings(max_examples=30, deadline=None, derandomize=True)


def one_layer(*rows: list[float]) -> np.ndarray:
    """[domains, 1 layer, experts]."""
    return np.array(rows, float)[:, None, :]


@st.composite
def usages(draw: st.DrawFn, least_domains: int = 2) -> np.ndarray:
    """Usage [domains, layers, experts] of any shape, zeros included."""
    shape = tuple(draw(st.integers(least, 5)) for least in (least_domains, 1, 2))
    counts = draw(arrays(np.int64, shape, elements=st.integers(0, 9)))
    counts[..., 0] += 1
    return counts / counts.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param([1, 3], [0.25, 0.75], id="shares"),
        pytest.param([0, 0], [math.nan, math.nan], id="nothing counted"),
        pytest.param([5, 0], [1.0, 0.0], id="one expert"),
    ],
)
def test_usage_by_hand(counts: list[int], expected: list[float]) -> None:
    np.testing.assert_array_equal(metrics.usage_of(np.array(counts)), expected)


@pytest.mark.parametrize(
    ("row", "experts", "expected"),
    [
        pytest.param([0.25] * 4, 4, 0.0, id="even"),
        pytest.param([1.0, 0, 0, 0], 4, math.log(4), id="one of four"),
        pytest.param([0.5, 0.5, 0, 0], 4, LN2, id="two of four"),
        pytest.param([0.75, 0.25], 2, LN2 - 0.5623351446188083, id="by hand: ln 2 - H(3/4)"),
        pytest.param([0.5, 0.5, 0, 0], 2, 0.0, id="narrow layer, padded to the widest"),
    ],
)
def test_routing_specialization_by_hand(row: list[float], experts: int, expected: float) -> None:
    found = metrics.routing_specialization(one_layer(row), np.array([experts]))
    assert found[0, 0] == pytest.approx(expected, abs=1e-7)
    assert found[0, 0] == pytest.approx(naive.rs_row(row[:experts]), abs=1e-12)


@pytest.mark.parametrize(
    ("matrix", "participation", "entropy"),
    [
        pytest.param([[1, 0], [0, 1]], 1.0, 1.0, id="two orthogonal layers"),
        pytest.param([[0.5, 0.5], [0.5, 0.5]], 0.5, 0.5, id="two equal layers"),
        pytest.param([[1, 0], [0.6, 0.8]], 1.6 / 2, math.exp(0.6368973) / 2, id="by hand: s^2 = 1.6, 0.4"),
    ],
)
def test_normalized_effective_rank_by_hand(matrix: list[list[float]], participation: float, entropy: float) -> None:
    if matrix[1] == [0.6, 0.8]:  # s = sqrt(1.6), sqrt(0.4): shares 2/3, 1/3; (sum)^2 / sum of squares = 9 * 0.4 / 2
        participation, entropy = 1.8 / 2, math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))) / 2
    usage = np.array(matrix)[None]
    assert metrics.normalized_effective_rank(usage, np.array([2, 2]))[0] == pytest.approx(participation)
    assert metrics.normalized_effective_rank(usage, np.array([2, 2]), entropy=True)[0] == pytest.approx(entropy)


def test_normalized_effective_rank_of_a_domain_without_tokens_is_nan() -> None:
    usage = np.stack([np.full((2, 3), 1 / 3), np.full((2, 3), np.nan)])
    found = metrics.normalized_effective_rank(usage, np.array([3, 3]))
    assert found[0] == pytest.approx(0.5) and np.isnan(found[1])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([[1, 0], [0, 1]], [1.0, 1.0], id="disjoint"),
        pytest.param([[0.5, 0.5], [0.5, 0.5]], [0.0, 0.0], id="alike"),
        pytest.param([[1, 0], [0.5, 0.5]], [1 - 1 / math.sqrt(2)] * 2, id="45 degrees"),
        pytest.param([[1, 0], [1, 0], [0, 1]], [0.5, 0.5, 1.0], id="two alike, one apart"),
        pytest.param([[0.3, 0.7]], [0.0], id="one domain: 0 by convention"),
    ],
)
def test_published_domain_isolation_by_hand(rows: list[list[float]], expected: list[float]) -> None:
    whole, by_layer = metrics.published_domain_isolation(one_layer(*rows))
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    np.testing.assert_allclose(by_layer[:, 0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([[1, 0], [0, 1]], LN2, id="disjoint domains"),
        pytest.param([[0.5, 0.5], [0.5, 0.5]], 0.0, id="identical domains"),
        pytest.param([[1, 0], [0.5, 0.5]], 0.5623351446188083 - LN2 / 2, id="by hand: H(3/4) - ln2 / 2"),
        pytest.param([[1, 0, 0], [0, 1, 0], [0, 0, 1]], LN3, id="three disjoint domains"),
        pytest.param([[1.0, 0.0]], math.nan, id="one domain"),
        pytest.param([[1, 0], [math.nan, math.nan]], math.nan, id="a domain without tokens"),
    ],
)
def test_domain_information_by_hand(rows: list[list[float]], expected: float) -> None:
    assert metrics.domain_information(one_layer(*rows))[0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_domain_divergence_by_hand() -> None:
    found = metrics.domain_divergence(one_layer([1, 0], [0.5, 0.5]))
    np.testing.assert_allclose(found[:, 0], [math.log(4 / 3), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)])
    given_mixture = metrics.domain_divergence(one_layer([1, 0]), np.array([[0.5, 0.5]]))
    assert given_mixture[0, 0] == pytest.approx(LN2)
    assert np.isnan(metrics.domain_divergence(one_layer([1, 0], [math.nan, math.nan]))).all()


@pytest.mark.parametrize(
    ("rows", "experts", "ratio", "entropy"),
    [
        pytest.param([[1, 0, 0], [0, 1, 0]], 3, 1.0, 1.0, id="orthogonal, equal norm"),
        pytest.param([[0.2, 0.8], [0.2, 0.8]], 2, 0.0, 0.0, id="alike"),
        pytest.param(  # Gram 1, .6, .6, 1: 4 / 2.72; s = sqrt(1.6), sqrt(.4), as 2 to 1
            [[1, 0], [0.6, 0.8]], 2, 4 / 2.72 - 1, math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))) - 1, id="by hand"
        ),
        pytest.param(  # Gram eigenvalues 3/2, 1 and 0
            [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]], 2, 2.5**2 / 3.25 - 1, None, id="layer with fewer experts than domains"
        ),
        pytest.param([[0.2, 0.8]], 2, math.nan, math.nan, id="one domain"),
        pytest.param([[1, 0], [math.nan, math.nan]], 2, math.nan, math.nan, id="a domain without tokens"),
    ],
)
def test_effective_rank_by_hand(rows: list[list[float]], experts: int, ratio: float, entropy: float | None) -> None:
    usage = one_layer(*rows)
    if entropy is None:
        shares = np.array([math.sqrt(1.5), 1.0]) / (math.sqrt(1.5) + 1)
        entropy = math.exp(-(shares * np.log(shares)).sum()) - 1
    assert metrics.effective_rank(metrics.grams(usage), np.array([experts]))[0] == pytest.approx(ratio, abs=1e-12, nan_ok=True)
    assert metrics.entropy_rank(usage, np.array([experts]))[0] == pytest.approx(entropy, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("squared", "tokens", "slots", "expected"),
    [
        pytest.param(0.5, 10, 20, (0.5 - 0.05) / 0.9, id="by hand"),
        pytest.param(0.25, 4, 4, math.nan, id="no more than chance: nothing can be said"),
        pytest.param(0.5, 1, 2, math.nan, id="one token"),
        pytest.param(0.01, 10, 20, math.nan, id="negative estimate"),
    ],
)
def test_unbiased_norms_by_hand(squared: float, tokens: float, slots: float, expected: float) -> None:
    found = metrics.unbiased_norms(np.array(squared), np.array(tokens), np.array(slots))
    assert found == pytest.approx(expected, nan_ok=True)


def test_unbiased_norms_have_the_true_mean() -> None:
    """Over every possible pair of independent choices of 2 of 3 experts, the estimate averages to the true squared norm."""
    sets = {(0, 1): 0.5, (0, 2): 0.3, (1, 2): 0.2}
    true = np.array([0.8, 0.7, 0.5]) / 2
    expected = 0.0
    for first, second in product(sets, repeat=2):
        share = np.bincount([*first, *second], minlength=3) / 4
        estimate = (share @ share - 1 / 4) / (1 - 1 / 2)
        if estimate > 0:
            assert metrics.unbiased_norms(np.array(share @ share), np.array(2), np.array(4)) == pytest.approx(estimate)
        expected += sets[first] * sets[second] * estimate
    assert expected == pytest.approx(true @ true)


@pytest.mark.parametrize(
    ("primaries", "size", "expected"),
    [
        pytest.param([3, 1], 2, 0.5, id="3 of 4 pairs of AAAB in half of the cases"),
        pytest.param([4, 0], 2, 1.0, id="always alike"),
        pytest.param([1, 1], 2, 0.0, id="never alike"),
        pytest.param([1, 0], 2, math.nan, id="too short"),
        pytest.param([5, 5], 5, 2 / math.comb(10, 5), id="five of ten"),
    ],
)
def test_shuffled_ratio_by_hand(primaries: list[int], size: int, expected: float) -> None:
    assert metrics.shuffled_ratio(np.array(primaries), size) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("text", ["AABB", "AAABBC", "ABCABA"])
@pytest.mark.parametrize("size", [2, 3])
def test_shuffled_ratio_is_the_mean_over_every_order_of_the_tokens(text: str, size: int) -> None:
    orders = [sum(len(set(order[i : i + size])) == 1 for i in range(len(text) - size + 1)) for order in permutations(text)]
    counts = np.array([text.count(letter) for letter in "ABC"])
    assert metrics.shuffled_ratio(counts, size) == pytest.approx(np.mean(orders) / (len(text) - size + 1))


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        pytest.param([0.5, 0.3, 0.2], [True, True, True], id="0.8 is not enough"),
        pytest.param([0.6, 0.25, 0.15], [True, True, False], id="exactly 0.85"),
        pytest.param([0.1, 0.9, 0.0], [False, True, False], id="one expert"),
        pytest.param([0.25, 0.25, 0.25], [True, True, True], id="ties"),
        pytest.param([0.0, 0.0, 0.0], [False, False, False], id="no mass"),
        pytest.param([1.0, 5.0, 5.0], [False, True, True], id="by descending mass"),
    ],
)
def test_expert_group_by_hand(mass: list[float], expected: list[bool]) -> None:
    assert metrics.expert_group(np.array(mass)).tolist() == expected


@pytest.mark.parametrize(
    ("experts", "k", "expected"),
    [
        pytest.param(8, 2, 0.464285714, id="Mixtral, table 5: 46.4 %"),
        pytest.param(8, 1, 0.125, id="first choice: 12.5 %"),
        pytest.param(4, 3, 1.0, id="more than half"),
        pytest.param(4, 2, 1 - 1 / 6, id="half"),
        pytest.param(3, 3, 1.0, id="all"),
    ],
)
def test_overlap_chance_by_hand(experts: int, k: int, expected: float) -> None:
    assert metrics.overlap_chance(np.array([experts]), np.array([k]))[0] == pytest.approx(expected)
    assert naive.any_overlap_chance(experts, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("domains", "experts", "k", "expected"),
    [
        pytest.param(4, 64, 8, math.log(4), id="domains bind"),
        pytest.param(8, 8, 2, math.log(4), id="experts bind"),
        pytest.param(4, 8, 8, math.nan, id="k = E"),
        pytest.param(1, 8, 2, 0.0, id="one domain"),
    ],
)
def test_information_bound_by_hand(domains: int, experts: int, k: int, expected: float) -> None:
    assert metrics.information_bound(domains, np.array([experts]), np.array([k]))[0] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("ratio", "chance", "expected"),
    [
        pytest.param(0.5, 0.5, 0.0, id="chance"),
        pytest.param(1.0, 0.5, 1.0, id="always"),
        pytest.param(0.25, 0.5, -0.5, id="less than chance"),
        pytest.param(1.0, 1.0, math.nan, id="nothing to exceed"),
    ],
)
def test_above_chance_by_hand(ratio: float, chance: float, expected: float) -> None:
    assert metrics.above_chance(np.array(ratio), np.array(chance)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("measure", "rows", "expected"),
    [
        pytest.param(metrics.utilization, [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]], 0.5, id="utilization: half the experts"),
        pytest.param(metrics.utilization, [[1, 0], [0, 1]], 1.0, id="utilization: even together"),
        pytest.param(metrics.max_violation, [[0.75, 0.25], [0.25, 0.75]], 0.0, id="MaxVio: even together"),
        pytest.param(metrics.max_violation, [[1, 0, 0, 0], [1, 0, 0, 0]], 3.0, id="MaxVio: one of four"),
        pytest.param(metrics.load_entropy, [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]], 0.5, id="load entropy: ln 2 / ln 4"),
        pytest.param(metrics.load_divergence, [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]], LN2, id="load: ln 4 - ln 2"),
    ],
)
def test_load_companions_by_hand(measure: Callable[..., np.ndarray], rows: list[list[float]], expected: float) -> None:
    assert measure(one_layer(*rows), np.array([len(rows[0])]))[0] == pytest.approx(expected)


def test_purity_by_hand() -> None:
    assert metrics.purity(one_layer([1, 0], [0, 1]))[0] == 1.0
    assert metrics.purity(one_layer([0.5, 0.5], [0.5, 0.5]))[0] == 0.5
    assert metrics.purity(one_layer([0.75, 0.25], [0.5, 0.5]))[0] == pytest.approx((0.75 + 0.5) / 2)


def test_mutual_information_is_that_of_sklearn() -> None:
    random = np.random.default_rng(0)
    for shape in ((3, 4), (2, 7), (5, 5)):
        table = random.integers(0, 6, shape)
        assert metrics.mutual_information(table) == pytest.approx(mutual_info_score(None, None, contingency=table), abs=1e-12)
    assert np.isnan(metrics.mutual_information(np.zeros((2, 2))))


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([1, 2, 3, 4, 9, 19]))
def test_consecutive_windows(flags: list[bool], length: int) -> None:
    found = metrics.consecutive(np.array(flags), length)
    assert found.tolist() == [t + 1 >= length and all(flags[t - length + 1 : t + 1]) for t in range(len(flags))]


def test_ngram_sizes_are_those_of_the_definition() -> None:
    assert NGRAM_SIZES == (2, 5, 10, 20)


# ------------------------------------------------------------------------------------------------------------ properties


@quick
@given(usages())
def test_specialization_and_load_add_up_to_rs(usage: np.ndarray) -> None:
    experts = np.full(usage.shape[1], usage.shape[2])
    plain = rel_entr(usage, 1 / usage.shape[2]).sum(axis=-1).mean(axis=0)
    found = metrics.domain_information(usage) + metrics.load_divergence(usage, experts)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.routing_specialization(usage, experts).mean(axis=0), plain, atol=1e-6)


@quick
@given(usages())
def test_divergences_average_to_the_information_and_are_those_of_scipy(usage: np.ndarray) -> None:
    divergence = metrics.domain_divergence(usage)
    np.testing.assert_allclose(divergence, rel_entr(usage, usage.mean(axis=0)).sum(axis=-1), atol=1e-12)
    np.testing.assert_allclose(divergence.mean(axis=0), metrics.domain_information(usage), atol=1e-12)


@quick
@given(usages())
def test_plug_in_cosines_are_those_of_sklearn(usage: np.ndarray) -> None:
    for layer in range(usage.shape[1]):
        np.testing.assert_allclose(metrics.cosines(usage)[layer], cosine_similarity(usage[:, layer]), atol=1e-12)


def rank_of(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    return metrics.effective_rank(metrics.grams(usage), experts)


@quick
@given(usages(), st.randoms(use_true_random=False))
def test_renaming_the_experts_of_a_layer_changes_nothing_but_ner(usage: np.ndarray, random: st.DataObject) -> None:
    renamed = usage.copy()
    for layer in range(usage.shape[1]):
        order = list(range(usage.shape[2]))
        random.shuffle(order)  # type: ignore[attr-defined]
        renamed[:, layer] = usage[:, layer][:, order]
    experts = np.full(usage.shape[1], usage.shape[2])
    for measure in (metrics.domain_information, metrics.domain_divergence, metrics.cosines, metrics.purity):
        np.testing.assert_allclose(measure(renamed), measure(usage), atol=1e-9)
    for measure in (metrics.load_divergence, metrics.utilization, metrics.max_violation, metrics.routing_specialization, rank_of):
        np.testing.assert_allclose(measure(renamed, experts), measure(usage, experts), atol=1e-9)
    np.testing.assert_allclose(metrics.published_domain_isolation(renamed)[0], metrics.published_domain_isolation(usage)[0], atol=1e-9)


def test_renaming_the_experts_of_one_layer_does_change_ner() -> None:
    usage = np.array([[[1.0, 0, 0], [1.0, 0, 0]]])
    renamed = np.array([[[1.0, 0, 0], [0, 1.0, 0]]])
    experts = np.array([3, 3])
    assert metrics.normalized_effective_rank(usage, experts)[0] == pytest.approx(0.5)
    assert metrics.normalized_effective_rank(renamed, experts)[0] == pytest.approx(1.0)


@quick
@given(usages(), st.integers(1, 4))
def test_dead_experts_add_ln_to_rs_and_change_no_comparison_of_domains(usage: np.ndarray, dead: int) -> None:
    domains, layers, experts = usage.shape
    wider = np.concatenate([usage, np.zeros((domains, layers, dead))], axis=-1)
    before, after = np.full(layers, experts), np.full(layers, experts + dead)
    added = math.log((experts + dead) / experts)
    for measure in (metrics.routing_specialization, metrics.load_divergence):
        np.testing.assert_allclose(measure(wider, after), measure(usage, before) + added, atol=1e-6)
    np.testing.assert_allclose(metrics.domain_information(wider), metrics.domain_information(usage), atol=1e-12)
    np.testing.assert_allclose(metrics.published_domain_isolation(wider)[0], metrics.published_domain_isolation(usage)[0], atol=1e-12)
    if experts >= domains:
        np.testing.assert_allclose(rank_of(wider, after), rank_of(usage, before), atol=1e-9)


@quick
@given(usages())
def test_values_keep_to_their_range(usage: np.ndarray) -> None:
    domains, _, experts = usage.shape
    information = metrics.domain_information(usage)
    assert (information >= -1e-12).all() and (information <= math.log(min(domains, experts)) + 1e-12).all()
    for rank in (rank_of(usage, np.full(1, experts)), metrics.entropy_rank(usage, np.full(1, experts))):
        assert (rank >= -1e-12).all() and (rank <= 1 + 1e-9).all()


# --------------------------------------------------------------------------------------------------- extremes (section 6)

LAYERS, EXPERTS, TOP_K, DOMAINS = 26, 64, 8, 4


def extreme(router: str) -> np.ndarray:
    """Exact usage [domains, layers, experts] of infinitely many tokens."""
    usage = np.zeros((DOMAINS, LAYERS, EXPERTS))
    if router == "uniform":
        return usage + 1 / EXPERTS
    if router == "collapsed":
        usage[..., :TOP_K] = 1 / TOP_K
        return usage
    block = EXPERTS // DOMAINS
    for domain in range(DOMAINS):
        usage[domain, :, domain * block : (domain + 1) * block] = 1 / block
    if router == "renamed":
        random = np.random.default_rng(0)
        for layer in range(LAYERS):
            usage[:, layer] = usage[:, layer][:, random.permutation(EXPERTS)]
    return usage


@pytest.mark.parametrize(
    ("router", "rs", "ner", "ner_entropy", "di", "load", "specialization", "der"),
    [
        pytest.param("uniform", 0, 0.0385, 0.0385, 0, 0, 0, 0, id="uniform"),
        pytest.param("collapsed", 2.0794, 0.0385, 0.0385, 0, 2.0794, 0, 0, id="collapsed on experts 0..7"),
        pytest.param("perfect", 1.3863, 0.0385, 0.0385, 1, 0, 1.3863, 1, id="perfect domain router"),
        pytest.param("renamed", 1.3863, 0.81, 0.91, 1, 0, 1.3863, 1, id="perfect, experts renamed per layer"),
    ],
)
def test_extremes(
    router: str, rs: float, ner: float, ner_entropy: float, di: float, load: float, specialization: float, der: float
) -> None:
    usage, experts = extreme(router), np.full(LAYERS, EXPERTS)
    loose = 0.01 if router == "renamed" else 5e-5
    assert metrics.routing_specialization(usage, experts).mean() == pytest.approx(rs, abs=5e-5)
    assert metrics.normalized_effective_rank(usage, experts).mean() == pytest.approx(ner, abs=loose)
    assert metrics.normalized_effective_rank(usage, experts, entropy=True).mean() == pytest.approx(ner_entropy, abs=loose)
    assert metrics.published_domain_isolation(usage)[0].mean() == pytest.approx(di, abs=1e-9)
    assert metrics.load_divergence(usage, experts).mean() == pytest.approx(load, abs=5e-5)
    assert metrics.domain_information(usage).mean() == pytest.approx(specialization, abs=5e-5)
    assert rank_of(usage, experts).mean() == pytest.approx(der, abs=1e-9)


def test_extremes_are_the_same_by_plain_loops() -> None:
    for router in ("uniform", "collapsed", "perfect", "renamed"):
        usage, experts = extreme(router), np.full(LAYERS, EXPERTS)
        rows = usage[:, 0].tolist()
        assert metrics.domain_information(usage)[0] == pytest.approx(naive.specialization(rows), abs=1e-9)
        assert rank_of(usage, experts)[0] == pytest.approx(naive.der(rows), abs=1e-9)
        assert metrics.normalized_effective_rank(usage, experts)[0] == pytest.approx(naive.ner(usage[0].tolist()), abs=1e-9)
        assert metrics.routing_specialization(usage, experts)[0, 0] == pytest.approx(naive.rs_row(rows[0]), abs=1e-9)


def test_a_collapsed_router_outdoes_the_perfect_one_in_rs_when_domains_are_fewer_than_experts_over_k() -> None:
    experts = np.full(LAYERS, EXPERTS)
    collapsed, perfect = (metrics.routing_specialization(extreme(router), experts).mean() for router in ("collapsed", "perfect"))
    assert EXPERTS / TOP_K > DOMAINS and collapsed > perfect


# ---------------------------------------------------------------------------------------------------- bias (section 3, 6)


def uniform_counts(tokens: int, groups: int, repetitions: int) -> np.ndarray:
    """Hits of a uniform 6-of-64 router, [repetitions, groups, 1 layer, 64]."""
    random = np.random.default_rng(1)
    counts = np.zeros((repetitions, groups, 1, 64))
    for repetition in range(repetitions):
        for group in range(groups):
            chosen = np.argpartition(random.random((tokens, 64)), 6, axis=1)[:, :6]
            counts[repetition, group, 0] = np.bincount(chosen.reshape(-1), minlength=64)
    return counts


@pytest.mark.parametrize(
    ("tokens", "rs", "information", "isolation"),
    [pytest.param(100, 0.0471, 0.0368, 0.088, id="100 tokens"), pytest.param(2000, 0.0024, 0.0018, 0.0049, id="2,000 tokens")],
)
def test_small_samples_inflate_plug_in_values_as_stated(tokens: int, rs: float, information: float, isolation: float) -> None:
    usage = metrics.usage_of(uniform_counts(tokens, 4, 60 if tokens == 100 else 15))
    assert metrics.routing_specialization(usage, np.array([64])).mean() == pytest.approx(rs, rel=0.05)
    assert metrics.domain_information(usage).mean() == pytest.approx(information, rel=0.05)
    assert np.mean([metrics.published_domain_isolation(each)[0].mean() for each in usage]) == pytest.approx(isolation, rel=0.05)
    k, experts, domains = 6, 64, 4
    assert rs == pytest.approx((experts - k) / (2 * tokens * k), rel=0.05)
    assert information == pytest.approx((domains - 1) * (experts - k) / (2 * tokens * k * domains), rel=0.05)


def test_unbiased_norms_take_the_bias_out_of_domain_isolation() -> None:
    counts = uniform_counts(100, 4, 60)
    usage = metrics.usage_of(counts)
    tokens = np.full((60, 4, 1), 100.0)
    found = metrics.isolation_of_gram(metrics.unbiased_grams(usage, tokens, tokens * 6))
    assert abs(found.mean()) < 4 * found.mean(axis=(1, 2)).std() / math.sqrt(60)
