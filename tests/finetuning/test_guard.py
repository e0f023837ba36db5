"""Protected domains guard the learning rate and the step that is kept."""

import math

import numpy as np
import pytest
from test_choice import run  # noqa: F401
from test_run import same_weights, settings, slow
from test_validation import entries

from dbes.finetuning import guard as guard_module
from dbes.finetuning import training
from dbes.finetuning.choice import RATES, Rise, find_rate
from dbes.finetuning.guard import FEWEST, KEPT, NOISE, TEXTS, Guard, split_protected
from dbes.finetuning.report import read_report
from dbes.finetuning.summary import findings
from dbes.finetuning.validation import best_step, stalled
from dbes.models import load_model
from dbes.models.encoding import Sample
from dbes.tasks.entries import prepare_data

BITS = math.log(2)


def sample(text_bytes):
    return Sample(np.arange(3), np.asarray([False, True, True]), text_bytes)


def test_a_rise_is_held_against_the_fall_and_its_noise_by_hand():
    guard = Guard(samples={"a": [sample(10), sample(10)], "b": [sample(20)]})
    before = {"a": [0.0, 0.0], "b": [0.0]}
    rise = guard.rise(before, {"a": [1 * BITS, 3 * BITS], "b": [-BITS]}, fall=1.0)
    # a rose by 4 bits in 20 bytes; the residuals are -1 and 1, so that SE = sqrt(2 * 2 / 1) / 20
    assert rise.domain == "a" and rise.change == pytest.approx(0.2) and rise.allowed == pytest.approx(KEPT + NOISE * 0.1)
    assert rise.is_kept
    worse = guard.rise(before, {"a": [2 * BITS, 2 * BITS], "b": [3 * BITS]}, fall=1.0)
    assert worse.domain == "a" and not worse.is_kept and worse.allowed == pytest.approx(KEPT), "no noise where texts agree"
    assert guard.rise(before, before, fall=-1.0).allowed == 0 and guard.rise(before, before, fall=-1.0).is_kept
    lost = guard.rise(before, {"a": [math.nan, 0.0], "b": [9.0]}, fall=1.0)
    assert lost.domain == "a" and lost.change is None and not lost.is_kept


def test_the_rate_of_the_largest_fall_is_taken_among_those_that_keep():
    losses = dict(zip(RATES, [3.99, 3.98, 3.9, 3.8, 3.6, 3.5, 3.4, 3.2, 3.0, 2.9, 2.8, 2.7], strict=True))

    def found(*kept):
        return find_rate(lambda rate: losses[rate], before=4.0, known={}, keeps=lambda rate: rate in kept, enough=1.0)

    assert found(*RATES) == 0.3
    assert found(*RATES[:8]) == RATES[7], "two thirds are not enough"
    assert found(*RATES[:4]) == RATES[3]
    assert found() == RATES[0]


def test_a_step_that_does_not_keep_is_never_the_best():
    losses = [(0, 5.0), (4, 4.0), (8, 3.0), (12, 2.0)]
    assert best_step(losses, {8, 12}) == 4 and best_step(losses, {4, 8, 12}) == 0
    assert stalled(losses, 2, {8, 12}) and not stalled(losses, 3, {8, 12}) and not stalled(losses, 1)


@pytest.mark.parametrize("sources", [FEWEST - 1, FEWEST, 40, 200])
def test_matrices_are_made_of_other_texts_where_there_are_enough(sources, tiny_checkpoint):
    given = {"law": entries(sources, per_source=2)}
    matrices, guard = split_protected(given, load_model(tiny_checkpoint).tokenizer, settings())
    enough = sources >= FEWEST
    assert guard.shared == (() if enough else ("law",)) and guard.texts == min(TEXTS, sources // 4 if enough else sources)
    apart = {entry.source for entry in given["law"]} - {entry.source for entry in matrices["law"]}
    assert len(apart) == (guard.texts if enough else 0)


def test_what_guards_is_not_what_is_reported(tiny_checkpoint, tiny_task):
    found, loaded = prepare_data("task:law", tasks=tiny_task), load_model(tiny_checkpoint)
    for name, part in found.elsewhere.items():
        assert not {entry.source for entry in part} & {entry.source for entry in found.heldout[name]}
    matrices, guard = split_protected(found.elsewhere, loaded.tokenizer, settings())
    assert guard.texts and set(matrices) == set(found.elsewhere) and "law" not in guard.samples


@pytest.fixture
def planted(monkeypatch):
    """A conflict: protected domains rise far above what is allowed where a condition on the learning rate of the last update holds."""

    def go(bad):
        real, prepare, last = Guard.rise, training._prepare, []

        def prepared(training_run, step, rate):
            last[:] = [rate]
            return prepare(training_run, step, rate)

        def rise(self, before, now, *, fall):
            real(self, before, now, fall=fall)
            return Rise(domain="code", change=1.0 if last and bad(last[0]) else 0.0, allowed=0.1)

        monkeypatch.setattr(training, "_prepare", prepared)
        monkeypatch.setattr(guard_module.Guard, "rise", rise)

    return go


def test_a_rate_that_does_not_keep_is_refused(run, planted):  # noqa: F811
    planted(lambda rate: rate > 2e-4)
    said = []
    report, folder = run(steps=12, protect=0.03, named={"say": said.append})
    choice = report.choice
    assert choice.lr <= 1e-4 and choice.guard_texts > 0 and not choice.none_keeps
    assert [trial.keeps for trial in choice.trials] == [trial.lr < 2e-4 for trial in choice.trials]
    assert len(choice.rises) == len(choice.losses) - 1
    assert report == read_report(folder)
    assert any("above 0.1000" in line for line in said) and any("refused (code +1.0000" in line for line in findings(report))


def test_where_no_rate_keeps_the_smallest_is_taken_and_nothing_is_kept(run, planted):  # noqa: F811
    planted(lambda _: True)
    said = []
    report, _ = run(steps=60, protect=0.03, patience=2, named={"say": said.append})
    choice = report.choice
    assert choice.lr == RATES[0] and choice.none_keeps and choice.best_step == 0 and report.gain == 0
    assert choice.stopped == "forgetting" and report.steps == 2 * choice.check_every
    told = "no learning rate kept the protected domains; the smallest, 1e-06, "
    assert any(told in line for line in said) and any(told in line for line in report.warnings)


def test_a_given_rate_is_used_and_steps_are_guarded_all_the_same(run, planted):  # noqa: F811
    planted(lambda _: True)
    report, _ = run(steps=60, lr=1e-2, protect=0.03, patience=2)
    assert report.choice.lr == 1e-2 and not report.choice.trials and report.choice.best_step == 0
    free, _ = run(steps=6, lr=1e-2, patience=2)
    assert free.choice.guard_texts == 0 and not free.choice.rises


@pytest.mark.parametrize("interrupted", [False, slow(True)])
def test_a_state_that_does_not_keep_is_gone_back_from_at_a_third_of_the_rate(run, monkeypatch, tmp_path, interrupted):  # noqa: F811
    """The second check refuses: the third starts from the first, and a run that is interrupted after it ends alike."""
    real, prepare, steps, peaks = Guard.rise, training._prepare, [0], {}

    def prepared(training_run, step, rate):
        steps[:], peaks[step] = [step], training_run.checks.found.lr and training_run.checks.found.peak
        if step == stop_at:
            raise KeyboardInterrupt
        return prepare(training_run, step, rate)

    def rise(self, before, now, *, fall):
        return real(self, before, now, fall=fall).model_copy(update={"change": 1.0 if 8 < steps[0] < 20 else 0.0, "allowed": 0.1})

    monkeypatch.setattr(training, "_prepare", prepared)
    monkeypatch.setattr(guard_module.Guard, "rise", rise)
    stop_at = None
    report, folder = run(steps=60, protect=0.03)
    choice = report.choice
    refused = [step for step, one in choice.rises if not one.is_kept]
    assert refused and choice.retreats == len(refused) and choice.best_step not in refused
    assert peaks[refused[0] - 1] == choice.lr and peaks[refused[-1]] == pytest.approx(choice.lr / 3 ** len(refused))
    if not interrupted:
        return
    stop_at = refused[-1] + 2
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, steps=60, protect=0.03, named={"checkpoint_seconds": 0})
    stop_at = None
    again, _ = run(out=tmp_path, steps=60, protect=0.03)
    assert same_weights(tmp_path, folder) and again.choice.rises == choice.rises


@pytest.mark.parametrize("at", [slow(2), slow(7), 25], ids=lambda at: f"forward {at}")
def test_an_interrupted_protected_run_makes_no_other_choice(run, monkeypatch, tmp_path, at):  # noqa: F811
    whole, folder = run(steps=12, protect=0.03)
    real, calls = training._gradients, []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(training, "_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, steps=12, protect=0.03, named={"checkpoint_seconds": 0})
    monkeypatch.setattr(training, "_gradients", real)
    report, _ = run(out=tmp_path, steps=12, protect=0.03)
    assert same_weights(tmp_path, folder)
    assert report.choice.model_copy(update={"search_seconds": whole.choice.search_seconds}) == whole.choice


def test_guarding_is_off_where_nothing_is_chosen(run):  # noqa: F811
    report, _ = run(steps=3, lr=1e-2, early_stopping=False, protect=0.03)
    assert report.choice.guard_texts == 0 and report.choice.rises == ()
