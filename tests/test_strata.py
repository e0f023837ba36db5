"""Strata of tokens: what is planted in one is found there, what is the token's own goes once the tokens are the same, noise stays noise."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

import dbes
from dbes import SettingError, Trace, TraceError, load_result, score
from dbes.cli import app
from dbes.reporting.commands import command
from dbes.reporting.page import write_page
from dbes.result_parts import Strata, StrataDifference
from dbes.scoring import counting
from dbes.scoring.counting import count_routes
from dbes.scoring.strata import CLASSES, NONE, division_of, frequency_thirds, gate_entropy, same_tokens, token_classes
from dbes.scoring.stratified import strata_of
from dbes.trace.types import TokenRoutes

DOMAINS, EXPERTS, LAYERS, SLOTS, VOCABULARY = 3, 12, 2, 2, 60
FREQUENT = 5  # token ids that make up the most frequent third, and a little more


def drawn(
    seed: int,
    *,
    documents: int = 14,
    length: tuple[int, int] = (60, 160),
    lean: float = 0.0,
    only: str = "all",
    lookup: bool = False,
    opening: bool = False,
) -> Trace:
    """Documents of three domains whose tokens are Zipf, routed by logits that lean to the domain.

    Args:
        lean: standard deviation of the domain's log-odds. only: of ``all`` tokens, or of the ``frequent`` ones.
        lookup: experts are a table of the token. opening: the first quarter of a document has words of its domain.
    """
    random = np.random.default_rng(seed)
    size = random.integers(*length, DOMAINS * documents)
    document = np.repeat(np.arange(len(size)), size)
    domain = np.repeat(np.arange(DOMAINS), documents)
    place = np.arange(len(document)) - np.repeat(np.cumsum(size) - size, size)
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    tokens = random.choice(VOCABULARY, len(document), p=zipf / zipf.sum())
    if opening:
        early = (place < size[document] / 4) & (random.random(len(document)) < 0.6)
        tokens = np.where(early, 20 + 10 * domain[document] + tokens % 10, tokens)
    logits = np.broadcast_to(random.normal(0, 0.5, (LAYERS, EXPERTS)), (len(document), LAYERS, EXPERTS)).copy()
    logits += random.normal(0, 0.3, (len(size), LAYERS, EXPERTS))[document]
    leaning = random.normal(0, lean, (DOMAINS, LAYERS, EXPERTS))[domain[document]]
    logits += leaning if only == "all" else leaning * (tokens < FREQUENT)[:, None, None]
    logits += random.gumbel(size=logits.shape)
    if lookup:
        logits = random.normal(size=(VOCABULARY, LAYERS, EXPERTS))[tokens]
    ids = np.argsort(-logits, axis=-1)[..., :SLOTS]
    weights = random.dirichlet(np.ones(SLOTS), ids.shape[:2])
    return Trace.from_arrays(
        ids, document=document, domain=domain, domains=("a", "b", "c"), layers=range(LAYERS), experts=EXPERTS, weights=weights,
        token_ids=tokens, vocabulary={token: f" w{token}" if token % 2 else f"w{token}" for token in range(VOCABULARY)},
        document_ids=[f"text {number}" for number in range(len(size))],
    )  # fmt: skip


def of(found: Strata, first: str, second: str, *, matched: bool = False, metric: str = "specialization") -> StrataDifference:
    return next(d for d in found.differences if (d.first, d.second, d.matched, d.metric) == (first, second, matched, metric))


def strata(trace: Trace, kind: str, permutations: int = 99) -> Strata:
    return strata_of(trace, [kind], permutations=permutations, seed=0)[kind]


# ------------------------------------------------------------------------------------------------------------- what is found


def test_specialization_planted_in_frequent_tokens_is_found_in_that_stratum_only() -> None:
    found = strata(drawn(1, lean=0.9, only="frequent"), "frequency")
    frequent, _, rare = (each.score("specialization") for each in found.strata)
    assert frequent is not None and rare is not None
    assert frequent.p <= 0.02 and frequent.score_low > 0.05
    assert rare.p > 0.05 and rare.score_low <= 0 <= rare.score_high
    assert of(found, "frequent third", "rare third").p_holm < 0.001 and of(found, "frequent third", "rare third").low > 0
    assert abs(sum(each.share for each in found.strata) - 1) < 1e-12


def test_a_lookup_of_the_token_differs_between_strata_until_the_tokens_are_the_same() -> None:
    found = strata(drawn(2, lookup=True, opening=True), "position")
    plain, same = (of(found, "first quarter", "rest", matched=matched) for matched in (False, True))
    assert plain.p_holm < 0.001 and plain.low > 0
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert 0.05 < same.covered < 0.6
    for metric in ("der", "domain_isolation"):
        assert of(found, "first quarter", "rest", matched=True, metric=metric).difference == 0


def test_what_a_position_adds_stays_when_the_tokens_are_the_same() -> None:
    trace = drawn(3, lean=0.9, opening=False)
    (routes,) = tuple(trace)
    plain = drawn(3, lean=0.0)
    (other,) = tuple(plain)
    size = np.bincount(routes.document)[routes.document]
    early = routes.positions < size / 4
    mixed = replace(routes, ids=np.where(early[:, None, None], routes.ids, other.ids))
    found = strata(replace(trace, loaded=(mixed,)), "position")
    for matched in (False, True):
        assert of(found, "first quarter", "rest", matched=matched).p_holm < 0.001
        assert of(found, "first quarter", "rest", matched=matched).low > 0


@pytest.mark.slow
@pytest.mark.parametrize("lean", [0.0, 0.6])
def test_strata_without_a_difference_are_told_apart_in_five_percent_of_runs(lean: float) -> None:
    runs, told = 80, Counter[tuple[str, bool]]()
    for seed in range(runs):
        trace = drawn(seed, lean=lean)
        for kind, first, second in (
            ("position", "first quarter", "rest"),
            ("entropy", "highest fifth", "rest"),
            ("frequency", "frequent third", "rare third"),
        ):
            found = strata(trace, kind, permutations=0)
            for matched in (False, True):
                p = of(found, first, second, matched=matched).p
                told[kind, matched] += p <= 0.05
    assert max(told.values()) <= stats.binom.ppf(0.9995, runs, 0.05), told


# ------------------------------------------------------------------------------------------------------------- by hand and naive


def test_a_stratum_is_scored_as_a_trace_of_its_rows() -> None:
    trace = drawn(4, lean=0.5)
    found = strata(trace, "position", permutations=50)
    (routes,) = tuple(trace)
    size = np.bincount(routes.document)[routes.document]
    for stratum, rows in zip(found.strata, (routes.positions + 0.5 < size / 4, routes.positions + 0.5 >= size / 4), strict=True):
        alone = score(replace(trace, loaded=(routes.take(np.flatnonzero(rows)),)), permutations=50)
        assert stratum.tokens == rows.sum() and stratum.documents == len(np.unique(routes.document))
        for own in stratum.scores:
            record = alone.record(own.metric, layer=own.layer)
            for name in (*own.model_dump().keys() - {"metric", "layer"},):
                np.testing.assert_allclose(getattr(own, name), getattr(record, name), rtol=1e-12, equal_nan=True)


def test_sums_in_files_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn(5, lean=0.5).save(tmp_path / "trace")
    trace = Trace.load(tmp_path / "trace")
    before = strata(trace, "entropy", permutations=20)
    monkeypatch.setattr(counting, "MEMORY_BYTES", 0)
    assert strata(trace, "entropy", permutations=20).model_dump_json() == before.model_dump_json()


def test_labels_by_plain_loops() -> None:
    trace = drawn(6)
    (routes,) = tuple(trace)
    assert routes.weights is not None and routes.token_ids is not None
    entropy = [
        sum(-w / sum(layer) * math.log(w / sum(layer)) for layer in token for w in layer if w > 0) / LAYERS / math.log(SLOTS)
        for token in routes.weights.astype(float).tolist()
    ]
    np.testing.assert_allclose(gate_entropy(routes, np.array([SLOTS] * LAYERS)), entropy)
    division = division_of("entropy", trace)
    assert not isinstance(division, str)
    label = division.label(routes)
    for document in range(0, 42, 7):
        rows = np.flatnonzero(routes.document == document)
        ranked = sorted(rows.tolist(), key=lambda row: (-entropy[row], row))
        wanted = {row for place, row in enumerate(ranked) if place + 0.5 < 0.2 * len(ranked)}
        assert {row for row in rows.tolist() if label[row] == 0} == wanted
    counts = np.bincount(routes.token_ids, minlength=VOCABULARY)
    thirds, below = frequency_thirds(counts), 0
    for token in sorted(range(VOCABULARY), key=lambda token: (-counts[token], token)):
        assert thirds[token] == min(2, int(3 * (below + counts[token] / 2) / counts.sum()))
        below += counts[token]


def test_the_same_tokens_are_the_same_in_every_document() -> None:
    (routes,) = tuple(drawn(7))
    assert routes.token_ids is not None
    label = np.random.default_rng(0).integers(NONE, 2, len(routes))
    first, second = same_tokens(routes, label, seed=0)
    assert (label[first] == 0).all() and (label[second] == 1).all() and (np.diff(first) > 0).all()
    bags = [Counter(zip(routes.document[rows].tolist(), routes.token_ids[rows].tolist(), strict=True)) for rows in (first, second)]
    each = [
        Counter(zip(routes.document[label == side].tolist(), routes.token_ids[label == side].tolist(), strict=True)) for side in (0, 1)
    ]
    assert bags[0] == bags[1] == each[0] & each[1]
    assert same_tokens(routes.take(np.arange(5)), np.full(5, NONE), seed=0)[0].size == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" law", "word-initial"), ("▁law", "word-initial"), ("law", "continuation"), (" 12", "digits"), ("½", "digits"), ("7", "digits"),
        (",", "punctuation and space"), (" \n", "punctuation and space"), ("", "punctuation and space"), (" (the", "other"),
        ("<|end|>", "other"), (b"\xe4\xb8", "other"), ("\n\tdef", "word-initial"), ("法", "continuation"),
    ],
)  # fmt: skip
def test_classes_of_tokens(text: str | bytes, name: str) -> None:
    assert CLASSES[token_classes({3: text})[3]] == name and CLASSES[token_classes({3: text})[0]] == "other"


# ------------------------------------------------------------------------------------------------------------- what is unknown


def test_what_a_trace_lacks_is_a_reason() -> None:
    trace = drawn(8)
    (routes,) = tuple(trace)

    def without(**more: object) -> Trace:
        return replace(trace, loaded=(replace(routes, **more),))  # type: ignore[arg-type]

    assert strata(without(weights=None), "entropy").reason == "the trace has no gate weights"
    one = replace(trace.shape, top_k=(1,) * LAYERS)
    assert strata(replace(trace, shape=one, loaded=(replace(routes, ids=routes.ids[..., :1], weights=None),)), "entropy").reason == (
        "a token has one expert, whose gate weights have no entropy"
    )
    assert strata(without(token_ids=None), "frequency").reason == "the trace has no token ids"
    assert strata(replace(trace, vocabulary={}), "token-class").reason == "the trace has no texts of its tokens (vocabulary.json)"
    assert of(strata(without(token_ids=None), "position"), "first quarter", "rest", matched=True).reason == "the trace has no token ids"
    few = of(strata(drawn(8, documents=2, length=(8, 12)), "position"), "first quarter", "rest", matched=True)
    assert math.isnan(few.difference) and "occur in both strata of one document" in (few.reason or "")
    by_class = strata(trace, "token-class")
    assert of(by_class, "word-initial", "continuation", matched=True).reason == "a token id is in one stratum only"
    assert [each.tokens for each in by_class.strata][2:] == [0, 0, 0] and "digits: no tokens" in by_class.notes
    assert of(by_class, "word-initial", "digits").reason == "fewer than two documents of a domain have tokens in both"
    with pytest.raises(TraceError, match="these are counts; strata need the trace"):
        score(count_routes(trace), strata=["position"], permutations=0)
    with pytest.raises(SettingError, match="no kind of strata is called 'positon', did you mean position"):
        score(trace, strata=["positon"], permutations=0)


def test_a_phase_is_divided_by_itself() -> None:
    trace = drawn(9)
    (routes,) = tuple(trace)
    size = np.bincount(routes.document)[routes.document]
    phased = replace(trace, loaded=(replace(routes, phase=(routes.positions >= size // 2).astype(np.uint8)),))
    result = score(phased, phase="generated", strata=["position", "frequency"], permutations=5)
    half = int((routes.positions >= size // 2).sum())
    for kind in ("position", "frequency"):
        assert sum(each.tokens for each in result.strata[kind].strata) == half
    assert result.strata["position"].strata[0].share == pytest.approx(0.25, abs=0.01)


# ------------------------------------------------------------------------------------------------------------- around it


def test_command_line_result_and_page(tmp_path: Path) -> None:
    trace = replace(drawn(10, lean=0.5), vocabulary={0: "<b>x</b>"})
    trace.save(tmp_path / "trace")
    asked = ["score", str(tmp_path / "trace"), "--strata", "position,entropy"]
    run = CliRunner().invoke(app, [*asked, "--permutations", "19", "--output-path", str(tmp_path / "out")])
    assert run.exit_code == 0 and "Strata of tokens: place in the document" in run.output, run.output
    result = load_result(tmp_path / "out")
    assert set(result.strata) == {"position", "entropy"} and result.settings["strata"] == ["position", "entropy"]
    assert "entropy of the router, not of the next token" in result.strata["entropy"].by
    assert "--strata position,entropy" in command(result)
    page = write_page(tmp_path / "out").read_text("utf-8")
    assert 'data-figure="strata"' in page and "highest fifth" in page
    assert CliRunner().invoke(app, [*asked[:2], "--strata", "x"]).exit_code == 2


def test_an_evaluation_with_other_strata_is_another(tmp_path: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    options = {"tasks": tiny_task, "output_path": tmp_path, "permutations": 5}
    first = dbes.evaluate(tiny_checkpoint, strata=["position", "entropy", "token-class", "frequency"], **options)
    assert not any(each.reason for each in first.strata.values())
    again = dbes.evaluate(tiny_checkpoint, strata=["position", "entropy", "token-class", "frequency"], **options)
    assert again.created == first.created and again.model_dump_json() == first.model_dump_json()
    with pytest.raises(dbes.ResultError, match="another strata"):
        dbes.evaluate(tiny_checkpoint, **options)


def test_routes_without_any_token_in_a_part_are_skipped() -> None:
    trace = drawn(11)

    def nothing(routes: TokenRoutes) -> list[np.ndarray]:
        return [np.zeros(0, np.int64), np.arange(len(routes))]

    empty, every = counting.count_parts(trace, nothing, 2)
    assert not empty.tokens.any() and every.tokens.sum() == trace.tokens
    np.testing.assert_array_equal(every.whole().hits, count_routes(trace, plain=True).whole().hits)
