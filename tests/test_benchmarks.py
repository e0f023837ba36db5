"""The commands beside the package: the import graph as a table, and the comparison of two folders of numbers."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas
import pytest
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def command(monkeypatch):
    def start(name: str, *arguments: object) -> int:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return import_module(name).main()

    return start


@pytest.fixture
def imports(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("imports")


def test_cycles_and_upward_imports_are_found(imports):
    edges = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("e", "d"), ("f", "a")]
    assert imports.cycles(edges) == [["a", "b", "c"], ["d", "e"]]
    assert imports.cycles([("a", "b"), ("b", "c"), ("a", "c")]) == []
    layers = [["high"], ["one", "other"], ["low"]]
    between = [("low", "high"), ("high", "low"), ("one", "other"), ("low", "unnamed")]
    assert imports.upward(between, layers) == [("low", "high"), ("one", "other")]


def test_drawing_counts_modules_lines_and_imports(imports):
    found = imports.Imports(
        {"dbes": 1, "dbes.top": 10, "dbes.low": 2, "dbes.low.one": 30, "dbes.low.two": 4},
        [("dbes.top", "dbes.low.one"), ("dbes.top", "dbes.low.two"), ("dbes.low.one", "dbes.low.two")],
        [("dbes.low.two", "dbes.low.one"), ("dbes.low.two", "dbes.top")],
    )
    text, clean = imports.drawing(found, [["top"], ["low"]])
    rows = [line.split() for line in text.splitlines()]
    assert rows[2] == ["2", "top", "2", "1", "10", "·", "2"]
    assert rows[3] == ["3", "low", "1", "3", "36", "1", "·"]
    assert "low -> top (1)" in text and "cycles of modules while they are loaded: 0" in text and "cycles of parts: 1\n  low, top" in text
    assert not clean


def test_the_package_has_no_cycle_and_no_upward_import(command, capsys):
    assert command("imports") == 0, capsys.readouterr().out


def written(folder: Path, **changes) -> Path:
    """A folder with one file of each kind."""
    values = {"value": 0.5, "mass": [1.0, math.nan], "share": 3.0, "created": "then", "hits": np.array([1, 2]), **changes}
    folder.mkdir()
    record = {"created": values["created"], "record": {"value": values["value"], "p": math.nan, "verdict": "above"}}
    (folder / "result.json").write_text(json.dumps(record), "utf-8")
    save_file({"mass": np.array(values["mass"]), "hits": values["hits"]}, folder / "matrices.safetensors")
    pandas.DataFrame({"share": [values["share"], math.nan], "domain": ["law", "code"]}).to_csv(folder / "usage.csv", index=False)
    (folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n', "utf-8")
    (folder / "README.md").write_text("words", "utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        pytest.param({}, [], 0, id="equal"),
        pytest.param({"created": "now"}, [], 0, id="another time"),
        pytest.param({"value": 0.5000001}, [], 1, id="number of JSON"),
        pytest.param({"value": 0.5000001}, ["--tolerance", "1e-6"], 0, id="within the tolerance"),
        pytest.param({"value": 0.5000001}, ["--ignore", "value"], 0, id="left out"),
        pytest.param({"value": math.nan}, ["--tolerance", "1e6"], 1, id="NaN for a number"),
        pytest.param({"value": "0.5"}, [], 1, id="text for a number"),
        pytest.param({"mass": [1.0, 2.0]}, [], 1, id="number for NaN"),
        pytest.param({"mass": [1.0, math.nan, 0.0]}, [], 1, id="shape"),
        pytest.param({"hits": np.array([1, 2], np.int32)}, [], 1, id="type of an array"),
        pytest.param({"hits": np.array([1, 3])}, [], 1, id="whole number"),
        pytest.param({"share": 4.0}, [], 1, id="table"),
    ],
)
def test_same_numbers(tmp_path, command, capsys, changes, options, code):
    assert command("same_numbers", written(tmp_path / "before"), written(tmp_path / "after", **changes), *options) == code
    assert f"compared: {code} differ, 0 files missing" in capsys.readouterr().out


def test_missing_files_and_renamed_keys(tmp_path, command, capsys):
    before, after = written(tmp_path / "before"), written(tmp_path / "after")
    (after / "new.csv").write_text("share\n1\n", "utf-8")
    record = json.loads((after / "result.json").read_text("utf-8"))
    (after / "result.json").write_text(json.dumps({"entry": record["record"]}), "utf-8")
    assert command("same_numbers", before, after) == 1
    assert command("same_numbers", before, after, "--renamed", "record=entry") == 0
    (after / "usage.csv").unlink()
    assert command("same_numbers", before, after, "--renamed", "record=entry") == 1
    assert "missing in AFTER  usage.csv" in capsys.readouterr().out
    assert command("same_numbers", before, after, "--renamed", "record=entry", "--ignore", "usage.csv") == 0
