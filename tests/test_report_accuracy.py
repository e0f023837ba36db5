"""Accuracies from a table or from lm-eval: what is read, and what is refused with a message that says what to do."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from report_results import simulated_trace, write_result
from typer.testing import CliRunner

from dbes.cli import app
from dbes.comparison.accuracy import read_accuracies
from dbes.comparison.compare import compare
from dbes.errors import ResultError
from dbes.reporting import export
from dbes.reporting.html import unpacked
from dbes.reporting.leaderboard import render_leaderboard

HARNESS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.6},
        "piqa": {"acc,none": 0.7},
        "wikitext": {"word_perplexity,none": 12.0},
    },
    "group_subtasks": {"arc_easy": [], "piqa": [], "wikitext": []},
    "config": {"model": "hf", "model_args": "pretrained=model-0,dtype=float32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    for seed in (0, 1):
        trace = simulated_trace(seed, model=f"model-{seed}", documents=4, layers=2)
        write_result(made / f"m{seed}", trace, keep_trace=False, permutations=5)
    return made


def written(path: Path, content: str | dict) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def harness(**update: object) -> dict:
    return HARNESS | update


def test_a_table_of_models_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "arc.csv", '\ufeffmodel,accuracy\r\norg/a,0.25\r\n"b, tuned",1\r\n\r\n')
    found = read_accuracies([path])
    assert found.by_model == {"org/a": 0.25, "b, tuned": 1.0}
    assert found.source == "arc.csv"
    assert read_accuracies([]).by_model == {}


@pytest.mark.parametrize(
    ("update", "model", "accuracy"),
    [
        ({}, "model-0", 0.6),
        ({"model_name": "org/m"}, "org/m", 0.6),
        ({"config": {"model_args": {"pretrained": "org/x"}}}, "org/x", 0.6),
        ({"results": {"mmlu": {"acc,none": 0.3}, "mmlu_law": {"acc,none": 0.9}}, "group_subtasks": {"mmlu": ["mmlu_law"]}}, "model-0", 0.3),
        ({"results": {"a": {"acc,strict": 0.4}, "b": {"acc": 0.2}}}, "model-0", 0.3),
    ],
    ids=["mean of tasks with acc", "model_name first", "arguments as object", "a group counts once", "only filter, no filter"],
)
def test_results_of_lm_eval_are_read(tmp_path: Path, update: dict, model: str, accuracy: float) -> None:
    found = read_accuracies([written(tmp_path / "results.json", harness(**update))])
    assert found.by_model == pytest.approx({model: accuracy})
    assert found.source.startswith("lm-eval ") and "wikitext" not in found.source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line is 'nothing', expected model,accuracy"),
        ("name,score\na,1\n", "first line is 'name,score', expected model,accuracy"),
        ("model,accuracy\n", "no model below the heading"),
        ("model,accuracy\na,55\n", r"line 2: accuracy 55 is not between 0 and 1 \(55 % is 0.55\)"),
        ("model,accuracy\na,nan\n", "accuracy nan is not between 0 and 1"),
        ("model,accuracy\na,good\n", "accuracy 'good' is not a number"),
        ("model,accuracy\na,0.1,0.2\n", "line 2: expected a model and its accuracy, found 3 cells"),
        ("model,accuracy\na,0.1\na,0.2\n", "line 3: 'a' occurs twice"),
        ("{", "not JSON"),
        ("{}", "no `results` by task"),
        (harness(results={"a": {"ppl,none": 3}}), "none of its tasks"),
        (harness(results={"a": {"acc,none": 1.5}}), "task 'a': accuracy 1.5 is not between"),
        (harness(results={"a": {"acc,x": 0.5, "acc,y": 0.6}}), "several accuracies"),
        (harness(config={"model": "hf"}), "names the model"),
    ],
    ids=["empty", "heading", "no rows", "percent", "nan", "text", "cells", "twice", "truncated", "no results", "no acc", "above 1",
         "filters", "no model"],
)  # fmt: skip
def test_what_is_no_accuracy_is_refused(tmp_path: Path, content: str | dict, message: str) -> None:
    path = written(tmp_path / "file", content)
    with pytest.raises(ResultError, match=message) as problem:
        read_accuracies([path])
    assert str(path) in str(problem.value)


def test_files_must_agree(tmp_path: Path) -> None:
    first = written(tmp_path / "0.json", HARNESS)
    other = written(tmp_path / "1.json", harness(model_name="model-1"))
    assert read_accuracies([first, other]).by_model == pytest.approx({"model-0": 0.6, "model-1": 0.6})
    fewer = written(tmp_path / "2.json", harness(model_name="model-2", results={"piqa": {"acc,none": 0.7}}))
    with pytest.raises(ResultError, match="accuracies of different tasks cannot share a column"):
        read_accuracies([first, fewer])
    with pytest.raises(ResultError, match="'model-0' has an accuracy in"):
        read_accuracies([first, first])
    with pytest.raises(ResultError, match="no such file"):
        read_accuracies([tmp_path / "missing.csv"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="not UTF-8"):
        read_accuracies([tmp_path / "binary"])


def test_accuracy_stands_in_every_form_of_the_comparison(folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "arc.csv", "model,accuracy\nmodel-0,0.25\n")
    found = compare([folder], accuracy=[path])
    assert {entry.label: entry.accuracy for entry in found.entries} == {"model-0": 0.25, "model-1": None}
    assert {row["model"]: row["accuracy"] for row in csv.DictReader(io.StringIO(export.as_csv(found)))} == {
        "model-0": "0.25",
        "model-1": "",
    }
    content = json.loads(export.as_json(found))
    assert content["accuracy_of"] == "arc.csv"
    assert "| Accuracy |" in export.as_markdown(found) and "25.0%" in export.as_markdown(found)
    page = render_leaderboard(found)
    assert 'data-figure="scatter"' in page and 'data-figure="scatter"' not in render_leaderboard(compare([folder]))
    assert {row["model"]: row["accuracy"] for row in unpacked(page)["rows"]} == {"model-0": 0.25, "model-1": None}
    shown = CliRunner().invoke(app, ["compare", str(folder), "--accuracy", str(path)])
    assert shown.exit_code == 0 and "25.0%" in shown.stdout and "Accuracy: arc.csv" in shown.stdout


def test_accuracies_of_no_result_are_an_error(folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "arc.csv", "model,accuracy\nmodel-7,0.25\n")
    with pytest.raises(ResultError, match="'model-7': no such model among the results; there are model-0, model-1"):
        compare([folder], accuracy=[path])
    shown = CliRunner().invoke(app, ["compare", str(folder), "--accuracy", str(path)])
    assert shown.exit_code == 1 and "model-7" in shown.stderr


def test_namesakes_are_told_apart_by_label(tmp_path: Path) -> None:
    for seed in (1, 2):
        trace = simulated_trace(seed, model="twin", documents=3, layers=2)
        write_result(tmp_path / "results" / str(seed), trace, keep_trace=False, permutations=5)
    path = tmp_path / "results" / "2" / "result.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["revision"] = "0123456789"
    written(path, content)
    with pytest.raises(ResultError, match="several results have that name; use one of twin @"):
        compare([tmp_path / "results"], accuracy=[written(tmp_path / "a.csv", "model,accuracy\ntwin,0.5\n")])
    found = compare([tmp_path / "results"], accuracy=[written(tmp_path / "b.csv", "model,accuracy\ntwin @01234567,0.5\n")])
    assert {entry.label: entry.accuracy for entry in found.entries}["twin @01234567"] == 0.5


def test_accuracy_of_a_result_that_stands_apart_is_left_out(folder: Path, tmp_path: Path) -> None:
    write_result(tmp_path / "other", simulated_trace(3, model="elsewhere", documents=3, layers=2), keep_trace=False, permutations=5)
    content = json.loads((tmp_path / "other" / "result.json").read_text("utf-8"))
    content["task"]["version"] = 2
    written(tmp_path / "other" / "result.json", content)
    path = written(tmp_path / "arc.csv", "model,accuracy\nelsewhere,0.5\nmodel-1,0.25\n")
    found = compare([folder, tmp_path / "other"], accuracy=[path])
    assert [entry.accuracy for entry in found.entries if entry.label == "model-1"] == [0.25]
    assert [each.name for each in found.apart] == ["elsewhere"]
