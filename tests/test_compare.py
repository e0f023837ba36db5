"""Results side by side: only like with like, ranks that do not claim more than the documents can tell, exports that say the same."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import simulate
import yaml
from report_results import simulated_trace, write_result
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from dbes.cli import app
from dbes.comparison.check import check_folder
from dbes.comparison.compare import (
    Comparison,
    LeaderboardEntry,
    Replicates,
    compare,
    depth_of,
    difference,
    differences,
    model_score,
    paired_of,
    phase_differences,
)
from dbes.comparison.excess import excess_of
from dbes.comparison.ranks import Difference, ranks_of
from dbes.comparison.ranks import corrected as holm
from dbes.errors import ResultError, SettingError
from dbes.reporting import export
from dbes.reporting.card import card_section
from dbes.reporting.html import unpacked
from dbes.reporting.leaderboard import curve_rows, render_leaderboard, render_terminal
from dbes.results import CalibratedRecord, Result, load_result
from dbes.scoring.resampling import jackknife
from dbes.trace.types import PHASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    for seed, lean in enumerate((0.1, 0.5, 0.5)):
        write_result(made / f"m{seed}", simulated_trace(seed, lean=lean, model=f"model-{seed}"), keep_trace=False)
    return made


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder: Path, **update: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | update), "utf-8")


def pair(first: str, second: str, gap: float, p: float) -> Difference:
    return Difference(first=first, second=second, metric="specialization", depth="all layers", score_first=0.0, score_second=0.0,
                      difference=gap, low=0.0, high=0.0, p=p, adjusted=p)  # fmt: skip


def test_models_with_a_gap_are_ordered_and_equal_ones_share_a_rank(folder: Path) -> None:
    found = compare([folder])
    assert [entry.label for entry in found.entries][-1] == "model-0"
    assert (found.ranks["model-0"].place, found.ranks["model-0"].last) == (3, 3)
    assert str(found.ranks["model-1"]) == str(found.ranks["model-2"]) == "1 (1–2)"
    assert found.apart == ()


def test_models_are_ordered_by_their_excess_where_each_has_a_random_router(tmp_path: Path) -> None:
    """A router whose score its representation gives away stands below one that adds something, whatever the scores are."""
    frozen = simulated_trace(3, lean=0.9, model="frozen")
    routes = next(iter(frozen))
    frozen = replace(frozen, control=replace(frozen, loaded=(replace(routes, ids=routes.ids[:, :, ::-1]),), control=None))
    write_result(tmp_path / "frozen", frozen, keep_trace=False)
    write_result(tmp_path / "trained", simulated_trace(4, lean=0.4, model="trained"), keep_trace=False)
    found = compare([tmp_path])
    scores = {entry.label: entry.result.record("specialization").score for entry in found.entries}
    assert found.by_excess and [entry.label for entry in found.entries] == ["trained", "frozen"] and scores["frozen"] > scores["trained"]
    assert str(found.ranks["trained"]) == "1" and str(found.ranks["frozen"]) == "2" and found.pairs[0].of == "excess"
    assert "Order and rank by excess over the random router, specialization" in terminal(found)
    bare = replace(simulated_trace(5, lean=0.1, model="bare"), control=None)
    write_result(tmp_path / "bare", bare, keep_trace=False)
    found = compare([tmp_path])
    assert found.by_excess and [entry.label for entry in found.entries] == ["trained", "frozen", "bare"]
    assert str(found.ranks["trained"]) == "1" and str(found.ranks["frozen"]) == "2" and "bare" not in found.ranks
    assert "models without one stand below" in terminal(found)
    found = compare([tmp_path], by="score")
    assert not found.by_excess and [entry.label for entry in found.entries] == ["frozen", "trained", "bare"] and "bare" in found.ranks
    assert "Order and rank by score, specialization" in terminal(found)
    with pytest.raises(SettingError, match="no model here has random routers"):
        compare([tmp_path / "bare"], by="excess")


def test_the_test_of_excesses_has_the_draws_of_both_random_routers(folder: Path) -> None:
    pair = next(each for each in compare([folder]).pairs if {each.first, each.second} == {"model-1", "model-2"})
    sides = {entry.label: entry for entry in compare([folder]).entries}
    records = [sides[label].result.record("specialization") for label in (pair.first, pair.second)]
    assert pair.difference == pytest.approx(records[0].excess - records[1].excess)
    draws = [excess_of(sides[label], "specialization").draw_variance for label in (pair.first, pair.second)]
    assert all(draw > 0 for draw in draws) and pair.high - pair.difference > 1.95 * math.sqrt(sum(draws))


def test_columns_of_meaning_stand_in_every_form(folder: Path) -> None:
    found = compare([folder])
    row = next(csv.DictReader(io.StringIO(export.as_csv(found))))
    assert 0 <= float(row["share_of_word"]) < 0.2 and float(row["domain_named"]) > 0.9 and float(row["excess"]) > 0
    assert "| Excess | Word | Domain named |" in export.as_markdown(found) and "Excess" in terminal(found)


def test_80_columns_cut_no_number(folder: Path) -> None:
    texts = []
    for width in (200, 80):
        out = io.StringIO()
        Console(file=out, width=width).print(render_terminal(compare([folder])))
        texts.append(out.getvalue())
    assert max(map(len, texts[1].splitlines())) <= 80 and "…" not in texts[1]
    numbers = [sorted(word for word in text.replace("│", " ").split() if "%" in word) for text in texts]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 20


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], {"a": "1 (1–3)", "b": "1 (1–3)", "c": "1 (1–3)"}),
        ([("a", "b", 1, 0.001), ("a", "c", 1, 0.001), ("b", "c", 1, 0.001)], {"a": "1", "b": "2", "c": "3"}),
        ([("a", "b", 1, 0.5), ("a", "c", 1, 0.01), ("b", "c", 1, 0.5)], {"a": "1 (1–2)", "b": "1 (1–3)", "c": "2 (2–3)"}),
        ([("a", "b", -1, 0.01), ("a", "c", 1, 0.06)], {"a": "2 (2–3)", "b": "1 (1–2)", "c": "1 (1–3)"}),
        ([("a", "b", 1, math.nan)], {"a": "1 (1–3)", "b": "1 (1–3)", "c": "1 (1–3)"}),
    ],
    ids=["nothing told apart", "all ordered", "not transitive", "direction", "no test"],
)
def test_ranks_by_hand(pairs: list, expected: dict[str, str]) -> None:
    found = ranks_of(["a", "b", "c"], [pair(*each) for each in pairs])
    assert {label: str(rank) for label, rank in found.items()} == expected


def test_holm_by_hand() -> None:
    tests = [pair("a", "b", 1, p) for p in (0.01, 0.04, 0.03, math.nan)]
    assert [each.adjusted for each in holm(tests)[:3]] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(holm(tests)[3].adjusted)


def test_difference_is_the_paired_jackknife(folder: Path) -> None:
    entries = {entry.label: entry for entry in compare([folder]).entries}
    a, b = entries["model-0"], entries["model-1"]
    assert a.replicates is not None and b.replicates is not None
    found = difference(a, b, "specialization", "all layers", 0.0, 1.0)
    assert found is not None
    left = a.replicates.by_metric["specialization"][:, -1].astype(float) - b.replicates.by_metric["specialization"][:, -1].astype(float)
    paired = jackknife(np.asarray(found.difference), left, a.replicates.document_domain)
    assert found.difference == pytest.approx(a.result.record("specialization").score - b.result.record("specialization").score)
    assert found.high - found.difference == pytest.approx(float(paired.reach))
    assert 11 <= paired.freedom <= 44, "Satterthwaite's, between those of one domain and of all"
    back = difference(b, a, "specialization", "all layers", 0.0, 1.0)
    assert back is not None and (back.difference, back.p) == pytest.approx((-found.difference, found.p))


def test_depths_take_their_thirds(folder: Path) -> None:
    a, b = (entry for entry in compare([folder]).entries if entry.label != "model-2")
    found = {each.depth: each for each in differences(a, b) if each.metric == "domain_isolation"}
    scores = [a.result.record("domain_isolation", layer=layer).score for layer in a.result.model.layers]
    assert found["first third"].score_first == pytest.approx(scores[0])
    assert found["middle third"].score_first == pytest.approx(scores[1])
    assert found["last third"].score_first == pytest.approx(np.mean(scores[2:]))
    assert depth_of(1).tolist() == [0] and depth_of(3).tolist() == [0, 0.5, 1]


def simulated_entry(label: str, effect: float, seed: int, *, documents: int = 25, concentration: float = 12.0) -> LeaderboardEntry:
    """A model whose truth depends on ``effect`` alone; documents drawn with ``seed`` differ more with a small ``concentration``."""
    about = simulate.population(3, domains=3, layers=1, experts=16, top_k=2, effect=effect, concentration=concentration)
    statistics = simulate.draw_statistics(about, np.random.default_rng(seed), documents=documents)
    found = {metric: each for metric, each in simulate.intervals(statistics).items() if metric in simulate.truth(about)}
    rest = {name: math.nan for name in CalibratedRecord.model_fields if name not in ("metric", "layer", "domain", "score")}
    domains = (*statistics.shape.domains, None)
    records = tuple(
        CalibratedRecord(metric=metric, layer=layer, domain=domain, score=estimate.score[row, column], **rest)
        for metric, estimate in found.items()
        for row, domain in enumerate(domains if len(estimate.score) > 1 else (None,))
        for column, layer in enumerate((0, None))
    )
    sizes = {name: {"documents": documents, "sources": documents, "tokens": 1000} for name in statistics.shape.domains}
    result = Result.model_validate(
        {"status": "ok", "created": "2026-01-01", "model": {"name": label, "layers": [0], "experts": [16], "top_k": [2]},
         "task": {"name": "t", "domains": sizes}}
    ).model_copy(update={"calibrated": records})  # fmt: skip
    replicates = Replicates(
        documents=statistics.shape.document_ids, document_domain=statistics.shape.document_domain,
        by_metric={metric: estimate.replicates for metric, estimate in found.items()},
    )  # fmt: skip
    return LeaderboardEntry(result=result, folder=Path(), label=label, replicates=replicates)


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.2, 0.6])
def test_models_of_equal_truth_whose_documents_differ_more_or_less_are_told_apart_in_5_percent_of_400_runs(effect: float) -> None:
    """The plug-in statistics told them apart in every run; 5 % and three standard errors."""
    apart = dict.fromkeys(("specialization", "der", "domain_isolation"), 0)
    for run in range(400):
        alike, unlike = (
            simulated_entry(str(concentration), effect, 10 * run + place, concentration=concentration)
            for place, concentration in enumerate((80.0, 5.0))
        )
        for metric in apart:
            found = difference(alike, unlike, metric, "all layers", 0, 1)
            assert found is not None
            apart[metric] += found.p <= 0.05
    assert max(apart.values()) / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400), apart


@pytest.mark.slow
def test_equal_models_share_a_rank_in_95_percent_of_draws() -> None:
    shared, draws = 0, 200
    for draw in range(draws):
        entries = [simulated_entry(str(number), 0.3, 10 * draw + number) for number in range(3)]
        tests = holm([difference(a, b, "specialization", "all layers", 0, 1) for i, a in enumerate(entries) for b in entries[i + 1 :]])
        shared += {rank.place for rank in ranks_of([entry.label for entry in entries], tests).values()} == {1}
    assert shared / draws >= 0.92  # 95 % less two standard errors of 200 draws


def test_equal_models_mostly_share_and_a_known_gap_is_ordered() -> None:
    outcome = []
    for draw in range(25):
        entries = [
            simulated_entry(label, effect, 100 * draw + place) for place, (label, effect) in enumerate((("a", 0.3), ("b", 0.3), ("c", 0.6)))
        ]
        tests = holm([difference(x, y, "specialization", "all layers", 0, 1) for i, x in enumerate(entries) for y in entries[i + 1 :]])
        ranks = ranks_of(["a", "b", "c"], tests)
        outcome.append((ranks["a"].place == ranks["b"].place, ranks["c"].place == 1 and ranks["a"].place > 1 and ranks["b"].place > 1))
    share, ordered = np.mean(outcome, axis=0)
    assert share >= 0.8
    assert ordered >= 0.95


# ---------------------------------------------------------------------------------------------------------------------
# What may share a table


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"fingerprint": "cd" * 32}, "another task fingerprint cdcdcdcdcdcd instead of abababababab"),
        ({"version": 2}, "another task version 2 instead of 1"),
        ({"name": "other"}, "another task other instead of simulated"),
    ],
    ids=["fingerprint", "version", "task"],
)
def test_other_tasks_stand_apart_with_the_reason(copied: Path, update: dict, reason: str) -> None:
    content = json.loads((copied / "m1" / "result.json").read_text("utf-8"))
    change(copied / "m1", task=content["task"] | update)
    found = compare([copied])
    assert [entry.label for entry in found.entries] == ["model-2", "model-0"]
    assert [(each.name, each.reason) for each in found.apart] == [("model-1", reason)]


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., Path]:
    """Writes a result of routing that was recorded elsewhere: documents are known by number unless something else is given."""

    def write(name: str, *, words: int | None = None, ids: tuple[str, ...] | None = None, **task: Any) -> Path:
        made = simulated_trace(seed=len(name), documents=6, layers=2, model=name)
        about = {"model": name, "task": {"name": "mine", **task}}
        routes = made.loaded[0]
        token_ids = None if words is None else np.random.default_rng(words).integers(0, 50, len(routes)).astype(np.int32)
        shape = replace(made.shape, document_ids=ids or tuple(map(str, range(24))))
        trace = replace(made, shape=shape, provenance=about, control=None, loaded=(replace(routes, token_ids=token_ids),))
        return write_result(tmp_path / name, trace, keep_trace=False, permutations=20)

    return write


def test_numbers_of_documents_do_not_make_unrelated_recordings_comparable(imported: Callable[..., Path]) -> None:
    found = compare([imported("a"), imported("bb")])
    assert [entry.label for entry in found.entries] == ["a"] and found.pairs == ()
    assert found.apart[0].name == "bb" and "no fingerprint of its data" in found.apart[0].reason
    found = compare([imported("ccc"), imported("dddd", words=1), imported("eeeee", words=1)])
    assert {entry.label for entry in found.entries} == {"dddd", "eeeee"} and len(found.pairs) == 1
    assert "no fingerprint of its data" in found.apart[0].reason


def test_other_words_under_the_same_numbers_stand_apart_and_a_named_fingerprint_joins(imported: Callable[..., Path]) -> None:
    found = compare([imported("a", words=1), imported("bb", words=2)])
    assert len(found.entries) == 1 and "made from document ids, domains and token ids" in found.apart[0].reason
    ids = tuple(f"paper-{i}" for i in range(24))
    assert len(compare([imported("ccc", ids=ids), imported("dddd", ids=ids)]).pairs) == 1
    named = {"fingerprint": "ef" * 32}
    assert len(compare([imported("eeeee", words=1, **named), imported("ffffff", words=2, **named)]).pairs) == 1


def test_the_same_documents_in_other_domains_are_not_paired(copied: Path) -> None:
    path = copied / "m1" / "replicates.safetensors"
    with safe_open(path, framework="numpy") as content:
        about = content.metadata()
    arrays = load_file(path)
    arrays["document_domain"] = np.roll(arrays["document_domain"], 1)
    save_file(arrays, path, metadata=about)
    assert "model-1" not in compare([copied]).ranks


def test_too_few_texts_are_told_beside_the_score(tmp_path: Path) -> None:
    for seed in range(2):
        write_result(tmp_path / f"m{seed}", simulated_trace(seed, documents=1, model=f"m{seed}"), keep_trace=False, permutations=20)
    found = compare([tmp_path])
    assert all(str(rank) == "1 (1–2)" for rank in found.ranks.values())
    for text in (export.as_csv(found), export.as_json(found), terminal(found)):
        assert "too few texts to tell; the smallest possible p is 1" in text
    assert "nan" not in terminal(found).lower() and "nan" not in export.as_markdown(found, paired_of(found))


def terminal(found: Comparison) -> str:
    out = io.StringIO()
    Console(file=out, width=300).print(render_terminal(found, paired_of(found)))
    return out.getvalue()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"schema_version": 99}', "schema_version 99; this dbes reads 1"),
        ('{"schema_version": 1, "status": "ok"}', "created: Field required"),
        ("\x00\xff", "not UTF-8"),
    ],
    ids=["truncated", "not an object", "newer schema", "missing fields", "binary"],
)
def test_unreadable_results_are_named_and_the_rest_compared(copied: Path, text: str, reason: str) -> None:
    (copied / "m1" / "result.json").write_text(text, "latin-1")
    found = compare([copied])
    assert len(found.entries) == 2
    assert reason in found.apart[0].reason


def test_failed_evaluations_stand_apart(copied: Path) -> None:
    change(copied / "m1", status="error", error="out of memory")
    assert compare([copied]).apart[0].reason == "the evaluation failed: out of memory"


def test_a_missing_domain_or_layer_makes_no_mean(folder: Path) -> None:
    result = load_result(folder / "m1")
    assert model_score(result, "specialization") == result.record("specialization").score
    for gone in ({"domain": "law"}, {"layer": 2}):
        name, value = next(iter(gone.items()))
        kept = tuple(record for record in result.calibrated if getattr(record, name) != value)
        assert model_score(result.model_copy(update={"calibrated": kept}), "specialization") is None
    unknown = tuple(
        record.model_copy(update={"score": math.nan}) if record.domain == "law" and record.layer == 2 else record
        for record in result.calibrated
    )
    assert model_score(result.model_copy(update={"calibrated": unknown}), "specialization") is None
    assert model_score(result, "no such metric") is None


def test_models_without_replicates_are_shown_but_not_ranked(copied: Path) -> None:
    (copied / "m1" / "replicates.safetensors").unlink()
    (copied / "m2" / "replicates.safetensors").write_bytes(b"nonsense")
    found = compare([copied])
    assert set(found.ranks) == {"model-0"}
    problems = {entry.label: entry.problem for entry in found.entries}
    assert "neither replicates nor a trace" in str(problems["model-1"])
    assert "cannot be read" in str(problems["model-2"])


def test_replicates_come_from_the_trace_where_they_are_missing(tmp_path: Path) -> None:
    folder = write_result(tmp_path / "m", simulated_trace(documents=4, layers=2), permutations=10)
    saved = load_file(folder / "replicates.safetensors")
    (folder / "replicates.safetensors").unlink()
    replicates = compare([folder]).entries[0].replicates
    assert replicates is not None
    np.testing.assert_allclose(replicates.by_metric["der"], saved["der"])


def test_other_documents_are_not_paired(copied: Path) -> None:
    arrays = load_file(copied / "m1" / "replicates.safetensors")
    names = json.dumps([f"other-{i}" for i in range(len(arrays["document_domain"]))])
    save_file(arrays, copied / "m1" / "replicates.safetensors", metadata={"documents": names, "domains": "[]"})
    found = compare([copied])
    assert "model-1" not in found.ranks
    assert "other documents" in str({entry.label: entry.problem for entry in found.entries}["model-1"])


def test_a_text_may_stand_in_several_domains_but_once_in_each(copied: Path) -> None:
    ranks = compare([copied]).ranks
    for name in ("m0", "m1", "m2"):
        arrays = load_file(copied / name / "replicates.safetensors")
        domain = arrays["document_domain"]
        ids = [f"text {np.sum(domain[:place] == own)}" for place, own in enumerate(domain)]
        save_file(arrays, copied / name / "replicates.safetensors", metadata={"documents": json.dumps(ids), "domains": "[]"})
    assert len(set(ids)) < len(ids)
    assert compare([copied]).ranks == ranks
    assert np.sum(domain == domain[0]) > 1
    twice = [ids[0] if own == domain[0] else other for own, other in zip(domain, ids, strict=True)]
    save_file(arrays, copied / "m2" / "replicates.safetensors", metadata={"documents": json.dumps(twice), "domains": "[]"})
    [problem] = [entry.problem for entry in compare([copied]).entries if entry.label == "model-2"]
    assert "distinct ids within a domain" in str(problem)


def test_baselines_are_marked_and_not_ranked(folder: Path, tmp_path: Path) -> None:
    write_result(tmp_path / "r", simulated_trace(9, lean=1.0, model="reference router"), keep_trace=False)
    found = compare([folder, tmp_path])
    assert found.entries[-1].baseline and "reference router" not in found.ranks
    assert found.ranks["model-1"].last == 2


def test_results_of_another_k_and_depth_are_compared(folder: Path, tmp_path: Path) -> None:
    write_result(tmp_path / "deep", simulated_trace(5, layers=7, experts=32, top_k=4, model="deep"), keep_trace=False)
    found = compare([folder / "m1", tmp_path])
    assert set(found.ranks) == {"model-1", "deep"}
    assert {each.depth for each in paired_of(found)} == {"all layers", "first third", "middle third", "last third"}


@pytest.fixture(scope="module")
def by_phase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models scored on all their tokens, on prompts and on generated text; of the second, generated text is missing."""
    made = tmp_path_factory.mktemp("phases")
    for seed, phases in enumerate(((None, 0, 1), (None, 0))):
        trace = simulated_trace(seed, lean=0.5, model=f"model-{seed}", documents=5, layers=2, generated=True)
        for phase in phases:
            write_result(made / f"m{seed}-{PHASES[phase]}", trace, keep_trace=False, permutations=5, phase=phase)
    return made


def test_prompt_and_generated_text_stand_beside_the_model(by_phase: Path) -> None:
    found = compare([by_phase])
    assert {entry.label for entry in found.entries} == {"model-0", "model-1"}
    assert [(each.name, each.reason) for each in found.apart] == [("model-1", "another phase prompt instead of all")]
    single = {phase: load_result(by_phase / f"m0-{phase}") for phase in ("prompt", "generated")}
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(export.as_csv(found)))}
    assert rows["model-1"]["prompt"] == rows["model-1"]["generated"] == ""
    shown = json.loads(export.as_json(found))["prompt_and_generated"]
    assert {row["model"] for row in shown} == {"model-0"} and len(shown) > 3
    for phase, result in single.items():
        assert float(rows["model-0"][phase]) == result.record("specialization").score
        assert float(rows["model-0"][f"{phase}_low"]) == result.record("specialization").score_low
        for row in shown:
            assert row[phase] == result.record(row["metric"]).score
    assert unpacked(render_leaderboard(found))["phases"]["generated"] == pytest.approx([row["generated"] for row in shown], rel=1e-4)
    assert "Prompt and generated text:" in export.as_markdown(found)
    printed = io.StringIO()
    Console(width=200, file=printed).print(render_terminal(found))
    assert "Generated minus prompt" in printed.getvalue()


def test_prompt_and_generated_text_are_compared_on_the_same_documents(by_phase: Path) -> None:
    entry = next(entry for entry in compare([by_phase]).entries if entry.phases)
    each = next(found for found in phase_differences(entry) if found.metric == "specialization")
    assert each.test is not None and each.test.difference == pytest.approx(each.generated - each.prompt)
    sides = [entry.phases[phase].replicates for phase in ("generated", "prompt")]
    assert sides[0] is not None and sides[1] is not None
    left = sides[0].by_metric["specialization"][:, -1].astype(float) - sides[1].by_metric["specialization"][:, -1].astype(float)
    paired = jackknife(np.asarray(each.test.difference), left, sides[0].document_domain)
    assert each.test.high - each.test.difference == pytest.approx(float(paired.reach))


def test_phases_of_namesakes_are_not_guessed(by_phase: Path, tmp_path: Path) -> None:
    shutil.copytree(by_phase / "m0-generated", tmp_path / "again")
    found = compare([by_phase, tmp_path])
    assert not any(entry.phases for entry in found.entries)
    assert (
        sorted(each.reason for each in found.apart)
        == ["another phase generated instead of all"] * 2 + ["another phase prompt instead of all"] * 2
    )


def test_without_phases_no_column_speaks_of_them(folder: Path) -> None:
    found = compare([folder])
    assert unpacked(render_leaderboard(found))["phases"]["model"] == []
    assert "Prompt" not in export.as_markdown(found)


def test_namesakes_get_different_labels(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_result(tmp_path / str(seed), simulated_trace(seed, model="twin", documents=3, layers=2), keep_trace=False, permutations=5)
    content = json.loads((tmp_path / "2" / "result.json").read_text("utf-8"))
    change(tmp_path / "2", model=content["model"] | {"revision": "0123456789abcdef"})
    assert {entry.label for entry in compare([tmp_path]).entries} == {"twin @00000000", "twin @01234567"}


def test_what_cannot_be_compared_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ResultError, match="no such file or folder"):
        compare([tmp_path / "nothing"])
    with pytest.raises(ResultError, match=r"no result\.json below"):
        compare([tmp_path])
    with pytest.raises(SettingError, match="called 'accuracy'; there are specialization"):
        compare([folder], by="accuracy")


# ---------------------------------------------------------------------------------------------------------------------
# Exports


def test_csv_json_and_markdown_say_the_same(folder: Path) -> None:
    found = compare([folder])
    rows = list(csv.DictReader(io.StringIO(export.as_csv(found))))
    content = json.loads(export.as_json(found, paired_of(found)))
    for row, entry, shown in zip(rows, found.entries, content["entries"], strict=True):
        score = entry.result.record("specialization").score
        assert float(row["specialization"]) == shown["specialization"] == score
        assert f"{score:.1%}" in export.as_markdown(found)
    assert rows[0]["rank"] == "1"
    assert next(csv.DictReader(io.StringIO(export.as_csv(found, published=True))))["rs (published, uncalibrated)"]
    assert export.as_markdown(found, published=True).startswith("Published values: uncalibrated")


def test_cells_can_neither_run_nor_break_a_table(tmp_path: Path) -> None:
    write_result(tmp_path, simulated_trace(model="=HYPERLINK(1)|<b>`\u202e", documents=3, layers=2), keep_trace=False, permutations=5)
    found = compare([tmp_path])
    assert next(csv.DictReader(io.StringIO(export.as_csv(found))))["model"].startswith("'=HYPERLINK")
    line = export.as_markdown(found).splitlines()[2]
    assert "\\|" in line and "<b>" not in line and "\u202e" not in line
    assert "<b>" not in card_section(found.entries[0].result)


def test_hub_metadata_and_open_record(folder: Path) -> None:
    from huggingface_hub import parse_eval_result_entries

    result = load_result(folder / "m1")
    entries = parse_eval_result_entries(yaml.safe_load(export.hub_entries(result, dataset="org/benchmark")))
    assert {entry.task_id for entry in entries} >= {"simulated_specialization", "simulated_der"}
    assert entries[0].value == pytest.approx(result.record("specialization").score, abs=1e-6)
    record = json.loads(export.open_record(result))
    assert set(record) == {"config", "results"}
    assert record["results"]["simulated_specialization"]["score"] == result.record("specialization").score
    assert record["config"]["model_sha"] == result.model.revision


def test_hub_metadata_need_the_id_of_a_dataset(folder: Path) -> None:
    command = ["report", str(folder / "m1"), "--format", "hub"]
    missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 2 and "--dataset OWNER/NAME" in missing.stderr
    wrong = CliRunner().invoke(app, [*command, "--dataset", "no owner"])
    assert wrong.exit_code == 1 and "expected the id of a dataset on the hub, owner/name" in wrong.stderr
    assert "id: org/benchmark" in CliRunner().invoke(app, [*command, "--dataset", "org/benchmark"]).stdout


def test_card_has_scores_and_command(folder: Path) -> None:
    result = load_result(folder / "m1")
    card = card_section(result)
    assert f"{result.record('specialization').score:.1%}" in card and "dbes score TRACE" in card
    assert "failed: out\\_of" in card_section(result.model_copy(update={"status": "error", "error": "out_of memory"}))


def test_leaderboard_page_holds_the_numbers_and_is_reproducible(folder: Path) -> None:
    found = compare([folder])
    page = render_leaderboard(found)
    assert page == render_leaderboard(compare([folder]))
    payload = unpacked(page)
    assert [row["specialization"] for row in payload["rows"]] == [entry.result.record("specialization").score for entry in found.entries]
    assert len(payload["curves"]["score"]) == len(curve_rows(found.entries)) == 3 * 4 * 4  # models x layers x metrics (no stiffness)
    assert set(payload["pairs"]["first"]) <= {entry.label for entry in found.entries}


def test_shipped_leaderboard_is_what_its_entries_give() -> None:
    reports = Path(__file__).resolve().parent.parent / "reports"
    shown = unpacked((reports / "leaderboard.html").read_text("utf-8"))
    found = compare([reports / "entries"])
    assert [row["model"] for row in shown["rows"]] == [entry.label for entry in found.entries]
    assert [row["specialization"] for row in shown["rows"]] == [model_score(entry.result, "specialization") for entry in found.entries]


# ---------------------------------------------------------------------------------------------------------------------
# --check


def test_a_sound_result_passes(folder: Path) -> None:
    assert check_folder(folder / "m1") == []


def edited(kind: str, content: dict) -> None:
    model = next(
        each for each in content["calibrated"] if each["metric"] == "specialization" and each["layer"] is None and each["domain"] is None
    )
    cell = next(
        each for each in content["calibrated"] if each["metric"] == "specialization" and each["layer"] == 2 and each["domain"] == "law"
    )
    if kind == "score above 1":
        model |= {"score": 1.5, "score_low": 1.2, "score_high": 1.8}
    elif kind == "mean":
        model["value"] += 0.1
    elif kind == "score does not follow":
        cell["score"] += 0.2
        cell["score_high"] += 0.2
    elif kind == "p":
        cell["p"] = 0
    elif kind == "record missing":
        content["calibrated"].remove(cell)
    elif kind == "tokens":
        content["task"]["domains"]["law"]["tokens"] += 5
    elif kind == "specialist":
        content["specialists"][0]["expert"] = 99
    elif kind == "revision":
        content["model"]["revision"] = None
    elif kind == "date":
        content["created"] = "yesterday"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("score above 1", "score 1.5"), ("mean", "is not the mean of its domains"),
            ("score does not follow", "is not corrected / reference"),
        ("p", "p = 0"), ("record missing", "records, one for each layer and domain"), ("tokens", "do not add up"),
        ("specialist", "no such expert"), ("revision", "no revision"), ("date", "is not a date"),
    ],
)  # fmt: skip
def test_implausible_results_are_refused(copied: Path, kind: str, message: str) -> None:
    content = json.loads((copied / "m1" / "result.json").read_text("utf-8"))
    edited(kind, content)
    change(copied / "m1", **content)
    assert any(message in problem for problem in check_folder(copied / "m1"))


@pytest.mark.parametrize(
    ("column", "factor", "message"),
    [("share", 1.01, "do not follow from the hits"), ("lift", 50, "outside its interval"), ("lift_high", 0.1, "outside its interval")],
)
def test_usage_that_cannot_be_true_is_refused(copied: Path, column: str, factor: float, message: str) -> None:
    path = copied / "m1" / "expert_usage.parquet"
    usage = pd.read_parquet(path)
    usage.loc[3, column] *= factor
    usage.to_parquet(path)
    assert any(message in problem for problem in check_folder(copied / "m1"))


def test_replicates_of_another_model_are_refused(copied: Path) -> None:
    shutil.copy(copied / "m1" / "replicates.safetensors", copied / "m0" / "replicates.safetensors")
    assert any("replicates: domain_isolation is about" in problem for problem in check_folder(copied / "m0"))


HISTORIC = sorted((Path(__file__).resolve().parent / "historic_results").glob("*/result.json"))


@pytest.mark.parametrize("path", HISTORIC, ids=[path.parent.name for path in HISTORIC])
def test_every_released_result_loads(path: Path) -> None:
    result = load_result(path)
    assert result.status in ("ok", "error")
    assert compare([path.parent]).entries or result.status == "error"


def test_there_are_historic_results() -> None:
    assert HISTORIC
