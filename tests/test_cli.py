"""The command line: answers on stdout, progress on stderr, exit codes, a help that is quick."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import dbes.trace.store
from dbes.cli import app
from dbes.errors import FileError, SettingError
from dbes.files import locked
from dbes.trace.baselines import expert_blocks

DBES = [sys.executable, "-m", "dbes.cli"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DBES, *map(str, arguments)], capture_output=True, text=True, check=False)


def inside(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has loaded everything already."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return subprocess.CompletedProcess([], done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    done = inside("evaluate", "--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", folder, "--permutations", "50")
    assert done.returncode == 0, done.stderr
    assert "verdict" in done.stdout and "Written:" in done.stdout
    assert "recording" in done.stderr and "recording" not in done.stdout.split("Written")[0].split("Layers")[0]
    return folder


def test_help_loads_nothing_heavy() -> None:
    script = "import sys, dbes, dbes.cli; print([name for name in ('torch', 'transformers', 'pandas', 'datasets') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    started = time.perf_counter()
    done = run("--help")
    assert done.returncode == 0 and "evaluate" in done.stdout
    print(f"dbes --help: {time.perf_counter() - started:.2f} s")


def test_json_is_the_result_and_nothing_else(
    results: Path, tiny_checkpoint: Path, tiny_task: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", results, "--permutations", "50")
    with pytest.raises(SystemExit) as done:
        app(["evaluate", *map(str, arguments), "--format", "json"])
    assert not done.value.code
    assert json.loads(capfd.readouterr().out)["status"] == "ok"


@pytest.mark.slow
def test_json_of_a_process_of_its_own(results: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    arguments = ("--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", results, "--permutations", "50")
    done = run("evaluate", *arguments, "--format", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"] == "ok"


def test_json_of_several_tasks_is_one_document_and_a_failure_stops_none(tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(tiny_task.parent, tmp_path / name)
        text = (tmp_path / name / tiny_task.name).read_text()
        (tmp_path / name / tiny_task.name).write_text(text.replace("name: tiny", f"name: {name}"))
    tasks = ",".join(str(tmp_path / name / tiny_task.name) for name in ("one", "two"))
    arguments = ("--model", tiny_checkpoint, "--limit", "3", "--permutations", "5", "--output-path", tmp_path / "out", "--format", "json")
    done = inside("evaluate", "--tasks", tasks, *arguments)
    assert done.returncode == 0, done.stderr
    assert [result["task"]["name"] for result in json.loads(done.stdout)] == ["one", "two"]

    first = next((tmp_path / "out").rglob("one*/result.json"))
    content = json.loads(first.read_text())
    first.write_text(json.dumps({**content, "settings": {**content["settings"], "seed": 9}}))
    done = inside("evaluate", "--tasks", tasks, *arguments)
    assert done.returncode == 1 and "another seed" in done.stderr and "reused, recorded at" in done.stderr
    assert [result["task"]["name"] for result in json.loads(done.stdout)] == ["two"]
    missing = inside("evaluate", "--tasks", f"{tasks},no-such-task", *arguments)
    assert missing.returncode == 2 and not missing.stdout and "no-such-task" in missing.stderr


def test_the_page_is_made_again_where_it_is_missing_or_cut_short(results: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    arguments = ("--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", results, "--permutations", "50")
    page = next(results.rglob("report.html"))
    made: set[bytes] = set()
    for content in (None, page.read_bytes()[:1000], b""):
        page.unlink() if content is None else page.write_bytes(content)
        done = inside("evaluate", *arguments)
        assert done.returncode == 0 and "reused, recorded at" in done.stderr
        made.add(page.read_bytes())
    assert len(made) == 1 and b"Do it again" in made.pop()


@pytest.mark.slow
def test_a_reader_that_goes_away_leaves_no_traceback(results: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    arguments = ("evaluate", "--model", tiny_checkpoint, "--tasks", tiny_task, "--output-path", results, "--permutations", "50")
    for form in ("json", "table"):
        line = [*DBES, *map(str, arguments), "--format", form]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as gone:
            assert gone.stdout is not None and gone.stderr is not None
            gone.stdout.close()
            told = gone.stderr.read()
        assert "Traceback" not in told and "Broken pipe" not in told


@pytest.mark.parametrize(
    ("problem", "told", "code"),
    [
        pytest.param(OSError(28, "No space left on device", "/disk/file"), "dbes: /disk/file: No space left on device", 1, id="disk full"),
        pytest.param(PermissionError(13, "Permission denied", "a", None, "b"), "dbes: a: b: Permission denied", 1, id="two files"),
        pytest.param(MemoryError(), "dbes: out of memory", 1, id="memory"),
        pytest.param(RuntimeError("std::bad_alloc"), "dbes: out of memory: std::bad_alloc", 1, id="memory in torch"),
        pytest.param(ValueError("I/O error: File too large (os error 27)"), "dbes: File too large", 1, id="a library in Rust"),
        pytest.param(FileError("x\x1b[31m: cannot be written"), "dbes: x\\x1b[31m: cannot be written", 1, id="escapes"),
        pytest.param(SettingError("dtype 'x'"), "dbes: dtype 'x'", 2, id="setting"),
        pytest.param(KeyboardInterrupt(), "", 130, id="Ctrl-C"),
    ],
)
def test_whatever_the_system_refuses_is_one_line(
    problem: BaseException, told: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(dbes.trace.store.Trace, "load", refuse)
    done = CliRunner().invoke(app, ["score", str(tmp_path)])
    assert (done.exit_code, done.stderr.strip()) == (code, told)


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(dbes.trace.store.Trace, "load", defect)
    assert isinstance(CliRunner().invoke(app, ["score", str(tmp_path)]).exception, RuntimeError)


def test_score_refuses_the_folder_of_an_evaluation_and_one_that_is_written_to(results: Path, tmp_path: Path) -> None:
    trace = next(results.rglob("trace"))
    done = inside("score", trace, "--output-path", trace.parent)
    assert done.returncode == 1 and "choose another --output-path" in done.stderr
    with locked(tmp_path / "held"):
        done = inside("score", trace, "--output-path", tmp_path / "held")
    assert done.returncode == 1 and f"another run is writing here (process {os.getpid()}" in done.stderr


def test_score_of_a_baseline(results: Path, tmp_path: Path) -> None:
    trace = next(results.rglob("trace"))
    settings = ("--router", "reference", "--permutations", "50", "--format", "json")
    done = inside("score", trace, *settings, "--output-path", tmp_path / "reference")
    assert done.returncode == 0, done.stderr
    scores = {(row["metric"], row["layer"], row["domain"]): row for row in json.loads(done.stdout)["calibrated"]}
    for metric in ("specialization", "domain_isolation"):
        assert scores[(metric, None, None)]["score"] == pytest.approx(1, abs=0.02)
    # Blocks of 3 and of 2 experts have other norms, which keeps the effective rank below that of equal blocks.
    norms = np.array([1 / len(block) for block in expert_blocks(6, 16, 2)])
    rank = (norms.sum() ** 2 / (norms**2).sum() - 1) / 5
    assert scores[("der", None, None)]["score"] == pytest.approx(rank, abs=0.02)
    assert (tmp_path / "reference" / "result.json").is_file()


def test_score_of_matched_lengths_beside_a_router_of_bigrams(results: Path) -> None:
    trace = next(results.rglob("trace"))
    done = inside("score", trace, "--match", "length", "--surrogate", "bigram", "--permutations", "20", "--format", "json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["settings"]["match"], result["settings"]["surrogate"]) == ("length", "bigram")
    assert result["settings"]["matched"]["tokens"] == sum(each["tokens"] for each in result["task"]["domains"].values())
    assert {"random", "length", "summary"} == {*result["companions"]["placebo"]}
    assert "bigram" in result["companions"]["surrogate_covered"]


def test_score_of_a_folder_without_a_trace(tmp_path: Path) -> None:
    done = inside("score", tmp_path)
    assert done.returncode == 1
    assert "not a trace folder" in done.stderr and not done.stdout


def test_failed_evaluation_exits_1_and_is_written(tiny_task: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = inside("evaluate", "--model", tmp_path / "empty", "--tasks", tiny_task, "--output-path", tmp_path / "results")
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
        pytest.param(["evaluate", "--dtype", "nonsense"], id="dtype"),
        pytest.param(["evaluate", "--seed", "-1"], id="seed"),
        pytest.param(["evaluate", "--tasks", ","], id="no task"),
        pytest.param(["no-such-command"], id="unknown command"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    done = inside(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_tasks_are_listed_and_validated(tiny_task: Path, tmp_path: Path) -> None:
    listed = inside("tasks")
    assert listed.returncode == 0 and "embedded" in listed.stdout and "smoke" in listed.stdout
    valid = inside("tasks", "validate", tiny_task)
    assert valid.returncode == 0 and "law" in valid.stdout
    (tmp_path / "bad.yaml").write_text("name: bad\nversion: 1\ncolour: blue\ndomains: {}\n")
    refused = inside("tasks", "validate", tmp_path / "bad.yaml")
    assert refused.returncode == 2 and "colour" in refused.stderr


def test_doctor(tiny_checkpoint: Path) -> None:
    done = inside("doctor", tiny_checkpoint, "--format", "json")
    assert done.returncode == 0, done.stderr
    diagnosis = json.loads(done.stdout)
    assert diagnosis["ok"] and [layer["layer"] for layer in diagnosis["layers"]] == [0, 1, 2]
