"""The loop: exact gradients, identical after any interruption, stopped by NaN, and one run in one process or two."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_files import sealed
from testbed_mix import tiny_mix

from dbes.models.losses import next_token_loss
from dbes.testbed import training
from dbes.testbed.heldout import measure
from dbes.testbed.models import build_model
from dbes.testbed.settings import MixSettings, ModelSettings, OptimizerSettings, RoutingSettings, TrainSettings
from dbes.testbed.training import LOG, STATE, StateError, TrainingError, train

HERE = Path(__file__).parent


def settings(steps=6, *, routing=None, **changes):
    values = {
        "mix": MixSettings(tokens_per_step=256, lengths=(32,)),
        "model": ModelSettings(vocabulary=300, hidden=32, layers=2, experts=8, intermediate=8, max_positions=64),
        "routing": routing or RoutingSettings(micro_batch=2),
        "optimizer": OptimizerSettings(steps=steps, warmup=2, learning_rate=1e-2),
    }
    return TrainSettings(**{**values, **changes})


def weights(trained):
    return {name: value.detach().clone() for name, value in trained.model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_chunked_loss_is_the_plain_one_with_the_plain_gradient():
    model = build_model(settings().model, seed=0)
    tokens = torch.randint(2, 300, (70, 32), generator=torch.Generator().manual_seed(0))
    loss, nats = next_token_loss(model, tokens)
    (2 * loss).backward()
    chunked = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=tokens).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 300), tokens[:, 1:].reshape(-1))
    (2 * plain).backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert nats.mean().item() == pytest.approx(plain.item(), abs=1e-5)
    for name, value in model.named_parameters():
        assert torch.allclose(value.grad, chunked[name], atol=1e-6), name


def test_training_learns_and_logs_every_domain():
    trained = train(settings(steps=40), tiny_mix(), log_every=10)
    assert [record["step"] for record in trained.log] == [0, 10, 20, 30, 39]
    assert trained.log[-1]["loss"] < trained.log[0]["loss"] - 0.5
    assert set(trained.log[0]["loss_by_domain"]) == {"domain0", "domain1", "domain2", "domain3"}
    assert len(trained.log[0]["load_entropy"]) == 2
    assert trained.cpu_seconds > 0


def test_equal_settings_give_equal_weights_and_other_seeds_do_not():
    first, second, other = (train(settings(seed=seed), tiny_mix()) for seed in (0, 0, 1))
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize(
    "routing",
    [
        RoutingSettings(),
        RoutingSettings(balancing="loss_free", coefficient=0.05),
        RoutingSettings(router="rerandomised", balancing="none"),
        RoutingSettings(balancing="assignment", scope="sequence"),
    ],
    ids=lambda routing: f"{routing.router}-{routing.balancing}",
)
def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch, routing):
    whole = train(settings(8, routing=routing), tiny_mix(), folder=tmp_path / "whole", log_every=1)
    real, steps = training.train_step, []

    def interrupted(*arguments, **named):
        if named["step"] == 5 and 5 not in steps:
            steps.append(5)
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(8, routing=routing), tiny_mix(), folder=tmp_path / "cut", log_every=1, checkpoint_seconds=0)
    again = train(settings(8, routing=routing), tiny_mix(), folder=tmp_path / "cut", log_every=1, checkpoint_seconds=0)
    assert same(weights(whole), weights(again))
    assert torch.equal(whole.bias, again.bias)
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "cut")
    finished = train(settings(8, routing=routing), tiny_mix(), folder=tmp_path / "cut")
    assert same(weights(whole), weights(finished)), "a finished run is read back"


def test_a_state_of_an_earlier_version_is_resumed(tmp_path):
    whole = train(settings(4), tiny_mix())
    train(settings(4), tiny_mix(), folder=tmp_path)
    path, kept = tmp_path / STATE, {}
    with safe_open(path, "pt") as state:
        kept = {key: value for key, value in state.metadata().items() if key != "sha256"}
    path.write_bytes(sealed(save(load_file(path), kept)))
    assert same(weights(train(settings(4), tiny_mix(), folder=tmp_path)), weights(whole))


def without_time(folder):
    records = [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(settings(), tiny_mix(), folder=tmp_path)
    with pytest.raises(TrainingError, match="another run"):
        train(settings(seed=1), tiny_mix(), folder=tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_log(tmp_path):
    broken = settings(30, optimizer=OptimizerSettings(steps=30, warmup=0, learning_rate=1e12, clip=1e12))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step"):
        train(broken, tiny_mix(), folder=tmp_path, log_every=1)
    records = [json.loads(line) for line in (tmp_path / LOG).read_text("utf-8").splitlines()]
    assert records[0]["loss"] > 0
    assert records[-1]["loss"] is None


def test_learning_rate_warms_up_and_falls_to_its_share():
    optimizer = OptimizerSettings(steps=100, warmup=10, learning_rate=1.0, final_share=0.1)
    rates = [record["learning_rate"] for record in train(settings(100, optimizer=optimizer), tiny_mix(), log_every=1).log]
    assert rates[0] == pytest.approx(1 / 11, abs=1e-6)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_heldout_trace_and_losses_agree_with_a_plain_forward():
    trained, mix = train(settings(10), tiny_mix()), tiny_mix()
    found = measure(trained.model, mix, routing=settings().routing, length=32, documents=5, batch_tokens=100, keep_inputs=True)
    (routes,) = found.trace.loaded
    assert found.trace.tokens == 4 * 5 * 32 == len(found.entropy) == len(found.inputs)
    nats = np.zeros(4)
    for domain in range(4):
        for place in range(5):
            tokens = torch.from_numpy(mix.heldout[domain].document(place)[:32].astype(np.int64))[None]
            with torch.no_grad():
                logits = trained.model(input_ids=tokens).logits
            nats[domain] += float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))
    assert found.nats == pytest.approx(nats, rel=1e-4)
    assert found.tokens.tolist() == [5 * 31] * 4
    assert found.bits_per_byte == pytest.approx(nats / np.log(2) / (5 * 31 * 3), rel=1e-4)
    assert routes.token_ids is not None
    assert routes.token_ids[:32].tolist() == mix.heldout[0].document(0)[:32].tolist()
    other = measure(trained.model, mix, routing=settings().routing, length=32, documents=5, batch_tokens=10_000)
    assert np.array_equal(np.sort(routes.ids, -1), np.sort(other.trace.loaded[0].ids, -1)), "batching changes no route"


@pytest.mark.parametrize("harm", ["cut short", "altered", "another step", "not sealed", "empty"])
def test_a_damaged_state_is_refused(tmp_path, harm):
    train(settings(2), tiny_mix(), folder=tmp_path)
    path = tmp_path / STATE
    content = path.read_bytes()
    changed = {
        "cut short": content[:-8],
        "altered": content[:-1] + bytes([content[-1] ^ 1]),
        "another step": content.replace(b'"step":"2"', b'"step":"1"'),
        "not sealed": content.replace(b'"sha256"', b'"sha-no"'),
        "empty": b"",
    }[harm]
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(StateError, match=r"training state is damaged \(.*delete it to train from the start"):
        train(settings(2), tiny_mix(), folder=tmp_path)
    assert path.read_bytes() == changed
    path.write_bytes(content)
    with pytest.raises(StateError, match="the state of another run"):
        train(settings(3), tiny_mix(), folder=tmp_path)


@pytest.mark.slow
def test_a_run_killed_by_sigkill_ends_like_one_that_was_not(tmp_path):
    """The process is killed for good between checkpoints, as often as it takes."""
    steps = 120
    whole = train(settings(steps), tiny_mix(), folder=tmp_path / "whole", log_every=1)
    command = [sys.executable, str(HERE / "testbed_process.py"), "killed", str(tmp_path / "cut"), str(steps)]
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # The second run and later ones live on until they are done.
        while kills < 1 and process.poll() is None:
            log = tmp_path / "cut" / LOG
            if (tmp_path / "cut" / STATE).is_file() and len(log.read_text("utf-8").splitlines()) > 20:
                process.send_signal(signal.SIGKILL)
                kills += 1
            time.sleep(0.01)
        assert process.stdout is not None
        process.stdout.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills == 1
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "cut")
    states = [load_file(tmp_path / name / STATE) for name in ("whole", "cut")]
    assert same(*states)
    assert float(states[0]["model.lm_head.weight" if "model.lm_head.weight" in states[0] else "model.model.norm.weight"].norm()) > 0
    assert whole.log[-1]["step"] == steps - 1


@pytest.mark.slow
@pytest.mark.parametrize("balancing", ["aux_loss", "loss_free", "sinkhorn", "assignment"])
def test_two_gloo_processes_equal_one(tmp_path, balancing):
    """Global scope spans the processes: same routes, same weights up to the order of sums."""
    one = train(settings(4, routing=RoutingSettings(balancing=balancing)), tiny_mix(), log_every=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(HERE / "testbed_process.py"), "gloo", str(tmp_path / "two"), "4", balancing]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    two = load_file(tmp_path / "two" / STATE)
    for name, value in weights(one).items():
        assert torch.allclose(value, two[f"model.{name}"], atol=2e-4), name
    log = [json.loads(line) for line in (tmp_path / "two" / LOG).read_text("utf-8").splitlines()]
    for ours, theirs in zip(one.log, log, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-3)
        assert theirs["balancing_loss"] == pytest.approx(ours["balancing_loss"], abs=1e-3)
        assert theirs["load_entropy"] == pytest.approx(ours["load_entropy"], abs=2e-3)
