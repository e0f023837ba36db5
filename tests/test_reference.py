"""Routers without a model: what they emit, and that scoring them gives the values of METRICS section 6."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import naive
import numpy as np
import pytest
from scipy import stats

from dbes.results import PublishedMetric, Result
from dbes.scoring.score import score
from dbes.trace.baselines import ROUTERS, Router, baseline_trace, blocks_overlap, expert_blocks, ideal_trace, imitate
from dbes.trace.shards import validate_routes
from dbes.trace.types import RoutingShape


def shape_of(
    *, domains: int = 4, documents: int = 6, experts: tuple[int, ...] = (64,) * 3, top_k: tuple[int, ...] = (8,) * 3
) -> RoutingShape:
    return RoutingShape(
        layers=tuple(range(len(experts))),
        experts=experts,
        top_k=top_k,
        domains=tuple(f"domain{index}" for index in range(domains)),
        document_domain=np.repeat(np.arange(domains), documents).astype(np.int32),
        document_ids=tuple(map(str, range(domains * documents))),
    )


@pytest.mark.parametrize(
    ("domains", "experts", "k", "sizes", "overlap"),
    [
        pytest.param(4, 64, 8, [16] * 4, False, id="even"),
        pytest.param(3, 16, 4, [6, 5, 5], False, id="sizes differ by one"),
        pytest.param(8, 64, 8, [8] * 8, False, id="just enough"),
        pytest.param(8, 16, 4, [4] * 8, True, id="overlapping"),
        pytest.param(5, 4, 4, [4] * 5, True, id="k = E"),
        pytest.param(1, 8, 2, [8], False, id="one domain"),
    ],
)
def test_expert_blocks_by_hand(domains: int, experts: int, k: int, sizes: list[int], overlap: bool) -> None:
    blocks = expert_blocks(domains, experts, k)
    assert [len(block) for block in blocks] == sizes
    assert blocks_overlap(domains, experts, k) is overlap
    assert all(np.array_equal(block, (block[0] + np.arange(len(block))) % experts) for block in blocks)
    assert {int(expert) for block in blocks for expert in block} == set(range(experts))
    if not overlap:
        assert all(before[-1] < after[0] for before, after in pairwise(blocks))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_emits_what_a_model_could(router: Router) -> None:
    shape = shape_of(experts=(16, 5, 300), top_k=(4, 2, 1))
    tokens = np.random.default_rng(0).integers(0, 20, 24)
    token_ids = np.random.default_rng(0).integers(0, 9, tokens.sum())
    trace = baseline_trace(shape, tokens, router=router, seed=3, token_ids=token_ids)
    (routes,) = tuple(trace)
    validate_routes(routes, shape, where="here")
    np.testing.assert_array_equal(np.bincount(routes.document, minlength=24), tokens)
    assert routes.ids.dtype == np.uint16 and routes.weights is not None
    ran = routes.ids != 65535
    np.testing.assert_array_equal(ran.sum(axis=2), np.tile([4, 2, 1], (len(routes), 1)))
    np.testing.assert_allclose(routes.weights.sum(axis=2), 1, atol=1e-3)
    again = baseline_trace(shape, tokens, router=router, seed=3, token_ids=token_ids)
    np.testing.assert_array_equal(next(iter(again)).ids, routes.ids)


def test_the_ideal_router_stays_in_the_block_of_the_domain_and_uses_it_evenly() -> None:
    shape = shape_of(experts=(10,), top_k=(2,), domains=2, documents=3)
    (routes,) = tuple(ideal_trace(shape, np.full(6, 2000), seed=0))
    domain = shape.document_domain[routes.document]
    for index in range(2):
        counts = np.bincount(routes.ids[domain == index].reshape(-1), minlength=10)
        assert counts[5 * index : 5 * index + 5].sum() == counts.sum() == 12_000
        assert stats.chisquare(counts[5 * index : 5 * index + 5]).pvalue > 0.001
        first = np.bincount(routes.ids[domain == index, 0, 0], minlength=10)[5 * index : 5 * index + 5]
        assert stats.chisquare(first).pvalue > 0.001  # the primary expert is evenly drawn too


def test_the_uniform_router_chooses_every_set_equally_often() -> None:
    shape = shape_of(experts=(4,), top_k=(2,), domains=1, documents=1)
    (routes,) = tuple(baseline_trace(shape, np.array([6000]), router="uniform", seed=1))
    pairs = np.sort(routes.ids[:, 0], axis=1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 0.001


def test_the_collapsed_router_always_takes_the_first_k() -> None:
    (routes,) = tuple(baseline_trace(shape_of(), np.full(24, 5), router="collapsed", seed=1))
    assert (routes.ids == np.arange(8)).all()


def test_the_hash_router_knows_the_token_and_nothing_else() -> None:
    shape = shape_of(experts=(32,), top_k=(4,))
    token_ids = np.random.default_rng(0).integers(0, 50, 24 * 10)
    (routes,) = tuple(baseline_trace(shape, np.full(24, 10), router="hash", seed=1, token_ids=token_ids))
    for token in range(50):
        assert len(np.unique(routes.ids[token_ids == token], axis=0)) <= 1
    with pytest.raises(ValueError, match="needs token ids"):
        baseline_trace(shape, np.full(24, 10), router="hash", seed=1)


def test_all_experts_are_taken_when_k_is_e() -> None:
    shape = shape_of(experts=(3,), top_k=(3,))
    (routes,) = tuple(baseline_trace(shape, np.full(24, 5), router="uniform", seed=1))
    assert (np.sort(routes.ids, axis=2) == np.arange(3)).all()


def test_a_trace_is_imitated_with_its_documents_tokens_and_names() -> None:
    recording = naive.random_recording(1, documents=(3, 2))
    trace = replace(recording.trace(provenance={"task": {"name": "t"}, "secret": 1}), vocabulary={1: "x"})
    made = imitate(trace, "uniform", seed=4)
    assert made.shape == trace.shape and made.tokens == trace.tokens and made.vocabulary == {1: "x"}
    assert made.provenance == {"model": "uniform router", "seed": 4, "task": {"name": "t"}}
    assert recording.token_ids is not None
    np.testing.assert_array_equal(next(iter(made)).token_ids, recording.token_ids)
    without = imitate(naive.random_recording(1, extras=False).trace(), "reference", seed=4)
    assert next(iter(without)).token_ids is None


# ------------------------------------------------------------------------------- extremes by simulation (METRICS section 6)


def model(result: Result, name: str) -> float:
    metric = result.published[name]
    assert isinstance(metric, PublishedMetric)
    return metric.model


def scored(router: Router, *, permutations: int = 100, documents: int = 6, tokens: int = 800) -> Result:
    shape = shape_of(documents=documents)
    ids = np.random.default_rng(0).integers(0, 400, 4 * documents * tokens)
    return score(baseline_trace(shape, np.full(4 * documents, tokens), router=router, seed=2, token_ids=ids), permutations=permutations)


@pytest.mark.parametrize(
    ("router", "rs", "di", "load", "specialization", "der", "scores"),
    [
        pytest.param("uniform", 0, 0, 0, 0, 0, 0, id="uniform"),
        pytest.param("collapsed", math.log(8), 0, math.log(8), 0, 0, 0, id="collapsed"),
        pytest.param("reference", math.log(4), 1, 0, math.log(4), 1, 1, id="ideal"),
    ],
)
def test_extremes_by_simulation(
    router: Router, rs: float, di: float, load: float, specialization: float, der: float, scores: float
) -> None:
    result = scored(router)
    assert model(result, "rs") == pytest.approx(rs, abs=0.002)
    assert model(result, "ner") == pytest.approx(1 / 3, abs=0.03)
    assert model(result, "di") == pytest.approx(di, abs=0.002)
    assert result.companions["model"]["load"] == pytest.approx(load, abs=0.002)
    records = {metric: result.record(metric) for metric in ("specialization", "der", "domain_isolation")}
    assert records["specialization"].value == pytest.approx(specialization, abs=0.002)
    assert records["specialization"].corrected == pytest.approx(specialization, abs=0.0005)
    # Noise lifts DER by the square root of what it adds to the information: of the uniform router it is chance that is left.
    assert records["der"].value == pytest.approx(der if router != "uniform" else records["der"].null, abs=0.02)
    assert records["domain_isolation"].value == pytest.approx(di, abs=1e-3)
    for record in records.values():
        if router != "collapsed":  # a constant has no interval to speak of, and der sits on its bound
            assert record.score_low - 1e-6 <= scores <= record.score_high + 0.03
        assert record.score == pytest.approx(scores, abs=0.03)
        assert (record.p <= 0.05) == (router == "reference")
    assert result.specialists == () or router == "reference"


def test_the_uniform_router_scores_zero_within_its_interval_at_every_layer() -> None:
    result = scored("uniform", tokens=100, documents=10)
    for metric in ("specialization", "der", "domain_isolation"):
        for layer in (None, 0, 1, 2):
            record = result.record(metric, layer=layer)
            assert record.ci_low <= 0 <= record.ci_high
            assert record.p > 0.01
    assert result.verdict.startswith("No specialization")


def test_every_expert_of_the_ideal_router_is_a_specialist_of_its_domain() -> None:
    result = scored("reference")
    assert len(result.specialists) == 64 * 3
    for found in result.specialists:
        assert found.domain == f"domain{found.expert // 16}"
        assert found.lift == pytest.approx(4.0)
    assert result.verdict.startswith("Domain specialization is above chance in 3 of 3 layers")


def test_the_hash_router_is_explained_by_the_token() -> None:
    result = scored("hash")
    assert result.record("specialization").p > 0.01  # all domains draw from one vocabulary here
    by_layer = result.companions["by_layer"]
    for layer in ("0", "1", "2"):
        entropy = math.log(64)
        assert by_layer["information_token"][layer] > 0.4 * entropy
        assert result.record("specialization", layer=int(layer)).contextual == pytest.approx(0, abs=1e-9)
