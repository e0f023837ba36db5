"""Files from outside, damaged in every way that can be thought of: one line, exit 1 or 2, never a traceback, nothing for the terminal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutations
from report_results import simulated_trace, write_result
from safetensors.numpy import save as encode_safetensors
from test_report_intervention import made, made_with_items
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import DbesError
from dbes.paths.files import read_esft, read_path
from dbes.pipeline import EMBEDDED_MODEL
from dbes.testbed.mixes import read_prepared
from dbes.testbed.prescribed import read_prescription
from dbes.text import HIDDEN, printable

REPORTS = Path(__file__).parents[1] / "reports"
PART = 60
"""Damaged versions of a file that every run tries; the slow ones try all of them."""


def told(*arguments: object) -> str | None:
    """What the command said on stderr where it failed, None where it did not; anything else than one line is a failure of the test."""
    ran = CliRunner().invoke(app, [str(each) for each in arguments])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise AssertionError(f"{' '.join(map(str, arguments))}: traceback") from ran.exception
    for stream in (ran.stdout, ran.stderr):
        assert printable(stream, lines=True) == stream or not any(hidden(stream)), f"{arguments}: {stream[:300]!r}"
    if ran.exit_code == 0:
        return None
    assert ran.exit_code in (1, 2)
    lines = ran.stderr.splitlines() or ran.stdout.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 1500, lines
    return lines[0]


def hidden(text: str) -> Iterator[str]:
    import unicodedata

    return (each for each in text if each not in "\n\t" and unicodedata.category(each) in HIDDEN)


def refused(read: Callable[[], object]) -> str | None:
    """What a reader said, None where it took the file."""
    try:
        read()
    except DbesError as problem:
        assert len(str(problem)) < 1500 and "\n" not in str(problem), str(problem)
        return str(problem)
    return None


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = simulated_trace(documents=3, layers=2, experts=4, lean=0.9, domains=("law", "code"), tokens=(20, 30))
    folder = write_result(tmp_path_factory.mktemp("result"), made, permutations=20)
    shutil.copytree(folder, folder / "other")
    return folder


def path_file(folder: Path, name: str, **changes: Any) -> Path:
    content = {
        "schema_version": 1, "domain": "law", "rule": "lift", "budget": 0.2, "cells": [[1, 0], [2, 3]], "layers": [1, 2], "experts": [4, 4],
        "share": 0.25, "coverage": 0.5, "overlap": {"code": {"coverage": 0.2, "jaccard": None}}, "stability": 0.5,
        "trajectories": [{"experts": [0, 1], "found": 1.0, "log_lift": 0.5, "low": 0.1, "high": 0.9}],
        "provenance": {"model": "m", "dbes": "0.1.0"},
    }  # fmt: skip
    (folder / name).write_text(json.dumps(content | changes))
    return folder / name


Case = tuple[Path, Callable[[], object]]


def experiment_folder(folder: Path) -> Path:
    """A small experiment on disk: one arm and its search, one mask."""
    from dbes.intervention.grid import run_key
    from dbes.intervention.masking import MaskJob
    from dbes.intervention.settings import Arm, Settings, run_of

    settings = Settings(
        domains=("a",), rules=("specialization",), extras=(), seeds=1, rates=(0.01,), steps=2, points=(1, 2), full_points=(1, 2), masks=2
    )
    cells = ((0, 1),)
    arms = [Arm(name="specialization", target="a", seed=seed, kind="cells", budget=0.15, cells=cells) for seed in (1000, 0)]
    job = MaskJob(target="a", rule="specialization", budget=0.15, cells=cells, controls=(((0, 2),), ((1, 1),)))
    key = run_key(settings, model="m", data="d")
    nats = {"a": [3.0, 4.0, 5.0], "b": [2.0, 3.0]}
    about = {
        "schema_version": 1, "key": key, "model": {"name": "m"}, "texts": "t",
        "data": {"digest": "d", "domains": ["a", "b"], "boundary": 0}, "bytes": {"a": [9, 9, 9], "b": [9, 9]}, "base": nats,
        "tokens": {"a": [3, 3, 3], "b": [3, 3]},
        "settings": settings.model_dump(mode="json"), "arms": [arm.model_dump(mode="json") for arm in arms],
        "paths": {}, "masks": [job.model_dump(mode="json")], "skipped": [], "versions": {"dbes": "0"},
    }  # fmt: skip
    (folder / "runs").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "experiment.json").write_text(json.dumps(about))
    for arm in arms:
        run = run_of(arm, rate=0.01, tuning=arm.seed == 1000)
        curve = [{"step": step, "seconds": 0.1 * step, "nats": nats} for step in (1, 2)]
        record = {
            "schema_version": 1, "status": "ok", "error": None, "run": run.model_dump(mode="json"), "losses": [1.0], "curve": curve,
            "trainable_parameters": 1, "optimizer_bytes": 8, "peak_added_bytes": None, "training_seconds": 1.0, "seconds": 1.0,
            "steps_without_gradient": 0,
        }  # fmt: skip
        (folder / "runs" / f"{run.identity(key)}.json").write_text(json.dumps(record))
    mask = {"schema_version": 1, "job": job.model_dump(mode="json"), "nats": nats, "controls": [nats, nats]}
    (folder / "masks" / f"{job.identity(key)}.json").write_text(json.dumps(mask))
    return folder


def analysed(folder: Path) -> Callable[[], object]:
    from dbes.intervention.analysis import analyse
    from dbes.intervention.grid import read_experiment

    return lambda: refused(lambda: json.dumps(analyse(*read_experiment(folder)), allow_nan=False))


def grid_folder(folder: Path, cells: int = 4) -> Path:
    """The first cells of the grid in reports/."""
    grid = json.loads((REPORTS / "testbed" / "grid.json").read_text("utf-8"))
    wanted = [cell for cell in grid["cells"] if cell["arm"] in ("reference", "frozen")][:cells]
    for cell in wanted:
        target = folder / "cells" / cell["identity"]
        target.mkdir(parents=True)
        shutil.copy(REPORTS / "testbed" / "cells" / cell["identity"] / "cell.json", target)
    (folder / "grid.json").write_text(json.dumps(grid | {"cells": wanted}))
    return folder


def mix_folder(folder: Path) -> Path:
    arrays: dict[str, np.ndarray] = {"token_bytes": np.ones(9, np.int64)}
    for side in ("training", "heldout"):
        for index in range(2):
            arrays |= {f"{side}.{index}.tokens": np.arange(6, dtype=np.int32), f"{side}.{index}.starts": np.array([0, 3, 6])}
    folder.mkdir()
    (folder / "mix.safetensors").write_bytes(encode_safetensors(arrays))
    (folder / "mix.json").write_text(json.dumps({"domains": ["a", "b"], "boundary": 0, "digest": "00"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, folder)
    return folder


def cases(name: str, result: Path, folder: Path) -> list[Case]:
    """A file of the kind, and what reads it."""
    own = folder / "own"
    if name in ("result", "manifest", "vocabulary"):
        shutil.copytree(result, own)
        trace = own / "trace"
        if name == "result":
            read = [
                *(("report", own, "--format", form) for form in ("card", "record", "html")),
                *(("compare", own, "--format", form) for form in ("table", "csv", "json")), ("compare", own, "--check"),
            ]  # fmt: skip
            return [(own / "result.json", lambda: [told(*each) for each in read])]
        file = trace / f"{name}.json"
        return [(file, lambda: [told("score", trace, "--permutations", 0)])]
    if name == "path":
        file = path_file(folder, "p.json")
        return [(file, lambda: refused(lambda: read_path(file)))]
    if name == "esft":
        file = folder / "e.json"
        file.write_text(json.dumps({"experts": {"1": [0, 1], "2": [3]}, "shared_experts": False, "non_expert_modules": False}))
        return [(file, lambda: refused(lambda: read_esft(file, layers=(1, 2), experts=(4, 4), model="m")))]
    if name == "accuracy":
        (own := folder / "own").mkdir()
        file = own / "a.json"
        scores = {"arc": {"alias": "x", "acc,none": 0.5}, "piqa": {"acc": 0.4}}
        where = {"model_name": "simulated", "config": {"model_args": "pretrained=simulated"}}
        file.write_text(json.dumps({"results": scores, "group_subtasks": {"arc": []}, **where}))
        return [(file, lambda: [told("compare", result, "--accuracy", file)])]
    if name in ("outcome", "outcome with items"):
        own.mkdir()
        file = own / "intervention.json"
        file.write_text(json.dumps(made() if name == "outcome" else made_with_items()))
        return [(file, lambda: [told("report", own, "--format", "card"), told("report", own)])]
    if name in ("grid", "cell"):
        grid_folder(own)
        file = own / "grid.json" if name == "grid" else sorted(own.glob("cells/*/cell.json"))[0]
        return [(file, lambda: [told("testbed", "report", own)])]
    if name in ("experiment", "run", "mask"):
        experiment_folder(own)
        files = {"experiment": "experiment.json", "run": "runs/*.json", "mask": "masks/*.json"}
        return [(file, analysed(own)) for file in sorted(own.glob(files[name]))]
    if name == "mix":
        mix_folder(own)
        return [(own / "mix.json", lambda: refused(lambda: read_prepared(own)))]
    own.mkdir()
    file = own / "training.json"
    settings = {"model": {"size": "1m"}, "routing": {"router": "reference", "balancing": "none"}}
    file.write_text(json.dumps({"settings": settings, "prescribed": {"domains": ["a", "b"]}}))
    return [(file, lambda: refused(lambda: read_prescription(own)))]


KINDS = (
    "result", "manifest", "vocabulary", "path", "esft", "accuracy", "outcome", "outcome with items", "grid", "cell", "experiment",
    "run", "mask", "mix", "prescription",
)  # fmt: skip


def tried(name: str, result: Path, folder: Path, most: int | None) -> None:
    for file, read in cases(name, result, folder):
        content = json.loads(file.read_bytes())
        read()
        for what, damaged in mutations(content, most=most):
            file.write_bytes(damaged)
            try:
                read()
            except Exception as problem:
                raise AssertionError(f"{file.name}, {what}: {problem!r}") from problem
        file.unlink()
        os.mkfifo(file)
        read()
        file.unlink()
        file.symlink_to(file)
        read()


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in ("result", "outcome with items", "grid", "cell", "outcome")])
def test_damaged_json_is_one_line(kind: str, result: Path, tmp_path: Path) -> None:
    tried(kind, result, tmp_path, PART)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_to_json_is_one_line(kind: str, result: Path, tmp_path: Path) -> None:
    tried(kind, result, tmp_path, None)
