"""A whole run: what is saved, that nothing else moved, and that it goes on after a kill, over processes, and not on bad input."""

import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dbes.errors import FinetuneError
from dbes.finetuning import machine, training
from dbes.finetuning.output import merge
from dbes.finetuning.report import read_report
from dbes.finetuning.run import checked_path, finetune
from dbes.finetuning.settings import Tracker, make_settings
from dbes.finetuning.state import LOG, STATE
from dbes.models import load_model
from dbes.paths.types import Cell, ExpertPath, Provenance

CELLS = (Cell(0, 1), Cell(0, 3), Cell(1, 0), Cell(1, 5), Cell(2, 2), Cell(2, 7))


@functools.cache
def revision_of(checkpoint):
    return load_model(checkpoint).revision


def path_of(checkpoint, **changes):
    values = {
        "domain": "law", "rule": "specialization", "cells": CELLS, "layers": (0, 1, 2), "experts": (8, 8, 8), "share": 0.25,
        "provenance": Provenance(model="tiny", revision=revision_of(checkpoint), dbes="0"),
    }  # fmt: skip
    return ExpertPath(**{**values, **changes})


def settings(**changes):
    kept = {"steps": 6, "lr": 1e-2, "early_stopping": False, "batch_size": 4, "seq_len": 32, "weight_decay": 0.1}
    return make_settings(**kept | changes)


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tiny_task, tmp_path_factory):
    """Trains, in a folder of its own, and returns the report and the folder."""

    def go(out=None, data="task:law", model=tiny_checkpoint, path=None, limit=2, save="model", named=None, **changes):
        out = out or tmp_path_factory.mktemp("run")
        chosen = path or path_of(model)
        return finetune(model, chosen, data, out, settings(**changes), tasks=tiny_task, limit=limit, save=save, **(named or {})), out

    return go


@pytest.fixture(scope="module")
def finished(run):
    return run()


def tensors(folder):
    """The checkpoint's tensors as plain transformers loads them; no key may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model, dict(model.state_dict())


def is_chosen(name, expert):
    return any(f"layers.{layer}.mlp.experts." in name and expert == chosen for layer, chosen in CELLS)


def assert_only_chosen_differ(base, trained):
    assert base.keys() == trained.keys()
    moved = 0
    for name, value in base.items():
        if ".experts." in name:
            for expert in range(8):
                equal = torch.equal(value[expert], trained[name][expert])
                assert equal != is_chosen(name, expert), (name, expert)
                moved += not equal
        else:
            assert torch.equal(value, trained[name]), name
    assert moved == 2 * len(CELLS)


def test_the_checkpoint_loads_in_plain_transformers_and_only_chosen_experts_differ(finished, tiny_checkpoint):
    report, folder = finished
    _, base = tensors(tiny_checkpoint)
    _, trained = tensors(folder)
    assert_only_chosen_differ(base, trained)
    assert AutoTokenizer.from_pretrained(folder)("abc") == AutoTokenizer.from_pretrained(tiny_checkpoint)("abc")
    assert json.loads((folder / "config.json").read_text()) == json.loads((tiny_checkpoint / "config.json").read_text())
    assert not list(folder.glob(".*")), "nothing temporary is left"
    assert not (folder / STATE).exists()
    assert report.train_loss[1] < report.train_loss[0] - 0.02


def test_the_reloaded_logits_are_those_of_the_model_that_was_measured(run, monkeypatch, tiny_checkpoint):
    seen = {}

    def keep(model, cells, *arguments, **named):
        done = real(model, cells, *arguments, **named)
        with torch.no_grad():
            seen["trained"] = model.eval()(input_ids=ids).logits
        return done

    real, ids = training.train, torch.arange(1, 60).view(1, -1)
    monkeypatch.setattr("dbes.finetuning.run.train", keep)
    _, folder = run()
    with torch.no_grad():
        assert torch.equal(tensors(folder)[0].eval()(input_ids=ids).logits, seen["trained"])
        assert not torch.equal(tensors(tiny_checkpoint)[0].eval()(input_ids=ids).logits, seen["trained"])


def test_the_report_and_the_log_say_what_was_done(finished):
    report, folder = finished
    assert read_report(folder) == report
    assert report.target == "law" and list(report.before) == list(report.after) == ["law", "code", "math"]
    assert report.parameters == len(CELLS) * 3 * 32 * 16
    assert report.chosen_bytes == 4 * report.parameters
    assert report.optimizer_bytes == 2 * report.chosen_bytes
    assert report.peak_memory_bytes is not None and report.peak_memory_bytes > 1e8
    assert report.gain == pytest.approx(report.before["law"].bits_per_byte - report.after["law"].bits_per_byte)
    risen = [report.after[name].bits_per_byte - report.before[name].bits_per_byte for name in ("code", "math")]
    assert report.forgetting_mean == pytest.approx(sum(risen) / 2)
    assert report.forgetting_worst == max(risen)
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(6)) and report.steps == 6
    assert log[0]["loss"] == report.train_loss[0] and log[-1]["loss"] == report.train_loss[1]
    assert all(record["active"] <= record["tensors"] == 2 * len(CELLS) for record in log)


def test_a_finished_run_is_returned_and_another_one_refused(finished, run, monkeypatch):
    report, folder = finished
    monkeypatch.setattr("dbes.finetuning.run.train", lambda *_, **__: pytest.fail("trained again"))
    assert run(out=folder)[0] == report
    with pytest.raises(FinetuneError, match="holds another run"):
        run(out=folder, seed=1)


def test_a_folder_with_a_checkpoint_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FinetuneError, match="holds a checkpoint already"):
        run(out=tmp_path)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"train_router": True}], ids=["full", "rank2", "router"])
def test_a_delta_merges_into_what_would_have_been_saved(run, finished, tmp_path, tiny_checkpoint, changes):
    _, folder = run(**changes) if changes else finished
    _, delta = run(save="delta", **changes)
    assert sum(path.stat().st_size for path in delta.glob("delta.*")) < 0.3 * (folder / "model.safetensors").stat().st_size
    merged = merge(str(tiny_checkpoint), delta, tmp_path / "merged")
    assert load_file(merged / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(merged / "model.safetensors")[name], value), name


def test_a_merge_is_found_finished_and_takes_no_other_base_or_delta(run, finished, tmp_path, tiny_checkpoint):
    _, folder = finished
    _, delta = run(save="delta")
    merged = merge(str(tiny_checkpoint), delta, tmp_path / "merged")
    times = {path: path.stat().st_mtime_ns for path in merged.iterdir()}
    assert merge(str(tiny_checkpoint), delta, tmp_path / "merged") == merged
    assert times == {path: path.stat().st_mtime_ns for path in merged.iterdir()}
    shutil.copytree(tiny_checkpoint, tmp_path / "occupied")
    with pytest.raises(FinetuneError, match="holds a checkpoint already"):
        merge(str(tiny_checkpoint), delta, tmp_path / "occupied")
    with pytest.raises(FinetuneError, match="not those that the delta was trained from"):
        merge(str(folder), delta, tmp_path / "other")
    content = bytearray((delta / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (delta / "delta.safetensors").write_bytes(content)
    with pytest.raises(FinetuneError, match="altered or cut short"):
        merge(str(tiny_checkpoint), delta, tmp_path / "again")
    with pytest.raises(FinetuneError, match=r"no delta here \(delta.json is missing\)"):
        merge(str(tiny_checkpoint), tmp_path, tmp_path / "again")


def test_a_bf16_checkpoint_stays_one_and_keeps_every_other_bit(run, tiny_checkpoint, tmp_path):
    model, _ = tensors(tiny_checkpoint)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "narrow")
    _, base = tensors(tmp_path / "narrow")
    _, folder = run(model=tmp_path / "narrow")
    _, trained = tensors(folder)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert_only_chosen_differ(base, trained)


def test_mixed_precision_and_gradient_checkpointing_run(run):
    from accelerate.state import AcceleratorState

    plain, _ = run()
    AcceleratorState._reset_state()
    try:
        mixed, _ = run(bf16=True, gradient_checkpointing=True, eval_every=4)
    finally:
        AcceleratorState._reset_state()
    assert mixed.train_loss[1] == pytest.approx(plain.train_loss[1], rel=0.02)
    assert mixed.train_loss[1] != plain.train_loss[1]


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}, {"method": "view_leaves"}], ids=str)
def test_what_saves_memory_changes_no_result(run, finished, changes):
    _, folder = run(**changes)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(finished[1] / "model.safetensors")
    assert all(torch.allclose(value, theirs[name], atol=2e-4) for name, value in ours.items())


def test_an_interrupted_run_ends_like_one_that_was_not(run, finished, monkeypatch, tmp_path):
    real = training._gradients
    calls = []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(training, "_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, named={"checkpoint_seconds": 0})
    with pytest.raises(FinetuneError, match="state of another run"):
        run(out=tmp_path, seed=1)
    report, _ = run(out=tmp_path, named={"checkpoint_seconds": 0})
    assert len(calls) == 5 + 3, "the state of step 3 was gone on with"
    assert same_weights(tmp_path, finished[1])
    assert [line["loss"] for line in logged(tmp_path)] == [line["loss"] for line in logged(finished[1])]
    assert report.after == finished[0].after


def same_weights(one, other):
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def logged(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(run, monkeypatch, tmp_path):
    real = training.token_nats
    calls = []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(training, "token_nats", broken)
    with pytest.raises(FinetuneError, match=r"the loss is nan at step 3: training stopped; the last good state is kept in .*Lower --lr"):
        run(out=tmp_path, named={"checkpoint_seconds": 0})
    state = load_file(tmp_path / STATE)
    assert all(value.isfinite().all() for value in state.values())
    assert [record["loss"] for record in logged(tmp_path)][-1] is None
    assert not (tmp_path / "config.json").exists()


def test_an_exploding_run_is_stopped(run):
    with pytest.raises(FinetuneError, match="training stopped"):
        run(lr=1e30, warmup=0.0, steps=4)


@pytest.mark.parametrize(
    "problem", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError(), torch.OutOfMemoryError("x")]
)
def test_out_of_memory_names_the_remedies(run, monkeypatch, problem):
    def exhausted(*_):
        raise problem

    monkeypatch.setattr(training, "token_nats", exhausted)
    with pytest.raises(FinetuneError, match=r"out of memory .*micro_batch_size: 1, gradient_checkpointing: true"):
        run()
    monkeypatch.setattr(training, "token_nats", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()


def test_a_path_that_no_token_takes_is_refused(run, tiny_checkpoint, tmp_path):
    model, _ = tensors(tiny_checkpoint)
    with torch.no_grad():
        for layer in model.model.layers:  # all tokens go to experts 4 and above
            layer.mlp.gate.weight[:4] = -layer.mlp.gate.weight[4:]
            layer.post_attention_layernorm.weight.zero_()
    # logits are all zero then: ties, broken towards the first experts
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "tied")
    with torch.no_grad():
        used = set(model(input_ids=torch.arange(9)[None], output_router_logits=True).router_logits[0].topk(2).indices.flatten().tolist())
    idle = tuple(Cell(layer, expert) for layer in range(3) for expert in sorted(set(range(8)) - used)[:1])
    for method in ("split_bank", "view_leaves"):
        with pytest.raises(FinetuneError, match="no token of the data is routed to any of the 3 chosen experts"):
            run(model=tmp_path / "tied", path=path_of(tmp_path / "tied", cells=idle), method=method)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": (1, 2, 3), "cells": (Cell(1, 0),)},
            "the path is of another model: its MoE layers are 1, 2, 3, those of tiny-olmoe 0, 1, 2",
        ),
        ({"experts": (16, 16, 16)}, "the path is of another model: it has 16 experts by layer, tiny-olmoe 8"),
        ({"provenance": Provenance(model="m", revision="sha256:1", dbes="0")}, "found on revision sha256:1 of m, this is sha256:"),
    ],
)
def test_paths_of_other_models_are_refused(tiny_checkpoint, changes, message):
    with pytest.raises(FinetuneError, match=message):
        checked_path(path_of(tiny_checkpoint, **changes), load_model(tiny_checkpoint))


def test_paths_are_read_from_both_formats_and_empty_ones_refused(tiny_checkpoint, tmp_path):
    loaded, path = load_model(tiny_checkpoint), path_of(tiny_checkpoint)
    assert checked_path(path.save(tmp_path / "own.json"), loaded) == path
    assert checked_path(path.save(tmp_path / "esft.json", format="esft"), loaded).cells == CELLS
    content = json.loads((tmp_path / "own.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "cells": []}))
    (tmp_path / "empty_esft.json").write_text('{"experts": {"0": []}, "shared_experts": false, "non_expert_modules": false}')
    (tmp_path / "other.json").write_text('{"experts": {"9": [1]}, "shared_experts": false, "non_expert_modules": false}')
    for name, message in (("empty", "path is empty"), ("empty_esft", "path is empty"), ("other", "path of another model")):
        with pytest.raises(FinetuneError, match=message):
            checked_path(tmp_path / f"{name}.json", loaded)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "epochs": 1.0}, "give steps or epochs, not both"),
        ({"steps": 0}, "--steps: .*greater than or equal to 1"),
        ({"steps": 1, "lr": 0.0}, r"--lr: expected auto or a number above 0 \(given: 0.0\)"),
        ({"steps": 1, "lr": "fast"}, "--lr: expected auto or a number above 0"),
        ({"steps": 1, "lr": True}, "--lr: expected auto or a number above 0"),
        ({"steps": 1, "lr": float("nan")}, "--lr: expected auto or a number above 0"),
        ({"steps": 1, "seq_len": 1}, "seq_len: "),
        ({"patience": 0}, "patience: "),
        ({"steps": 1, "colour": 1}, "colour: no such setting; there are steps, epochs, lr"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(FinetuneError, match=message):
        make_settings(**values)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(run):
    _, folder = run(steps=20, warmup=0.1, lr=1e-3, data="task:law")
    rates = [line["lr"] for line in logged(folder)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 18)) / 2 for step in range(18)]
    assert rates == pytest.approx([1e-3 * share for share in (1 / 3, 2 / 3, *cosine)])


def test_every_epoch_takes_every_sample_once():
    places = [place for step in range(9) for place in training.batch_places(step, 4, 12, seed=0)]
    assert [sorted(places[start : start + 12]) for start in (0, 12, 24)] == [list(range(12))] * 3
    assert places[:12] != places[12:24]
    assert settings(steps=None, epochs=1.5).total_steps(12) == 5
    assert settings(steps=None).total_steps(12) == 12, "four passes in batches of 4"


def test_sharded_training_is_refused(run, monkeypatch):
    with pytest.raises(FinetuneError, match="FSDP cuts the fused tensors"):
        machine.refuse_sharding(SimpleNamespace(distributed_type="FSDP"))
    machine.refuse_sharding(SimpleNamespace(distributed_type="MULTI_GPU"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FinetuneError, match="plain multi-process mode"):
        run()


def test_a_batch_that_processes_cannot_share_evenly_is_refused():
    three = SimpleNamespace(distributed_type="MULTI_CPU", num_processes=3, is_main_process=True)
    nothing: Any = None
    with pytest.raises(FinetuneError, match="batch_size 4 cannot be shared evenly by 3 processes"):
        training.train(nothing, nothing, [nothing], settings(), padding=0, accelerator=three)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(run, monkeypatch, tracker, tmp_path):
    # a folder of the package's name, such as W&B leaves in the working directory, is found but is no package
    for found in (None, SimpleNamespace(origin=None)):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=found: found)
        with pytest.raises(FinetuneError, match=rf"tracker {tracker}: .*pip install 'dbes\[{tracker}\]'"):
            run(tracker=tracker, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extras_are_named_after_their_trackers():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert {name: project["optional-dependencies"][name] for name in get_args(Tracker) if name != "none"} == {
        "tensorboard": ["tensorboard"],
        "trackio": ["trackio"],
        "wandb": ["wandb"],
    }


class Recorder(GeneralTracker):
    """Keeps what it is given."""

    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.rows.append((step, values))


def test_what_a_tracker_prints_keeps_off_the_standard_output(run, monkeypatch, capsys):
    monkeypatch.setattr("dbes.finetuning.run.is_installed", lambda _: True)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [Recorder()])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, **__: print("hello from the tracker"))
    monkeypatch.setattr(Accelerator, "end_training", lambda _: print("bye from the tracker"))
    run(tracker="wandb", steps=1)
    shown = capsys.readouterr()
    assert "from the tracker" not in shown.out and shown.err.count("from the tracker") == 2


def test_a_tracker_gets_every_step_and_every_evaluation(run):
    recorder = Recorder()
    accelerator = Accelerator(log_with=recorder)
    accelerator.init_trackers("x")
    report, folder = run(eval_every=2, named={"accelerator": accelerator})
    assert_tracked(recorder.rows, report, folder)


def assert_tracked(rows, report, folder, tolerance=0.0):
    """Loss and learning rate of all six steps; bits per byte before, after 2 and 4 updates, and after the last."""
    log, found = logged(folder), {}
    for step, values in rows:
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    assert found["loss"] == pytest.approx({line["step"]: line["loss"] for line in log}, abs=tolerance)
    assert found["lr"] == pytest.approx({line["step"]: line["lr"] for line in log}, abs=tolerance)
    assert "step" not in found and not any(name.startswith("accuracy") for name in found)
    for name in ("law", "code", "math"):
        expected = {0: report.before[name].bits_per_byte, 6: report.after[name].bits_per_byte}
        expected |= {line["step"] + 1: line["bits_per_byte"][name] for line in log if "bits_per_byte" in line}
        assert sorted(expected) == [0, 2, 4, 6]
        assert found[f"bits_per_byte/{name}"] == pytest.approx(expected, abs=tolerance)


def test_tensorboard_events_hold_loss_rate_and_evaluations(run, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    report, _ = run(out=out, eval_every=2, tracker="tensorboard")
    events = event_accumulator.EventAccumulator(str(out / "dbes")).Reload()
    rows = [(event.step, {name: event.value}) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    assert_tracked(rows, report, out, tolerance=1e-5)  # written as float32
    files = sorted(out.rglob("events*"))
    assert run(out=out, eval_every=2, tracker="tensorboard")[0] == report
    assert sorted(out.rglob("events*")) == files, "a finished run leaves no empty one behind"


def slow(value):
    """A case for the slow tests alone, of a behaviour that others show in the default ones."""
    return pytest.param(value, marks=pytest.mark.slow)


def command(checkpoint, task, folder, out, steps, pause=0, protect=None, rate=1e-2):
    script = Path(__file__).parent / "finetune_process.py"
    path = path_of(checkpoint).save(folder / "paths.json")
    return [sys.executable, *map(str, (script, checkpoint, task, path, out, steps, pause, protect or "", rate))]


@pytest.mark.slow
def test_a_run_killed_by_sigkill_ends_like_one_that_was_not(run, tiny_checkpoint, tiny_task, tmp_path):
    _, whole = run(steps=12)
    out = tmp_path / "cut"
    process = subprocess.Popen(
        command(tiny_checkpoint, tiny_task, tmp_path, out, 12, 0.2),
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads as the run that goes on with it
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not ((out / LOG).is_file() and len((out / LOG).read_text().splitlines()) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (out / STATE).is_file() and not (out / "config.json").exists()
    run(out=out, steps=12)
    assert same_weights(out, whole)
    assert [line["loss"] for line in logged(out)] == [line["loss"] for line in logged(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("protect", [None, 0.03], ids=["plain", "protected"])
def test_two_gloo_processes_equal_one(run, tiny_checkpoint, tiny_task, tmp_path, protect):
    finished = run(protect=protect)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            command(tiny_checkpoint, tiny_task, tmp_path, tmp_path / "two", 6, protect=protect),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    report = read_report(tmp_path / "two")
    assert report is not None and report.processes == 2
    ours, theirs = load_file(tmp_path / "two" / "model.safetensors"), load_file(finished[1] / "model.safetensors")
    assert all(torch.allclose(value, theirs[name], atol=2e-4) for name, value in ours.items())
    for one, two in zip(logged(finished[1]), logged(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["active"] == one["active"]
    for name, score in finished[0].after.items():
        assert report.after[name].bits_per_byte == pytest.approx(score.bits_per_byte, abs=1e-4)
        assert report.after[name].tokens == score.tokens
