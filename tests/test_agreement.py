"""Agreement of two recordings: against plain loops, planted disagreement, identical recordings, refusals, coverage of the intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.comparison.agreement import Agreement, agreement
from dbes.comparison.disagreement import BANDS
from dbes.errors import ResultError, TraceError
from dbes.reporting.agreement import as_text, words
from dbes.reporting.html import unpacked
from dbes.scoring.resampling import jackknife
from dbes.trace.store import Trace
from dbes.trace.types import TokenRoutes
from dbes.trace.writer import TraceWriter

DOMAINS = ("law", "code")
LAYERS = (1, 3, 4)


def drawn(rng: np.random.Generator, tokens: int, layers: int, experts: int, k: int) -> np.ndarray:
    return rng.permuted(np.broadcast_to(np.arange(experts), (tokens, layers, experts)), axis=2)[..., :k].copy()


def trace_of(ids: np.ndarray, lengths: Sequence[int], *, domain: Sequence[int], experts: int = 6, **more: Any) -> Trace:
    document = np.repeat(np.arange(len(lengths)), lengths)
    given: dict[str, Any] = {
        "token_ids": np.arange(len(document)) % 50,
        "document_ids": [f"text-{index}" for index in range(len(lengths))],
        "layers": LAYERS[: ids.shape[1]],
        "domains": DOMAINS,
    }
    return Trace.from_arrays(ids, document=document, domain=domain, experts=experts, **(given | more))


def two(seed: int = 0, *, changed: float = 0.2, lengths: Sequence[int] = (5, 9, 1, 12, 7, 3), k: int = 3) -> tuple[Trace, Trace]:
    """Two recordings of which some rows were drawn again, with slots that did not run and slots in another order."""
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    ids = drawn(rng, tokens, 3, 6, k)
    ids[rng.random(ids.shape) < 0.05] = -1
    other = np.where(rng.random((tokens, 3, 1)) < changed, drawn(rng, tokens, 3, 6, k), rng.permuted(ids, axis=2))
    margins = np.abs(rng.normal(size=(tokens, 3))).astype(np.float32)
    margins[rng.random(margins.shape) < 0.1] = np.nan
    domain = [index % 2 for index in range(len(lengths))]
    return trace_of(ids, lengths, domain=domain, selection_margins=margins), trace_of(other, lengths, domain=domain)


def naive(first: Trace, second: Trace) -> dict[str, Any]:
    """The same sums by loops over tokens and layers, from the definitions alone."""
    (one,), (other,) = first.loaded, second.loaded
    mark = int(np.iinfo(one.ids.dtype).max)
    rows = {(int(d), int(p)): row for row, (d, p) in enumerate(zip(other.document, other.positions, strict=True))}
    cells = []
    ever: dict[int, bool] = {}
    for row in range(len(one)):
        there, before = rows[int(one.document[row]), int(one.positions[row])], False
        for column in range(one.ids.shape[1]):
            a, b = ({int(each) for each in ids[at, column]} - {mark} for ids, at in ((one.ids, row), (other.ids, there)))
            if not a or not b:
                continue
            margin = math.nan if one.selection_margins is None else float(one.selection_margins[row, column])
            cells.append({"document": int(one.document[row]), "column": column, "differs": a != b, "slots": len(a), "kept": len(a & b),
                          "fresh": a != b and not before, "at_risk": not before, "margin": margin})  # fmt: skip
            before = before or a != b
        ever[row] = before
    return {"cells": cells, "ever": sum(ever.values()) / len(ever)}


def ratio(cells: Sequence[dict[str, Any]], above: str, below: str | None = None) -> float:
    base = sum(cell[below] for cell in cells) if below else len(cells)
    return sum(cell[above] for cell in cells) / base if base else math.nan


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(1, 4))
def test_every_share_is_that_of_plain_loops(seed: int, changed: float, k: int) -> None:
    first, second = two(seed, changed=changed, k=k)
    found, expected = agreement(first, second, scores=False), naive(first, second)
    cells = expected["cells"]
    assert found.differing.value == pytest.approx(ratio(cells, "differs"))
    assert found.kept.value == pytest.approx(ratio(cells, "kept", "slots"))
    assert found.ever.value == pytest.approx(expected["ever"])
    assert found.identical is (not any(cell["differs"] for cell in cells))
    for column, each in enumerate(found.by_layer):
        here = [cell for cell in cells if cell["column"] == column]
        assert (each.compared, each.missing) == (len(here), 37 - len(here))
        assert each.differing.value == pytest.approx(ratio(here, "differs"), nan_ok=True)
        assert each.kept.value == pytest.approx(ratio(here, "kept", "slots"), nan_ok=True)
        assert each.started.value == pytest.approx(ratio([cell for cell in here if cell["at_risk"]], "fresh"), nan_ok=True)
        for index, domain in enumerate(DOMAINS):
            inside = [cell for cell in here if cell["document"] % 2 == index]
            assert each.by_domain[domain].value == pytest.approx(ratio(inside, "differs"), nan_ok=True)
    started = [sum(cell["fresh"] for cell in cells if cell["column"] <= column) for column in range(3)]
    if started[-1]:
        assert found.half_by == LAYERS[next(column for column in range(3) if 2 * started[column] >= started[-1])]
    else:
        assert found.half_by is None
    known = [cell for cell in cells if not math.isnan(cell["margin"])]
    assert sum(band.pairs for band in found.by_margin) == len(known)
    if any(cell["differs"] for cell in known):
        assert sum(band.part.value for band in found.by_margin) == pytest.approx(1)
        total = sum(band.pairs * band.differing.value for band in found.by_margin if band.pairs)
        assert total == pytest.approx(sum(cell["differs"] for cell in known))


def test_the_interval_is_the_jackknife_of_a_ratio_over_documents() -> None:
    first, second = two(3)
    cells = naive(first, second)["cells"]
    domain = np.asarray([0, 1] * 3)
    left_out = np.asarray([ratio([cell for cell in cells if cell["document"] != index], "differs") for index in range(6)])
    value = ratio(cells, "differs")
    reach = float(jackknife(np.asarray(value), left_out, domain).reach)
    found = agreement(first, second, scores=False).differing
    assert (found.low, found.high) == pytest.approx(ends(value, reach))


def ends(value: float, reach: float) -> tuple[float, float]:
    """Ends of an interval symmetric in the log-odds."""
    odds, far = math.log(value / (1 - value)), reach / (value * (1 - value))
    return 1 / (1 + math.exp(far - odds)), 1 / (1 + math.exp(-far - odds))


def test_documents_of_one_source_are_one_unit() -> None:
    first, second = two(3)
    sources = ["a", "b", "a", "b", "c", "d"]
    joined = [trace_of(_ids(each), (5, 9, 1, 12, 7, 3), domain=[0, 1] * 3, document_source=sources) for each in (first, second)]
    cells = naive(first, second)["cells"]
    left_out = np.asarray([
        ratio([cell for cell in cells if sources[cell["document"]] != source], "differs") for source in ("a", "b", "c", "d")
    ])  # fmt: skip
    reach = float(jackknife(np.asarray(ratio(cells, "differs")), left_out, np.asarray([0, 1, 0, 1])).reach)
    found = agreement(*joined, scores=False).differing
    assert (found.low, found.high) == pytest.approx(ends(found.value, reach))


def _ids(trace: Trace) -> np.ndarray:
    (routes,) = trace.loaded
    return np.where(routes.ids == np.iinfo(routes.ids.dtype).max, -1, routes.ids.astype(int))


def test_identical_recordings_differ_by_exactly_nothing_and_are_called_so(tmp_path: Path) -> None:
    first, _ = two(1, lengths=(40, 50, 60, 45, 30, 55))
    saved = first.save(tmp_path / "trace")
    found = agreement(first, saved)
    assert found.identical and found.verified
    for each in (found.differing, found.ever, *(layer.differing for layer in found.by_layer)):
        assert (each.value, each.low, each.high) == (0, 0, 0)
    assert (found.kept.value, found.kept.low, found.kept.high) == (1, 1, 1)
    assert found.scores and all(each.difference == 0 for each in found.scores)
    assert "identical" in words(found)[0] and words(found)[-1] == "Every score is the same."
    assert found.half_by is None


def test_a_planted_disagreement_is_found_at_its_layer_domain_and_margin() -> None:
    rng = np.random.default_rng(5)
    lengths, domain = [60] * 12, [0, 1] * 6
    ids = drawn(rng, 720, 3, 6, 2)
    margins = rng.random((720, 3)).astype(np.float32)
    other = ids.copy()
    ours = np.repeat(np.asarray(domain) == 1, 60)
    near = ours & (margins[:, 1] < np.quantile(margins[:, 1], 0.1))
    for row in np.flatnonzero(near):
        other[row, 1, 0] = next(expert for expert in range(6) if expert not in ids[row, 1])
    found = agreement(
        trace_of(ids, lengths, domain=domain, selection_margins=margins), trace_of(other, lengths, domain=domain), scores=False
    )
    assert [each.differing.value for each in found.by_layer] == [0, pytest.approx(near.sum() / 720), 0]
    assert [each.started.value > 0 for each in found.by_layer] == [False, True, False]
    assert found.half_by == 3
    assert {each.domain: each.differing.value > 0 for each in found.by_domain} == {"law": False, "code": True}
    assert found.by_layer[1].kept.value == pytest.approx(1 - near.sum() / 1440)
    # codes are cut at 128 steps to a doubling, so that a few of the planted ones may fall on the other side of the quantile
    assert found.by_margin[0].part.value > 0.9 and found.by_margin[0].part.value + found.by_margin[1].part.value == pytest.approx(1)
    assert "It starts at layer 3" in words(found)[1] and "Mostly near ties" in words(found)[2]


def test_bands_of_margins_are_even_and_never_cut_ties_apart() -> None:
    rng = np.random.default_rng(0)
    lengths, domain = [500] * 4, [0, 1] * 2
    ids, margins = drawn(rng, 2000, 3, 6, 2), rng.lognormal(size=(2000, 3)).astype(np.float32)
    margins[:, 2] = 0.5
    found = agreement(trace_of(ids, lengths, domain=domain, selection_margins=margins), trace_of(ids, lengths, domain=domain), scores=False)
    sizes = [each.pairs for each in found.by_margin]
    tied = max(range(BANDS), key=lambda band: sizes[band])
    assert sum(sizes) == 6000 and sizes[tied] > 2000
    # a code holds less than a hundredth of the draws of a lognormal, so that no band is off by more than one code at each end
    assert all(abs(size - (2000 if band == tied else 0) - 400) <= 80 for band, size in enumerate(sizes))


def test_documents_in_another_order_other_shards_and_missing_rows_are_matched(tmp_path: Path) -> None:
    first, second = two(7)
    expected = agreement(first, second, scores=False)
    order = [4, 0, 5, 2, 1, 3]
    (routes,) = second.loaded
    rows = np.concatenate([np.flatnonzero(routes.document == index) for index in order])
    shuffled = trace_of(
        _ids(second)[rows], [(5, 9, 1, 12, 7, 3)[index] for index in order], domain=[index % 2 for index in order],
        document_ids=[f"text-{index}" for index in order], token_ids=np.asarray(routes.token_ids)[rows],
    )  # fmt: skip
    writer = TraceWriter(tmp_path / "shards", shuffled.shape, {})
    (all_rows,) = shuffled.loaded
    for document in range(6):
        writer.write(all_rows.take(np.flatnonzero(all_rows.document == document)), last_document=document)
    writer.finish()
    assert agreement(first, tmp_path / "shards", scores=False) == expected
    assert agreement(first.save(tmp_path / "first"), tmp_path / "shards", scores=False) == expected
    # a server's recording: the last row of every document is missing
    short = routes.take(np.flatnonzero(np.r_[routes.document[1:] == routes.document[:-1], False]))
    cut = Trace(shape=second.shape, loaded=(short,))
    found = agreement(first, cut, scores=False)
    assert found.tokens == 31 and any("6 tokens of the first recording" in note for note in found.notes)
    (kept,) = first.loaded
    both = kept.take(np.flatnonzero(np.r_[kept.document[1:] == kept.document[:-1], False]))
    again = agreement(Trace(shape=first.shape, loaded=(both,)), cut, scores=False)
    assert (again.differing, again.kept, again.by_layer) == (found.differing, found.kept, found.by_layer)


def test_documents_of_one_recording_only_are_left_out_and_counted() -> None:
    first, second = two(2)
    renamed = trace_of(_ids(second), (5, 9, 1, 12, 7, 3), domain=[0, 1] * 3, document_ids=["x", *(f"text-{i}" for i in range(1, 6))])
    found = agreement(first, renamed)
    assert found.documents == 5 and found.tokens == 32 and not found.scores
    assert [note for note in found.notes if "document" in note][:2] == [
        "1 document of the first recording is not in the other",
        "1 document of the second recording is not in the other",
    ]
    assert any(note.startswith("scores are not compared") for note in found.notes)


def test_ids_stored_in_a_wider_dtype_mean_the_same() -> None:
    first, second = two(9)
    (routes,) = second.loaded
    wide = np.where(routes.ids == 255, 65535, routes.ids.astype(np.uint16)).astype(np.uint16)
    widened = Trace(shape=second.shape, loaded=(TokenRoutes(**(routes.arrays() | {"ids": wide})),))
    assert agreement(first, widened, scores=False) == agreement(first, second, scores=False)


LENGTHS = (4, 6, 5, 7)


def plain(**more: Any) -> Trace:
    ids = drawn(np.random.default_rng(0), 22, 3, 6, 2)
    return trace_of(ids, LENGTHS, domain=[0, 1, 0, 1], **more)


def other_token() -> Trace:
    tokens = np.arange(22) % 50
    tokens[12] = 49
    return plain(token_ids=tokens)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(lambda: plain(layers=(1, 3, 5)), r"has MoE layers \[1, 3, 4\], the second \[1, 3, 5\]", id="layers"),
        pytest.param(lambda: plain(experts=[6, 8, 6]), "layer 3: experts 6 in the first recording and 8 in the second", id="experts"),
        pytest.param(
            lambda: trace_of(drawn(np.random.default_rng(0), 22, 3, 6, 3), LENGTHS, domain=[0, 1, 0, 1]),
            "layer 1: top-k 2 in the first recording and 3 in the second",
            id="top-k",
        ),
        pytest.param(other_token, "'text-2', position 2: token 12 in the first recording and 49 in the second", id="token ids"),
        pytest.param(
            lambda: plain(document_ids=list("abcd")), "no document is in both recordings: the first has 'text-0'", id="no document"
        ),
        pytest.param(lambda: plain(domains=("law", "poetry")), "'text-1' has domain 'code' in the first.*'poetry'", id="domain"),
        pytest.param(lambda: plain(document_source=["a", "b", "x", "d"]), "'text-2' has source 'c' in the first.*'x'", id="source"),
        pytest.param(lambda: plain(positions=np.r_[50:72]), "no token of one position", id="positions"),
        pytest.param(lambda: plain(positions=np.repeat([0, 1, 2, 3], [1, 1, 10, 10])), "position 2 twice", id="a position twice"),
    ],
)
def test_recordings_that_are_not_of_the_same_are_refused_with_the_reason(other: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message) as told:
        agreement(plain(document_source=["a", "b", "c", "d"]), other(), scores=False)
    assert "\n" not in str(told.value)


def test_tokens_that_the_model_wrote_otherwise_are_called_so() -> None:
    phase = np.asarray([0, 0, 1, 1] + [0] * 18, np.uint8)
    tokens = np.arange(22) % 50
    tokens[3] = 7
    with pytest.raises(TraceError, match=r"position 3: token 3 .* the model wrote this text"):
        agreement(plain(phase=phase), plain(phase=phase, token_ids=tokens), scores=False)


def test_numbers_without_token_ids_are_no_evidence_of_the_same_texts() -> None:
    unknown = {"token_ids": None, "document_ids": None}
    with pytest.raises(TraceError, match="nothing shows that both are of the same texts"):
        agreement(plain(**unknown), plain(**unknown), scores=False)
    task = {"task": {"name": "t", "version": 1, "fingerprint": "f" * 64}}
    found = agreement(plain(**unknown, provenance=task), plain(**unknown, provenance=task), scores=False)
    assert found.identical and not found.verified and any("token ids are unknown for 22 tokens" in note for note in found.notes)
    assert agreement(plain(token_ids=None), plain(), scores=False).verified is False


def test_a_domain_of_one_text_has_no_interval() -> None:
    ids = drawn(np.random.default_rng(0), 22, 3, 6, 2)
    pair = [trace_of(each, LENGTHS, domain=[0, 0, 0, 1]) for each in (ids, ids[:, :, ::-1])]
    found = agreement(*pair, scores=False)
    intervals = {each.domain: each.differing.high for each in found.by_domain}
    assert math.isnan(intervals["code"]) and intervals["law"] == 0 and math.isnan(found.differing.high)


def simulated(rng: np.random.Generator, documents: int, *, growth: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Differing and compared tokens of documents whose rates and lengths vary; with growth, the longer ones differ more."""
    rate = rng.beta(spread, 19 * spread, size=documents)
    tokens = 20 + rng.geometric(1 / (200 + growth * rate))
    return rng.binomial(tokens, rate), tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("documents", "growth", "spread", "least"),
    [
        pytest.param(40, 0, 2, 0.887, id="rates and lengths are independent"),
        pytest.param(200, 2000, 2, 0.887, id="long documents differ more, many documents"),
        pytest.param(40, 2000, 2, 0.86, id="long documents differ more, few: what the module admits"),
    ],
)
def test_intervals_cover_the_share_that_many_documents_tend_to(documents: int, growth: float, spread: float, least: float) -> None:
    """Nominally 95 %; the bounds are three standard errors of 600 runs below the 92 and 90 % that the module admits."""
    above, below = simulated(np.random.default_rng(99), 2_000_000, growth=growth, spread=spread)
    truth, rng, held = above.sum() / below.sum(), np.random.default_rng(0), 0
    domain = np.repeat([0, 1], documents // 2)
    for _ in range(600):
        found = _share(*simulated(rng, documents, growth=growth, spread=spread), domain)
        held += found.low <= truth <= found.high
    assert held / 600 >= least, held


def _share(above: np.ndarray, below: np.ndarray, domain: np.ndarray) -> Any:
    from dbes.comparison.agreement import Units

    count = len(domain)
    units = Units(of_document=np.arange(count), domain=domain, chosen=np.arange(count))
    return units.shares(above, below)[0]


@pytest.fixture(scope="module")
def compared() -> Agreement:
    rng = np.random.default_rng(0)
    lengths, domain = [60] * 8, [0, 1] * 4
    ids = drawn(rng, 480, 3, 6, 2)
    other = np.where(rng.random((480, 3, 1)) < 0.1, drawn(rng, 480, 3, 6, 2), ids)
    margins = np.abs(rng.normal(size=(480, 3))).astype(np.float32)
    about = [{"model": "m", "dtype": dtype} for dtype in ("float32", "bfloat16")]
    return agreement(
        trace_of(ids, lengths, domain=domain, selection_margins=margins, provenance=about[0]),
        trace_of(other, lengths, domain=domain, provenance=about[1]),
    )


def test_recordings_are_named_by_what_tells_them_apart(compared: Agreement) -> None:
    assert (compared.first, compared.second) == ("m (float32)", "m (bfloat16)")


def test_the_scores_of_both_are_paired_over_documents(compared: Agreement) -> None:
    found = {(each.metric, each.depth): each for each in compared.scores}
    each = found["specialization", "all layers"]
    assert each.difference == pytest.approx(each.score_first - each.score_second)
    assert each.low < each.difference < each.high and not math.isnan(each.adjusted)


def test_every_form_says_the_same(compared: Agreement) -> None:
    content = json.loads(as_text(compared, "json"))
    assert content["differing"]["value"] == pytest.approx(compared.differing.value)
    assert len(content["by_layer"]) == 3 and content["by_margin"][0]["pairs"] == compared.by_margin[0].pairs
    rows = as_text(compared, "csv").splitlines()
    assert rows[0].startswith("layer,compared,missing,differing,") and [row.split(",")[0] for row in rows[1:]] == ["1", "3", "4"]
    assert "| 1 | 480 |" in as_text(compared, "markdown")


def test_the_page_holds_the_numbers_and_figures_that_follow_the_schema(compared: Agreement) -> None:
    import altair as alt

    page = as_text(compared, "html")
    data = unpacked(page)
    assert [row["differing"] for row in data["layers"]] == [each.differing.value for each in compared.by_layer]
    assert len(data["cells"]) == 6 and len(data["margins"]) == BANDS and len(data["scores"]) == len(compared.scores)
    assert set(data["specs"]) == {"layers", "margins", "domains", "cells"}
    for spec in data["specs"].values():
        alt.Chart.from_dict(spec)  # raises where the specification is none
    for figure in data["specs"]:
        assert f'data-figure="{figure}"' in page
    assert page.count('data-save="csv"') == 4 and words(compared)[0] in page


def test_the_page_of_identical_recordings_has_no_figure_of_nothing() -> None:
    page = as_text(agreement(plain(), plain(), scores=False), "html")
    assert "<figure" not in page and "The recordings are identical" in page


def test_names_from_outside_are_harmless_on_the_page() -> None:
    hostile = plain(provenance={"model": "</script><script>alert(1)</script>"}, domains=("<b>law</b>", "code"))
    page = as_text(agreement(hostile, hostile, scores=False), "html")
    assert "<script>alert" not in page and "<b>law" not in page


def test_the_command_shows_and_writes_an_agreement(tmp_path: Path) -> None:
    first, second = two(4, lengths=(40, 50, 60, 45, 30, 55))
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    run = CliRunner().invoke(app, ["compare", "--agreement", str(tmp_path / "a"), str(tmp_path / "b")])
    assert run.exit_code == 0, run.output
    assert "By layer" in run.output and "The expert sets differ in" in run.output
    target = tmp_path / "page.html"
    run = CliRunner().invoke(
        app, ["compare", "--agreement", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "html", "--output", str(target)]
    )
    assert run.exit_code == 0 and target.read_text().rstrip().endswith("</html>")
    run = CliRunner().invoke(app, ["compare", "--agreement", str(tmp_path / "a")])
    assert run.exit_code == 2 and "two recordings, 1 were given" in run.output


def test_results_are_read_with_their_scores(tmp_path: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    made = [
        dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path / dtype, dtype=dtype, permutations=10, limit=4)
        for dtype in ("float32", "bfloat16")
    ]
    found = dbes.agreement(made[0], tmp_path / "bfloat16")
    assert found.scores and found.verified
    score = next(each for each in found.scores if (each.metric, each.depth) == ("specialization", "all layers"))
    assert [score.score_first, score.score_second] == [each.record("specialization").score for each in made]
    assert 0 < found.differing.value < 0.5 and found.margin == "scaled_margins"
    with pytest.raises(ResultError, match="holds 2 results"):
        agreement(tmp_path, made[0])
