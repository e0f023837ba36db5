"""The command line: answers on stdout, progress on stderr, exit codes, a help that is quick."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

DBES = [sys.executable, "-m", "dbes.cli"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DBES, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    done = run("evaluate", "--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", folder, "--permutations", "50")
    assert done.returncode == 0, done.stderr
    assert "Layers: score" in done.stdout and "verdict" in done.stdout and "Written:" in done.stdout
    assert "recording" in done.stderr and "recording" not in done.stdout.split("Written")[0].split("Layers")[0]
    return folder


def test_help_loads_nothing_heavy() -> None:
    script = "import sys, dbes, dbes.cli; print([name for name in ('torch', 'transformers', 'pandas', 'datasets') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    started = time.perf_counter()
    done = run("--help")
    assert done.returncode == 0 and "evaluate" in done.stdout
    print(f"dbes --help: {time.perf_counter() - started:.2f} s")


def test_json_is_the_result_and_nothing_else(results: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    arguments = ("--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", results, "--permutations", "50")
    done = run("evaluate", *arguments, "--format", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"] == "ok"


def test_score_of_a_baseline(results: Path, tmp_path: Path) -> None:
    trace = next(results.rglob("trace"))
    done = run("score", trace, "--router", "reference", "--permutations", "50", "--format", "json", "--output-path", tmp_path / "reference")
    assert done.returncode == 0, done.stderr
    scores = {(row["metric"], row["layer"], row["domain"]): row for row in json.loads(done.stdout)["calibrated"]}
    for metric in ("specialization", "der", "domain_isolation"):
        assert scores[(metric, None, None)]["score"] == pytest.approx(1, abs=0.02)
    assert (tmp_path / "reference" / "result.json").is_file()


def test_score_of_a_folder_without_a_trace(tmp_path: Path) -> None:
    done = run("score", tmp_path)
    assert done.returncode == 1
    assert "not a trace folder" in done.stderr and not done.stdout


def test_failed_evaluation_exits_1_and_is_written(tiny_task: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("evaluate", "--model", tmp_path / "empty", "--tasks", tiny_task, "--output-path", tmp_path / "results")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "config.json" in done.stderr
    written = json.loads(next((tmp_path / "results").rglob("result.json")).read_text())
    assert written["status"] == "error" and "config.json" in written["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["evaluate", "--no-such-flag"], id="unknown flag"),
        pytest.param(["evaluate", "--batch-size", "many"], id="batch size"),
        pytest.param(["evaluate", "--tasks", "no-such-task"], id="unknown task"),
        pytest.param(["evaluate", "--limit", "0"], id="limit"),
        pytest.param(["no-such-command"], id="unknown command"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_tasks_are_listed_and_validated(tiny_task: Path, tmp_path: Path) -> None:
    listed = run("tasks")
    assert listed.returncode == 0 and "embedded" in listed.stdout and "smoke" in listed.stdout
    valid = run("tasks", "validate", tiny_task)
    assert valid.returncode == 0 and "law" in valid.stdout
    (tmp_path / "bad.yaml").write_text("name: bad\nversion: 1\ncolour: blue\ndomains: {}\n")
    refused = run("tasks", "validate", tmp_path / "bad.yaml")
    assert refused.returncode == 2 and "colour" in refused.stderr


def test_doctor(tiny_checkpoint: Path) -> None:
    done = run("doctor", tiny_checkpoint, "--format", "json")
    assert done.returncode == 0, done.stderr
    diagnosis = json.loads(done.stdout)
    assert diagnosis["ok"] and [layer["layer"] for layer in diagnosis["layers"]] == [0, 1, 2]
