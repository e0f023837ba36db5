"""Paths as files and on the command line: round trips, refusals, ESFT's config."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dbes.cli import app
from dbes.cli.paths import next_step
from dbes.errors import PathError
from dbes.evaluation.pipeline import evaluate
from dbes.paths.esft import read_esft
from dbes.paths.evidence import read_evidence
from dbes.paths.types import Cell, ExpertPath, Overlap, Provenance, Trajectory
from dbes.results import DomainFacts, ModelFacts, Result, TaskFacts
from dbes.tasks.task import load_task

PATH = ExpertPath(
    domain="law",
    rule="specialization",
    budget=0.15,
    cells=(Cell(1, 0), Cell(1, 3), Cell(4, 2)),
    layers=(1, 4),
    experts=(4, 6),
    share=0.3,
    coverage=0.42,
    overlap={"math": Overlap(coverage=0.2, jaccard=0.0), "code": Overlap(coverage=0.1)},
    stability=0.9,
    trajectories=(Trajectory(experts=(3, 2), found=0.8, log_lift=0.7, low=0.5, high=0.9), Trajectory(experts=(0, 1), found=0.1)),
    provenance=Provenance(model="m", revision="sha256:1", task="t", task_version=2, task_fingerprint="f", dbes="0.1.0", seed=3),
)


def test_round_trip(tmp_path: Path) -> None:
    assert ExpertPath.load(PATH.save(tmp_path / "p.json")) == PATH
    assert ExpertPath.load(tmp_path / "p.json").cells[2].layer == 4


def test_esft_round_trip_names_every_layer(tmp_path: Path) -> None:
    file = PATH.model_copy(update={"cells": (Cell(4, 2),)}).save(tmp_path / "esft.json", format="esft")
    assert json.loads(file.read_text()) == {"experts": {"1": [], "4": [2]}, "shared_experts": False, "non_expert_modules": False}
    found = read_esft(file, layers=(1, 4), experts=(4, 6), model="m", domain="law")
    assert found.cells == (Cell(4, 2),) and found.share == pytest.approx(0.1) and found.coverage is None


def test_the_published_form_of_an_esft_config_is_read(tmp_path: Path) -> None:
    file = tmp_path / "law.json"
    file.write_text('{"experts": {"1": [24, 49], "2": [1]}, "shared_experts": false, "non_expert_modules": false}')
    assert read_esft(file, layers=(1, 2), experts=(64, 64), model="m").cells == (Cell(1, 24), Cell(1, 49), Cell(2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"cells": []}, "at least one", id="no cells"),
        pytest.param({"cells": [[1, 4]]}, "experts 0 to 3", id="no such expert"),
        pytest.param({"cells": [[2, 0]]}, r"MoE layers \[1, 4\]", id="a dense layer"),
        pytest.param({"cells": [[1, 3], [1, 0]]}, "ordered", id="out of order"),
        pytest.param({"cells": [[1, 3], [1, 3]]}, "distinct", id="twice"),
        pytest.param({"schema_version": 2}, "schema_version 2", id="a later version"),
        pytest.param({"extra": 1}, "extra", id="unknown field"),
        pytest.param({"experts": [4]}, "2 layers", id="layers without experts"),
    ],
)
def test_paths_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({**PATH.model_dump(mode="json"), **change}))
    with pytest.raises(PathError, match=message):
        ExpertPath.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            '{"experts": {"1": [9]}, "shared_experts": false, "non_expert_modules": false}', "does not exist", id="no such expert"
        ),
        pytest.param('{"experts": {}, "shared_experts": false, "non_expert_modules": false}', "at least one", id="empty"),
        pytest.param('{"experts": {"1": [0]}, "shared_experts": true}', "shared experts too", id="more than routed experts"),
        pytest.param('{"expert": {}}', "not an ESFT", id="something else"),
        pytest.param("[]", "expected a JSON object", id="a list"),
        pytest.param("{", "not JSON", id="no JSON"),
    ],
)
def test_esft_configs_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "esft.json"
    file.write_text(content)
    with pytest.raises(PathError, match=message):
        read_esft(file, layers=(1, 4), experts=(4, 6), model="m")


def test_files_that_are_not_there_or_of_the_other_kind(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="run `dbes paths` first"):
        ExpertPath.load(tmp_path / "none.json")
    with pytest.raises(PathError, match="ESFT expert config"):
        ExpertPath.load(PATH.save(tmp_path / "esft.json", format="esft"))
    with pytest.raises(PathError, match="cannot be written"):
        PATH.save(PATH.save(tmp_path / "p.json") / "below.json")


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    evaluate(tiny_checkpoint, tasks=tiny_task, output_path=folder, permutations=50)
    return next(folder.rglob("result.json")).parent


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["paths", *map(str, arguments)])


def test_command(result: Path, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    out = tmp_path / "paths.json"
    done = run(result, "--domain", "law", "--rule", "gradient", "--model", tiny_checkpoint, "--tasks", tiny_task, "--out", out)
    assert done.exit_code == 0 and done.stdout.strip() == str(out), done.stderr
    path = ExpertPath.load(out)
    assert len(path.cells) == 3 and path.provenance.model == "tiny-olmoe" and path.provenance.revision is not None
    assert "3 of 24 cells (12.5% of the expert parameters)" in done.stderr


def next_command(stderr: str) -> list[str]:
    """Arguments of the command line that was printed, as a shell reads them."""
    words = shlex.split(next(line for line in stderr.splitlines() if " finetune --model " in line))
    return words[words.index("finetune") :]


def test_the_next_command_runs_as_printed(
    result: Path, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("--domain", "law", "--rule", "load", "--model", tiny_checkpoint, "--tasks", tiny_task, "--out", "it's paths.json")
    words = next_command(run(result, *given).stderr)
    assert not {"--steps", "--lr", "--protect"} & {*words}, "no number that was not measured for this model"
    assert words[words.index("--data") + 1] == "task:law" and words[words.index("--out") + 1] == "finetuned-law"
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "learning rate" in done.stdout and (tmp_path / "finetuned-law" / "config.json").is_file()
    assert "finetuned-law-2" in next_command(run(result, *given).stderr), "a folder that is free"


def test_what_a_result_does_not_say_is_named_in_the_next_command(result: Path, tmp_path: Path) -> None:
    found = json.loads((result / "result.json").read_text())
    for name in ("model", "tasks"):
        found["settings"].pop(name, None)
    shutil.copytree(result, tmp_path / "old")
    (tmp_path / "old" / "result.json").write_text(json.dumps(found))
    done = run(tmp_path / "old", "--domain", "law", "--rule", "load", "--out", tmp_path / "p.json")
    words = next_command(done.stderr)
    assert words[words.index("--model") + 1] == "MODEL" and words[words.index("--tasks") + 1] == "TASK"
    assert "MODEL is the folder of tiny-olmoe, TASK is the YAML file of task tiny" in done.stderr


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "dbes-embedded", "revision": "sha256:1"}, ["--model", "embedded", "--paths"]),
        ({"name": "org/moe", "revision": "abc"}, ["--model", "org/moe", "--revision", "abc", "--paths"]),
    ],
)
def test_models_that_are_known_by_name_are_named(model: dict[str, str], words: list[str]) -> None:
    domains = {name: DomainFacts(documents=1, sources=1, tokens=1) for name in load_task("embedded").domains}
    task = TaskFacts(name="embedded", version=load_task("embedded").version, domains=domains)
    about = Result(status="ok", created="", model=ModelFacts(**model), task=task)
    found = next_command(next_step(about, Path("p.json"), domain="law", model=None, tasks="embedded"))
    assert found[1 : 1 + len(words)] == words and "--tasks" not in found and "TASK" not in found


def test_command_refuses_a_domain_it_does_not_know(result: Path, tmp_path: Path) -> None:
    done = run(result, "--domain", "lawn", "--out", tmp_path / "p.json")
    assert done.exit_code == 2 and "did you mean law?; there are law, code, math" in done.stderr and not (tmp_path / "p.json").exists()


def test_a_result_without_its_trace_is_refused(result: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text((result / "result.json").read_text())
    with pytest.raises(PathError, match="save-trace"):
        read_evidence(tmp_path)
