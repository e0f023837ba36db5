"""``score`` on raw arrays against the loops of naive.py: every published and calibrated value, interval, null and companion."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import naive
import numpy as np
import pytest
from naive import Recording
from scipy import stats
from sklearn.metrics import mutual_info_score
from sklearn.metrics.pairwise import cosine_similarity

from dbes.errors import TraceError
from dbes.results import PublishedMetric, RecordingFacts, Result
from dbes.scoring.permutation import permuted_labels
from dbes.scoring.reference import ideal_values
from dbes.scoring.score import Scores, score, score_tables
from dbes.trace.baselines import imitate
from dbes.trace.store import Trace

PERMUTATIONS = 12
EXACT = 1e-9
CASES = naive.cases()
every_case = pytest.mark.parametrize("name", CASES)


@cache
def scored(name: str) -> Scores:
    return score_tables(CASES[name].trace(), permutations=PERMUTATIONS, seed=3)


def with_tokens(recording: Recording) -> Recording:
    """The recording without the documents that have no token (renumbered)."""
    used = np.unique(recording.document)
    return replace(recording, document=np.searchsorted(used, recording.document), domain=recording.domain[used])


def published_metric(result: Result, name: str) -> PublishedMetric:
    key, *size = name.split()
    found = result.published[key]
    return found if isinstance(found, PublishedMetric) else found[int(size[0])]


def table(result: Result, metric: str, field: str, recording: Recording) -> list[list[float]]:
    """One field of the calibrated records as [domains + 1][layers + 1] (DER: [1][layers + 1])."""
    rows = [None] if metric == "der" else [*recording.domains, None]
    return [[getattr(result.record(metric, layer=layer, domain=row), field) for layer in (*recording.layers, None)] for row in rows]


def published_text(result: Result) -> str:
    """The published values as text (as text NaN equals NaN)."""
    return result.model_copy(update={"calibrated": (), "created": "", "settings": {}, "companions": {}}).model_dump_json()


def assert_same(actual: Sequence[object] | np.ndarray, expected: Sequence[object] | np.ndarray, within: float = EXACT) -> None:
    np.testing.assert_allclose(np.array(actual, float), np.array(expected, float), rtol=0, atol=within)


@every_case
def test_published_values_are_those_of_plain_loops(name: str) -> None:
    recording = CASES[name]
    for metric, (by_domain, by_layer) in naive.published(recording).items():
        found = published_metric(scored(name).result, metric)
        assert_same([found.by_domain[domain] for domain in recording.domains], by_domain)
        assert_same([found.model], [naive.mean(by_domain)])
        if by_layer is None:
            assert found.by_layer == {}
        else:
            assert_same([found.by_layer[layer] for layer in recording.layers], by_layer)


@every_case
def test_calibrated_values_are_those_of_plain_loops(name: str) -> None:
    for metric, expected in naive.domain_metrics(CASES[name]).items():
        assert_same(table(scored(name).result, metric, "value", CASES[name]), expected)


@every_case
def test_corrected_and_interval_are_the_stratified_jackknife(name: str) -> None:
    recording = CASES[name]
    metrics = list(naive.domain_metrics(recording))

    def values(some: Recording) -> list[float]:
        found = naive.domain_metrics(some, by_documents=True)
        return [value for metric in metrics for row in found[metric] for value in row]

    corrected, error, freedom = naive.jackknife(values, recording)
    place = 0
    for metric in metrics:
        fields = {field: table(scored(name).result, metric, field, recording) for field in ("corrected", "ci_low", "ci_high")}
        for row in range(len(fields["corrected"])):
            for column in range(len(recording.layers) + 1):
                reach = stats.t.ppf(0.975, freedom[place]) * error[place]
                expected = [corrected[place] + sign * reach for sign in (0, -1, 1)]
                assert_same([fields[field][row][column] for field in fields], expected, 1e-7)
                place += 1


@every_case
def test_null_is_the_mean_over_the_documents_with_permuted_labels(name: str) -> None:
    recording = with_tokens(CASES[name])
    labels = permuted_labels(recording.domain, permutations=PERMUTATIONS, seed=3)
    drawn = [naive.domain_metrics(replace(recording, domain=np.asarray(row))) for row in labels]
    for metric in naive.domain_metrics(recording):
        draws = np.array([draw[metric] for draw in drawn])
        assert_same(table(scored(name).result, metric, "null", recording), draws.mean(axis=0))


@every_case
def test_p_is_that_of_the_test_of_equal_usage_with_permuted_labels(name: str) -> None:
    recording = with_tokens(CASES[name])
    domains, layers = len(recording.domains), range(len(recording.layers))
    usage, tokens = naive.hits(recording), np.bincount(recording.document).tolist()
    labels = [recording.domain, *permuted_labels(recording.domain, permutations=PERMUTATIONS, seed=3)]
    unknown = np.isnan(naive.domain_metrics(recording)["specialization"])
    for column in (*layers, None):
        chosen = layers if column is None else [column]
        found = [naive.equal_usage([[row[layer] for layer in chosen] for row in usage], tokens, label, domains) for label in labels]
        expected = [(1 + sum(draw[row] >= found[0][row] - 1e-9 for draw in found[1:])) / len(found) for row in range(domains + 1)]
        at = -1 if column is None else column
        for metric in ("specialization", "specialization_normalized", "der", "domain_isolation"):
            actual = [row[at] for row in table(scored(name).result, metric, "p", recording)]
            known = [math.nan if unknown[row][at] else value for row, value in enumerate(expected)]
            assert_same(actual, known[-len(actual) :])


@every_case
def test_score_is_the_corrected_value_over_that_of_the_ideal_router(name: str) -> None:
    recording = with_tokens(CASES[name])
    shape, result = scored(name).counts.shape, scored(name).result
    for metric in ("specialization", "specialization_normalized", "der", "domain_isolation"):
        ideal = [ideal_values(len(shape.domains), *size)[metric] for size in zip(shape.experts, shape.top_k, strict=True)]
        reference = np.stack([*ideal, np.mean(ideal, axis=0)], axis=-1)
        assert_same(table(result, metric, "reference", recording), reference)
        for score_field, field in (("score", "corrected"), ("score_low", "ci_low"), ("score_high", "ci_high")):
            expected = np.array(table(result, metric, field, recording)) / np.where(reference > 1e-9, reference, math.nan)
            assert_same(table(result, metric, score_field, recording), expected)


@every_case
def test_ngram_expertise_is_the_ratio_above_the_shuffle_inside_documents(name: str) -> None:
    recording = CASES[name]
    known = recording.weights is not None or recording.ids.shape[2] == 1
    for n in (2, 5, 10, 20):
        found = {field: table(scored(name).result, f"ngram_expertise_{n}", field, recording) for field in ("value", "null", "score")}
        if not known:
            assert all(np.isnan(found[field]).all() for field in found)
            continue
        ratio = naive.with_means(naive.ngram_ratio(recording, n))
        chance = naive.with_means(naive.shuffle_chance(recording, n))
        assert_same(found["value"], ratio)
        assert_same(found["null"], chance)

        def above(some: Recording, size: int = n) -> list[float]:
            pairs = (naive.with_means(cells(some, size)) for cells in (naive.ngram_ratio, naive.shuffle_chance))
            flat = [[value for row in rows for value in row] for rows in pairs]
            return [(r - c) / (1 - c) if c < 1 else math.nan for r, c in zip(*flat, strict=True)]

        if n == 2:
            assert_same(np.ravel(found["score"]), naive.jackknife(above, recording)[0], 1e-7)


@every_case
def test_stiffness_is_the_share_of_tokens_with_an_unchanged_set(name: str) -> None:
    recording, result = CASES[name], scored(name).result
    found = table(result, "stiffness", "value", recording)
    if recording.kept is None:
        assert np.isnan(found).all()
        assert any("stiffness is NaN" in warning for warning in result.warnings)
        return
    unchanged, overlap = naive.stability(recording)
    assert_same(found, naive.with_means(unchanged[2]))
    companions = result.companions["by_layer"]
    assert recording.selection_margins is not None and recording.scaled_margins is not None
    for key, cells in (
        *((f"set_stability_{scale}", unchanged[i]) for i, scale in enumerate(("0.0001", "0.001", "0.01", "0.1"))),
        *((f"expected_overlap_{scale}", overlap[i]) for i, scale in enumerate(("0.0001", "0.001", "0.01", "0.1"))),
        ("selection_margin", naive.token_mean(recording, recording.selection_margins)),
        ("scaled_margin", naive.token_mean(recording, recording.scaled_margins)),
    ):
        expected = [naive.mean([row[layer] for row in cells]) for layer in range(len(recording.layers))]
        assert_same([math.nan if value is None else value for value in companions[key].values()], expected)


@every_case
def test_companions_are_those_of_plain_loops(name: str) -> None:
    recording = CASES[name]
    found = scored(name).result.companions
    p = naive.profile(recording)
    sums = naive.of_domain(recording, naive.hits(recording))
    for layer, number in enumerate(recording.layers):
        rows = [p[domain][layer] for domain in range(len(recording.domains))]
        experts, k = recording.experts[layer], recording.slots(layer)
        pairs = [naive.neighbours(recording, domain, layer) for domain in range(len(recording.domains))]
        expected = {
            "load": naive.load(rows),
            "utilization": naive.utilization(rows),
            "max_violation": naive.maxvio(rows),
            "load_entropy": naive.load_entropy(rows) / math.log(experts),
            "der_entropy": naive.der_entropy(rows),
            "purity": math.fsum(float(np.max([row[e] for row in rows])) for e in range(experts)) / len(rows),
            "neighbour_overlap_any": naive.mean([pair[0] for pair in pairs]),
            "neighbour_overlap_share": naive.mean([pair[1] for pair in pairs]),
            "neighbour_overlap_any_uniform": naive.any_overlap_chance(experts, k),
            "dead_experts": sum(all(sums[d][layer][e] == 0 for d in range(len(recording.domains))) for e in range(experts)),
        }
        for key, value in expected.items():
            actual = found["by_layer"][key][str(number)]
            assert (math.nan if actual is None else actual) == pytest.approx(value, abs=EXACT, nan_ok=True), key


@every_case
def test_coactivation_and_transitions_are_those_of_plain_loops(name: str) -> None:
    recording, arrays = CASES[name], scored(name).arrays
    for layer, experts in enumerate(recording.experts):
        np.testing.assert_array_equal(arrays["coactivation"][layer, :experts, :experts], naive.coactivation(recording, layer))
        assert arrays["coactivation"][layer].sum() == np.sum(naive.coactivation(recording, layer))
    for layer in range(len(recording.layers) - 1):
        here, there = recording.experts[layer : layer + 2]
        scale = recording.slots(layer) * recording.slots(layer + 1)
        assert_same(arrays["transitions"][layer, :here, :there] * scale, naive.transitions(recording, layer))


@every_case
def test_domain_similarity_has_unbiased_norms(name: str) -> None:
    recording = CASES[name]
    p, sums, tokens = naive.profile(recording), naive.of_domain(recording, naive.hits(recording)), naive.routed(recording)
    for layer in range(len(recording.layers)):
        rows = [rows[layer] for rows in p]
        norms = naive.token_norms(rows, [row[layer] for row in tokens], [math.fsum(row[layer]) for row in sums])
        expected = np.array(naive.isolation_matrix(rows, norms))
        np.fill_diagonal(expected, 1.0)
        assert_same(scored(name).arrays["similarity"][layer], expected)


def test_token_identity_is_the_mutual_information_of_sklearn() -> None:
    recording = naive.random_recording(21, length=(80, 120), vocabulary=5)
    found = score(recording.trace(), permutations=2).companions["by_layer"]
    assert recording.token_ids is not None
    for layer, number in enumerate(recording.layers):
        chosen, owner = recording.ids[:, layer].reshape(-1), np.repeat(np.arange(len(recording.document)), 2)
        tokens = recording.token_ids[owner]
        assert found["information_token"][str(number)] == pytest.approx(mutual_info_score(tokens, chosen), abs=EXACT)


def test_specialization_with_equal_domains_is_the_mutual_information_of_sklearn() -> None:
    recording = naive.random_recording(22, documents=(1, 1, 1), length=(50, 51))
    result = score(recording.trace(), permutations=2)
    domain = np.repeat(recording.domain[recording.document], 2)
    for layer, number in enumerate(recording.layers):
        expected = mutual_info_score(domain, recording.ids[:, layer].reshape(-1))
        assert result.record("specialization", layer=number).value == pytest.approx(expected, abs=EXACT)


def test_published_domain_isolation_is_the_cosine_of_sklearn() -> None:
    recording = CASES["plain"]
    vectors = np.array([naive.flat(rows) for rows in naive.profile(recording)])
    similarity = cosine_similarity(vectors)
    expected = 1 - (similarity.sum(axis=1) - 1) / (len(vectors) - 1)
    assert_same(list(published_metric(scored("plain").result, "di").by_domain.values()), expected)


@every_case
def test_specialization_plus_load_is_the_epsilon_free_rs(name: str) -> None:
    recording, result = CASES[name], scored(name).result
    p = naive.profile(recording)
    for layer, number in enumerate(recording.layers):
        uniform = [1 / recording.experts[layer]] * recording.experts[layer]
        plain = naive.mean([naive.kl(rows[layer], uniform) for rows in p])
        information = result.record("specialization", layer=number).value
        load = result.companions["by_layer"]["load"][str(number)]
        if math.isnan(information) or load is None:
            continue
        assert information + load == pytest.approx(plain, abs=EXACT)
        assert result.companions["by_layer"]["rs_exact"][str(number)] == pytest.approx(plain, abs=EXACT)


WARNINGS = {
    "plain": [],
    "domain without tokens": ["domain 'domain1' has no tokens"],
    "one domain": ["one domain only"],
    "one document in one domain": ["domain 'domain1' has one document only"],
    "k = E at one layer": ["fewer than domains x k", "nothing is chosen there"],
    "more domains x k than experts": ["fewer than domains x k"],
    "without weights, margins and token ids": ["no gate weights", "no selection scores"],
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_name_what_is_undefined(name: str) -> None:
    # these recordings are small, and warned of as such besides: see test_warnings.py
    found = [warning for warning in scored(name).result.warnings if "in simulations" not in warning]
    assert len(found) == len(WARNINGS[name])
    for warning, expected in zip(found, WARNINGS[name], strict=True):
        assert expected in warning


def test_a_domain_without_tokens_leaves_nan_where_it_would_be_needed_and_nowhere_else() -> None:
    result = scored("domain without tokens").result
    rs = published_metric(result, "rs")
    assert math.isnan(rs.by_domain["domain1"]) and math.isnan(rs.model)
    assert rs.by_domain["domain0"] > 0
    for metric in ("specialization", "specialization_normalized", "der", "domain_isolation"):
        for record in result.calibrated:
            if record.metric == metric:
                assert math.isnan(record.value) and math.isnan(record.p) and math.isnan(record.score)
    assert result.specialists == ()
    assert "domain1" in result.verdict


def test_one_domain_has_published_isolation_zero_and_no_domain_metric() -> None:
    result = scored("one domain").result
    assert published_metric(result, "di").model == 0
    for metric in ("specialization", "der", "domain_isolation"):
        assert math.isnan(result.record(metric).value)
    assert "one domain only" in result.verdict


def test_one_document_per_domain_gives_values_without_interval_and_no_claim() -> None:
    result = scored("one document per domain").result
    for metric in ("specialization", "der", "domain_isolation"):
        record = result.record(metric)
        assert record.value > 0 and math.isnan(record.ci_low) and math.isnan(record.ci_high)
        assert record.p == 1.0
    assert result.specialists == ()
    assert result.verdict.startswith("Too few texts to tell; the smallest possible p is 1 (1 source text in each of 3 domains)")


def test_all_experts_chosen_leaves_routing_metrics_undefined() -> None:
    result = scored("k = E").result
    for metric in ("specialization", "specialization_normalized", "der", "domain_isolation"):
        assert math.isnan(result.record(metric).value)
    assert math.isnan(scored("k = E at one layer").result.record("specialization", layer=1).value)
    assert scored("k = E at one layer").result.record("specialization", layer=3).value > 0


def test_a_trace_without_any_token_scores_nothing_and_says_so() -> None:
    empty = naive.random_recording(30, documents=(2, 2)).take(np.zeros(0, int))
    result = score(empty.trace(), permutations=5)
    assert math.isnan(result.record("specialization").value)
    assert sum("has no tokens" in warning for warning in result.warnings) == 2
    assert result.recording is not None and result.recording.tokens == 0


def test_a_phase_is_scored_as_if_it_were_the_whole_trace() -> None:
    recording = naive.random_recording(23, documents=(5, 5, 5), length=(20, 40))
    random = np.random.default_rng(0)
    starts = random.integers(5, 40, len(recording.domain))[recording.document]
    place = np.concatenate([np.arange(count) for count in np.bincount(recording.document)])
    marked = replace(recording, phase=(place >= starts).astype(np.uint8))
    assert marked.phase is not None
    for phase, name in ((0, "prompt"), (1, "generated")):
        part = score(marked.trace(), permutations=9, phase=name)
        alone = score(with_tokens(recording.take(np.flatnonzero(marked.phase == phase))).trace(), permutations=9)
        assert part.settings["phase"] == name
        # what the position explains knows where in its document a token stands, also one that the model wrote
        sides = [found.to_dataframe().drop(columns="position") for found in (part, alone)]
        assert sides[0].equals(sides[1])
        # what a model wrote itself is no part of the data, so that only the prompts give both the same fingerprint
        assert (part.task.fingerprint == alone.task.fingerprint) == (name == "prompt")
        task = part.task.model_copy(update={"fingerprint": alone.task.fingerprint})
        assert published_text(part.model_copy(update={"task": task})) == published_text(alone)
        covered = [found.companions.pop("surrogate_covered") for found in (part, alone)]
        assert part.companions == alone.companions and covered[0]["lexical"] == covered[1]["lexical"]
    everything = score(recording.trace(), permutations=9)
    assert score(recording.trace(), permutations=9, phase="prompt").to_dataframe().equals(everything.to_dataframe())


@pytest.mark.parametrize(
    ("marks", "phase", "message"),
    [
        pytest.param(None, 1, "no generated tokens to score; it holds {all} prompt tokens; choose that phase, or all", id="unmarked"),
        pytest.param(0, 1, "no generated tokens to score; it holds {all} prompt tokens", id="prompts only"),
        pytest.param(1, 0, "no prompt tokens to score; it holds {all} generated tokens", id="generated only"),
        pytest.param(1, 2, "expected 0 (prompt), 1 (generated) or None (all tokens), got 2", id="no such phase"),
    ],
)
def test_a_phase_without_tokens_is_an_error_that_names_those_there_are(marks: int | None, phase: int, message: str) -> None:
    recording = naive.random_recording(23, documents=(3, 3))
    count = len(recording.document)
    marked = recording if marks is None else replace(recording, phase=np.full(count, marks, np.uint8))
    with pytest.raises(TraceError, match=re.escape(message.format(all=count))):
        score_tables(marked.trace(), permutations=5, phase=phase)
    if phase == 1:
        with pytest.raises(TraceError, match="no generated tokens"):
            score_tables(imitate(marked.trace(), "uniform", seed=0), permutations=5, phase=phase)


def test_documents_without_tokens_change_nothing() -> None:
    recording = CASES["documents without tokens"]
    assert len(np.unique(recording.document)) < len(recording.domain)
    assert scored("documents without tokens").result.recording == RecordingFacts(documents=9, tokens=len(recording.document))
    whole = score(recording.trace(), permutations=9)
    assert whole.to_dataframe().equals(score(with_tokens(recording).trace(), permutations=9).to_dataframe())


def test_documents_cut_from_one_source_count_as_one() -> None:
    recording = naive.random_recording(31, documents=(4, 4, 4), length=(30, 50))
    whole = score(recording.trace(), permutations=20, seed=1)
    place = np.concatenate([np.arange(count) for count in np.bincount(recording.document)])
    pieces = replace(recording, document=2 * recording.document + (place >= 13), domain=np.repeat(recording.domain, 2))
    trace = pieces.trace()
    sources = tuple(f"text-{index // 2}" for index in range(24))
    joined = score(replace(trace, shape=replace(trace.shape, document_source=sources)), permutations=20, seed=1)
    apart = score(trace, permutations=20, seed=1)
    assert joined.task.domains["domain0"].documents == 8 and joined.task.domains["domain0"].sources == 4
    for metric in ("specialization", "domain_isolation", "der", "stiffness"):
        for field in ("value", "corrected", "ci_low", "ci_high", "p", "null"):
            found, expected = (getattr(result.record(metric), field) for result in (joined, whole))
            assert found == pytest.approx(expected, abs=1e-12, nan_ok=True), (metric, field)
        assert apart.record(metric).value == pytest.approx(whole.record(metric).value, abs=1e-12)
    assert apart.record("specialization").ci_low != pytest.approx(whole.record("specialization").ci_low, abs=1e-6)


def test_splitting_in_shards_and_merging_changes_no_value() -> None:
    trace = CASES["missing slots"].trace()
    (routes,) = tuple(trace)
    cuts = [0, *np.flatnonzero(np.diff(routes.document) > 0)[[0, 3, 4]] + 1, len(routes)]
    pieces = tuple(routes.take(slice(start, end)) for start, end in pairwise(cuts))
    split = score_tables(replace(trace, loaded=pieces), permutations=PERMUTATIONS, seed=3)
    whole = scored("missing slots")
    assert split.result.to_dataframe().equals(whole.result.to_dataframe())
    assert published_text(split.result) == published_text(whole.result)
    assert split.result.companions == whole.result.companions
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(split.arrays[key], array)


def test_the_same_seed_gives_the_same_result_and_another_seed_another_null() -> None:
    trace = CASES["plain"].trace()
    first, again, other = (score(trace, permutations=20, seed=seed) for seed in (1, 1, 2))
    assert first.to_dataframe().equals(again.to_dataframe())
    assert first.record("specialization").value == other.record("specialization").value
    assert first.record("specialization").null != other.record("specialization").null


def test_without_permutations_there_is_no_null_and_no_claim() -> None:
    result = score(CASES["plain"].trace(), permutations=0)
    record = result.record("specialization")
    assert record.value > 0 and math.isnan(record.null) and math.isnan(record.p)
    assert record.score == scored("plain").result.record("specialization").score
    assert "nothing can be said" in result.verdict


def test_a_control_that_is_the_trace_itself_leaves_no_excess() -> None:
    recording = CASES["plain"]
    trace = recording.trace(control=recording.trace())
    result = score(trace, permutations=PERMUTATIONS, seed=3)
    for record in result.calibrated:
        if not math.isnan(record.score):
            assert record.control == pytest.approx(record.score)
            assert record.excess == pytest.approx(0.0, abs=1e-12)
            # What is left of the interval is the draw of the control: symmetric, and 0 inside.
            assert math.isnan(record.excess_low) or record.excess_low == pytest.approx(-record.excess_high, abs=1e-9)
    assert result.settings["control"] == 1
    assert all(math.isnan(record.control) for record in scored("plain").result.calibrated)


def test_a_uniform_control_leaves_the_whole_score_as_excess() -> None:
    trace = naive.random_recording(40, documents=(8, 8, 8), length=(60, 90), effect=1.5).trace()
    result = score(replace(trace, control=imitate(trace, "uniform", seed=1)), permutations=100)
    record = result.record("specialization")
    assert record.excess_low > 0 and abs(record.control) < 0.05
    assert record.excess == pytest.approx(record.score - record.control)
    assert "frozen random routers" in result.verdict


def test_top_specialists_come_with_their_most_over_represented_tokens() -> None:
    random = np.random.default_rng(5)
    domain = np.repeat([0, 1], 12)
    document = np.repeat(np.arange(24), 60)
    token_ids = random.integers(0, 6, len(document))
    ids = random.integers(0, 4, len(document))
    ids[(domain[document] == 0) & (token_ids == 2)] = 7  # expert 7 takes token 2, in domain 0 only
    trace = Trace.from_arrays(
        ids[:, None, None], document=document, domain=domain, domains=("left", "right"), layers=(5,), experts=8, token_ids=token_ids
    )
    result = score(replace(trace, vocabulary={2: "two"}), permutations=200)
    first = result.specialists[0]
    assert (first.layer, first.expert, first.domain, first.tokens[0]) == (5, 7, "left", "two")
    assert first.hits == int(((domain[document] == 0) & (token_ids == 2)).sum())
    assert first.lift == pytest.approx(2.0)
    assert result.companions["specialists"]["by_domain"]["left"] >= 1
