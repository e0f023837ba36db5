"""The report of a run: intervals of changes, what it says in words, and reports of earlier versions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from test_run import path_of
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import FinetuneError
from dbes.finetuning.choice import Choice, Trial
from dbes.finetuning.evaluation import DomainScore, Measured
from dbes.finetuning.report import Change, change_of, changes, read_report, write_report
from dbes.finetuning.run import finetune
from dbes.finetuning.settings import FinetuneSettings, make_settings
from dbes.finetuning.summary import advice, findings, forgotten, protects_next

OLD = Path(__file__).resolve().parents[1] / "historic_results" / "0.1.0-finetune"


def measured(bits, text_bytes, sources=None):
    bits, text_bytes = np.asarray(bits, float), np.asarray(text_bytes, float)
    score = DomainScore(
        entries=len(bits), tokens=10, bits_per_byte=bits.sum() / text_bytes.sum(), nats_per_token=1.0, items=0, accuracy=None,
        accuracy_per_byte=None,
    )  # fmt: skip
    return Measured(score=score, sources=tuple(sources or map(str, range(len(bits)))), bits=bits, text_bytes=text_bytes)


def test_an_interval_by_hand():
    # d = 2 and 1 bits over 10 bytes each: R = 3 / 20; residuals 0.5 and -0.5; SE^2 = 2 / 1 * 0.5 / 400; t(1) at 97.5 % = 12.7062
    found = change_of(measured([20, 20], [10, 10]), measured([22, 21], [10, 10]), error=0.05)
    assert found.change == pytest.approx(0.15)
    assert (found.low, found.high) == pytest.approx((0.15 - 12.7062 * 0.05, 0.15 + 12.7062 * 0.05), abs=1e-4)


def test_texts_of_one_source_are_one_piece_of_evidence():
    text_bytes = [10, 30, 10, 10]
    by_text = change_of(measured([5, 9, 5, 5], text_bytes, "aabc"), measured([6, 13, 5, 7], text_bytes, "aabc"), error=0.05)
    by_source = change_of(measured([14, 5, 5], [40, 10, 10]), measured([19, 5, 7], [40, 10, 10]), error=0.05)
    assert by_text == by_source
    assert change_of(measured([5, 6], [9, 9], "aa"), measured([5, 7], [9, 9], "aa"), error=0.05).low is None


def test_the_interval_is_close_to_the_jackknife():
    random = np.random.default_rng(0)
    text_bytes = random.integers(50, 500, 60).astype(float)
    before = 2 * text_bytes + random.normal(0, 30, 60)
    after = before + 0.01 * text_bytes + random.normal(0, 4, 60)
    found = change_of(measured(before, text_bytes), measured(after, text_bytes), error=0.05)
    left_out = [(np.delete(after - before, place).sum()) / np.delete(text_bytes, place).sum() for place in range(60)]
    error = np.sqrt(59 / 60 * np.square(np.asarray(left_out) - np.mean(left_out)).sum())
    assert found.high is not None
    assert found.high - found.change == pytest.approx(student.ppf(0.975, 59) * error, rel=0.03)


def test_the_other_domains_share_the_error():
    one, two = measured([20, 20, 21], [10, 10, 10]), measured([22, 21, 21], [10, 10, 10])
    found = changes({"law": one, "code": one, "math": one}, {"law": two, "code": two, "math": two}, "law")["changes"]
    assert found["code"] == found["math"] == change_of(one, two, error=0.025)
    assert found["law"] == change_of(one, two, error=0.05)


def report_of(law=(-0.02, -0.03, -0.01), code=(0.0, -0.01, 0.01), math=(0.0, -0.01, 0.01), **values):
    """An old report with these changes of three domains: change, low, high."""
    old = read_report(OLD)
    assert old is not None
    found = {name: Change(change=one[0], low=one[1], high=one[2]) for name, one in (("law", law), ("code", code), ("math", math))}
    risen = [found[name].change for name in ("code", "math")]
    told = {"gain": -law[0], "forgetting_mean": sum(risen) / 2, "forgetting_worst": max(risen), "changes": found}
    settings = values.pop("settings", FinetuneSettings())
    return old.model_copy(update={"schema_version": 2, "target": "law", "settings": settings, **told, **values})


CALM = "nothing was forgotten beyond noise"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "law: gained 0.0200 bits per byte (95 % interval +0.0100 to +0.0300)"),
        ({"law": (-0.02, -0.05, 0.01)}, "law: the gain of +0.0200 bits per byte is within noise (95 % interval -0.0100 to +0.0500)"),
        ({"law": (0.02, 0.01, 0.03)}, "law: lost 0.0200 bits per byte (95 % interval of the gain -0.0300 to -0.0100)"),
        (
            {"law": (0.02, -0.01, 0.05)},
            "law: the loss of 0.0200 bits per byte is within noise (95 % interval of the gain -0.0500 to +0.0100)",
        ),
        ({"law": (-0.02, None, None)}, "law: the gain of +0.0200 bits per byte is from one held-out text, so that noise cannot be told"),
        ({}, f"{CALM}: other domains changed by +0.0000 on average, +0.0000 at worst"),
        ({"code": (0.03, 0.02, 0.04)}, "forgotten: code +0.0300 (+0.0200 to +0.0400) bits per byte; not beyond noise: math"),
        ({"code": (0.01, -0.02, 0.04)}, f"{CALM}: other domains changed by +0.0050 on average, +0.0100 at worst"),
        ({"code": (0.03, None, None)}, f"{CALM}: math +0.0000; one text is held out of code (+0.0300), too few to tell"),
        (
            {"code": (0.02, 0.01, 0.03), "math": (0.03, 0.02, 0.04)},
            "forgotten: math +0.0300 (+0.0200 to +0.0400), code +0.0200 (+0.0100 to +0.0300) bits per byte",
        ),
    ],
)
def test_gain_and_forgetting_are_what_was_measured(changed, line):
    found = findings(report_of(**changed))
    assert any(one.startswith(line) for one in found), found


def test_protection_is_advised_only_where_something_was_forgotten_and_it_is_possible():
    harm = {"code": (0.03, 0.02, 0.04)}
    assert protects_next(report_of(**harm)) and list(forgotten(report_of(**harm))) == ["code"]
    assert not protects_next(report_of())
    assert not protects_next(report_of(code=(0.03, -0.01, 0.07))), "within noise"
    for way in ({"lora_rank": 2}, {"train_router": True}):
        settings = make_settings(**way)
        assert not protects_next(report_of(**harm, settings=settings))
        assert "can be protected" in advice(report_of(**harm, settings=settings))[0]
    protected = report_of(**harm, settings=make_settings(protect=0.03))
    assert not protects_next(protected) and advice(protected)[0].startswith("a smaller --protect than 0.03 keeps other domains better")
    told = advice(protected.model_copy(update={"choice": choice()}))[0]
    assert told == "a smaller --protect than 0.03, or a smaller --lr than 0.001, keeps other domains better, at some cost of the gain"
    assert advice(report_of()) == []


def choice(**values):
    given = {
        "lr": 1e-3, "source": "range test", "trials": (Trial(lr=1e-3, loss=3.9), Trial(lr=3e-3, loss=None)), "trial_steps": 4,
        "search_seconds": 5.0, "validation_sequences": 6, "check_every": 2, "losses": ((0, 4.0), (2, 3.5), (4, 3.6)), "best_step": 2,
        "stopped": "stalled",
    }  # fmt: skip
    return Choice(**{**given, **values})


def test_how_it_was_trained_is_said():
    report = report_of(choice=choice(), seconds=50.0, steps=4, passes=0.5, sequences=32, validation_unit="texts")
    rate, kept = findings(report)[2:]
    assert "learning rate 0.001" in rate and "(validation loss before 4.0000; 0.001: 3.9000, 0.003: diverged), 10 % of the time" in rate
    why = "by the loss on 6 sequences of texts set apart; ended: the loss no longer fell"
    assert kept == f"kept step 2 of 4 (0.5 passes over 32 sequences), {why}"
    still = report_of(choice=choice(best_step=4, stopped="all steps made"), seconds=50.0, steps=4, passes=1.0)
    assert "more --steps may gain more" in advice(still)[0]
    given = report_of(law=(-0.02, -0.05, 0.01), choice=choice(source="given", trials=()), passes=1.0)
    assert "without --lr one is found" in advice(given)[0]


def test_reports_of_the_first_schema_load_for_ever(tmp_path):
    old = read_report(OLD)
    assert old is not None and old.schema_version == 1
    assert old.choice is None and not old.changes and old.settings.lr == 1e-4 and not old.settings.early_stopping
    assert findings(old) == ["law: +0.0023 bits per byte", "other domains: -0.0001 bits per byte on average, +0.0002 at worst"]
    assert not advice(old)
    write_report(report_of(choice=choice()), tmp_path)
    assert read_report(tmp_path) == report_of(choice=choice())


def test_a_finished_run_of_before_is_another_run_and_is_refused(tiny_checkpoint, tiny_task, tmp_path):
    shutil.copytree(OLD, tmp_path / "out")
    with pytest.raises(FinetuneError, match="holds another run"):
        finetune(tiny_checkpoint, path_of(tiny_checkpoint), "task:law", tmp_path / "out", make_settings(steps=1), tasks=tiny_task)


@pytest.mark.parametrize(("code", "said"), [((0.03, 0.02, 0.04), True), ((0.03, -0.02, 0.08), False)])
def test_the_hint_of_the_command_follows_the_measurement(monkeypatch, tmp_path, code, said):
    monkeypatch.setattr("dbes.finetuning.run.finetune", lambda *_, **__: report_of(code=code))
    given = ["finetune", "--paths", "p.json", "--data", "task:law", "--out", str(tmp_path / "a b"), "--steps", "7"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert ("Less may be forgotten with protection" in done.stderr) == said
    wanted = f"finetune --model embedded --paths p.json --data task:law --out '{tmp_path / 'a b'}-protected' --steps 7 --protect 0.03"
    assert (wanted in done.stderr) == said
    assert json.loads(CliRunner().invoke(app, [*given, "--format", "json"]).stdout)["target"] == "law"
