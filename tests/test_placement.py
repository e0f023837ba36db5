"""Placements: sums against plain loops with every text really taken out, planted skews, noise that overfits, and what cannot be said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import PathError, SettingError
from dbes.exporting.export import export
from dbes.paths.coverage import covered_slots, deal_folds
from dbes.paths.evidence import gather
from dbes.paths.placement import Budget, Placement, place
from dbes.reporting.placement import as_json, render_page, shown
from dbes.scoring.counts import Counts

EXPERTS, K = 12, 2


def simulated(
    seed: int,
    *,
    texts: int = 10,
    tokens: int = 40,
    spread: float = 0.3,
    domain: float = 0.0,
    load: float = 0.0,
    names: tuple[str, ...] = ("law", "code", "<b>math"),
) -> Counts:
    """Every text has preferences of its own; ``domain`` and ``load`` are those shared in a domain and by all, in logits."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=(3, EXPERTS)) * load, rng.normal(size=(len(names), 3, EXPERTS)) * domain
    label = np.repeat(np.arange(len(names)), texts)
    logits = common + own[label] + rng.normal(size=(len(label), 3, EXPERTS)) * spread
    scores = logits[:, None] + rng.gumbel(size=(len(label), tokens, 3, EXPERTS))
    hits = (scores >= np.sort(scores, axis=-1)[..., -K, None]).sum(axis=1)
    ids = [f"text {seed} {text}" for text in range(len(label))]
    return Counts.from_arrays(hits, domains=names, document_domain=label, top_k=K, document_ids=ids)


def top(hits: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(hits)), key=lambda cell: (-hits[cell], cell))[:count]


def by_loops(
    hits: np.ndarray, label: list[int], fold: list[int], count: int, domains: int, loads: dict[int, list[int]]
) -> dict[str, np.ndarray]:
    """What ``Slots`` holds, text by text; ``loads`` are the choices by overall load, which are filled in where they are missing."""
    found = {name: np.zeros(domains) for name in ("total", "own", "oracle", "load")} | {"across": np.zeros((domains, domains))}

    def total(domain: int, parts: set[int]) -> np.ndarray:
        rows = [row for row, at, part in zip(hits, label, fold, strict=True) if at == domain and part in parts]
        return np.sum([np.zeros(hits.shape[1]), *rows], axis=0)

    every = set(fold)
    for part in every:
        usages = [total(domain, every - {part}) for domain in range(domains)]
        loads.setdefault(part, top(np.sum([usage / usage.sum() for usage in usages], axis=0), count))
    for domain in range(domains):
        for part in every:
            unseen = total(domain, {part})
            found["total"][domain] += unseen.sum()
            found["own"][domain] += unseen[top(total(domain, every - {part}), count)].sum()
            found["oracle"][domain] += unseen[top(unseen, count)].sum()
            found["load"][domain] += unseen[loads[part]].sum()
        for other in range(domains):
            found["across"][domain, other] = total(other, every)[top(total(domain, every), count)].sum()
    return found


def test_slots_are_those_of_plain_loops_with_every_text_really_taken_out() -> None:
    rng = np.random.default_rng(1)
    label = np.asarray([0] * 7 + [1] * 4 + [2] * 3)
    hits = rng.integers(0, 9, (14, 6)).astype(float)
    fold = deal_folds(tuple(map(str, range(14))), label, 3)
    found = covered_slots(hits, label, fold, domains=3, count=2)
    loads: dict[int, list[int]] = {}
    for row in range(15):
        kept = [text for text in range(14) if text != row - 1]
        expected = by_loops(hits[kept], label[kept].tolist(), fold[kept].tolist(), 2, 3, loads)
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(found, name)[row], values, rtol=1e-12, err_msg=f"{name} without text {row - 1}")
        np.testing.assert_allclose(found.uniform[row], expected["total"] / 3)


def test_folds_are_dealt_by_the_ids_alone() -> None:
    names, label = tuple(f"text {text}" for text in range(20)), np.arange(20) % 2
    fold = deal_folds(names, label)
    order = np.random.default_rng(0).permutation(20)
    assert deal_folds(tuple(names[text] for text in order), label[order]).tolist() == fold[order].tolist()
    assert np.bincount(fold[label == 0]).tolist() == np.bincount(fold[label == 1]).tolist() == [2] * 5
    first = min((hashlib.sha256(names[text].encode()).hexdigest(), text) for text in range(0, 20, 2))[1]
    assert fold[first] == 0


def test_a_domain_with_experts_of_its_own_is_found() -> None:
    counts = simulated(0, texts=20, domain=1.0)
    found = place(counts)
    assert [each.finding for each in found.domains] == ["domain"] * 3
    assert (found.chosen, found.cells, found.confidence) == (9, 36, pytest.approx(1 - 0.05 / 3))
    each = found["law"]
    hits = counts.whole().hits[:20].sum(axis=0)
    assert [tuple(cell) for cell in each.cells] == sorted((layer, expert) for layer in range(3) for expert in top(hits[layer], 3))
    assert each.seen == pytest.approx(sum(hits[cell] for cell in each.cells) / hits.sum())
    assert each.covered.value <= each.oracle and each.uniform == 0.25
    assert all(other.lost.low > 0 for other in each.elsewhere.values())


def test_what_all_domains_share_is_no_reason_to_know_the_domain() -> None:
    found = [place(simulated(seed, load=0.8), domain="law").domains[0] for seed in range(10)]
    assert {each.finding for each in found} == {"load"}


def test_few_texts_with_habits_of_their_own_overfit_and_this_is_seen() -> None:
    found = [place(simulated(seed, texts=4, spread=1.5), domain="law").domains[0] for seed in range(10)]
    assert min(each.seen for each in found) > 0.35  # far above the 25 % of chance, on the texts that chose
    assert sum(each.finding == "none" for each in found) >= 9
    assert "No exploitable skew" in shown(place(simulated(0, texts=4, spread=1.5), domain="law")).words[0]


@pytest.mark.slow
@pytest.mark.parametrize(("allocation", "spread", "texts"), [("layer", 0.3, 12), ("layer", 1.5, 5), ("global", 0.5, 12), ("layer", 0, 30)])
def test_without_skew_none_is_said_to_be_there(allocation: str, spread: float, texts: int) -> None:
    found = [place(simulated(seed, texts=texts, spread=spread), allocation=allocation, domain="code").domains[0] for seed in range(200)]
    assert sum(each.finding == "none" for each in found) >= 190
    assert abs(np.mean([each.covered.value for each in found]) - 0.25) < 4 * np.std([each.covered.value for each in found]) / 200**0.5


@pytest.mark.slow
def test_knowing_the_domain_is_seldom_said_to_help_where_it_does_not() -> None:
    found = [place(simulated(seed, load=0.8), domain="law").domains[0] for seed in range(200)]
    assert sum(each.finding == "domain" for each in found) <= 10


@pytest.mark.slow
def test_the_interval_of_coverage_holds_the_coverage_of_new_texts() -> None:
    """Of the procedure: the mean over recordings of what texts nobody saw get."""
    held = 0
    for seed in range(100):
        every = simulated(seed, texts=60, domain=0.7)
        few = every.take(np.flatnonzero(np.arange(180) % 60 < 12))
        mask = np.zeros((3, EXPERTS), bool)
        each = place(few, domain="law").domains[0]
        for layer, expert in each.cells:
            mask[layer, expert] = True
        rest = every.whole().hits[12:60].sum(axis=0)
        held += each.covered.low <= rest[mask].sum() / rest.sum() <= each.covered.high
    assert held >= 88


def test_a_global_budget_takes_cells_wherever_they_lie() -> None:
    counts = simulated(3, domain=1.0)
    hits = counts.whole().hits.copy()
    hits[:, 1] = hits[:, 1].mean(axis=-1, keepdims=True).round()  # a layer where nothing can be gained
    flat = Counts.from_arrays(
        hits, domains=counts.shape.domains, document_domain=counts.shape.document_domain, top_k=K, tokens=np.full(30, 60),
        document_ids=counts.shape.document_ids,
    )  # fmt: skip
    found = place(flat, budget=6, allocation="global", domain="law")
    assert found.chosen == 6 and {cell.layer for cell in found.domains[0].cells} <= {0, 2}
    assert place(flat, budget=6, domain="law").chosen == 18


def test_groups_of_many_texts_stand_for_them() -> None:
    counts = simulated(0, texts=700, tokens=6, domain=0.5)
    found = place(counts, domain="law")
    assert found.groups == 150 and found.domains[0].texts == 700 and found.domains[0].finding == "domain"


def test_equal_use_of_all_experts_leaves_nothing_to_gain() -> None:
    counts = Counts.from_arrays(np.full((8, 2, 4), 3), domains=["a", "b"], document_domain=[0, 1] * 4, top_k=2, document_ids=[*"abcdefgh"])
    assert {(each.finding, each.gain.value) for each in place(counts).domains} == {("none", 0.0)}


def test_counts_of_whole_domains_say_nothing_of_unseen_texts() -> None:
    counts = simulated(0, domain=1.0)
    found = place(Counts.from_domains(counts.by_domain(lambda sums: sums.hits), domains=counts.shape.domains, top_k=K))
    for each in found.domains:
        assert each.finding == "unknown" and np.isnan([each.covered.value, each.gain.low, each.knowing.value, each.oracle]).all()
        assert "not of documents" in str(each.reason)
    assert json.loads(as_json(found))["domains"][0]["covered"] == {"value": None, "low": None, "high": None}
    assert shown(found).words[0] == "Nothing can be said about unseen texts."


def test_a_domain_of_two_texts_and_a_domain_alone_are_told() -> None:
    counts = simulated(0, domain=1.0)
    found = place(counts.take(np.r_[0:2, 10:30]))
    assert found["law"].finding == "unknown" and "only 2 texts" in str(found["law"].reason) and found["code"].finding == "domain"
    alone = place(simulated(0, domain=1.0, names=("law",))).domains[0]
    assert alone.finding == "load" and np.isnan(alone.knowing.value) and "one domain only" in str(alone.reason)


@pytest.mark.parametrize(("size", "allocation", "told"), [
    (0, "layer", "above 0"), (1.5, "layer", "whole number"), (12, "layer", "all of the 12"), (36, "global", "all of the 36"),
    (float("nan"), "layer", "above 0"),
])  # fmt: skip
def test_budgets_that_leave_no_choice(size: float, allocation: str, told: str) -> None:
    with pytest.raises(PathError, match=told):
        place(simulated(0), budget=size, allocation=allocation)


def test_budgets_round_shares_to_at_least_one() -> None:
    assert [Budget(size=size).count(12) for size in (0.01, 0.25, 0.99 - 0.06, 1, 11)] == [1, 3, 11, 1, 11]
    with pytest.raises(SettingError, match="layer"):
        Budget(size=0.5, allocation="layers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counts") / "counts"
    simulated(0, domain=1.0).save(path)
    return path


def run(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["paths", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_writes_and_exports(folder: Path, tmp_path: Path) -> None:
    code, told, _ = run(folder, "--for", "placement")
    assert code == 0 and "3 of 3 domains have a skew" in told
    code, told, _ = run(folder, "--for", "placement", "--domain", "<b>math", "--budget", 0.5, "--format", "json")
    content = json.loads(told)
    expected: Placement = place(Counts.load(folder), domain="<b>math", budget=0.5)
    assert code == 0 and content["domains"][0]["gain"]["low"] == expected.domains[0].gain.low
    out, page = tmp_path / "law.json", tmp_path / "law.html"
    code, _, hints = run(folder, "--for", "placement", "--domain", "law", "--out", out, "--output", page)
    assert code == 0 and "prune-list" in hints and "logical-count" in hints
    kept = json.loads(export(out, tmp_path / "keep.json", format="prune-list").read_text())
    assert kept["fewest_kept"] == 3 and sum(map(len, kept["keep"].values())) == 9
    assert "&lt;b&gt;math" in page.read_text() and "<b>math" not in page.read_text()


def test_the_page_is_the_same_every_time(folder: Path) -> None:
    assert render_page(place(Counts.load(folder))) == render_page(place(gather(Counts.load(folder))))


@pytest.mark.parametrize(("words", "code", "told"), [
    (["--for", "placement", "--domain", "lwa"], 2, "law"),
    (["--for", "placement", "--budget", 0.2, "--budget", 0.4], 2, "takes one budget"),
    (["--for", "placement", "--out", "x.json"], 2, "one domain"),
    (["--for", "placement", "--budget", 40], 1, "nothing is left to choose"),
    (["--for", "pruning", "--domain", "law"], 2, "needs --model"),
    (["--for", "pruning", "--model", "m"], 2, "needs --domain"),
    (["--domain", "law"], 2, "--out is needed"),
    (["--domain", "law", "--out", "x.json", "--format", "json"], 2, "--for placement"),
])  # fmt: skip
def test_what_the_command_refuses(folder: Path, words: list[object], code: int, told: str) -> None:
    found, out, err = run(folder, *words)
    assert (found, out) == (code, "") and told in err and len(err.strip().splitlines()) == 1


def test_a_placement_of_one_domain_is_that_of_all_but_for_its_intervals() -> None:
    counts = simulated(5, domain=0.6)
    one, every = place(counts, domain="code").domains[0], place(counts)["code"]
    assert replace(one.covered, low=0, high=0) == replace(every.covered, low=0, high=0) and one.covered.low > every.covered.low
