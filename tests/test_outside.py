"""Files from outside, damaged in every way that can be thought of: one line, exit 1 or 2, never a traceback, nothing for the terminal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mutations import mutations
from report_results import simulated_trace, write_result
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as encode_safetensors
from test_report_intervention import made, made_with_items
from typer.testing import CliRunner

from dbes.cli import app
from dbes.comparison.compare import compare
from dbes.errors import DbesError
from dbes.evaluation.pipeline import EMBEDDED_MODEL
from dbes.intervention.settings import read_configuration
from dbes.paths.esft import read_esft
from dbes.paths.types import ExpertPath
from dbes.reporting.export import markdown_cell
from dbes.reporting.html import unpacked
from dbes.reporting.leaderboard import render_terminal
from dbes.reporting.page import write_page
from dbes.reporting.terminal import DOMAIN_WIDTH, harmless
from dbes.testbed.mixes import read_prepared
from dbes.testbed.prescribed import read_prescription
from dbes.testbed.settings import read_settings
from dbes.text import HIDDEN, labels, printable

REPORTS = Path(__file__).parents[1] / "reports"
PART, LARGE_PART = 20, 600
"""Damaged versions of a file that every run tries, and that the slow ones do; a kind has up to some hundred thousand."""


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
    lines = ran.stderr.splitlines()
    if "--check" in arguments and not lines:  # lists what is wrong, a line each
        return ran.stdout
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
    from dbes.intervention.settings import Arm, InterventionSettings, run_of

    settings = InterventionSettings(
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
        return [(file, lambda: refused(lambda: ExpertPath.load(file)))]
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


def tried(name: str, result: Path, folder: Path, most: int, seed: int = 0) -> None:
    for file, read in cases(name, result, folder):
        content = json.loads(file.read_bytes())
        read()
        for what, damaged in mutations(content, most=most, seed=seed):
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


EXPENSIVE = ("result", "outcome", "outcome with items", "grid", "cell")
"""Kinds that whole reports are made of."""


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_json_is_one_line(kind: str, result: Path, tmp_path: Path) -> None:
    tried(kind, result, tmp_path, 2 if kind in EXPENSIVE else PART)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_to_json_is_one_line(kind: str, result: Path, tmp_path: Path) -> None:
    tried(kind, result, tmp_path, 30 if kind in EXPENSIVE else LARGE_PART, seed=1)


# ------------------------------------------------------------------------------------------------------------ tables and arrays


def safetensors_changed(file: Path, **changes: Callable[[np.ndarray], np.ndarray] | None) -> None:
    arrays = parse_safetensors(file.read_bytes())
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = np.ascontiguousarray(change(arrays[name]))
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    file.write_bytes(encode_safetensors(arrays, header.get("__metadata__")))


def table_changed(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(file)).to_parquet(file)


USAGE = "expert_usage.parquet"
BESIDE: list[tuple[str, Callable[[Path], object]]] = [
    (USAGE, lambda f: f.write_bytes(b"PAR1" + bytes(90))),
    (USAGE, lambda f: f.write_bytes(f.read_bytes()[:-20])),
    (USAGE, lambda f: (f.unlink(), os.mkfifo(f))),
    (USAGE, lambda f: (f.unlink(), f.mkdir())),
    *((USAGE, lambda f, name=name: table_changed(f, lambda t: t.drop(columns=name)))
      for name in ("domain", "layer", "expert", "hits", "share", "lift", "lift_high", "q", "specialist", "unknown")),
    *((USAGE, lambda f, name=name: table_changed(f, lambda t: t.assign(**{name: "x"})))
      for name in ("domain", "layer", "hits", "lift", "q", "specialist")),
    (USAGE, lambda f: table_changed(f, lambda t: t.assign(hits=np.nan))),
    (USAGE, lambda f: table_changed(f, lambda t: t.assign(expert=0))),
    (USAGE, lambda f: table_changed(f, lambda t: t.iloc[1:])),
    ("matrices.safetensors", lambda f: f.write_bytes(bytes(100))),
    ("matrices.safetensors", lambda f: safetensors_changed(f, similarity=lambda a: a[:1])),
    ("matrices.safetensors", lambda f: safetensors_changed(f, similarity=lambda a: a.astype(np.int64))),
    ("matrices.safetensors", lambda f: (f.unlink(), os.mkfifo(f))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), BESIDE)
def test_damaged_tables_beside_a_result_are_one_line(name: str, damage: Callable[[Path], object], result: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(result, own)
    shutil.rmtree(own / "trace")
    damage(own / name)
    line = told("report", own)
    assert line is not None and name in line


REPLICATES: list[Callable[[Path], object]] = [
    lambda f: f.write_bytes(b"\xff" * 100),
    lambda f: (f.unlink(), os.mkfifo(f)),
    lambda f: safetensors_changed(f, document_domain=None),
    lambda f: safetensors_changed(f, document_domain=lambda a: a.astype(np.float32)),
    lambda f: safetensors_changed(f, specialization=lambda a: a[:, :1]),
    lambda f: safetensors_changed(f, specialization=lambda a: a.astype(np.int32)),
    lambda f: f.write_bytes(encode_safetensors(parse_safetensors(f.read_bytes()), {"documents": "[1, 2]"})),
    lambda f: f.write_bytes(encode_safetensors(parse_safetensors(f.read_bytes()), {"documents": "[" * 9999})),
    lambda f: f.write_bytes(encode_safetensors(parse_safetensors(f.read_bytes()))),
]


@pytest.mark.parametrize("damage", REPLICATES)
def test_damaged_replicates_are_told_and_not_ranked(damage: Callable[[Path], object], result: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(result, own)
    damage(own / "replicates.safetensors")
    ran = CliRunner().invoke(app, ["compare", str(own / "result.json"), "--format", "json"])
    assert ran.exit_code == 0
    assert "replicates.safetensors" in json.loads(ran.stdout)["entries"][0]["note"]
    checked = CliRunner().invoke(app, ["compare", "--check", str(own / "result.json")])
    assert checked.exit_code == 1 and "replicates.safetensors" in checked.stdout


# ------------------------------------------------------------------------------------------------------------ which files, and how often


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    for name, content in (("a", "{"), ("b", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content)
    line = told("compare", tmp_path)
    assert line is not None and "a/result.json: not JSON" in line and "b/result.json: expected a JSON object" in line
    failed = tmp_path / "failed"
    shutil.copytree(Path(__file__).parent / "historic_results" / "0.1.0-error", failed)
    line = told("compare", failed)
    assert line is not None and "the evaluation failed" in line
    assert told("compare", tmp_path / "none") == f"dbes: {tmp_path / 'none'}: no such file or folder"
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "result.json")
    line = told("compare", tmp_path / "pipe")
    assert line is not None and "a pipe, socket or device" in line
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert told("compare", tmp_path / "loop") is not None


def test_a_result_reached_by_several_paths_counts_once(result: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(result)
    (tmp_path / "file.json").symlink_to(result / "other" / "result.json")
    other = result / "other"
    paths = [other, other / "result.json", result / "." / "other", tmp_path / "file.json", tmp_path / "link" / "other"]
    ran = CliRunner().invoke(app, ["compare", *map(str, paths), "--format", "json"])
    assert len(json.loads(ran.stdout)["entries"]) == 1
    both = CliRunner().invoke(app, ["compare", str(result), "--format", "json"])
    assert len(json.loads(both.stdout)["entries"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "k0: &k0 [x]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]\n" for i in range(1, 30)),
        "seed: 1\nseed: 2\n", "{1: 2}", "- 1", "seed: " + "9" * 5000, "seed: [" * 500, "mix: !!python/object/apply:os.system [ls]",
        "seed: \x1b[31m", "seed: 2020-13-77", "\xff", "? [a]\n: b", "seed: &a [*a]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("reader", ["train", "intervene"])
def test_damaged_settings_are_one_line(content: str, reader: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(content.encode("latin-1"))
    line = refused(lambda: read_settings(file) if reader == "train" else read_configuration(file, {"domains": ("a",)}))
    assert line is not None and line.startswith(str(file))


# ------------------------------------------------------------------------------------------------------------ names and texts

EVIL = "\x1b]8;;http://evil\x07\x1b[31m[red]x[/]\x9b2J\u202e|`<b>https://evil www.evil.com @you $x$"
ALIKE = ("a" * 70 + "1" + "z" * 70, "a" * 70 + "2" + "z" * 70, "law\x1b[0m", "law\x1b[1m", "law\\x1b[1m")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evil")
    words = {token: f"{EVIL}{token}" for token in range(60)}
    for number, model in enumerate((EVIL, "[/] [link=x]b")):
        made = simulated_trace(
            number, documents=3, layers=2, experts=10, lean=0.95, domains=ALIKE, tokens=(50, 70), model=model, family=EVIL, vocabulary=words
        )
        write_result(folder / str(number), made, permutations=60)
    return folder


COMMANDS = [
    ("score", "0/trace", "--permutations", "20"), ("score", "0/trace", "--permutations", "20", "--format", "json"),
    *(("compare", ".", "--format", form) for form in ("table", "csv", "json", "markdown")), ("compare", ".", "--published"),
    ("compare", ".", "--check"), ("report", "0", "--format", "card"), ("report", "0", "--format", "record"),
    ("report", "0", "--format", "hub", "--dataset", "a/b"), ("paths", "0", "--domain", ALIKE[2], "--out", "p.json", "--rule", "lift"),
    ("paths", "0", "--domain", EVIL, "--out", "p.json"), ("compare", ".", "--accuracy", EVIL), ("score", EVIL),
]  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments)[:40].encode("ascii", "ignore").decode())
def test_nothing_in_names_or_texts_reaches_the_terminal(arguments: tuple[str, ...], evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    ran = CliRunner().invoke(app, arguments)
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    assert not list(hidden(ran.stdout)) and not list(hidden(ran.stderr))


def test_markup_in_names_is_text(evil: Path) -> None:
    console = harmless()
    console.width = 400
    with console.capture() as captured:
        console.print(render_terminal(compare([evil])))
    assert "[/] [link=x]b" in captured.get() and r"\x1b]8;;http" in captured.get()
    card = CliRunner().invoke(app, ["compare", str(evil), "--format", "markdown"]).stdout
    assert r"\[/\] \[link=x\]b" in card
    assert markdown_cell("|`<b>https://evil www.a.com @you $x$ a.b:c") == r"\|\`&lt;b&gt;https\://evil www\.a.com &#64;you \$x\$ a.b:c"


def test_domains_that_look_alike_stay_apart(evil: Path) -> None:
    page = unpacked(write_page(evil / "0").read_text("utf-8"))
    assert len(set(page["domains"])) == len(ALIKE)
    assert set(page["curves"]["domain"]) - {None} == set(page["domains"]) == {each["domain"] for each in page["text"]}
    assert set(page["specialists"]["domain"]) <= set(page["domains"])
    shown = CliRunner().invoke(app, ["score", str(evil / "0" / "trace"), "--permutations", "20"]).stdout
    assert all(f"│ {name} " in shown or f"│ {name}│" in shown for name in labels(ALIKE, DOMAIN_WIDTH).values())
    usage = pd.read_csv(evil / "0" / "expert_usage.csv")
    assert usage["domain"].nunique() == len(ALIKE) - 1  # the file names them whole; only an escape and its own text are one
    assert not any(any(hidden(name)) for name in usage["domain"])
