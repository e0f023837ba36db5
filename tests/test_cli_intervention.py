"""`dbes intervene` from the command line: a whole experiment, going on with it, its page, and what is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from dbes.cli import app
from dbes.files import locked
from dbes.intervention import grid
from dbes.intervention.grid import MASKS, RUNS
from dbes.reporting.outcome import EXPERIMENT_FILE, OUTCOME_FILE

SMALL: dict[str, Any] = {
    "rules": ["target-load", "random-load-matched"], "extras": ["full"], "idea_rule": "target-load", "rates": [1e-3], "steps": 2,
    "warmup": 0, "sequences": 2, "length": 32, "points": [2], "full_points": [1, 2], "documents": 3, "other_documents": 2,
    "tuning_documents": 2, "evidence_tokens": 1500, "permutations": 20, "masks": 2,
}  # fmt: skip


def intervene(folder: Path, model: Path, task: Path, *options: object, domain: str = "law", **changes: Any) -> Result:
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump({**SMALL, **changes}), "utf-8")
    arguments = ("--model", model, "--texts", f"task:{task}", "--domain", domain, "--config", config, "--out", folder / "out")
    before = torch.get_num_threads()
    try:
        return CliRunner().invoke(
            app, ["intervene", *map(str, (*arguments, "--cache", folder / "cache", "--processes", 1, *options))]
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for name in (RUNS, MASKS) for path in (folder / "out" / name).glob("*.json")}


def test_an_experiment_its_page_and_the_same_command_again(
    tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--budget", "0.2", "--seeds", "2")
    done = intervene(tmp_path, tiny_checkpoint, tiny_task, *options)
    assert done.exit_code == 0, done.output
    outcome = json.loads((tmp_path / "out" / OUTCOME_FILE).read_text("utf-8"))
    target, overall = done.stdout.splitlines()
    assert target == outcome["targets"]["law"]["verdict"]["text"] and target.startswith("law: ")
    assert overall == outcome["verdict"] and "full finetuning stopped early" in overall
    assert done.stderr.splitlines()[-1] == str(tmp_path / "out" / OUTCOME_FILE)
    settings = outcome["settings"]
    assert (settings["budgets"], settings["seeds"], settings["rates"], settings["routing"]) == ([0.2], 2, [1e-3], "plain")
    assert "prescribed" not in json.loads((tmp_path / "out" / EXPERIMENT_FILE).read_text("utf-8"))
    assert {arm["arm"] for arm in outcome["targets"]["law"]["arms"]} == {"target-load", "random-load-matched", "full"}

    page = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert page.exit_code == 0, page.output
    assert "target-load" in Path(page.stdout.strip().splitlines()[-1]).read_text("utf-8")

    before = files(tmp_path)
    again = intervene(tmp_path, tiny_checkpoint, tiny_task, *options)
    assert again.exit_code == 0 and again.stdout == done.stdout
    told = [line for line in again.stderr.splitlines() if "runs are finished" in line]
    assert len(told) == 2 and all(line.endswith("; 0 to do") for line in told)
    assert before and files(tmp_path) == before

    with locked(tmp_path / "out"):
        held = intervene(tmp_path, tiny_checkpoint, tiny_task, *options)
    assert held.exit_code == 1 and f"another run is writing here (process {os.getpid()}" in held.stderr

    monkeypatch.setattr(grid.os, "access", lambda path, mode: (Path(path), mode) != (tmp_path / "out", os.W_OK))  # as on a read-only disk
    shown = intervene(tmp_path, tiny_checkpoint, tiny_task, *options)
    assert shown.exit_code == 0 and shown.stdout == done.stdout
    other = intervene(tmp_path, tiny_checkpoint, tiny_task, *options[:-1], "3")
    assert other.exit_code == 1 and "cannot be written, and holds an experiment with other settings" in other.stderr


def assert_one_line(done: Result, told: str) -> None:
    """The error is the last line of stderr, and the only one besides the bar of weights that were loaded before it."""
    *before, last = done.stderr.splitlines()
    assert last.startswith("dbes: ") and told in last
    assert all(not line or line.startswith("Loading weights") for line in before)


@pytest.mark.parametrize(
    ("options", "changes", "code", "told"),
    [
        pytest.param((), {"stepps": 3}, 1, "stepps", id="unknown setting"),
        pytest.param((), {"steps": 4}, 1, "points [2]: expected ascending steps from 1 on, the last of them 4", id="points"),
        pytest.param(("--rules", "best"), {}, 2, "no rule is called 'best'", id="unknown rule"),
        pytest.param(("--budget", "2"), {}, 1, "above 0 and at most 1", id="budget"),
        pytest.param(("--new", "poems"), {}, 2, "no domain of the texts is called 'poems'", id="unknown new domain"),
        pytest.param(("--texts", "task:nowhere"), {}, 2, "nowhere", id="unknown task"),
        pytest.param(("--routing", "as-trained"), {}, 1, "training.json: not there; expected a checkpoint folder of", id="plain model"),
        pytest.param((), {"routing": "by-hand"}, 1, "routing: Input should be 'plain' or 'as-trained'", id="unknown routing"),
    ],
)
def test_refusals_are_one_line(
    options: tuple[object, ...], changes: dict[str, Any], code: int, told: str, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
) -> None:
    done = intervene(tmp_path, tiny_checkpoint, tiny_task, *options, **changes)
    assert done.exit_code == code, done.output
    assert_one_line(done, told)
    assert not done.stdout and not (tmp_path / "out").exists()


def test_an_unknown_domain_and_an_unknown_option_value(tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    done = intervene(tmp_path, tiny_checkpoint, tiny_task, domain="poems")
    assert done.exit_code == 2
    assert_one_line(done, "is called 'poems'; there are law, code, math")
    assert intervene(tmp_path, tiny_checkpoint, tiny_task, "--routing", "by-hand").exit_code == 2
