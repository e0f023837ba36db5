"""`dbes finetune` and `dbes merge` as a user calls them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_run import path_of
from typer.testing import CliRunner

from dbes.cli import app
from dbes.paths.files import write_path


@pytest.fixture
def call(tiny_checkpoint, tiny_task, tmp_path):
    path = write_path(path_of(tiny_checkpoint), tmp_path / "paths.json")

    def go(*arguments, out=tmp_path / "out", data="task:code"):
        given = ["finetune", "--model", tiny_checkpoint, "--paths", path, "--data", data, "--out", out, "--tasks", tiny_task]
        settings = ["--limit", 2, "--batch-size", 2, "--seq-len", 24, "--lr", 1e-2]
        return CliRunner().invoke(app, [str(argument) for argument in (*given, *settings, *arguments)])

    return go


def test_finetune_prints_a_table_or_json_and_says_where_the_checkpoint_is(call, tmp_path):
    done = call("--steps", 2)
    assert done.exit_code == 0, done.output
    assert "code (target)" in done.stdout and str(tmp_path / "out") in done.stdout.replace("\n", "")
    said = " ".join(done.stdout.split())
    again = call("--steps", 2, "--format", "json")
    report = json.loads(again.stdout)
    assert f"code: {report['gain']:+.4f} bits per byte gained; other domains forget {report['forgetting_mean']:.4f} on average" in said
    assert ("--protect 0.03 keeps them better" in said) == (report["forgetting_mean"] > 0)
    assert json.loads(again.stdout)["target"] == "code", "a finished run is reported again"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_protection_by_chosen_domains(call):
    done = call("--steps", 2, "--protect", 0.03, "--protect-domains", "law, math", "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["settings"]["protect"] == 0.03 and report["settings"]["protect_domains"] == ["law", "math"]
    assert report["protection_bytes"] > 0 and report["optimizer_bytes"] == 2 * report["chosen_bytes"]


def test_a_conversation_file_of_one_epoch_and_its_delta(call, tmp_path, tiny_checkpoint):
    rows = [{"prompt": f"{number}+1=", "completion": f" {number + 1}"} for number in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("--epochs", 1, "--save", "delta", "--lora-rank", 2, "--format", "json", data=tmp_path / "sums.jsonl")
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
    ("arguments", "data", "message"),
    [
        (("--steps", 1), "task:latin", "no domain is called 'latin'"),
        (("--steps", 1), "nowhere.jsonl", "no such file"),
        ((), "task:code", "give steps or epochs"),
        (("--steps", 1, "--lr", 0), "task:code", "--lr"),
        (("--steps", 1, "--protect", 0.03, "--protect-domains", "code"), "task:code", "other domains of the task are law, math"),
        (("--steps", 1, "--protect", 0.03, "--lora-rank", 2), "task:code", "it goes with no --lora-rank"),
    ],
)
def test_mistakes_end_with_one_line_and_no_traceback(call, arguments, data, message):
    done = call(*arguments, data=data)
    assert done.exit_code == 1
    assert message in done.stderr and "Traceback" not in done.stderr
