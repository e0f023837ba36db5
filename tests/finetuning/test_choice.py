"""A run that finds its learning rate and stops by validation text: what it keeps, and that it ends alike after a kill."""

import os
import signal
import socket
import subprocess
import time

import pytest
import torch
from test_run import command, logged, path_of, same_weights, settings, slow, tensors
from test_validation import Alone

from dbes.errors import FinetuneError
from dbes.finetuning import checks, training
from dbes.finetuning.choice import FALLBACK
from dbes.finetuning.report import read_report
from dbes.finetuning.run import finetune
from dbes.finetuning.state import STATE
from dbes.finetuning.summary import findings
from dbes.finetuning.validation import best_step, split_validation, validation_loss
from dbes.models import load_model
from dbes.tasks.entries import prepare_data

AUTO = {"lr": "auto", "early_stopping": True}


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tiny_task, tmp_path_factory):
    """Trains, in a folder of its own, and returns the report and the folder."""

    def go(out=None, data="task:law", named=None, **changes):
        out = out or tmp_path_factory.mktemp("run")
        given = settings(**AUTO | changes)
        return finetune(tiny_checkpoint, path_of(tiny_checkpoint), data, out, given, tasks=tiny_task, limit=2, **(named or {})), out

    return go


@pytest.fixture(scope="module")
def finished(run):
    return run(steps=12)


def test_the_report_says_what_was_tried_and_kept(finished):
    report, folder = finished
    assert report == read_report(folder) and report.schema_version == 2
    choice = report.choice
    assert choice.source == "range test" and choice.lr in [trial.lr for trial in choice.trials]
    assert len(choice.trials) == len({trial.lr for trial in choice.trials}) >= 3 and choice.trial_steps == 4
    fall = [choice.losses[0][1] - trial.loss for trial in choice.trials if trial.loss is not None]
    assert choice.losses[0][1] - {trial.lr: trial.loss for trial in choice.trials}[choice.lr] >= max(fall) * 2 / 3 > 0
    assert [step for step, _ in choice.losses][:2] == [0, choice.check_every]
    assert choice.best_step == best_step(choice.losses)
    assert 0 < choice.search_seconds < report.seconds
    assert [line["step"] for line in logged(folder)] == list(range(report.steps))
    assert [line["validation_loss"] for line in logged(folder) if "validation_loss" in line] == [loss for _, loss in choice.losses[1:]]
    assert report.passes == choice.best_step * 4 / report.sequences


def test_what_is_chosen_by_is_neither_trained_on_nor_reported(tiny_checkpoint, tiny_task):
    found, loaded = prepare_data("task:law", tasks=tiny_task), load_model(tiny_checkpoint)
    split = split_validation(found.training, loaded.tokenizer, settings(**AUTO))
    assert split.validation and split.unit == "sequences"
    rows = [{tuple(sample.ids) for sample in part} for part in (split.training, split.validation)]
    assert not rows[0] & rows[1]
    assert not {entry.id for entry in found.training} & {entry.id for entry in found.heldout["law"]}


def test_trials_leave_no_trace_in_the_run(run, finished):
    report, folder = finished
    given, other = run(steps=12, lr=report.choice.lr)
    assert given.choice.source == "given" and not given.choice.trials
    assert given.choice.losses == report.choice.losses and same_weights(folder, other)


@pytest.fixture
def scripted(monkeypatch):
    """Lets checks find the losses of a script; what they would have found is returned, in order."""

    def go(losses):
        real, found, script = validation_loss, [], iter(losses)

        def told(*arguments, **named):
            found.append(real(*arguments, **named))
            return next(script)

        monkeypatch.setattr(checks, "validation_loss", told)
        return found

    return go


LOW_RANK = {"lora_rank": 2}
PROTECTED = {"protect": 0.03}
WAYS = [{}, {"method": "view_leaves"}, LOW_RANK, LOW_RANK | {"method": "view_leaves"}, {"train_router": True}, PROTECTED]


@pytest.mark.parametrize("changes", [way if way in ({}, PROTECTED) else slow(way) for way in WAYS], ids=str)
def test_every_way_of_training_keeps_the_step_of_the_lowest_loss(run, scripted, tiny_checkpoint, tiny_task, changes):
    real = scripted([5, 4.5, 4, 4.2, 4.1, 0, 0])
    report, folder = run(steps=60, lr=1e-2, patience=2, **changes)
    every = report.choice.check_every
    assert every == 7 or ("protect" in changes and every > 7), "checks of protected domains cost too"
    assert (report.choice.best_step, report.steps, report.choice.stopped) == (2 * every, 4 * every, "stalled")
    saved = saved_loss(folder, tiny_checkpoint, tiny_task)
    assert len(real) == 5 and saved == pytest.approx(real[2], abs=2e-5)
    assert min(abs(saved - other) for other in (*real[:2], *real[3:])) > 1e-4


@pytest.mark.parametrize("changes", [slow(way) if way not in (WAYS[3], PROTECTED) else way for way in WAYS[1:]], ids=str)
def test_every_way_of_training_finds_a_rate(run, tiny_checkpoint, tiny_task, changes):
    report, folder = run(steps=8, **changes)
    assert report.choice.source == "range test" and len(report.choice.trials) >= 3
    loss = min(loss for _, loss in report.choice.losses)
    assert saved_loss(folder, tiny_checkpoint, tiny_task) == pytest.approx(loss, abs=2e-5)


def saved_loss(folder, tiny_checkpoint, tiny_task):
    """The validation loss of the checkpoint that was written, in plain transformers."""
    found, tokenizer = prepare_data("task:law", tasks=tiny_task), load_model(tiny_checkpoint).tokenizer
    split = split_validation(found.training, tokenizer, settings(**AUTO))
    return validation_loss(tensors(folder)[0], split.validation, padding=0, accelerator=Alone())


def test_a_run_that_only_harms_saves_the_model_as_it_was(run, scripted, tiny_checkpoint):
    scripted([5, 5.5, 6, 0])
    report, folder = run(steps=40, lr=1e-2, patience=2)
    assert report.choice.best_step == 0 and report.steps == 14 and report.gain == 0
    (_, base), (_, saved) = tensors(tiny_checkpoint), tensors(folder)
    assert all(torch.equal(value, saved[name]) for name, value in base.items())
    assert any("kept none of 14 steps: none was better than the model before" in line for line in findings(report))


def test_a_validation_loss_that_is_not_a_number_ends_the_run(run, scripted):
    scripted([5, float("nan")])
    with pytest.raises(FinetuneError, match="the loss on validation text is nan after 7 updates; lower --lr"):
        run(steps=40, lr=1e-2)


def test_without_early_stopping_the_last_step_is_kept(run, scripted):
    real = scripted([])
    report, _ = run(steps=3, lr=1e-2, early_stopping=False)
    assert not real and report.choice.best_step == report.steps == 3 and report.choice.check_every == 0
    assert any("no early stopping" in line for line in findings(report))


def test_a_rate_is_found_without_early_stopping_too(run):
    report, _ = run(steps=3, early_stopping=False)
    assert report.choice.source == "range test" and report.choice.check_every == 0 and report.choice.best_step == 3
    assert [step for step, _ in report.choice.losses] == [0] and report.choice.validation_sequences > 0


def test_too_little_text_is_said_and_takes_the_fixed_rate(run, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n')
    said = []
    report, _ = run(data=str(tmp_path / "few.jsonl"), steps=3, named={"say": said.append})
    assert report.choice.source == "fallback" and report.choice.lr == FALLBACK and report.choice.check_every == 0
    assert report.steps == report.choice.best_step == 3 and report.validation_unit == "nothing"
    warning = "sequences are too few to set some apart to choose by (at least 10): no early stopping and no test of learning rates"
    assert any(warning in line for line in report.warnings) and any(warning in line for line in said)


@pytest.mark.parametrize("at", [slow(2), 7, slow(14), 17], ids=lambda at: f"forward {at}")
def test_an_interrupted_run_makes_no_other_choice(run, finished, monkeypatch, tmp_path, at):
    """Interrupted in the first trial, in the second, in the last, and in the run itself."""
    real, calls = training._gradients, []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(training, "_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, steps=12, named={"checkpoint_seconds": 0})
    monkeypatch.setattr(training, "_gradients", real)
    said = []
    report, _ = run(out=tmp_path, steps=12, named={"checkpoint_seconds": 0, "say": said.append})
    assert same_weights(tmp_path, finished[1]) and not (tmp_path / STATE).exists()
    theirs = finished[0].choice
    assert report.choice.model_copy(update={"search_seconds": theirs.search_seconds}) == theirs
    again = sum(line.startswith("learning rate") for line in said)
    assert again == max(0, len(theirs.trials) - (at - 1) // 4), "finished trials are not made again"


def test_a_run_with_another_rate_is_another_run(run, finished):
    with pytest.raises(FinetuneError, match="holds another run"):
        run(out=finished[1], steps=12, lr=finished[0].choice.lr)


@pytest.mark.slow
def test_a_run_killed_in_the_range_test_ends_like_one_that_was_not(run, tiny_checkpoint, tiny_task, tmp_path):
    whole, folder = run(steps=12)
    out = tmp_path / "cut"
    process = subprocess.Popen(
        command(tiny_checkpoint, tiny_task, tmp_path, out, 12, 0.2, rate="auto"), env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 100
    while not (out / STATE).is_file():  # written after the first trial
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    report, _ = run(out=out, steps=12)
    assert same_weights(out, folder) and report.choice.losses == whole.choice.losses


@pytest.mark.slow
@pytest.mark.parametrize("protect", [None, 0.03], ids=["plain", "protected"])
def test_two_gloo_processes_make_one_choice(run, tiny_checkpoint, tiny_task, tmp_path, protect):
    alone, _ = run(steps=12, protect=protect)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            command(tiny_checkpoint, tiny_task, tmp_path, tmp_path / "two", 12, protect=protect, rate="auto"),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    report, theirs = read_report(tmp_path / "two"), alone.choice
    assert report.processes == 2 and (report.choice.lr, report.choice.best_step) == (theirs.lr, theirs.best_step)
    for (step, one), (other, two) in zip(report.choice.losses, theirs.losses, strict=True):
        assert step == other and one == pytest.approx(two, abs=1e-5)
    for (step, one), (other, two) in zip(report.choice.rises, theirs.rises, strict=True):
        assert step == other and one.is_kept == two.is_kept
