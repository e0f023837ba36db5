"""The page of one model: its numbers are the result's, nothing in the data can become markup, bad input is named."""

from __future__ import annotations

import html
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_results import HOSTILE, counted_domains, simulated_trace, write_result
from rich.console import Console
from safetensors.numpy import load_file

from dbes.errors import ResultError
from dbes.reporting import charts, layer_charts
from dbes.reporting.html import packed, unpacked
from dbes.reporting.meaning import meaning_rows, placebo_rows
from dbes.reporting.page import columns, command, read_usage, render_page, slug, write_page
from dbes.reporting.terminal import render
from dbes.reporting.text_view import contexts, documents, legible, read_sample, token_text, trajectories
from dbes.results import Result, load_result
from dbes.scoring.score import score


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_result(tmp_path_factory.mktemp("result"), simulated_trace())


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_page(folder).read_text("utf-8")


@pytest.fixture(scope="module")
def payload(page: str) -> dict:
    return unpacked(page)


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return load_result(folder)


def test_curves_are_the_calibrated_records(payload: dict, result: Result) -> None:
    curves = payload["curves"]
    expected = [record for record in result.calibrated if record.layer is not None]
    assert len(curves["metric"]) == len(expected)
    for index, record in enumerate(expected):
        assert (curves["metric"][index], curves["layer"][index], curves["domain"][index]) == (record.metric, record.layer, record.domain)
        for name in charts.CURVE_FIELDS:
            value = getattr(record, name)
            shown = curves[name][index]
            assert (shown is None and math.isnan(value)) or shown == pytest.approx(value, rel=1e-4)


def test_heat_map_is_the_expert_usage(payload: dict, folder: Path, result: Result) -> None:
    usage = pd.read_parquet(folder / "expert_usage.parquet")
    heat = payload["heat"]
    hits = np.array(heat["hits"], float).reshape(4, 4, 16)
    share = hits / hits.sum(axis=-1, keepdims=True)
    order = {name: place for place, name in enumerate(result.task.domains)}
    index = 0
    for domain in result.task.domains:
        for layer, experts in zip(result.model.layers, result.model.experts, strict=True):
            rows = usage[(usage["domain"] == domain) & (usage["layer"] == layer)].sort_values("expert")
            for row in rows.to_dict("records"):
                assert heat["hits"][index] == row["hits"]
                # The page orders experts by what it computes from the hits: the browser tests compare what it draws.
                assert share[order[row["domain"]], layer - 1, row["expert"]] == pytest.approx(row["share"], rel=1e-6)
                lift = heat["lift"][index]
                assert lift == pytest.approx(row["lift"], rel=1e-3)
                assert lift + heat["reach"][index] == pytest.approx(row["lift_high"], rel=1e-3)
                assert max(0.0, lift - heat["reach"][index]) == pytest.approx(row["lift_low"], abs=2e-3)
                assert (heat["kind"][index] == 2) == row["specialist"]
                index += 1
            assert len(rows) == experts
    assert index == len(heat["hits"])


def test_similarity_specialists_and_load_are_the_results(payload: dict, folder: Path, result: Result) -> None:
    matrix = load_file(folder / "matrices.safetensors")["similarity"]
    np.testing.assert_allclose(np.array(payload["similarity"][:-1], float), matrix, rtol=1e-4)
    shown = payload["specialists"]
    assert shown["expert"] == [each.expert for each in result.specialists]
    assert shown["lift"] == pytest.approx([each.lift for each in result.specialists], rel=1e-4)
    used = result.companions["by_layer"]["utilization"]
    assert [row["utilization"] for row in payload["load"]] == [used[str(layer)] for layer in result.model.layers]
    assert sorted(payload["order"]) == sorted(result.task.domains)


def test_text_view_shows_the_recorded_routes(payload: dict) -> None:
    trace = simulated_trace()
    routes = trace.loaded[0]
    for text in payload["text"]:
        document = trace.shape.document_ids.index(text["id"])
        rows = np.flatnonzero(routes.document == document)[: len(text["tokens"])]
        experts = np.array(text["experts"]).reshape(len(rows), len(trace.shape.layers), 2)
        assert (np.sort(experts, axis=-1) == np.sort(routes.ids[rows], axis=-1)).all()
        assert (np.diff(np.array(text["weights"]).reshape(experts.shape), axis=-1) <= 0).all()
        assert text["tokens"] == [trace.vocabulary[int(token)] for token in routes.token_ids[rows]]


def test_trajectories_count_primary_experts() -> None:
    trace = simulated_trace()
    sample = read_sample(trace)
    assert sample is not None and sample.primary is not None
    moves = trajectories(sample)
    assert moves is not None
    rows = np.flatnonzero(sample.domain == 2)
    start, end, share, lift = moves[2][1][0]
    here, there = sample.primary[rows, 1], sample.primary[rows, 2]
    assert share == pytest.approx(np.mean((here == start) & (there == end)), rel=1e-3)
    each = [np.mean((sample.primary[sample.domain == d, 1] == start) & (sample.primary[sample.domain == d, 2] == end)) for d in range(4)]
    assert lift == pytest.approx(share / np.mean(each), rel=1e-2)


def test_contexts_show_the_token_where_the_expert_fired(result: Result) -> None:
    sample = read_sample(simulated_trace())
    for specialist, places in zip(result.specialists[:20], contexts(sample, result.specialists)[:20], strict=True):
        assert places
        assert all(token in specialist.tokens for _, token, _ in places)


def test_without_weights_no_primary_is_claimed(tmp_path: Path) -> None:
    trace = simulated_trace()
    routes = replace(trace.loaded[0], weights=None)
    folder = write_result(tmp_path, replace(trace, loaded=(routes,), control=None))
    shown = unpacked(write_page(folder).read_text("utf-8"))
    assert shown["moves"] is None
    assert shown["text"] and all(text["weights"] == [] for text in shown["text"])


def test_page_without_trace_and_tables_says_less(tmp_path: Path, result: Result) -> None:
    result.save(tmp_path)
    shown = unpacked(write_page(tmp_path).read_text("utf-8"))
    assert shown["has"] == {
        "heat": False, "lift": False, "tests": True, "tree": True, "text": False, "moves": False, "weights": False,
        "more_specialists": False,
    }  # fmt: skip


def test_counts_of_whole_domains_show_their_values_and_claim_nothing_more(tmp_path: Path) -> None:
    page = write_page(counted_domains(tmp_path)).read_text("utf-8")
    value = load_result(tmp_path).record("specialization").value
    assert f'<div class="number">{value:.4g}</div>' in page
    assert "None can be told" in page and 'id="s-table"' not in page and 'data-figure="heat"' not in page
    assert '<th scope="col" class="n">Documents</th>' not in page
    text = io.StringIO()
    Console(file=text, width=80).print(render(load_result(tmp_path)))
    assert f"{value:.4f}" in text.getvalue() and "Value" in text.getvalue()
    assert not any(word in text.getvalue() for word in ("Specialists", "Sources", "Stiffness┃"))


@pytest.mark.parametrize("domains", [12, 13])
def test_only_a_table_of_few_domains_has_numbers_in_its_cells(domains: int) -> None:
    spec = json.dumps(charts.similarity_spec(domains))
    assert ('"label"' in spec) == (domains <= 12)


def test_what_rounding_leaves_of_nothing_is_nothing() -> None:
    rows = [{"a": 3e-17, "b": -2e-16}, {"a": 2e-9, "b": math.nan}]
    assert columns(rows, ("a", "b")) == {"a": [0.0, 2e-9], "b": [0.0, None]}


def test_halves_of_a_domain_and_what_its_texts_are_stand_beside_it(tmp_path: Path, result: Result) -> None:
    half = {"texts": 9, "score": 0.001, "score_low": -0.01, "score_high": 0.012, "p": 0.3, "p_least": 0.01, "p_holm": 0.6}
    whole = {"domains": 1, "score": 0.002, "score_low": -0.02, "score_high": 0.024, "p": 0.6, "p_least": 0.01, "rejected": 0}
    placebo = {kind: {"law": half} for kind in ("random", "length")} | {"summary": {"random": whole, "length": {**whole, "p": 0.02}}}
    domains = dict(result.task.domains)
    domains["law"] = domains["law"].model_copy(update={"cautions": ("one source text only <b>",)})
    found = result.model_copy(
        update={
            "companions": {**result.companions, "placebo": placebo},
            "task": result.task.model_copy(update={"domains": domains}),
        }
    )
    assert placebo_rows(found) == [
        (None, "0.2% (-2.0% to 2.4%)", "0.600", "0.2% (-2.0% to 2.4%)", "0.020"),
        ("law", "0.1% (-1.0% to 1.2%)", "0.600", "0.1% (-1.0% to 1.2%)", "0.600"),
    ]
    assert ("Placebo: domains split at random", "0.2% (-2.0% to 2.4%), told apart in 0 of 1") in meaning_rows(found)
    found.save(tmp_path)
    page = write_page(tmp_path).read_text("utf-8")
    assert "one source text only &lt;b&gt;" in page and page.count("0.1% (-1.0% to 1.2%)") == 2
    assert placebo_rows(result.model_copy(update={"companions": {}})) == []


def test_page_is_one_file_without_requests(page: str) -> None:
    head = html.unescape(page[:4000])
    assert "default-src 'none'" in head and "unsafe-eval" not in head and "script-src 'sha256-" in head
    body = page[page.index("<body") : page.index('id="data"')]
    assert "http://" not in body and "https://" not in body and "src=" not in body
    assert len(page.encode()) < 1_500_000


def test_page_of_48_layers_and_128_experts_stays_small(tmp_path: Path) -> None:
    domains = tuple(f"domain {index}" for index in range(8))
    trace = simulated_trace(domains=domains, layers=48, experts=128, top_k=8, documents=6, tokens=(60, 120))
    path = write_page(write_result(tmp_path, trace, permutations=5))
    shown = unpacked(path.read_text("utf-8"))
    assert len(shown["heat"]["hits"]) == 8 * 48 * 128 and len(shown["text"]) == 8
    assert path.stat().st_size < 2_000_000


def test_same_result_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first, second = (write_page(folder, output=tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    words = dict(enumerate(HOSTILE))
    trace = simulated_trace(model=HOSTILE[0], domains=(HOSTILE[1], HOSTILE[3], "=cmd()", "\u202elaw"), vocabulary=words)
    page = write_page(write_result(tmp_path, trace)).read_text("utf-8")
    markup = page[: page.index('id="data"')]  # what follows are packed data and our own scripts, checked by their hash
    assert "window.hacked = 1</script>" not in page
    assert "<img" not in markup
    assert "\u202e" not in page and "\x00" not in page
    assert "&lt;script&gt;window.hacked" in page
    assert len(page) < 1_500_000
    shown = unpacked(page)
    assert max(len(token) for text in shown["text"] for token in text["tokens"]) <= 33
    assert not any("\u202e" in name for name in shown["domains"])


def test_characters_over_several_tokens_are_shown_as_the_character() -> None:
    text = "中文 😀 é"
    trace = simulated_trace()
    (routes,) = trace.loaded
    assert routes.token_ids is not None
    tokens = {256 + byte: bytes([byte]) if byte > 127 else chr(byte) for byte in text.encode()}
    ids = routes.token_ids.copy()
    rows = np.flatnonzero(routes.document == 0)
    ids[rows] = np.resize([256 + byte for byte in text.encode()], len(rows))
    changed = replace(trace, loaded=(replace(routes, token_ids=ids),), vocabulary={**trace.vocabulary, **tokens})
    sample = read_sample(changed)
    assert sample is not None
    shown = documents(sample)[0]
    assert "".join(shown["tokens"]).startswith(text) and "\ufffd" not in "".join(shown["tokens"])
    assert shown["tokens"][:4] == ["中", "", "", "文"]
    assert {place: shown["bytes"][place] for place in "012"} == {"0": "<E4>", "1": "<B8>", "2": "<AD>"} and "6" not in shown["bytes"]
    assert shown["whole"] or len("".join(shown["tokens"]).encode()) >= len(shown["tokens"]), "the last character is whole"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("👨\u200d👩\U0001fae8", "👨\u200d👩\U0001fae8"),
        ("a\u202eb\u2066c", "a�b�c"),
        ("\x00\x1b[31m", "��[31m"),
        ("line\nend\t", "line⏎end⇥"),
        ("x" * 10_000_000, "x" * 32 + "…"),
        ("\ud800", "�"),
    ],
    ids=["plain", "joined and new emoji", "direction marks", "control", "line end", "ten megabytes", "lone surrogate"],
)
def test_token_text_is_legible(text: str, shown: str) -> None:
    assert token_text(text) == shown
    assert len(legible(text)) <= 33


def test_error_results_have_a_page(tmp_path: Path, result: Result) -> None:
    failed = result.model_copy(update={"status": "error", "error": "<b>out of memory</b>", "calibrated": (), "specialists": ()})
    failed.save(tmp_path)
    page = write_page(tmp_path).read_text("utf-8")
    assert "&lt;b&gt;out of memory" in page and "<script" not in page


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "expert_usage.parquet").write_bytes(b"PAR1 nonsense"), "expert_usage.parquet: cannot be read"),
        (lambda f: pd.DataFrame({"domain": ["a"]}).to_parquet(f / "expert_usage.parquet"), "not the table of this result"),
        (lambda f: (f / "matrices.safetensors").write_bytes(b"nonsense"), "matrices.safetensors: cannot be read"),
        (lambda f: (f / "result.json").write_text("{", "utf-8"), "not JSON"),
        (lambda f: (f / "result.json").unlink(), "there is no result here"),
    ],
    ids=["damaged table", "another table", "damaged matrices", "truncated", "missing"],
)
def test_bad_files_are_named(tmp_path: Path, damage, message: str) -> None:
    folder = write_result(tmp_path, simulated_trace(documents=3, layers=2), keep_trace=False, permutations=5)
    damage(folder)
    with pytest.raises(ResultError, match=message):
        write_page(folder)


def test_specs_are_valid_and_name_their_data() -> None:
    import altair as alt

    specs = [*layer_charts.curve_specs((1, 2)).values(), layer_charts.parts_spec((1, 2)), charts.domain_spec(3),
             charts.heat_spec(3), charts.similarity_spec(3),
             charts.load_spec(), charts.utilization_spec((1,)), charts.trajectory_spec((1, 2)),
            charts.scatter_spec("accuracy", "accuracy", "%"), charts.scatter_spec("loss", "bits per byte", ".2f"),
             charts.overlay_spec(),
             charts.parallel_spec(), charts.dendrogram_spec(["a", "b"]),
             *(charts.named_interval_spec(zero=zero) for zero in (True, False))]  # fmt: skip
    for spec in specs:
        alt.Chart.from_dict(spec)
        assert '"name": "rows"' in json.dumps(spec)
        assert "config" not in spec


def test_dendrogram_joins_the_nearest_domains_first() -> None:
    similarity = np.array([[1, 0.2, 0.9], [0.2, 1, 0.3], [0.9, 0.3, 1]])
    rows, order = charts.dendrogram_rows(similarity, ["a", "b", "c"])
    assert abs(order.index("a") - order.index("c")) == 1
    heights = sorted({row["distance"] for row in rows})
    assert heights == pytest.approx([0, 0.1, 0.75])
    assert charts.dendrogram_rows(np.full((2, 2), np.nan), ["a", "b"]) == ([], ["a", "b"])


def test_command_repeats_the_result(result: Result) -> None:
    assert command(result) == "dbes score TRACE --seed 0 --permutations 60"
    settings = {"permutations": 10, "seed": 3, "limit": 5, "batch_size": "auto"}
    model = result.model.model_copy(update={"name": "org/model; rm -rf /", "revision": "0123abc"})
    asked = {"settings": {**result.settings, "match": "length", "surrogate": "bigram", "phase": "prompt"}}
    words = command(result.model_copy(update=asked))
    assert words == "dbes score TRACE --phase prompt --match length --surrogate bigram --seed 0 --permutations 60"
    words = command(result.model_copy(update={"settings": settings, "model": model}))
    assert words.startswith("dbes evaluate --model 'org/model; rm -rf /' --revision 0123abc --tasks simulated --dtype float32 --limit 5")


def test_slug_and_packing_are_safe() -> None:
    assert slug("../../etc/<x>") == "etc_x"
    assert "<" not in packed({"a": "</script>"})


def test_usage_of_another_result_is_refused(folder: Path, result: Result) -> None:
    other = result.model_copy(update={"model": result.model.model_copy(update={"experts": (16, 16, 16, 8)})})
    with pytest.raises(ResultError, match="not the table of this result"):
        read_usage(folder, other)


def test_documents_fit_their_budget() -> None:
    sample = read_sample(simulated_trace(tokens=(500, 600), documents=2))
    assert sample is not None
    assert all(48 <= len(text["tokens"]) <= 240 and not text["whole"] for text in documents(sample))


def test_the_figure_of_the_parts_is_in_the_unit_of_the_score() -> None:
    result = score(simulated_trace(), permutations=20)
    rows = {
        (row["domain"], row["layer"], row["part"]): row
        for row in layer_charts.part_rows(result, {name: name for name in ("law", "code", "math", "general")})
    }
    record = result.record("specialization", layer=2)
    router, word = rows[None, 2, "router"], rows[None, 2, "the word alone"]
    assert router["score"] - word["score"] == pytest.approx(record.contextual / record.reference)
    assert router["low"] - word["score"] == pytest.approx(record.contextual_low / record.reference)
    assert rows[None, 2, "random router"]["score"] == record.control and rows["law", 2, "router"]["score"] != router["score"]
    assert router["score"] == pytest.approx(record.score, abs=0.002)  # nearly all tokens occur in several texts


def test_without_token_ids_the_figure_shows_the_router_as_it_is_scored() -> None:
    trace = simulated_trace()
    result = score(replace(trace, loaded=tuple(replace(part, token_ids=None) for part in trace), control=None), permutations=20)
    rows = layer_charts.part_rows(result, {name: name for name in ("law", "code", "math", "general")})
    assert {row["part"] for row in rows} == {"router", "the position alone"}
    first = next(row for row in rows if row["domain"] is None and row["part"] == "router")
    assert first["score"] == result.record("specialization", layer=first["layer"]).score
    assert "The share of the word is unknown: the recording has no token ids." in render_page(result)
