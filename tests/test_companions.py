"""Companion statistics on whole documents: the sample, the pairs, the token-identity control, the split halves."""

from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
import simulate
from naive import Recording

from dbes.scoring import descriptive
from dbes.scoring.counting import count_routes
from dbes.scoring.descriptive import (
    coactivation,
    random_halves,
    split_half_similarity,
    token_identity,
    transitions,
)
from dbes.scoring.metrics import unbiased_norms
from dbes.scoring.sampling import TokenSample, even_documents
from dbes.scoring.score import score
from dbes.trace.store import Trace


def sample_of(trace: Trace, *, limit: int | None = None, phase: int | None = None) -> TokenSample:
    counts = count_routes(trace, phase=phase)
    found = counts.sample
    assert found is not None and found.whole
    chosen = found if limit is None else found.of(even_documents(counts.shape, counts.tokens, limit=limit))
    assert chosen is not None
    return chosen


def test_a_small_trace_is_sampled_whole() -> None:
    trace = naive.random_recording(1).trace()
    assert sample_of(trace).tokens == trace.tokens


def test_a_large_trace_is_sampled_by_whole_documents_evenly_over_domains() -> None:
    trace = naive.random_recording(1, documents=(30, 10, 20), length=(20, 21)).trace()
    tokens = count_routes(trace).tokens
    found = sample_of(trace, limit=600)
    assert found.tokens == len(found.routes) <= 600
    taken = np.unique(found.routes.document)
    assert (np.bincount(found.routes.document)[taken] == tokens[taken]).all()
    assert np.bincount(trace.shape.document_domain[taken]).tolist() == [10, 10, 10]


def test_even_the_longest_document_is_taken_when_there_is_no_other() -> None:
    trace = naive.random_recording(1, documents=(1, 1), length=(40, 50)).trace()
    found = sample_of(trace, limit=10)
    assert found.tokens == trace.tokens


def test_a_trace_without_tokens_has_no_sample() -> None:
    trace = naive.random_recording(1).take(np.zeros(0, int)).trace()
    assert count_routes(trace).sample is None


def test_only_tokens_of_the_phase_are_sampled() -> None:
    recording = naive.random_recording(1)
    phase = (np.arange(len(recording.document)) % 2).astype(np.uint8)
    trace = replace(recording, phase=phase).trace()
    found = sample_of(trace, phase=1)
    assert found.tokens == phase.sum()


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_pairs_by_plain_loops(missing: float) -> None:
    recording = naive.random_recording(2, top_k=3, missing=missing, experts=(6, 9, 5))
    trace = recording.trace()
    pairs, moves = coactivation(sample_of(trace), trace.shape), transitions(sample_of(trace), trace.shape)
    for layer, experts in enumerate(recording.experts):
        np.testing.assert_array_equal(pairs[layer, :experts, :experts], naive.coactivation(recording, layer))
        np.testing.assert_array_equal(pairs[layer], pairs[layer].T)
    for layer in range(2):
        here, there = recording.experts[layer : layer + 2]
        np.testing.assert_allclose(moves[layer, :here, :there] * 9, naive.transitions(recording, layer))
    if not missing:
        np.testing.assert_allclose(moves.sum(axis=(1, 2)), trace.tokens)


def test_coactivation_by_hand() -> None:
    ids = np.array([[[0, 1, 2]], [[2, 0, -1]]])
    trace = Trace.from_arrays(ids, document=[0, 0], domain=[0], domains=["a"], layers=[0], experts=4)
    expected = [[2, 1, 2, 0], [1, 1, 1, 0], [2, 1, 2, 0], [0, 0, 0, 0]]
    assert coactivation(sample_of(trace), trace.shape)[0].tolist() == expected
    assert transitions(sample_of(trace), trace.shape).shape == (0, 4, 4)


# ---------------------------------------------------------------------------------------------------------- token identity


def worded(seed: int, *, by_token: bool, by_domain: bool, tokens: int = 4000) -> Recording:
    """Documents of two domains with unequal vocabularies, routed by the token, by the domain, or by nothing."""
    random = np.random.default_rng(seed)
    domain = np.repeat([0, 1], 10)
    document = np.sort(random.integers(0, 20, tokens))
    words = np.where(random.random(tokens) < np.array([0.2, 0.8])[domain[document]], 1, 0) * 5 + random.integers(0, 5, tokens)
    ids = random.integers(0, 8, tokens)
    if by_token:
        ids = (words * 3 + 1) % 8
    if by_domain:
        ids = np.where(random.random(tokens) < 0.5, domain[document], ids)
    return Recording(
        ids=ids[:, None, None], document=document, domain=domain, domains=("a", "b"), layers=(0,), experts=(8,), token_ids=words
    )


def identity(recording: Recording) -> dict[str, float]:
    trace = recording.trace()
    found = token_identity(sample_of(trace), trace.shape, seed=0)
    assert found is not None
    return {name: float(values[0]) for name, values in found.items()}


def test_a_router_of_token_identity_is_explained_by_the_token() -> None:
    recording = worded(0, by_token=True, by_domain=False)
    record = score(recording.trace(), permutations=50).record("specialization")
    assert record.p < 0.05  # vocabularies differ: real information
    assert record.lexical > 0 and record.contextual == pytest.approx(0.0, abs=1e-12)
    found = identity(recording)
    assert found["token"] > 1.5 and found["token_null"] < 0.05


def test_a_router_of_domains_is_not_explained_by_the_token() -> None:
    record = score(worded(0, by_token=False, by_domain=True).trace(), permutations=50).record("specialization")
    assert record.contextual_low > max(record.lexical, 0.05)


def test_a_router_of_nothing_shows_only_its_small_sample_bias() -> None:
    found = identity(worded(0, by_token=False, by_domain=False))
    assert found["token"] == pytest.approx(found["token_null"], abs=0.01)


def test_token_identity_needs_token_ids_that_occur_often() -> None:
    recording = worded(0, by_token=True, by_domain=False)
    trace = replace(recording, token_ids=None).trace()
    assert token_identity(sample_of(trace), trace.shape, seed=0) is None
    rare = replace(recording, token_ids=np.arange(len(recording.document))).trace()
    assert token_identity(sample_of(rare), rare.shape, seed=0) is None


def test_the_token_identity_control_of_a_large_sample_takes_every_nth_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptive, "IDENTITY_TOKENS", 1500)
    result = score(worded(0, by_token=True, by_domain=False).trace(), permutations=2)
    sizes = result.companions["sample_tokens"]
    assert sizes["coactivation_and_transitions"] == 4000 and 900 < sizes["token_identity"] <= 2000


# -------------------------------------------------------------------------------------------------------------- split halves


def test_halves_split_every_domain_evenly() -> None:
    domain = np.repeat([0, 1, 2], [4, 5, 1])
    half = random_halves(domain, seed=0)
    assert [int(half[domain == index].sum()) for index in range(3)] == [2, 2, 0]
    np.testing.assert_array_equal(half, random_halves(domain, seed=0))


def test_split_half_similarity_by_plain_loops() -> None:
    recording = naive.random_recording(3, documents=(4, 5), length=(20, 30))
    half = random_halves(recording.domain, seed=1)
    found = split_half_similarity(count_routes(recording.trace()).whole(), half)
    hits = np.array(naive.hits(recording))
    for domain in range(2):
        for layer in range(3):
            sides = [np.flatnonzero((recording.domain == domain) & (half == side)) for side in (0, 1)]
            rows = [naive.share(hits[side, layer].sum(axis=0).tolist()) for side in sides]
            tokens = [float(np.isin(recording.document, side).sum()) for side in sides]
            matrix = naive.isolation_matrix(rows, naive.token_norms(rows, tokens, [2 * count for count in tokens]))
            assert found[domain, layer] == pytest.approx(matrix[0][1], abs=1e-9)


def test_halves_of_one_router_are_alike_without_bias() -> None:
    about = simulate.population(1, domains=2, layers=2, experts=16, top_k=2, effect=0.5, concentration=1e6)
    found = []
    for run in range(40):
        sums = simulate.draw_statistics(about, np.random.default_rng(run), documents=6, tokens=30)
        found.append(split_half_similarity(sums, random_halves(sums.shape.document_domain, seed=run)))
    assert np.mean(found) == pytest.approx(1.0, abs=0.01)
    assert np.isfinite(unbiased_norms(np.array(0.2), np.array(50), np.array(100)))
