"""`dbes testbed`: one model to a checkpoint that `dbes evaluate` reads, a grid and its report, and what is refused before training."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dbes.cli import app
from dbes.files import locked
from dbes.testbed import grid as grid_module
from dbes.testbed.presets import Preset
from dbes.testbed.runner import run_jobs
from dbes.testbed.runs import GridRun
from dbes.testbed.settings import parse_settings
from dbes.testbed.training import TrainingError

WORDS = {
    "fruit": "apple banana cherry date elder fig grape honey iris juniper",
    "metal": "iron copper zinc nickel silver gold lead tin chrome cobalt",
}
SETTINGS = {
    "mix": {"tokens_per_step": 256, "lengths": [32]},
    "model": {"vocabulary": 300, "hidden": 32, "layers": 2, "experts": 8, "intermediate": 8, "max_positions": 64},
    "routing": {"balancing": "aux_loss", "scope": "global_batch"},
    "optimizer": {"steps": 6, "warmup": 1},
}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    generator = random.Random(0)
    for name, words in WORDS.items():
        rows = [
            {
                "id": f"{name}-{n}",
                "domain": name,
                "source_document": f"{name}/{n}",
                "text": " ".join(generator.choices(words.split(), k=60)),
            }
            for n in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def written(path, **changes):
    content = {name: {**part, **changes.get(name, {})} for name, part in SETTINGS.items()}
    content |= {name: value for name, value in changes.items() if name not in SETTINGS}
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["testbed", *map(str, arguments)])


def test_one_model_becomes_a_checkpoint_that_plain_transformers_and_evaluate_read(mix, tmp_path, tiny_task):
    config = written(tmp_path / "config.yaml")
    done = run("train", "--config", config, "--out", tmp_path / "model", "--mix", mix, "--cache", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "model")
    assert json.loads(done.stderr.splitlines()[0])["step"] == 0
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("iron copper", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
    about = json.loads((tmp_path / "model" / "training.json").read_text("utf-8"))
    assert set(about["heldout_bits_per_byte"]) == set(WORDS)
    result = CliRunner().invoke(
        app,
        ["evaluate", "--model", str(tmp_path / "model"), "--tasks", str(tiny_task), "--output-path", str(tmp_path / "results"),
         "--permutations", "20", "--format", "json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["status"] == "ok"


@pytest.mark.slow
def test_two_launched_processes_write_the_checkpoint_of_one(mix, tmp_path):
    config = written(tmp_path / "config.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ["testbed", "train", "--config", str(config), "--mix", str(mix), "--cache", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "dbes.cli", *common, "--out", str(tmp_path / "two")]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert run(*common[1:], "--out", tmp_path / "one").exit_code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.allclose(value.float(), two[name].float(), atol=2e-3) for name, value in one.items())


def test_the_loss_free_bias_is_part_of_the_checkpoint(mix, tmp_path):
    routing = {"balancing": "loss_free", "coefficient": 0.02}
    config = written(tmp_path / "config.yaml", model={"architecture": "deepseek_v3"}, routing=routing)
    done = run("train", "--config", config, "--out", tmp_path / "model", "--mix", mix, "--cache", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    kept = load_file(tmp_path / "model" / "model.safetensors")
    biases = [value for name, value in kept.items() if name.endswith("e_score_correction_bias")]
    assert biases and all(value.abs().max() > 0 for value in biases)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"routing": {"router": "reference"}}, "not part of a plain checkpoint", id="prescribed router"),
        pytest.param({"routing": {"balancing": "loss_free"}}, "set model.architecture to deepseek_v3", id="bias without a place"),
        pytest.param({"routing": {"scope": "micro_batch", "micro_batch": 16}}, "wider than the batch", id="scope wider than the batch"),
        pytest.param({"model": {"top_k": 9}}, "larger than the number of experts", id="top-k"),
        pytest.param({"surprise": 1}, "surprise", id="unknown key"),
    ],
)
def test_impossible_settings_are_refused_before_training(mix, tmp_path, changes, told):
    config = written(tmp_path / "config.yaml", **changes)
    done = run("train", "--config", config, "--out", tmp_path / "model", "--mix", mix, "--cache", tmp_path / "cache")
    assert done.exit_code == 2
    assert told in done.stderr and done.stderr.startswith("dbes: ")
    assert not (tmp_path / "model").exists()


def test_an_empty_domain_is_named(tmp_path):
    folder = tmp_path / "mix"
    folder.mkdir()
    (folder / "empty.jsonl").write_text("", "utf-8")
    row = {"id": "a", "domain": "full", "source_document": "a", "text": "words " * 50}
    (folder / "full.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    done = run("mix", folder, "--vocabulary", "300", "--cache", tmp_path / "cache")
    assert done.exit_code == 2
    assert "empty" in done.stderr


def test_a_built_mix_says_what_it_holds(mix, tmp_path):
    done = run("mix", mix, "--vocabulary", "300", "--cache", tmp_path)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == list(WORDS) and "held-out documents" in lines[0]


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_grid_and_its_report(mix, tmp_path, monkeypatch, request, processes):
    if not processes:
        request.getfixturevalue("in_process")
    arms = {}
    for name, routing in (("aux_loss/global_batch", {}), ("frozen", {"router": "frozen", "balancing": "none", "coefficient": 0.0})):
        content = {**SETTINGS, "routing": routing, "optimizer": {"steps": 2, "warmup": 1}}
        arms[name] = GridRun(arm=name, settings=parse_settings(content, where="test"), documents=3, permutations=10)
    tiny = Preset(name="smoke", mix="embedded", seeds=1, vocabulary=300, arms=arms, experiments={"scope": list(arms)})
    monkeypatch.setattr(grid_module, "preset", lambda _: tiny)
    arguments = ("run", "--preset", "smoke", "--out", tmp_path / "grid", "--mix", mix, "--cache", tmp_path / "cache")
    done = run(*arguments, "--processes", max(1, processes))
    assert done.exit_code == 0, done.output
    assert "0 of 2 runs are finished; 2 to train" in done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "grid" / "report" / "index.html"
    again = run(*arguments)
    assert "2 of 2 runs are finished; 0 to train" in again.stderr
    assert run("report", tmp_path / "grid").stdout == done.stdout
    assert run("run", "--out", tmp_path / "grid", "--only", "nothing", "--mix", mix, "--cache", tmp_path / "cache").exit_code == 2


def test_a_finished_checkpoint_is_kept_a_harmed_one_made_again_and_another_refused(mix, tmp_path):
    config = written(tmp_path / "config.yaml")
    out = tmp_path / "model"
    arguments = ("train", "--config", config, "--out", out, "--mix", mix, "--cache", tmp_path / "cache")
    assert run(*arguments).exit_code == 0
    assert not (out / "state").exists() and not list(out.rglob("*.part")) and not list(out.glob(".dbes*"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(*arguments)
    assert again.exit_code == 0 and again.stdout.strip() == str(out) and '"step"' not in again.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:100])
    (out / ".training.json.ab12.part").write_text("half")
    assert run(*arguments).exit_code == 0
    assert (out / "model.safetensors").read_bytes() == whole and not list(out.rglob("*.part"))
    written(config, optimizer={"steps": 3})
    other = run(*arguments)
    assert other.exit_code == 1 and "holds a checkpoint of other settings" in other.stderr


def test_two_runs_do_not_write_one_folder(mix, tmp_path):
    config = written(tmp_path / "config.yaml")
    common = ("--out", tmp_path / "out", "--mix", mix, "--cache", tmp_path / "cache")
    with locked(tmp_path / "out"):
        done = run("train", "--config", config, *common)
    assert done.exit_code == 1 and f"another run is writing here (process {os.getpid()}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_grid(tmp_path):
    done = run("report", tmp_path)
    assert done.exit_code == 2 and "no testbed run here" in done.stderr


def test_a_worker_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(TrainingError, match=r"a process was killed \(out of memory\?\); the same command resumes"):
        run_jobs(os._exit, [(1,)], processes=1, tell=lambda *_: None, error=TrainingError)
    done = []
    run_jobs(divmod, [(7, 2), (9, 5)], processes=1, tell=lambda *told: done.append(told), error=TrainingError)
    assert [count for count, *_ in done] == [1, 2] and sorted(told for _, *told in done) == [[0, (3, 1)], [1, (1, 4)]]


def test_workers_end_with_the_run_that_started_them(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "from dbes.errors import DbesError\n"
        "from dbes.testbed.runner import run_jobs\n"
        "def work(path):\n"
        "    pathlib.Path(path).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    run_jobs(work, [(sys.argv[1],)], processes=1, tell=print, error=DbesError)\n"
    )
    told = tmp_path / "pid"
    started = subprocess.Popen([sys.executable, str(script), str(told)])
    until(lambda: told.is_file() and told.read_text())
    worker = int(told.read_text())
    started.send_signal(signal.SIGKILL)
    started.wait()
    until(lambda: not running(worker))


def until(condition, seconds=60.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def running(process):
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
