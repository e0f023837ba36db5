"""Counts per document against plain loops, and that cutting the work in pieces, shards or documents changes none of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from naive import Recording

from dbes.scoring.counting import count_routes
from dbes.scoring.counts import LayerCounts, NgramSums, StiffnessSums
from dbes.scoring.score import score
from dbes.scoring.sums import follows_previous, of_phase, primary_experts
from dbes.trace.types import TokenRoutes, pieces_of

CASES = naive.cases()
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


@cache
def counted(name: str) -> LayerCounts:
    return count_routes(CASES[name].trace()).whole()


def assert_equal(first: LayerCounts, second: LayerCounts, *, but: tuple[str, ...] = ()) -> None:
    """Every array of the two is the same."""
    for field in fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name in ("shape", *but):
            continue
        if isinstance(a, NgramSums | StiffnessSums):
            for inner in fields(a):
                x, y = getattr(a, inner.name), getattr(b, inner.name)
                if x is None:
                    assert y is None
                else:
                    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9, err_msg=inner.name)
        elif a is None:
            assert b is None
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=field.name)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_plain_loops(name: str) -> None:
    recording, found = CASES[name], counted(name)
    expected = naive.hits(recording)
    for document in range(len(recording.domain)):
        rows = np.flatnonzero(recording.document == document)
        assert found.tokens[document] == len(rows)
        for layer, experts in enumerate(recording.experts):
            np.testing.assert_array_equal(found.hits[document, layer, :experts], expected[document][layer])
            assert not found.hits[document, layer, experts:].any()
            assert found.active[document, layer] == sum(bool((recording.ids[row, layer] >= 0).any()) for row in rows)
            assert found.slots[document, layer] == sum(expected[document][layer])


@pytest.mark.parametrize("name", [name for name, recording in CASES.items() if recording.weights is not None])
def test_gate_mass_is_one_per_token_with_a_slot(name: str) -> None:
    recording, found = CASES[name], counted(name)
    assert found.mass is not None and recording.weights is not None
    ran = recording.ids >= 0
    weight = np.where(ran, recording.weights.astype(float), 0)
    share = np.divide(weight, weight.sum(axis=2, keepdims=True), out=np.zeros_like(weight), where=weight.sum(axis=2, keepdims=True) > 0)
    for document in range(len(recording.domain)):
        for layer, experts in enumerate(recording.experts):
            for expert in range(experts):
                chosen = (recording.ids[:, layer] == expert) & (recording.document == document)[:, None]
                assert found.mass[document, layer, expert] == pytest.approx(share[:, layer][chosen].sum(), abs=1e-5)


def test_expert_groups_are_those_of_plain_loops() -> None:
    for name in ("plain", "missing slots", "layers of different width"):
        found = counted(name).ngrams
        assert found is not None
        for domain, layers in enumerate(naive.groups(CASES[name])):
            for layer, group in enumerate(layers):
                assert set(np.flatnonzero(found.groups[domain, layer])) == group


def routes_of(ids: list[list[int]], weights: list[list[float]] | None) -> TokenRoutes:
    made = np.array(ids, np.int64)
    return TokenRoutes(
        ids=made.astype(np.uint8)[:, None],
        document=np.zeros(len(ids), np.int32),
        positions=np.arange(len(ids), dtype=np.int32),
        weights=None if weights is None else np.array(weights, np.float16)[:, None],
    )


@pytest.mark.parametrize(
    ("ids", "weights", "expected"),
    [
        pytest.param([3, 5], [0.4, 0.6], 5, id="largest weight, not the first slot"),
        pytest.param([5, 3], [0.5, 0.5], 3, id="a tie goes to the lower expert, whatever the order of slots"),
        pytest.param([3, 5], [0.5, 0.5], 3, id="the same tie the other way round"),
        pytest.param([-1, 5], [0.9, 0.1], 5, id="a missing slot has no weight"),
        pytest.param([-1, -1], [0.5, 0.5], -1, id="no slot ran"),
        pytest.param([4, 2], [0.0, 0.0], 2, id="zero weights ran all the same"),
        pytest.param([7], None, 7, id="k = 1 needs no weights"),
        pytest.param([-1], None, -1, id="k = 1 that did not run"),
    ],
)
def test_the_primary_expert_has_the_largest_weight(ids: list[int], weights: list[float] | None, expected: int) -> None:
    found = primary_experts(routes_of([ids], None if weights is None else [weights]))
    assert found is not None and found[0, 0] == expected


def test_without_weights_the_primary_is_unknown() -> None:
    assert primary_experts(routes_of([[1, 2]], None)) is None


def test_tokens_follow_one_another_only_inside_a_document_and_without_gaps() -> None:
    routes = replace(
        routes_of([[1]] * 6, None), document=np.array([0, 0, 0, 1, 1, 1], np.int32), positions=np.array([0, 1, 3, 4, 5, 6], np.int32)
    )
    assert follows_previous(routes).tolist() == [False, True, False, False, True, True]


@pytest.mark.parametrize("tokens", [1, 25, 60, 10_000])
def test_pieces_are_whole_documents_in_order(tokens: int) -> None:
    (routes,) = tuple(CASES["plain"].trace())
    pieces = list(pieces_of(routes, tokens))
    np.testing.assert_array_equal(np.concatenate([piece.document for piece in pieces]), routes.document)
    for before, after in itertools.pairwise(pieces):
        assert before.document[-1] < after.document[0]
    longest = np.bincount(routes.document).max()
    assert all(len(piece) <= max(tokens, longest) for piece in pieces)
    assert len(pieces) == (1 if tokens > len(routes) else len(pieces))


def test_the_size_of_pieces_changes_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("missing slots", "documents without tokens", "k = 1 without weights"):
        whole = counted(name)
        with monkeypatch.context() as patch:
            patch.setattr(pieces_of, "__defaults__", (30,))
            assert_equal(count_routes(CASES[name].trace()).whole(), whole)


def test_a_phase_is_counted_alone() -> None:
    recording = replace(CASES["plain"], phase=(np.arange(len(CASES["plain"].document)) % 3 == 0).astype(np.uint8))
    parts = [count_routes(recording.trace(), phase=phase).whole() for phase in (0, 1)]
    np.testing.assert_array_equal(parts[0].hits + parts[1].hits, counted("plain").hits)
    assert parts[1].neighbours.sum() == 0  # every third token: none follows another
    (routes,) = tuple(recording.trace())
    assert (
        of_phase(routes, None).all()
        and of_phase(replace(routes, phase=None), 0).all()
        and not of_phase(replace(routes, phase=None), 1).any()
    )


def test_windows_of_repeated_tokens_are_left_out_of_the_control() -> None:
    """AAB: of the windows AA, AB only the second counts, and no window of three has one token id throughout."""
    recording = Recording(
        ids=np.array([[[1]], [[1]], [[1]]]),
        document=np.zeros(3, int),
        domain=np.array([0]),
        domains=("a",),
        layers=(0,),
        experts=(4,),
        token_ids=np.array([7, 7, 8]),
    )
    found = count_routes(recording.trace()).whole().ngrams
    assert found is not None and found.distinct_windows is not None and found.distinct_alike is not None
    assert found.windows[0, 0, 0] == 2 and found.alike[0, 0, 0] == 2
    assert found.distinct_windows[0, 0, 0] == 1 and found.distinct_alike[0, 0, 0] == 1


@pytest.mark.parametrize("name", ["plain", "missing slots"])
@pytest.mark.parametrize("n", [2, 5])
def test_the_repeated_token_control_is_that_of_plain_loops(name: str, n: int) -> None:
    recording, found = CASES[name], counted(name).ngrams
    assert found is not None and found.distinct_windows is not None and found.distinct_alike is not None and recording.token_ids is not None
    index = (2, 5, 10, 20).index(n)
    for layer in range(len(recording.layers)):
        count = alike = 0
        for domain in range(len(recording.domains)):
            for window in naive.windows(recording, domain, n):
                experts = {naive.primary(recording, token, layer) for token in window}
                if -1 not in experts and len({int(recording.token_ids[token]) for token in window}) > 1:
                    count += 1
                    alike += len(experts) == 1
        assert found.distinct_windows[:, layer, index].sum() == count
        assert found.distinct_alike[:, layer, index].sum() == alike


def test_margins_that_are_nan_are_left_out_of_their_means() -> None:
    recording = CASES["plain"]
    assert recording.margins is not None
    margins = recording.margins.copy()
    margins[::2] = np.nan
    found = count_routes(replace(recording, margins=margins).trace()).whole().stiffness
    assert found.logit_count.sum() == np.isfinite(margins).sum()
    assert found.logit_margin.sum() == pytest.approx(np.nansum(margins.astype(float)))


def test_published_stability_counts_the_bits() -> None:
    trace = CASES["plain"].trace()
    (routes,) = tuple(trace)
    stable = np.random.default_rng(0).integers(0, 8, routes.ids.shape[:2]).astype(np.uint8)
    found = count_routes(replace(trace, loaded=(replace(routes, logit_stable=stable),))).whole().stiffness
    for bit in range(3):
        assert found.logit_stable[..., bit].sum() == ((stable >> bit) & 1).sum()
    assert (found.stable_count.sum(axis=0) == len(routes)).all()


def test_tokens_without_a_score_do_not_count_for_stability() -> None:
    recording = CASES["plain"]
    assert recording.kept is not None
    kept = recording.kept.copy()
    kept[::2] = 255
    found = count_routes(replace(recording, kept=kept).trace()).whole().stiffness
    assert found.kept_count.sum() == 3 * (kept[:, 0, 0] != 255).sum()
    assert found.unchanged[..., 1].sum() == (kept[1::2, :, 1] == 2).sum()


def test_taking_documents_takes_every_sum() -> None:
    recording = CASES["plain"]
    chosen = np.array([0, 2, 5, 6, 8])
    rest = recording.take(np.flatnonzero(np.isin(recording.document, chosen)))
    alone = replace(rest, document=np.searchsorted(chosen, rest.document), domain=recording.domain[chosen])
    part = counted("plain").take(chosen)
    assert part.shape.document_ids == ("0", "2", "5", "6", "8")
    np.testing.assert_array_equal(part.shape.document_domain, recording.domain[chosen])
    assert_equal(replace(part, ngrams=None), replace(count_routes(alone.trace()).whole(), ngrams=None))
    assert counted("plain").take(np.arange(9)) is counted("plain")


# ------------------------------------------------------------------------------------------------ invariances (section 8)

DOMAIN_METRICS = ("specialization", "specialization_normalized", "der", "domain_isolation")
NGRAM_METRICS = tuple(f"ngram_expertise_{n}" for n in (2, 5))
PUBLISHED = ("rs", "di", "rss", "ner", "ner_entropy")


def values(recording: Recording, *, ngrams: bool = True, but: tuple[str, ...] = ()) -> dict[str, object]:
    """Plug-in values of the model and of its domains by name."""
    result = score(recording.trace(), permutations=0)
    metrics = (*DOMAIN_METRICS, "stiffness", *(NGRAM_METRICS if ngrams else ()))
    found: dict[str, object] = {}
    for record in result.calibrated:
        if record.metric in metrics:
            found[f"{record.metric} {record.layer} {record.domain}"] = record.value
    published = dict(result.published)
    names = (*PUBLISHED, *(("ngram_ratio", "ngram_group_ratio") if ngrams else ()))
    for name in names:
        metric = published[name]
        for key, one in metric.items() if isinstance(metric, dict) else ((name, metric),):
            if name not in but:
                found |= {f"{name} {key}": one.model, **{f"{name} {key} {domain}": value for domain, value in one.by_domain.items()}}
    for name in (
        "load",
        "utilization",
        "max_violation",
        "load_entropy",
        "purity",
        "dead_experts",
        *(("neighbour_overlap_any",) if ngrams else ()),
    ):
        found[name] = list(result.companions["by_layer"][name].values())
    return found


def assert_same_values(first: dict[str, object], second: dict[str, object]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(np.array(value, float), np.array(second[name], float), rtol=0, atol=1e-9, err_msg=name)


def some(seed: int) -> Recording:
    return naive.random_recording(seed, documents=(3, 2, 3), length=(12, 25), missing=0.15)


@few
@given(seeds)
def test_renaming_experts_per_layer_changes_nothing_but_ner(seed: int) -> None:
    recording, random = some(seed), np.random.default_rng(seed)
    ids = recording.ids.copy()
    for layer, experts in enumerate(recording.experts):
        names = np.r_[random.permutation(experts), -1]
        ids[:, layer] = names[ids[:, layer]]
    but = ("ner", "ner_entropy")
    assert_same_values(values(replace(recording, ids=ids), but=but), values(recording, but=but))


@few
@given(seeds)
def test_the_order_of_slots_means_nothing(seed: int) -> None:
    recording, random = some(seed), np.random.default_rng(seed)
    order = random.permuted(np.tile(np.arange(2), (*recording.ids.shape[:2], 1)), axis=2)
    assert recording.weights is not None
    moved = replace(
        recording, ids=np.take_along_axis(recording.ids, order, axis=2), weights=np.take_along_axis(recording.weights, order, axis=2)
    )
    assert_same_values(values(moved), values(recording))


@few
@given(seeds)
def test_the_order_of_domains_means_nothing(seed: int) -> None:
    recording = some(seed)
    order = np.random.default_rng(seed).permutation(3)
    names = tuple(recording.domains[index] for index in np.argsort(order))
    assert_same_values(values(replace(recording, domain=order[recording.domain], domains=names)), values(recording))


@few
@given(seeds)
def test_the_order_of_documents_means_nothing(seed: int) -> None:
    recording = some(seed)
    order = np.random.default_rng(seed).permutation(len(recording.domain))
    domain = np.empty_like(recording.domain)
    domain[order] = recording.domain
    assert_same_values(values(replace(recording, document=order[recording.document], domain=domain)), values(recording))


@few
@given(seeds)
def test_the_order_of_tokens_in_a_document_means_nothing_but_to_ngrams(seed: int) -> None:
    recording, random = some(seed), np.random.default_rng(seed)
    rows = np.lexsort((random.random(len(recording.document)), recording.document))
    assert_same_values(values(recording.take(rows), ngrams=False), values(recording, ngrams=False))


@few
@given(seeds)
def test_duplicating_the_whole_trace_changes_no_plug_in_value(seed: int) -> None:
    recording = some(seed)
    doubled = replace(
        recording.take(np.tile(np.arange(len(recording.document)), 2)),
        document=np.concatenate([recording.document, recording.document + len(recording.domain)]),
        domain=np.tile(recording.domain, 2),
    )
    once, twice = values(recording), values(doubled)
    unbiased = [name for name in once if name.startswith(("domain_isolation", "der"))]  # their norms know the sample size, on purpose
    assert_same_values(*({name: value for name, value in found.items() if name not in unbiased} for found in (once, twice)))


@few
@given(seeds)
def test_dead_experts_add_ln_to_rs_and_change_no_comparison_of_domains(seed: int) -> None:
    recording = some(seed)
    wider = replace(recording, experts=tuple(experts + 5 for experts in recording.experts))
    before, after = values(recording), values(wider)
    added = np.log(13 / 8)
    for name, value in before.items():
        if name.startswith("rs "):
            assert after[name] == pytest.approx(value + added, abs=1e-7)  # type: ignore[operator]
        elif name.split()[0] in ("der", "di", "domain_isolation", "specialization", "stiffness", "rss", *NGRAM_METRICS):
            assert after[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert after["dead_experts"] == [dead + 5 for dead in before["dead_experts"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "cut", [lambda count: [count // 2], lambda count: list(range(1, count))], ids=["two shards", "a shard per document"]
)
def test_shards_change_no_count(cut: Callable[[int], list[int]]) -> None:
    trace = CASES["missing slots"].trace()
    (routes,) = tuple(trace)
    edges = [0, *np.searchsorted(routes.document, cut(len(trace.shape.document_domain))), len(routes)]
    pieces = tuple(routes.take(slice(start, end)) for start, end in itertools.pairwise(edges))
    assert_equal(count_routes(replace(trace, loaded=pieces)).whole(), counted("missing slots"))


def test_weights_of_slots_that_did_not_run_do_not_matter() -> None:
    recording = CASES["missing slots"]
    assert recording.weights is not None
    for filler in (0.5, np.nan):
        weights = np.where(recording.ids < 0, filler, recording.weights).astype(np.float32)
        assert_equal(count_routes(replace(recording, weights=weights).trace()).whole(), counted("missing slots"))
