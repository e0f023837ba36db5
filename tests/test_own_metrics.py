"""Metrics of the user's own: measured as the package measures its own, told where they cannot be, compared only with themselves."""

from __future__ import annotations

import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
import simulate
from scipy import stats
from typer.testing import CliRunner

import dbes
from dbes import Metric, SettingError, load_result, score
from dbes.cli import app
from dbes.comparison.check import check_folder
from dbes.comparison.compare import paired_of
from dbes.reporting import leaderboard
from dbes.reporting.commands import command
from dbes.reporting.export import as_markdown
from dbes.reporting.page import write_page
from dbes.reporting.terminal import harmless, render
from dbes.results import CalibratedRecord
from dbes.trace.baselines import imitate
from dbes.trace.store import Trace

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_metric.py"
NUMBERS = (
    "value", "null", "corrected", "ci_low", "ci_high", "p", "reference", "score", "score_low", "score_high", "control",
    "excess", "excess_low", "excess_high",
)  # fmt: skip


def divergence(counts: np.ndarray) -> np.ndarray:
    """Routing specialization again, from the formula: each domain's divergence from the mean usage."""
    usage = counts / counts.sum(axis=1, keepdims=True)
    ratio = np.where(usage > 0, usage / usage.mean(axis=0), 1.0)
    return (usage * np.log(ratio)).sum(axis=1)


def divergence_of_documents(hits: np.ndarray, domain: np.ndarray) -> np.ndarray:
    return divergence(np.stack([hits[domain == each].sum(axis=0) for each in np.unique(domain)]))


def similarity(counts: np.ndarray) -> float:
    """Mean cosine of two domains: 1 where all route alike, 0 where no expert serves two; the bound lies below the zero."""
    unit = counts / np.sqrt((counts**2).sum(axis=1, keepdims=True))
    return float((unit @ unit.T)[np.triu_indices(len(counts), 1)].mean())


OWN = Metric(name="divergence", function=divergence, per_domain=True, title="Divergence again")
BY_DOCUMENT = Metric(name="of_documents", function=divergence_of_documents, per_domain=True, unit="documents")
ALIKE = Metric(name="alike", function=similarity, zero=1.0)


def recorded(seed: int = 1, **more: object) -> Trace:
    made = naive.random_recording(seed, documents=(9, 9, 9), length=(20, 60), experts=(12, 10, 12), **more)  # type: ignore[arg-type]
    trace = made.trace(document_ids=[f"text {number}" for number in range(27)])
    return replace(trace, control=replace(imitate(trace, "uniform", seed=1), control=imitate(trace, "uniform", seed=2)))


def test_a_metric_of_the_package_written_again_gives_its_numbers_everywhere() -> None:
    result = score(recorded(), permutations=99, metrics=[OWN, BY_DOCUMENT])
    for name in ("divergence", "of_documents"):
        for record in (each for each in result.calibrated if each.metric == name):
            same = result.record("specialization", layer=record.layer, domain=record.domain)
            mine, theirs = ([getattr(each, number) for number in NUMBERS] for each in (record, same))
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12, err_msg=f"{name} {record.layer} {record.domain}")
    assert not [warning for warning in result.warnings if "metric" in warning]


def test_many_documents_are_left_out_in_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbes.scoring.grouping.MANY_DOCUMENTS", 20)
    monkeypatch.setattr("dbes.scoring.grouping.FEWEST_GROUPS", 5)
    monkeypatch.setattr("dbes.scoring.grouping.ALL_GROUPS", 15)
    result = score(recorded(), permutations=20, metrics=[OWN])
    assert result.settings["groups"] == 15
    mine, theirs = (result.record(name) for name in ("divergence", "specialization"))
    np.testing.assert_allclose([getattr(mine, each) for each in NUMBERS], [getattr(theirs, each) for each in NUMBERS], rtol=1e-9)


def test_planted_structure_is_found_noise_is_not_and_the_ideal_router_scores_one() -> None:
    def drawn(effect: float, seed: int) -> CalibratedRecord:
        about = simulate.population(3, domains=3, layers=2, experts=16, top_k=2, effect=effect, concentration=200.0)
        trace = simulate.draw_trace(about, np.random.default_rng(seed), documents=12)
        return score(trace, permutations=99, metrics=[ALIKE]).record("alike")

    planted = drawn(0.8, 0)
    assert planted.p <= 0.01 and planted.score_low > 0 and planted.value < planted.null < 1
    noise = [drawn(0.0, seed) for seed in range(20)]
    assert sum(each.p <= 0.05 for each in noise) <= stats.binom.ppf(0.9995, len(noise), 0.05)
    assert sum(each.score_low <= 0 <= each.score_high for each in noise) >= stats.binom.ppf(0.0005, len(noise), 0.95)
    ideal = score(recorded(), router="reference", permutations=0, metrics=[ALIKE]).record("alike")
    assert ideal.reference == pytest.approx(0, abs=1e-12) and ideal.score == pytest.approx(1.0, abs=0.02)


def test_what_cannot_be_computed_is_nan_with_a_reason() -> None:
    def few_experts(counts: np.ndarray) -> float:
        if counts.shape[1] == 10:
            raise RuntimeError("ten experts\nare not enough")
        return float(counts.sum())

    def undefined(counts: np.ndarray) -> float:
        return float(np.log(-counts.sum()))

    def spoils(counts: np.ndarray) -> float:
        counts[0] = 0
        return 0.0

    metrics = [Metric(name=each.__name__, function=each, bound=None) for each in (few_experts, undefined, spoils)]
    result = score(recorded(), permutations=5, metrics=metrics)
    first, second, _ = result.model.layers
    assert math.isnan(result.record("few_experts", layer=second).value) and result.record("few_experts", layer=first).value > 0
    assert math.isnan(result.record("few_experts").score) and math.isnan(result.record("undefined").value)
    told = [warning for warning in result.warnings if warning.startswith("metric")]
    assert told == [
        "metric 'undefined': value unknown at every layer: its function gives NaN",
        "metric 'spoils': value unknown at every layer: ValueError: assignment destination is read-only",
        f"metric 'few_experts': value unknown at layer {second}: RuntimeError: ten experts are not enough",
    ]
    without = score(recorded(extras=False), permutations=0, metrics=[Metric(name="gates", function=similarity, counts="mass")])
    assert "metric 'gates': value unknown at every layer: the recording has no gate weights, which mass are made of" in without.warnings


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            lambda: [Metric(name="wide", function=lambda counts: counts)],
            r"'wide'.*one number \(per_d.*; it gave float64 \(3, 12\)",
        ),
        (lambda: [Metric(name="one", function=lambda _: 1.0, per_domain=True)], "'one'.*3 numbers, one for each domain.*it gave float"),
        (lambda: [Metric(name="words", function=lambda _: "much")], "'words'.*one number .*it gave str"),
        (lambda: [Metric(name="ragged", function=lambda _: [[1], [1, 2]])], "'ragged'.*it gave list"),
        (lambda: [OWN, OWN], "'divergence' twice"),
        (lambda: [divergence], r"expected dbes.Metric\(name=..., function=...\), got function"),
        (lambda: [Metric(name="der", function=divergence)], "no metric of dbes has"),
        (lambda: [Metric(name="My metric", function=divergence)], "small letters, digits and _"),
        (lambda: [Metric(name="own", function=divergence, bound=math.nan)], "bound: expected 'ideal', a number or None"),
        (lambda: [Metric(name="own", function=divergence, unit="texts")], "unit 'texts': expected one of domains, documents"),  # type: ignore[arg-type]
        (lambda: [Metric(name="own", function=divergence, version=0)], "expected a whole number of at least 1"),
        (lambda: [Metric(name="own", function=3)], "expected a function, got int"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_metric_is_refused_in_one_line(given: object, told: str) -> None:
    with pytest.raises(SettingError, match=told) as caught:
        score(recorded(), permutations=0, metrics=given())  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def written(folder: Path, name: str, seed: int, metric: Metric) -> Path:
    trace = replace(
        recorded(seed), provenance={"model": name, "revision": name, "task": {"name": "t", "version": 1, "fingerprint": "same"}}
    )
    score(trace, permutations=20, metrics=[metric], output_path=folder / name)
    return folder / name


def test_results_load_without_the_function_and_only_equal_sources_are_compared(tmp_path: Path) -> None:
    a, b = (written(tmp_path, name, seed, OWN) for name, seed in (("a", 1), ("b", 2)))
    other = written(tmp_path, "c", 3, replace(OWN, version=2))
    result = load_result(a)
    assert result.own_metrics["divergence"].sha256 == OWN.sha256 and len(OWN.sha256 or "") == 64
    assert "divergence" in set(dbes.load_result(a).to_dataframe()["metric"])
    assert not [problem for problem in check_folder(a) if "divergence" in problem or "replicates" in problem]
    by_own, by_score = dbes.compare([a, b, other], by="divergence"), dbes.compare([a, b, other])
    assert [entry.label for entry in by_own.entries] and {entry.label for entry in by_own.entries} == {"a", "b"}
    assert [(each.name, each.reason) for each in by_own.apart] == [
        ("c", "metric 'divergence' is computed by another version or source than in the table; score its trace again with --metric")
    ]
    assert len(by_score.entries) == 3 and by_score.own == {} and by_own.own == {"divergence": "Divergence again"}
    two = dbes.compare([a, b])
    paired = {each.metric: each.difference for each in paired_of(two) if each.depth == "all layers"}
    assert paired["divergence"] == pytest.approx(paired["specialization"], abs=1e-9)
    assert leaderboard.leaderboard_payload(two)["metrics"]["divergence"] == "Divergence again"
    assert "Divergence again" in as_markdown(two, paired_of(two))
    with pytest.raises(SettingError, match="did you mean divergence"):
        dbes.compare([a, b], by="divergenc")


def test_reports_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spiteful = replace(OWN, title="<b>Mine</b>", place="my file.py:OWN")
    folder = written(tmp_path, "a", 1, spiteful)
    harmless().print(render(load_result(folder)))
    assert "metrics of your own" in capsys.readouterr().out
    page = write_page(folder).read_text("utf-8")
    assert 'data-figure="curve-divergence"' in page and "<b>Mine" not in page and "&lt;b&gt;Mine" in page
    assert "--metric 'my file.py:OWN'" in command(load_result(folder))


def test_the_command_line_reads_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    recorded().save(trace)
    run = CliRunner().invoke(
        app, ["score", str(trace), "--permutations", "5", "--metric", f"{EXAMPLE}:ASSOCIATION", "--output-path", str(tmp_path / "out")]
    )
    assert run.exit_code == 0, run.output
    found = load_result(tmp_path / "out").own_metrics["association"]
    assert found.place == f"{EXAMPLE}:ASSOCIATION" and found.title == "Association"
    (tmp_path / "broken.py").write_text("1 / 0\n", "utf-8")
    for place, told in (
        (f"{EXAMPLE}:association", "association is no dbes.Metric; in"),
        (f"{tmp_path}/none.py:X", "expected FILE.py:NAME"),
        (f"{tmp_path}/broken.py:X", "ZeroDivisionError: division by zero"),
        ("X", "expected FILE.py:NAME"),
    ):
        run = CliRunner().invoke(app, ["score", str(trace), "--metric", place])
        assert run.exit_code == 2 and told in run.stderr.replace("\n", " "), run.output


def test_an_evaluation_with_other_metrics_is_another(tmp_path: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    options = {"tasks": tiny_task, "output_path": tmp_path, "permutations": 5}
    first = dbes.evaluate(tiny_checkpoint, metrics=[OWN], **options)
    assert dbes.evaluate(tiny_checkpoint, metrics=[OWN], **options).created == first.created
    with pytest.raises(dbes.ResultError, match="another metrics of your own; use --overwrite"):
        dbes.evaluate(tiny_checkpoint, metrics=[replace(OWN, version=2)], **options)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("association: 0.") and "ideal 1.000" in lines[0] and lines[2].startswith("top_expert: 1.")
