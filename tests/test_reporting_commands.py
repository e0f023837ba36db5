"""Commands that are printed run as printed: "Do it again" on pages and cards, "Next" in the terminal."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dbes.reporting import commands
from dbes.reporting.commands import command, program, shell
from dbes.results import ModelFacts, Result, TaskFacts, load_result


def result(**changes: object) -> Result:
    settings = {"seed": 0, "permutations": 7, "batch_size": "auto", "limit": None, "dtype": "auto"}
    settings |= {"model": "my models/m", "tasks": "t.yaml"}
    model = ModelFacts(name="m", revision="sha256:ab", dtype="bfloat16")
    task = TaskFacts(name="mine", version=1)
    return Result(status="ok", created="2026-01-01", model=model, task=task, settings={**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, "evaluate --model 'my models/m' --tasks t.yaml --dtype bfloat16 --seed 0 --permutations 7", id="own model"),
        pytest.param(
            {"limit": 3, "batch_size": 2, "device_map": "cpu", "trust_remote_code": True, "embedded_fallback": True},
            "evaluate --model 'my models/m' --tasks t.yaml --dtype bfloat16 --device-map cpu --batch-size 2 --limit 3 --trust-remote-code "
            "--embedded-fallback --seed 0 --permutations 7",
            id="every option",
        ),
        pytest.param(
            {"tasks": "x; rm -rf ~/$(id) `id` 'q'"},
            "evaluate --model 'my models/m' --tasks 'x; rm -rf ~/$(id) `id` '\"'\"'q'\"'\"'' --dtype bfloat16 --seed 0 --permutations 7",
            id="nothing of a name is run",
        ),
        pytest.param(
            {"model": "a" * 300}, f"evaluate --model {'a' * 300} --tasks t.yaml --dtype bfloat16 --seed 0 --permutations 7", id="long"
        ),
    ],
)
def test_the_command_of_an_evaluation(changes: dict[str, object], expected: str) -> None:
    assert command(result(**changes)) == f"dbes {expected}"


def test_the_command_of_a_hub_model_names_the_commit_that_was_read() -> None:
    found = result(model="org/m", revision="main")
    found = found.model_copy(update={"model": found.model.model_copy(update={"revision": "0a1b"})})
    assert " --model org/m --revision 0a1b " in command(found)


def test_a_model_in_memory_has_no_command_of_the_shell() -> None:
    assert command(result(model=None)).startswith("# the model was built in Python")


def test_words_come_back_from_the_shell_as_they_were() -> None:
    words = ["plain", "two words", "it's", "a\x1b[31mb", "line\nbreak", "back\\slash\x07'", "‮x", "ü", "-x", "$HOME", "*"]
    line = shell(words)
    assert not any(character in line for character in "\x1b\n‮\x07")
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, env=environment)
    assert done.stdout.decode().split("\0")[:-1] == words


class TestProgram:
    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        binaries = tmp_path / "my env" / "bin"
        binaries.mkdir(parents=True)
        for name in ("dbes", "python"):
            (binaries / name).write_text("#!/bin/sh\n")
            (binaries / name).chmod(0o755)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", os.environ["PATH"])
        monkeypatch.setattr(sys, "executable", str(binaries / "python"))
        return binaries

    def test_an_activated_environment(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(sys, "argv", [str(place / "dbes")])
        assert program() == program(shared=True) == "dbes"
        monkeypatch.setattr(sys, "argv", ["/x/dbes/cli/__main__.py"])
        assert program() == "dbes"
        monkeypatch.setattr(sys, "executable", str(place / "python3.11"))  # as launchers call it
        assert program() == "dbes"
        (place / "dbes").unlink()
        monkeypatch.setattr(sys, "executable", str(place / "python"))
        assert program() == "python -m dbes.cli"

    def test_by_its_path(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", [str(place / "dbes")])
        assert program() == program(shared=True) == "'my env/bin/dbes'"
        monkeypatch.chdir(place / "..")
        assert program() == "bin/dbes"
        monkeypatch.chdir("/")
        relative = place.relative_to("/") / "dbes"
        assert program() == shlex.quote(str(relative))

    def test_elsewhere_a_page_holds_no_path_of_this_machine(self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.setattr(sys, "argv", [str(place / "dbes")])
        assert program() == shlex.quote(str(place / "dbes")) and program(shared=True) == "dbes"

    def test_from_python(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", [""])
        assert program() == "'my env/bin/dbes'"
        (place / "dbes").unlink()
        monkeypatch.setattr(commands.shutil, "which", lambda _: None)
        assert program() == "'my env/bin/python' -m dbes.cli"


def activated() -> dict[str, str]:
    binaries = Path(sys.executable).parent
    return {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "HOME": os.environ["HOME"],
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def bash(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh shell."""
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=activated(), capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_the_lines_of_an_evaluation_run_as_printed(tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "my model")
    shutil.copytree(tiny_task.parent, tmp_path / "my task")
    given = "--model 'my model' --tasks 'my task/tiny.yaml' --limit 6 --permutations 20 --batch-size 2 --dtype bfloat16 --seed 3"
    done = bash(f"dbes evaluate {given} --output-path first", tmp_path)
    first = next(tmp_path.glob("first/*/*/*/result.json"))
    [line] = re.findall(r"Do it again</h2><pre>(.*?)</pre>", (first.parent / "report.html").read_text(), re.DOTALL)
    bash(html.unescape(line), tmp_path)
    second = next(tmp_path.glob("results/*/*/*/result.json"))
    found = [json.loads(load_result(path).model_dump_json(exclude={"created": True, "recording": True})) for path in (first, second)]
    assert found[0] == found[1]

    following = [line.strip() for line in done.stdout.splitlines() if re.match(r"  dbes (score|paths)", line)]
    # a tiny checkpoint that never learned anything may have no specialist, and then no path is offered
    assert len(following) == 2 + bool(load_result(first).specialists)
    for line in following:
        bash(line, tmp_path)

    bash(f"{following[1]} --output-path scored", tmp_path)
    card = bash("dbes report scored --format card", tmp_path).stdout
    bash(card.split("```")[1].strip(), tmp_path)


@pytest.mark.slow
def test_the_path_that_an_evaluation_offers_is_there(tmp_path: Path) -> None:
    done = bash("dbes evaluate --model embedded --limit 12 --permutations 200 --output-path first", tmp_path)
    [line] = [line.strip() for line in done.stdout.splitlines() if line.startswith("  dbes paths")]
    bash(line, tmp_path)
    assert (tmp_path / "paths.json").is_file()


@pytest.mark.slow
def test_the_lines_of_an_experiment_run_as_printed(tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    from test_cli_intervention import SMALL

    shutil.copytree(tiny_checkpoint, tmp_path / "my model")
    shutil.copytree(tiny_task.parent, tmp_path / "my task")
    rows = [{"text": f"a text of its own number {number}, words and more words to fill a row"} for number in range(40)]
    (tmp_path / "own rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    bash(
        "dbes intervene --model 'my model' --texts 'task:my task/tiny.yaml' --domain law --domain 'own=own rows.jsonl' --new own "
        "--config c.yaml --budget 0.2 --seeds 1 --out first --processes 1",
        tmp_path,
    )
    bash("dbes report first", tmp_path)
    [lines] = re.findall(r"Do it again</h2><pre>(.*?)</pre>", (tmp_path / "first" / "report.html").read_text(), re.DOTALL)
    bash(html.unescape(lines), tmp_path)
    found = [json.loads((tmp_path / name / "intervention.json").read_text()) for name in ("first", "OUT")]
    assert found[0]["settings"] == found[1]["settings"] and found[0]["given"] == ["law", "own=own rows.jsonl"]
    assert found[0]["targets"].keys() == found[1]["targets"].keys()
