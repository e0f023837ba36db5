"""The committed results of real models load, have a provenance, and make the page; pickles are read without running them."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dbes
from dbes.results import load_result, result_files

REAL = Path(__file__).parents[1] / "reports" / "real"
SOURCES = yaml.safe_load((REAL / "sources.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def unpickled() -> Any:
    sys.path.insert(0, str(REAL))
    try:
        import unpickled  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(REAL))
    return unpickled


def test_every_result_loads_and_has_a_provenance():
    found = {path.parent.name for path in result_files([REAL])}
    assert found == set(SOURCES["whole"])
    for name in found:
        entry = SOURCES["results"][name]
        repository = SOURCES["repositories"][entry["repository"]]
        assert len(repository["commit"]) == 40 and repository["licence"] and repository["url"].startswith("https://")
        result = load_result(REAL / name)
        assert result.status == "ok" and set(result.model.experts) == {entry["experts"]}
        assert (REAL / "maps" / entry["map"]).is_file() if "map" in entry else (REAL / name / "counts.csv").is_file()


def test_it_stays_small_and_apart_from_the_leaderboard():
    sizes = [path.stat().st_size for path in REAL.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert max(sizes) < 2_000_000 and sum(sizes) < 6_000_000
    entries = {path.resolve() for path in result_files([REAL.parent / "entries"])}
    assert not any(REAL.resolve() in path.parents for path in entries)


def test_the_page_is_made_of_the_committed_data(tmp_path):
    copy = tmp_path / "real"
    shutil.copytree(REAL, copy, ignore=shutil.ignore_patterns("index.html", "__pycache__"))
    subprocess.run([sys.executable, str(copy / "build.py")], check=True, cwd=tmp_path)
    assert (copy / "index.html").read_bytes() == (REAL / "index.html").read_bytes(), "run `python reports/real/build.py`"


@pytest.mark.parametrize(("name", "slots"), [("olmoe", 8), ("mixtral", 2)])
def test_counts_give_the_committed_result(tmp_path, name, slots):
    """Imported again, and computed without dbes."""
    counts = REAL / name / "counts.csv"
    found = dbes.import_routing(counts, output_path=tmp_path / "c", experts=SOURCES["results"][name]["experts"], top_k=slots)
    value = dbes.score(found.routes).record("specialization").value
    assert value == load_result(REAL / name).record("specialization").value
    rows = [line.split(",") for line in counts.read_text("utf-8").splitlines()[1:]]
    domains, layers = sorted({row[0] for row in rows}), sorted({int(row[1]) for row in rows})
    table = np.zeros((len(layers), len(domains), SOURCES["results"][name]["experts"]))
    for domain, layer, expert, count in rows:
        table[layers.index(int(layer)), domains.index(domain), int(expert)] += int(count)
    assert (table.sum(axis=2) == 102 * 2048 * slots).all()  # pieces of 2,048 tokens, as the script that counted them makes
    shares = table / table.sum(axis=2, keepdims=True)
    pooled = shares.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nansum(shares * np.log(shares / pooled), axis=2).mean()
    assert value == pytest.approx(information, rel=1e-12)


def test_counters_are_read_without_running_the_pickle(unpickled, tmp_path):
    rng = np.random.default_rng(0)
    planted = [Counter({np.int64(expert): int(rng.integers(0, 10**6)) for expert in range(8)}) for _ in unpickled.LAYERS]
    content = pickle.dumps(planted, protocol=4)
    assert unpickled.counters(content) == [dict(each) for each in planted]
    (tmp_path / "law.pkl").write_bytes(content)
    assert unpickled.as_csv(tmp_path).splitlines()[1] == f"law,0,0,{planted[0][np.int64(0)]}"
    assert unpickled.as_csv(tmp_path, ("law",)) == "domain,layer,expert,count\n"


class Harmful:
    def __reduce__(self) -> Any:
        return (exit, ("ran",))


@pytest.mark.parametrize("planted", [[Harmful()], [{1: "text"}], {"a": 1}, [Counter({np.float64(1): 2})], [{1: -2}], [{1: 2.5}]])
def test_anything_else_in_a_pickle_is_refused(unpickled, planted):
    with pytest.raises(ValueError):
        unpickled.counters(pickle.dumps(planted, protocol=4))


def test_a_cut_pickle_is_refused(unpickled):
    with pytest.raises(ValueError):
        unpickled.counters(pickle.dumps([Counter({1: 2})], protocol=4)[:-1])


def test_the_figures_of_the_text_are_those_of_the_results():
    text = " ".join((REAL / "README.md").read_text("utf-8").split())
    for name in ("esft", "gptoss-families", "gptoss-subjects"):
        result = load_result(REAL / name)
        score, low, high = (100 * getattr(result.record("specialization"), part) for part in ("score", "score_low", "score_high"))
        assert f"{score:.1f} % [{low:.1f}, {high:.1f}]" in text
    records = load_result(REAL / "esft").calibrated
    layers = {each.layer: each.score for each in records if (each.metric, each.domain) == ("specialization", None)}
    assert all(f"{100 * layers[layer]:.1f} % at layer {layer}" in text for layer in (3, 11, 17, 24))
