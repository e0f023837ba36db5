"""The page of an experiment on expert paths: its numbers are the outcome's, nothing in the names becomes markup, gaps are gaps."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intervention_records import experiment
from report_results import HOSTILE
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import ResultError
from dbes.intervention import analysis
from dbes.intervention.verdicts import overall_verdict, target_verdict
from dbes.reporting import arms, charts
from dbes.reporting.html import unpacked
from dbes.reporting.outcome import Outcome, is_outcome, load_outcome
from dbes.reporting.outcome_card import outcome_card
from dbes.reporting.outcome_page import MASK_SERIES, outcome_payload, render_outcome

TRUTH = {
    "specialization": (0.20, 0.010), "target-load": (0.15, 0.012), "random-load-matched": (0.12, 0.02),
    "full": (0.40, 0.200), "full-slow": (0.22, 0.05),
}  # fmt: skip


REPORTS = Path(__file__).parents[1] / "reports" / "intervention"


def mask_of(random: np.random.Generator, about: dict[str, Any]) -> dict[str, Any]:
    def nats(more: float) -> dict[str, list[float]]:
        return {name: [one + random.normal(more, 1.0) for one in values] for name, values in about["base"].items()}

    job = {"target": "a", "rule": "specialization", "budget": 0.15, "cells": [[0, 1], [1, 2]], "controls": [[[0, 2]], [[1, 1]]]}
    return {"job": job, "nats": nats(30.0), "controls": [nats(9.0), nats(11.0)]}


def made(*, masks: bool = True, **changes: Any) -> dict[str, Any]:
    """An outcome as `dbes intervene` writes it, from simulated records."""
    random = np.random.default_rng(3)
    about, records, _ = experiment(TRUTH, random, seeds=3, documents=8, other_documents=4)
    about["skipped"] = [{"target": "a", "arm": "lift", "budget": 0.15, "reason": "a budget below one cell"}]
    found = analysis.analyse(about, records, [mask_of(random, about)] if masks else [])
    return json.loads(json.dumps(found | changes))


def made_with_items() -> dict[str, Any]:
    """The same with six items of the target and four of domain b: arm by arm more of them are answered rightly."""
    random = np.random.default_rng(4)
    about, records, _ = experiment(TRUTH, random, seeds=3, documents=8, other_documents=4)
    counts = {"a": 6, "b": 4}

    def right(chance: float) -> dict[str, list[int]]:
        return {name: (random.random(count) < chance).astype(int).tolist() for name, count in counts.items()}

    about["accuracy"] = {"choices": {"a": [4, 4, 4, 2, 2, 2], "b": [5] * 4}, "right": right(0.3), "right_per_byte": right(0.3)}
    for _, record in records:
        for point in record["curve"]:
            point |= {"right": right(0.6), "right_per_byte": right(0.6)}
    return json.loads(json.dumps(analysis.analyse(about, records, []), allow_nan=False))


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "intervention.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return made()


@pytest.fixture(scope="module")
def page(content: dict[str, Any]) -> str:
    return render_outcome(Outcome.model_validate(content))


@pytest.mark.parametrize(
    ("arm", "group"),
    [("lift", "expert path"), ("lift-protected", "expert path"), ("full-slower", "full finetuning"), ("full-protected", "full finetuning"),
     ("full-replay-slow", "full finetuning"), ("target-load-protected", "target load"), ("random-load-matched", "random or bottom cells"),
     ("bottom-protected", "random or bottom cells"), ("all-protected", "no path"), ("lora", "no path"), ("router", "no path")],
)  # fmt: skip
def test_every_arm_has_its_group(arm: str, group: str) -> None:
    assert arms.group_of(arm) == group and group in arms.GROUPS


def test_verdicts_and_pages_call_an_arm_by_one_name() -> None:
    """The page finds the better arms among those that the verdict names."""
    row = {"arm": "lift", "budget": 0.025, "control": "target-load", "gained": 1.0, "control_gain": 0.1, "matched_holm": 0.01,
           "matched": {"value": 0.5}}  # fmt: skip
    assert target_verdict("a", [], [row])["beats_target_load"] == [arms.named("lift", 0.025)] == ["lift at 2.5%"]


def test_what_is_drawn_is_the_outcome(page: str, content: dict[str, Any]) -> None:
    payload = unpacked(page)
    expected = content["targets"]["a"]
    shown = {row["arm"]: row for row in payload["targets"][0]["arms"]}
    assert len(shown) == len(expected["arms"]) == len(TRUTH)
    for arm in expected["arms"]:
        row = shown[arms.named(arm["arm"], arm["budget"])]
        for name in ("gain", "forgetting", "worst_forgetting"):
            assert [row[f"{name}{end}"] for end in ("", "_low", "_high", "_p")] == list(arm[name].values())
        for name in ("cells", "coverage", "trainable_parameters", "optimizer_bytes", "training_seconds", "peak_added_bytes", "rate"):
            assert row[name] == arm[name]
        if "matched" not in arm:
            assert arm["arm"] in arms.EVERY_PARAMETER and row["matched_gain"] is None and row["matched_ratio"] is None
            continue
        assert row["matched_forgetting"] == arm["matched"]["forgetting"]
        for name in ("gain", "full", "difference", "ratio"):
            assert [row[f"matched_{name}{end}"] for end in ("", "_low", "_high", "_p")] == list(arm["matched"][name].values())
        assert [row[f"equal_compute_{name}"] for name in ("seconds", "gain", "forgetting")] == list(arm["equal_compute"].values())
    front = {arms.named(arm["arm"], arm["budget"]): arm for arm in expected["arms"] if arm["pareto"]}
    assert set(payload["targets"][0]["front"]) == set(front)
    lost = [front[name]["forgetting"]["value"] for name in payload["targets"][0]["front"]]
    assert lost == sorted(lost)
    drawn = [(row["arm"], row["step"], row["gain"], row["forgetting"]) for row in payload["targets"][0]["trajectories"]]
    curves = {arm["arm"]: arm["curve"] for arm in expected["arms"]}
    assert drawn == [(name, p["step"], p["gain"], p["forgetting"]) for name in ("full", "full-slow") for p in curves[name]]


def test_contrasts_and_masks_are_the_outcomes(page: str, content: dict[str, Any]) -> None:
    payload = unpacked(page)
    expected = content["targets"]["a"]["contrasts"]
    rows = payload["targets"][0]["contrasts"]
    assert len(rows) == len(expected) > 0
    for row, contrast in zip(rows, expected, strict=True):
        assert (row["arm"], row["control"]) == (arms.named(contrast["arm"], contrast["budget"]), contrast["control"])
        assert [row[f"matched{end}"] for end in ("", "_low", "_high", "_p")] == list(contrast["matched"].values())
        assert (row["matched_holm"], row["gain_holm"]) == (contrast["matched_holm"], contrast["gain_holm"])
        verdict = content["targets"]["a"]["verdict"]
        listed = verdict["beats_target_load" if row["control"] == "target-load" else "beats_random_load_matched"]
        assert row["better"] == (row["arm"] in listed)
    (mask,) = content["masks"]
    assert payload["masks"][0]["difference"] == mask["difference"]["value"]
    drawn = {row["series"]: (row["value"], row["low"], row["high"]) for row in payload["mask_series"]}
    parts = ("inside", "outside", "control_inside", "control_outside")
    assert drawn == {
        series: (mask[part]["value"], mask[part]["low"], mask[part]["high"]) for series, part in zip(MASK_SERIES, parts, strict=True)
    }


def test_page_says_the_verdicts_word_for_word_and_stays_small(page: str, content: dict[str, Any]) -> None:
    for text in (content["verdict"], content["targets"]["a"]["verdict"]["text"]):
        assert text in page and text in outcome_card(Outcome.model_validate(content)).replace("\\", "")
    assert "a budget below one cell" in page and "lift at 15%" in page
    assert "default-src 'none'" in html.unescape(page) and not re.search(r'(src|href)="(?!#|data:)', page.split("<script>")[0])
    assert len(page) < 1_500_000


def test_accuracy_is_shown_where_there_are_items_and_nowhere_else(page: str, content: dict[str, Any]) -> None:
    found = made_with_items()
    read = Outcome.model_validate(found)
    shown, card = render_outcome(read), outcome_card(read)
    payload = unpacked(shown)["targets"][0]
    assert payload["has_items"]
    by_arm = {arms.named(arm["arm"], arm["budget"]): arm["accuracy"] for arm in found["targets"]["a"]["arms"]}
    for row in payload["arms"]:
        expected = by_arm[row["arm"]]
        for name in ("gain", "elsewhere", "gain_per_byte", "elsewhere_per_byte"):
            assert [row[f"accuracy_{name}{end}"] for end in ("", "_low", "_high", "_p")] == list(expected[name].values())
        assert (row["accuracy_items"], row["accuracy_items_elsewhere"]) == (6, 4)
    before = found["targets"]["a"]["accuracy"]
    assert before["a"]["chance"] == pytest.approx(3 / 8) and before["b"]["chance"] == pytest.approx(1 / 5)
    assert f"{before['a']['base']:.1%}" in card and "of 6 items; chance 37.5%" in card and "of 6 items; chance 37.5%" in shown
    gain = by_arm["full"]["gain"]
    line = next(line for line in card.splitlines() if line.startswith("| full |"))
    assert f"{gain['value']:.3f} ({gain['low']:.3f} to {gain['high']:.3f})" in line and "| Accuracy elsewhere |" in card
    assert "Accuracy is measured beside them" in card and "Accuracy on tasks is not measured" not in shown

    without = unpacked(page)["targets"][0]
    assert not without["has_items"] and not any(name.startswith("accuracy") for row in without["arms"] for name in row)
    assert 'class="accuracy"' not in page and "Accuracy elsewhere" not in outcome_card(Outcome.model_validate(content))
    assert "accuracy" not in json.dumps(content) and "Accuracy on tasks is not measured" in page


@pytest.mark.parametrize("path", sorted(REPORTS.glob("*/intervention.json")), ids=lambda path: path.parent.name)
def test_committed_outcomes_are_still_read(path: Path) -> None:
    read = load_outcome(path)
    asked = any(target.accuracy for target in read.targets.values())
    assert ("Accuracy on tasks is not measured" in render_outcome(read)) != asked
    assert outcome_card(read).startswith("## Experiment on expert paths")


@pytest.mark.parametrize("path", sorted(REPORTS.glob("*/intervention.json")), ids=lambda path: path.parent.name)
def test_committed_verdicts_follow_from_the_committed_figures(path: Path) -> None:
    content = json.loads(path.read_text())
    for name, target in content["targets"].items():
        assert target_verdict(name, target["arms"], target["contrasts"]) == target["verdict"]
    assert overall_verdict(content["targets"]) == content["verdict"]


def test_specifications_are_valid_vega_lite() -> None:
    import altair as alt

    for spec in (charts.plane_spec(arms.GROUPS), charts.interval_spec("x", MASK_SERIES)):
        alt.LayerChart.from_dict({**spec, "datasets": {"rows": []}})


def test_markdown_holds_every_arm_and_contrast(content: dict[str, Any]) -> None:
    card = outcome_card(Outcome.model_validate(content))
    arm = next(arm for arm in content["targets"]["a"]["arms"] if arm["arm"] == "specialization")
    line = next(line for line in card.splitlines() if line.startswith("| specialization at 15% |"))
    ratio = arm["matched"]["ratio"]
    assert f"{arm['gain']['value']:.4f} ({arm['gain']['low']:.4f} to {arm['gain']['high']:.4f})" in line
    assert f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" in line
    for part in ("### Loss added by masking", "### Left out", "### Limits", "dbes intervene --out OUT", "| full |"):
        assert part in card


@pytest.mark.parametrize("told", [True, False], ids=["flag", "older outcome"])
def test_same_cells_are_called_so_and_shown_without_figures(content: dict[str, Any], told: bool) -> None:
    changed = json.loads(json.dumps(content))
    row = changed["targets"]["a"]["contrasts"][0]
    if told:
        unknown = {"value": None, "low": None, "high": None, "p": None}
        row.update(same_cells=True, overlap=1.0, matched=unknown, gain=unknown)
    else:
        nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
        row.update(matched=nothing, gain=nothing)
        row.pop("overlap"), row.pop("same_cells")
    read = Outcome.model_validate(changed)
    shown = unpacked(render_outcome(read))["targets"][0]["contrasts"][0]
    assert shown["note"] == "same cells, no contrast" and shown["overlap"] == 1.0
    assert shown["matched"] is shown["matched_p"] is shown["matched_holm"] is shown["gain"] is None
    lines = [line for line in outcome_card(read).splitlines() if "same cells, no contrast" in line]
    assert len(lines) == 1 and f"| {row['control']} | 100% | same cells, no contrast | – |" in lines[0]


def test_counts_of_parameters_keep_every_digit(content: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(content))
    changed["targets"]["a"]["arms"][0]["trainable_parameters"] = 3942528.0
    changed["model"]["parameters"] = 30_532_122_624
    read = Outcome.model_validate(changed)
    assert "| 3,942,528 |" in outcome_card(read)
    page = render_outcome(read)
    assert "30,532,122,624" in page and unpacked(page)["targets"][0]["arms"][0]["trainable_parameters"] == 3942528


def test_missing_pieces_are_gaps_not_errors(content: dict[str, Any]) -> None:
    bare = json.loads(json.dumps(content)) | {"masks": [], "skipped": []}
    for arm in bare["targets"]["a"]["arms"]:
        arm.pop("equal_compute", None)
        arm.update(coverage=None, trainable_parameters=None, optimizer_bytes=None, training_seconds=None, steps_without_gradient=None)
        arm["gain"].update(low=None, high=None, p=None)
        if arm["arm"] == "target-load":
            arm.pop("matched")
        elif "matched" in arm:
            arm["matched"]["ratio"] = None
    for row in bare["targets"]["a"]["contrasts"]:
        row.pop("matched_holm"), row.pop("gain_holm")
    bare["targets"]["b"] = {**bare["targets"]["a"], "arms": [], "contrasts": [], "is_new": True}
    read = Outcome.model_validate(bare)
    page, card = render_outcome(read), outcome_card(read)
    rows = {row["arm"]: row for row in unpacked(page)["targets"][0]["arms"]}
    assert rows["specialization at 15%"]["matched_ratio"] is None and rows["specialization at 15%"]["matched_gain"] is not None
    assert rows["target-load at 15%"]["matched_gain"] is None
    assert 'id="masks"' not in page and 'id="left-out"' not in page and "No arm has run with every seed yet" in page
    assert "not defined" in card and "No arm has run with every seed yet" in card


def test_hostile_names_are_escaped(content: dict[str, Any]) -> None:
    names = [name[:5000] for name in HOSTILE]
    every = " ".join(names)
    text = json.loads(json.dumps(content))
    text["targets"] = {name: {**json.loads(json.dumps(text["targets"]["a"])), "others": [name]} for name in names}
    for name, target in text["targets"].items():
        target["verdict"]["text"] = target["arms"][0]["arm"] = target["contrasts"][0]["control"] = name
    text["verdict"] = text["texts"] = every
    text["model"], text["settings"] = {"name": every}, dict(zip(names, names, strict=True))
    text["versions"] = text["settings"]
    text["skipped"] = [{"target": name, "arm": name, "budget": None, "reason": name} for name in names]
    text["masks"][0]["rule"], text["domains"] = every, names
    read = Outcome.model_validate(text)
    body = re.split(r"<script", render_outcome(read))[0]
    assert "<img" not in body and "onmouseover='" not in body and "window.hacked = 1</script" not in body and "\u202e" not in body
    card = outcome_card(read)
    assert "<script" not in card.partition("```")[0] and "\u202e" not in card
    json.dumps(outcome_payload(read), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 0}, "schema_version 0; this dbes reads 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"kind": "result"}, "not the outcome of `dbes intervene`"),
        ({"targets": {}}, "targets: "),
        ({"targets": {"a": {"arms": []}}}, "targets.a"),
        ({"masks": [{"target": "a"}]}, "masks.0"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"settings": [1]}, "settings: "),
    ],
)
def test_bad_outcomes_are_named(tmp_path: Path, content: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(ResultError, match=re.escape(told)):
        load_outcome(write(tmp_path, {**content, **change}))


def test_bad_files_are_named(tmp_path: Path) -> None:
    for text in ("", "[1", "[]", "3", "\x00"):
        (tmp_path / "intervention.json").write_text(text, "utf-8")
        with pytest.raises(ResultError, match=r"intervention\.json"):
            load_outcome(tmp_path)
    (tmp_path / "experiment.json").write_text("{}", "utf-8")
    (tmp_path / "intervention.json").unlink()
    assert is_outcome(tmp_path)
    with pytest.raises(ResultError, match="there is no outcome here"):
        load_outcome(tmp_path)


def test_command_line_tells_experiments_from_results(tmp_path: Path, content: dict[str, Any]) -> None:
    folder, run = write(tmp_path / "out", content), CliRunner().invoke
    shown = run(app, ["report", str(folder)])
    assert shown.exit_code == 0 and (folder / "report.html").is_file(), shown.output
    (tmp_path / "renamed.json").write_text(json.dumps(content), "utf-8")
    shown = run(app, ["report", str(tmp_path / "renamed.json"), "--output", str(tmp_path / "page.html")])
    assert shown.exit_code == 0 and (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()
    shown = run(app, ["report", str(folder), "--format", "card"])
    assert shown.exit_code == 0 and shown.output.startswith("## Experiment on expert paths")
    for wrong in (["--format", "hub"], ["--format", "record"], ["--trace", str(tmp_path)]):
        assert run(app, ["report", str(folder), *wrong]).exit_code == 2
    (folder / "intervention.json").write_text("{}", "utf-8")
    assert run(app, ["report", str(folder)]).exit_code not in (0, 2)


def test_an_outcome_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    content = json.dumps(made())
    assert content.count('"beats_full_clearly"') == 1
    for folder, text in (("new", content), ("old", content.replace('"beats_full_clearly"', '"prize"'))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "intervention.json").write_text(text)
    assert load_outcome(tmp_path / "old") == load_outcome(tmp_path / "new")
