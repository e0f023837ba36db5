"""Every option of every command that takes a name refuses a wrong one with exit code 2, and names the right ones, the nearest first."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dbes.cli import app

FREE = {
    *(f"{command} {option}" for command in ("evaluate", "finetune", "doctor", "merge", "plan") for option in ("revision",)),
    *(f"{command} model" for command in ("evaluate", "doctor", "paths", "finetune", "intervene", "plan")),
    *(f"plan {option}" for option in ("memory", "disk_speed", "paths")),
    "evaluate batch_size",
    "evaluate device_map",
    "evaluate max_memory",
    "finetune lr",
    "intervene budget",
    *(f"evaluate {option}" for option in ("system", "name", "base_url", "api_key_env", "engine_args")),
    "merge base",
    "report dataset",
}
"""Options whose text is no name of a few: a hub id, a revision, a number, a device."""

NAMES: dict[str, tuple[str, str]] = {
    "evaluate tasks": ("embeded", "embedded"),
    "evaluate dtype": ("bfloat", "bfloat16"),
    "evaluate engine": ("stream", "streaming"),
    "evaluate strata": ("entropi", "entropy"),
    "evaluate format": ("jsn", "json"),
    "score router": ("referenc", "reference"),
    "score phase": ("promt", "prompt"),
    "score match": ("lenght", "length"),
    "score surrogate": ("bigrams", "bigram"),
    "score strata": ("positon", "position"),
    "score format": ("tabel", "table"),
    "report format": ("htm", "html"),
    "compare by": ("specialisation", "specialization"),
    "compare format": ("markdwon", "markdown"),
    "doctor format": ("jsn", "json"),
    "plan tasks": ("embeded", "embedded"),
    "plan format": ("jsn", "json"),
    "import format": ("vlm", "vllm"),
    "export format": ("parket", "parquet"),
    "export rows": ("document", "documents"),
    "export domain": ("lwa", "law"),
    "paths domain": ("lwa", "law"),
    "paths rule": ("specialisation", "specialization"),
    "paths match": ("target-laod", "target-load"),
    "paths tasks": ("smoek", "smoke"),
    "paths purpose": ("prunning", "pruning"),
    "paths allocation": ("layers", "layer"),
    "paths format": ("esff", "esft"),
    "paths average": ("sample", "samples"),
    "finetune data": ("task:lwa", "law"),
    "finetune tasks": ("embeded", "embedded"),
    "finetune save": ("modle", "model"),
    "finetune format": ("jsn", "json"),
    "intervene domain": ("lwa", "law"),
    "intervene texts": ("task:embeded", "embedded"),
    "intervene new": ("mathe", "math"),
    "intervene rules": ("gradiant", "gradient"),
    "intervene ideas": ("per-layr", "per-layer"),
    "intervene protected": ("lfit", "lift"),
    "intervene routing": ("plane", "plain"),
    "tasks prepare task": ("embeded", "embedded"),
    "testbed run preset": ("smoek", "smoke"),
    "testbed run mix": ("embeded", "embedded"),
    "testbed run only": ("scop", "scope"),
    "testbed train mix": ("embeded", "embedded"),
    "testbed mix mix": ("pakages", "packages"),
}


def commands(of: typer.Typer = app, before: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for each in of.registered_commands:
        assert each.callback is not None
        yield before + (each.name or each.callback.__name__), each.callback
    for group in of.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{before}{group.name} ")


def named_parameters() -> set[str]:
    """Every parameter of every command that is a text, by command and name."""
    found = set()
    for command, function in commands():
        for name, hint in typing.get_type_hints(function).items():
            kinds = {hint, *typing.get_args(hint)}
            if name != "return" and str in kinds:
                found.add(f"{command} {name}")
    return found


def test_every_option_that_takes_text_is_known_here() -> None:
    assert named_parameters() == {*NAMES} | FREE


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    arguments = ["--model", tiny_checkpoint, "--tasks", tiny_task, "--limit", 4, "--permutations", 5, "--output-path", folder]
    assert CliRunner().invoke(app, ["evaluate", *map(str, arguments)]).exit_code == 0
    return next(folder.rglob("result.json")).parent


def line(case: str, wrong: str, *, result: Path, model: Path, task: Path, out: Path) -> list[object]:
    """A command in which nothing but one name is wrong."""
    command, name = case.rsplit(" ", 1)
    option = f"--{name.replace('_', '-')}"
    usual: dict[str, list[object]] = {
        "evaluate": ["--model", model, "--output-path", out],
        "score": [result / "trace"],
        "report": [result],
        "compare": [result],
        "doctor": [model],
        "plan": ["--model", model],
        "import": [result / "result.json", "--out", out],
        "export": [
            result / "trace",
            "--out",
            out,
            *([] if name == "format" else ["--format", "logical-count" if name == "domain" else "csv"]),
        ],
        "paths": [result, *([] if name == "domain" else ["--domain", "law"]), "--out", out],
        "finetune": ["--model", model, "--paths", out, *([] if name == "data" else ["--data", "task:law"]), "--out", out],
        "intervene": ["--model", model, *([] if name == "domain" else ["--domain", "law"]), "--out", out],
        "tasks prepare": ["--out", out],
        "testbed run": ["--out", out, "--cache", out],
        "testbed train": ["--out", out, "--config", out.parent / "train.yaml", "--cache", out],
        "testbed mix": ["--cache", out],
    }
    more: list[object] = [option, wrong]
    if command == "intervene" and name != "texts":
        more += ["--texts", f"task:{task}"]
    if command == "finetune" and name == "data":
        more += ["--tasks", task]
    if case == "paths purpose":
        more = ["--for", wrong]
    if case == "paths match":
        more += ["--rule", "random-load-matched"]
    if case == "paths tasks":
        more += ["--rule", "gradient", "--model", model]
    if case in ("testbed mix mix", "tasks prepare task"):
        more = [wrong]
    return [*command.split(), *usual[command], *more]


@pytest.mark.parametrize("case", list(NAMES))
def test_a_wrong_name_exits_2_and_names_the_right_ones(
    case: str, result: Path, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
) -> None:
    wrong, right = NAMES[case]
    (tmp_path / "train.yaml").write_text("routing: {router: learned}\n")
    arguments = line(case, wrong, result=result, model=tiny_checkpoint, task=tiny_task, out=tmp_path / "out")
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert f"is called {wrong.removeprefix('task:')!r}, did you mean {right}?; there are {right}, " in done.stderr
    assert not done.stdout and not (tmp_path / "out").is_file()
