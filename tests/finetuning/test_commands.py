"""`dbes finetune` and `dbes merge` as a user calls them."""

import json
import shlex

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_run import path_of
from typer.testing import CliRunner

from dbes.cli import app

DOMAINS = {"law": "abcd", "code": "(){};", "math": "0123"}
SMALL = {"batch_size": 2, "seq_len": 24}


@pytest.fixture
def call(tiny_checkpoint, tiny_task, tmp_path):
    path = path_of(tiny_checkpoint).save(tmp_path / "paths.json")

    def go(*arguments, out=tmp_path / "out", data="task:code", **config):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALL | config))
        given = ["finetune", "--model", tiny_checkpoint, "--paths", path, "--data", data, "--out", out, "--tasks", tiny_task]
        settings = ["--limit", 2, "--config", tmp_path / "config.yaml"]
        return CliRunner().invoke(app, [str(argument) for argument in (*given, *settings, *arguments)])

    return go


def test_finetune_prints_a_table_or_json_and_says_where_the_checkpoint_is(call, tmp_path):
    done = call("--steps", 6)
    assert done.exit_code == 0, done.output
    assert "code (target)" in done.stdout and str(tmp_path / "out") in done.stdout.replace("\n", "")
    said = " ".join(done.stdout.split())
    report = json.loads(call("--steps", 6, "--format", "json").stdout)
    assert report["target"] == "code", "a finished run is reported again"
    assert f"{-report['changes']['code']['change']:.4f} bits per byte" in said
    assert f"learning rate {report['choice']['lr']:g}, the smallest with two thirds of the best fall in 4 steps" in said
    assert f"kept step {report['choice']['best_step']} of {report['steps']}" in said
    assert "learning rate 0.001: validation loss" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def wide_task(tmp_path_factory):
    """Forty texts a domain, so that eight are held out: enough to tell forgetting from noise."""
    folder, random = tmp_path_factory.mktemp("wide"), np.random.default_rng(1)
    for name, letters in DOMAINS.items():
        rows = [{"id": f"{name}-{index}", "text": "".join(random.choice([*letters], size=90))} for index in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domains = {name: {"files": [f"{name}.jsonl"], "text_field": "text", "id_field": "id"} for name in DOMAINS}
    task = {"name": "wide", "version": 1, "description": "letters", "window": 64, "domains": domains}
    (folder / "wide.yaml").write_text(yaml.safe_dump(task))
    return folder / "wide.yaml"


def test_the_command_that_protects_is_printed_where_forgetting_was_measured_and_runs_as_printed(call, wide_task, tmp_path):
    given = ("--steps", 10, "--lr", 0.1, "--tasks", wide_task, "--limit", 8)
    done = call(*given, early_stopping=False, out=tmp_path / "it's out")
    assert done.exit_code == 0, done.output
    assert "forgotten: " in done.stdout and "nothing was forgotten" not in done.stdout
    printed = next(line for line in done.stderr.splitlines() if "--protect 0.03" in line)
    words = shlex.split(printed)
    again = CliRunner().invoke(app, [*words[words.index("finetune") :], "--format", "json"])
    assert again.exit_code == 0, again.output
    report = json.loads(again.stdout)
    assert report["settings"]["protect"] == 0.03 and report["settings"]["lr"] == 0.1 and report["settings"]["seq_len"] == 24
    assert (tmp_path / "it's out-protected" / "config.json").is_file()


def test_many_passes_are_counted_and_warned_about(call, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"text number {number}"}) + "\n" for number in range(15)))
    few = {"data": tmp_path / "few.jsonl", "packing": False, "patience": 99}
    done = call("--steps", 30, "--lr", 1e-3, **few)
    assert done.exit_code == 0, done.output
    report = json.loads(call("--steps", 30, "--lr", 1e-3, "--format", "json", **few).stdout)
    assert report["sequences"] == 10, "fifteen, less a fifth for the report, less two to stop by"
    assert "warning: 30 steps are 6.0 passes over 10 sequences; beyond about 4" in done.stderr
    assert report["warnings"] == ["the 30 steps made were 6.0 passes over 10 sequences; beyond about 4 a model learns its texts by heart"]
    assert report["warnings"][0] in " ".join(done.stdout.split())
    less = call("--lr", 1e-3, out=tmp_path / "less", **few)
    assert less.exit_code == 0 and "warning: " not in less.output, "four passes are the default"


def test_options_stand_above_the_file(call):
    report = json.loads(call("--steps", 1, "--lr", 0.5, "--format", "json", lr=0.1, steps=3, early_stopping=False).stdout)
    assert (report["settings"]["lr"], report["steps"]) == (0.5, 1)


def test_protection_by_chosen_domains(call):
    done = call("--steps", 2, "--lr", 1e-2, "--protect", 0.03, "--format", "json", protect_domains=["law", "math"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["settings"]["protect"] == 0.03 and report["settings"]["protect_domains"] == ["law", "math"]
    assert report["protection_bytes"] > 0 and report["optimizer_bytes"] == 2 * report["chosen_bytes"]


def test_a_conversation_file_of_one_epoch_and_its_delta(call, tmp_path, tiny_checkpoint):
    rows = [{"prompt": f"{number}+1=", "completion": f" {number + 1}"} for number in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"epochs": 1, "lora_rank": 2, "early_stopping": False, "lr": "1e-2"}
    done = call("--save", "delta", "--format", "json", data=tmp_path / "sums.jsonl", **settings)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["target"] == "data" and report["sequences"] == 8 and report["steps"] == 4
    merged = CliRunner().invoke(app, ["merge", str(tiny_checkpoint), str(tmp_path / "out"), "--out", str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
    base, trained = load_file(tiny_checkpoint / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert base.keys() == trained.keys()
    assert {name for name, value in base.items() if not torch.equal(value, trained[name])} == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer, expert in path_of(tiny_checkpoint).cells
        for part in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize(
    ("arguments", "data", "config", "message"),
    [
        (("--steps", 1), "task:latin", {}, "is called 'latin'; there are law, code, math"),
        (("--steps", 1), "nowhere.jsonl", {}, "no such file"),
        (("--steps", 1), "task:code", {"epochs": 1}, "give steps or epochs, not both"),
        (("--steps", 1, "--lr", 0), "task:code", {}, "--lr: expected auto or a number above 0"),
        (("--lr", "fast"), "task:code", {}, "--lr: expected auto or a number above 0"),
        (("--steps", 1, "--protect", 0.03), "task:code", {"protect_domains": ["code"]}, "other domains of the task are law, math"),
        (("--steps", 1, "--protect", 0.03), "task:code", {"lora_rank": 2}, "it goes with no lora_rank"),
        ((), "task:code", {"rank": 2}, "config.yaml: rank: no such setting"),
        ((), "task:code", {"steps": float("nan")}, "config.yaml: steps: Input should be a valid integer (given: nan)"),
        (("--lr", 0), "task:code", {"lr": 1}, "dbes: --lr: expected auto"),
        (("--protect", 0.03), "task:code", {"protect_domains": "law"}, "protect_domains: expected a list of names (given: 'law')"),
        ((), "task:code", {"batch_size": "many"}, "batch_size: Input should be a valid integer (given: 'many')"),
    ],
)
def test_mistakes_end_with_one_line_and_no_traceback(call, arguments, data, config, message):
    done = call(*arguments, data=data, **config)
    assert done.exit_code == (2 if "called 'latin'" in message else 1)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("dbes: ") == 1


@pytest.mark.parametrize("content", ["- steps", "just words", "1: 2"])
def test_a_file_that_is_no_settings_is_refused(call, tmp_path, content):
    (tmp_path / "other.yaml").write_text(content)
    done = call("--config", tmp_path / "other.yaml")
    assert done.exit_code == 1 and "expected settings, one `name: value` a line" in done.stderr
