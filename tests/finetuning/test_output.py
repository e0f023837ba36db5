"""What finetune and merge write: the base's own files, the trained rows replaced, for every family and layout; and what they refuse."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import NOT_CAUSAL, composites, discovered, tiny_composite, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_run import CELLS, command, path_of, same_weights, settings, slow
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import FileError, FinetuneError
from dbes.files import locked
from dbes.finetuning import checkpoint, output
from dbes.finetuning.checkpoint import local_folder, read_checkpoint, refuse_quantized
from dbes.finetuning.delta import DELTA, DELTA_FACTS
from dbes.finetuning.output import MERGING, Rows, merge
from dbes.finetuning.report import REPORT, read_report
from dbes.finetuning.run import finetune
from dbes.finetuning.state import LOG, STATE
from dbes.models import load_weights
from dbes.models.sites import expert_slices, find_sites
from dbes.models.training import save_state
from dbes.paths.types import Cell


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tiny_task, tmp_path_factory):
    def go(out=None, model=tiny_checkpoint, save="model", named=None, **changes):
        out = out or tmp_path_factory.mktemp("run")
        made = settings(**{"steps": 2, **changes})
        return finetune(model, path_of(model), "task:law", out, made, tasks=tiny_task, limit=2, save=save, **(named or {})), out

    return go


@pytest.fixture(scope="module")
def trained(run):
    """A run that saves the model, and one that saves the delta."""
    return {save: run(save=save) for save in ("model", "delta")}


@pytest.fixture
def finished(trained, tmp_path):
    """The report of a finished run, and a copy of its folder to do with as one likes."""

    def go(save="model"):
        report, folder = trained[save]
        return report, shutil.copytree(folder, tmp_path / "finished")

    return go


@pytest.fixture(scope="module")
def delta(run):
    return run(save="delta", train_router=True)[1]


def copy_of(folder, where, change=None, **config):
    shutil.copytree(folder, where)
    if change is not None:
        tensors = load_file(where / "model.safetensors")
        save_file(change(tensors) or tensors, where / "model.safetensors", metadata={"format": "pt"})
    if config:
        content = json.loads((where / "config.json").read_text()) | config
        (where / "config.json").write_text(json.dumps(content))
    return where


def differing(one, other):
    """Keys whose bits differ; both hold the same keys in the same dtypes."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and value.shape == other[key].shape
    bits = {key: (value.flatten().view(torch.uint8), other[key].flatten().view(torch.uint8)) for key, value in one.items() if value.numel()}
    return {key for key, (ours, theirs) in bits.items() if not torch.equal(ours, theirs)}


def listing(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


EXPERT_KEYS = {
    f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight" for layer, expert in CELLS for part in ("gate_proj", "up_proj", "down_proj")
}


def written_and_read(model, folder, read):
    """Write random rows of some cells and a router over a checkpoint; plain loading must give them, and nothing else may move."""
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    base, model = read_checkpoint(folder / "base"), read(folder / "base")
    sites = find_sites(model)
    cells = [Cell(site.layer, expert) for site in dict.fromkeys((sites[0], sites[-1])) for expert in (1, site.num_experts - 2)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    router = sites[0].router
    routers = [names[id(parameter)] for parameter in router.parameters() if parameter.is_floating_point()] if router is not None else []
    rows, values, generator = Rows(model, base, cells, routers), {}, torch.Generator().manual_seed(0)
    digest = rows.digest(loaded=True)
    structure = output._structure(str(folder / "base"), revision=None, trust_remote_code=False)
    assert Rows(structure, base, cells).digest() == digest, "merge finds them without the weights"
    by_layer, parameters = {site.layer: site for site in sites}, dict(model.named_parameters())
    views = {
        f"{names[id(parameter)]}[{cell.expert}]": cut(parameter.data)
        for cell in cells
        for parameter, cut in expert_slices(by_layer[cell.layer], cell.expert)
    } | {name: parameters[name].data for name in routers}
    assert set(rows.experts) | set(routers) == views.keys()
    for label, view in views.items():
        view.copy_(torch.randn(view.shape, generator=generator).to(rows.dtype(label)))
        values[label] = view.to(rows.dtype(label)).clone()
    (folder / "out").mkdir()
    rows.write(values, folder / "out")
    again = read(folder / "out").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value), name
    assert {path.name for path in (folder / "out").iterdir()} == {path.name for path in (folder / "base").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("family", discovered())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_of_every_family_are_written_where_transformers_reads_them(family, dtype, tmp_path):
    def read(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    written_and_read(tiny_model(family).to(dtype), tmp_path, read)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in composites() if name not in NOT_CAUSAL])
def test_rows_of_every_composite_model_are_written_where_transformers_reads_them(family, tmp_path):
    def read(folder):
        return load_weights(str(folder), dtype="float32")

    model = tiny_composite(family)
    written_and_read(model, tmp_path, read)
    ours, theirs = (read_checkpoint(tmp_path / name).tensors for name in ("out", "base"))
    assert ours == theirs


def wrapper(folder, tokenizer):
    """A model that sees and reads, of which transformers loads the text part as a causal language model."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text = {
        "vocab_size": 512, "hidden_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "num_position_embeddings": 16}
    torch.manual_seed(0)
    Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=sight)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_a_wrapper_keeps_its_vision_tower_its_further_token_layers_and_its_files(tiny_checkpoint, tiny_task, tmp_path):
    base = wrapper(tmp_path / "base", tiny_checkpoint)
    tensors = load_file(base / "model.safetensors")
    more = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(8, 32, 32)}
    save_file(tensors | more, base / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    (base / "preprocessor_config.json").write_text('{"size":  1}')
    paths = path_of(tiny_checkpoint, layers=(0, 1, 2, 3), experts=(8,) * 4, cells=(Cell(1, 2), Cell(3, 0)))
    paths = paths.model_copy(update={"provenance": paths.provenance.model_copy(update={"revision": None})})
    _, out = finetune(base, paths, "task:law", tmp_path / "out", settings(steps=2, lr=0.1), tasks=tiny_task, limit=2), tmp_path / "out"
    changed = differing(load_file(base / "model.safetensors"), load_file(out / "model.safetensors"))
    assert changed == {
        f"model.language_model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer, expert in ((1, 2), (3, 0))
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    ours, theirs = listing(out), listing(base)
    assert {name for name, digest in theirs.items() if ours.get(name) != digest} == {"model.safetensors"}
    assert ours.keys() - theirs.keys() == {REPORT, LOG}


def test_shards_their_index_and_every_file_are_the_bases_own(tiny_checkpoint, run, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).to(torch.float16)
    model.save_pretrained(base, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    extra = {"model.layers.3.enorm.weight": torch.ones(32).half(), "model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(4, 4)}
    save_file(extra, base / "model-mtp.safetensors")
    index["weight_map"] |= dict.fromkeys(extra, "model-mtp.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=3))
    kept = {"LICENSE": "free\r\n", "README.md": "# x", "chat_template.jinja": "{{ x }}", "modeling_own.py": "exit()\n", "a/b.txt": "b"}
    left = {"pytorch_model.bin": "p", "original/params.json": "{}", "x.gguf": "g", "finetune.json": "{}", "train.jsonl": "{}"}
    left |= {".gitattributes": "", "optimizer.pt": ""}
    for name, content in (kept | left).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content.encode())
    save_file({"layers.0.w1": torch.ones(2)}, base / "consolidated.safetensors")
    left["consolidated.safetensors"] = ""
    said = []
    _, out = run(model=base, named={"say": said.append})
    ours, theirs = listing(out), listing(base)
    assert ours.keys() == (theirs.keys() - left.keys()) | {REPORT, LOG}
    differ = {name for name in theirs.keys() - left.keys() if ours[name] != theirs[name]}
    assert differ == {index["weight_map"][key] for key in EXPERT_KEYS}
    changed = set()
    for name in {*index["weight_map"].values()}:
        changed |= differing(load_file(base / name), load_file(out / name))
    assert changed == EXPERT_KEYS
    assert any("not copied" in line and "pytorch_model.bin" in line and "consolidated.safetensors" in line for line in said)


def test_a_second_copy_of_the_weights_is_not_left_beside_the_trained_ones(tiny_checkpoint, run, tmp_path):
    base = copy_of(tiny_checkpoint, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    for path in (tmp_path / "cut").glob("model*"):
        shutil.copy(path, base)
    save_file({"adapter.something": torch.ones(2)}, base / "voice.safetensors")
    _, out = run(model=base)
    assert {path.name for path in out.glob("*.safetensors*")} == {"model.safetensors", "voice.safetensors"}


def test_a_base_that_is_itself_the_output_of_a_run(run, finished):
    _, first = finished()
    _, second = run(model=first, out=first / "second", seed=3)
    report = read_report(second)
    assert report is not None and report.identity != read_report(first).identity
    assert differing(load_file(first / "model.safetensors"), load_file(second / "model.safetensors")) == EXPERT_KEYS
    assert not (second / "second").exists()


def test_tied_embeddings_stay_one_tensor(tiny_checkpoint, run, tmp_path):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig.from_pretrained(tiny_checkpoint)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "tied")
    base = load_file(tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight" not in base
    _, out = run(model=tmp_path / "tied")
    assert differing(base, load_file(out / "model.safetensors")) == EXPERT_KEYS


def test_a_snapshot_of_links_is_copied_as_files(tiny_checkpoint, run, tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for path in tiny_checkpoint.iterdir():
        shutil.copy(path, tmp_path / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    before = listing(tmp_path / "blobs")
    _, out = run(model=snapshot)
    assert listing(tmp_path / "blobs") == before
    assert not any(path.is_symlink() for path in out.iterdir())
    assert differing(load_file(snapshot / "model.safetensors"), load_file(out / "model.safetensors")) == EXPERT_KEYS
    (snapshot / "lost.json").symlink_to("nowhere")
    with pytest.raises(FinetuneError, match=r"lost\.json: a link that leads nowhere"):
        read_checkpoint(snapshot)


def test_a_hub_id_is_the_snapshot_in_the_cache(tiny_checkpoint, monkeypatch, tmp_path):
    commit = "0123456789012345678901234567890123456789"
    snapshot = tmp_path / "models--some--moe" / "snapshots" / commit
    shutil.copytree(tiny_checkpoint, snapshot)
    (tmp_path / "models--some--moe" / "refs").mkdir()
    (tmp_path / "models--some--moe" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    real = checkpoint.snapshot_download
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path, **k))
    assert local_folder("some/moe") == snapshot and local_folder("some/moe", revision=commit) == snapshot
    with pytest.raises(Exception, match="some/other: neither a folder nor a repository"):
        local_folder("some/other")


QUANTIZED = {
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True}},
    "compressed": {"compression_config": {"format": "pack-quantized"}},
    "wrapper": {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
}


@pytest.mark.parametrize("config", QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_configs_are_refused_before_anything_is_loaded(tiny_checkpoint, delta, monkeypatch, tmp_path, config):
    base = copy_of(tiny_checkpoint, tmp_path / "base", **config)
    monkeypatch.setattr("dbes.finetuning.run.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(FinetuneError, match=r"weights are quantized \(.*give the original model, or load it dequantized"):
        finetune(base, path_of(tiny_checkpoint), "task:law", tmp_path / "out", settings())
    with pytest.raises(FinetuneError, match="weights are quantized"):
        merge(str(base), delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)},
        lambda tensors: {**tensors, "model.layers.0.x_blocks": torch.zeros(4, 4, dtype=torch.uint8)},
        lambda tensors: {**tensors, "model.layers.0.q.qweight": torch.zeros(4, 4, dtype=torch.int32)},
        lambda tensors: {**tensors, "model.layers.0.q.weight_scale": torch.ones(1)},
    ],
    ids=["fp8", "mxfp4", "gptq", "scales"],
)
def test_quantized_tensors_are_refused_whatever_the_config_says(tiny_checkpoint, tmp_path, change):
    base = copy_of(tiny_checkpoint, tmp_path / "base", change)
    for refuse in (refuse_quantized, read_checkpoint):
        with pytest.raises(FinetuneError, match="weights are quantized"):
            refuse(base)


def test_intervene_refuses_a_quantized_model_too(tiny_checkpoint, tmp_path):
    from dbes.intervention.grid import intervene
    from dbes.intervention.settings import InterventionSettings

    base = copy_of(tiny_checkpoint, tmp_path / "base", quantization_config={"quant_method": "fp8"})
    with pytest.raises(FinetuneError, match="weights are quantized"):
        intervene(str(base), tmp_path / "out", InterventionSettings(domains=("law",)), texts="none")


def altered(delta, where, change=None, **facts):
    """A delta whose tensors, or facts, were changed, and whose checksum is right again."""
    shutil.copytree(delta, where)
    tensors = load_file(where / DELTA)
    save_file(change(dict(tensors)) if change else tensors, where / DELTA)
    content = json.loads((where / DELTA_FACTS).read_text()) | facts
    content["sha256"] = hashlib.sha256((where / DELTA).read_bytes()).hexdigest()
    (where / DELTA_FACTS).write_text(json.dumps(content))
    return where


FIRST = "model.layers.0.mlp.experts.down_proj[1]"
TAMPERED = {
    "embeddings": (lambda t: t | {"model.embed_tokens.weight": torch.zeros(257, 32)}, {}, "holds model.embed_tokens.weight, which is none"),
    "another expert": (lambda t: t | {FIRST.replace("[1]", "[2]"): t[FIRST].clone()}, {}, "which is none of its cells"),
    "renamed": (lambda t: {k.replace(FIRST, FIRST[:-2] + "2]"): v for k, v in t.items()}, {}, "lacks model"),
    "outside": (lambda t: t | {"../../x": t[FIRST].clone()}, {}, "which is none of its cells"),
    "one missing": (lambda t: {k: v for k, v in t.items() if k != FIRST}, {}, "lacks model.layers.0.mlp.experts.down_proj"),
    "none": (lambda _: {}, {}, "lacks model.layers.0"),
    "NaN": (lambda t: t | {FIRST: t[FIRST] * torch.nan}, {}, "values that are not finite"),
    "infinite": (lambda t: t | {FIRST: t[FIRST] / 0}, {}, "values that are not finite"),
    "shape": (lambda t: t | {FIRST: t[FIRST].T.contiguous()}, {}, r"the delta has shape \(16, 32\), the base \(32, 16\)"),
    "dtype": (lambda t: t | {FIRST: t[FIRST].double()}, {}, "stored as torch.float64"),
    "router not declared": (None, {"routers": []}, "holds model.layers.0.mlp.gate.weight, which is none"),
    "no router": (None, {"routers": ["lm_head.weight"]}, "declares the router lm_head.weight"),
    "cells twice": (None, {"cells": [[0, 1], [0, 1]]}, "names expert 1 of layer 0 twice"),
    "fewer cells": (None, {"cells": [[0, 1]]}, "declares the router|which is none of its cells"),
    "no cells": (None, {"cells": []}, "cells: "),
    "no such cell": (None, {"cells": [[0, 99]]}, "layer 0 has experts 0 to 7, not 99"),
    "another base": (None, {"base_rows_sha256": "0" * 64}, "not those that the delta was trained from"),
    "version": (None, {"schema_version": 9}, "schema_version 9"),
    "field": (None, {"more": 1}, "more: "),
}


@pytest.mark.parametrize(("change", "facts", "message"), TAMPERED.values(), ids=TAMPERED)
def test_a_delta_that_is_not_exactly_its_cells_is_refused(delta, tiny_checkpoint, tmp_path, change, facts, message):
    wrong = altered(delta, tmp_path / "delta", change, **facts)
    done = CliRunner().invoke(app, ["merge", str(tiny_checkpoint), str(wrong), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and done.exception.__class__ is SystemExit, done.exception
    assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(FinetuneError, match=message):
        merge(str(tiny_checkpoint), wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b'{"schema_version": 1}', b'{"schema_version": NaN}'])
def test_damaged_facts_of_a_delta_are_refused(delta, tiny_checkpoint, tmp_path, content):
    wrong = altered(delta, tmp_path / "delta")
    (wrong / DELTA_FACTS).write_bytes(content)
    with pytest.raises(FinetuneError, match=r"delta\.json: "):
        merge(str(tiny_checkpoint), wrong, tmp_path / "out")


def interrupted_run(run, out, monkeypatch):
    """A folder with the state of a run that was stopped before its end."""
    with monkeypatch.context() as patch:
        patch.setattr("dbes.finetuning.run.write_output", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(out=out)
    assert (out / STATE).is_file() and not (out / "config.json").exists() and not list(out.glob(".*"))


def rewritten(path, change, *, checksum=True):
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors, metadata = change(tensors, metadata) or (tensors, metadata)
    kept = {name: value for name, value in metadata.items() if name != "sha256"}
    if checksum:
        save_state(path, tensors, **kept)
    else:
        save_file(tensors, path, metadata)


def flip(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


LEAF = f"leaf {FIRST}"
DAMAGED = {
    "a bit": lambda path: path.write_bytes(flip(path.read_bytes())),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"x" * 400),
    "no checksum": lambda path: rewritten(path, lambda t, m: (t, {k: v for k, v in m.items() if k != "sha256"}), checksum=False),
    "step": lambda path: rewritten(path, lambda t, m: (t, m | {"step": "1"}), checksum=False),
    "step beyond": lambda path: rewritten(path, lambda t, m: (t, m | {"step": "99"})),
    "step no number": lambda path: rewritten(path, lambda t, m: (t, m | {"step": "x"})),
    "NaN": lambda path: rewritten(path, lambda t, m: (t | {LEAF: t[LEAF] * torch.nan}, m)),
    "shape": lambda path: rewritten(path, lambda t, m: (t | {LEAF: t[LEAF].T.contiguous()}, m)),
    "broadcast": lambda path: rewritten(path, lambda t, m: (t | {LEAF: t[LEAF][:1].contiguous()}, m)),
    "dtype": lambda path: rewritten(path, lambda t, m: (t | {LEAF: t[LEAF].half()}, m)),
    "one missing": lambda path: rewritten(path, lambda t, m: ({k: v for k, v in t.items() if k != LEAF}, m)),
    "one more": lambda path: rewritten(path, lambda t, m: (t | {"x": torch.ones(1)}, m)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupted_run(run, out, patch)
    return out


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_training_state_is_refused(run, stopped, tmp_path, damage):
    shutil.copytree(stopped, tmp_path / "out")
    damage(tmp_path / "out" / STATE)
    with pytest.raises(FinetuneError, match=r"training state is damaged \(.*delete it to train from the start, or choose another folder"):
        run(out=tmp_path / "out")


@pytest.mark.parametrize("break_at", [0, slow(1), slow(2), slow(3), slow(4), 5])
def test_a_run_stopped_while_it_wrote_is_finished_by_the_same_command(run, trained, stopped, tmp_path, monkeypatch, break_at):
    report, whole = trained["model"]
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    real, calls = Path.replace, []

    def replace(path, target):
        if path.name.endswith(".part") and Path(target).name not in (LOG, STATE):
            calls.append(target)
            if len(calls) > break_at:
                raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(out=out)
    (out / ".x.json.part").write_text("litter")
    (out / ".saving-abc").mkdir()
    (out / ".saving-abc" / "model.safetensors").write_text("litter")
    again, _ = run(out=out)
    assert again.after == report.after and same_weights(out, whole)
    assert not list(out.glob(".*")) and not (out / STATE).exists()


def test_state_and_litter_beside_a_finished_run_are_removed(run, finished, stopped):
    report, out = finished()
    shutil.copy(stopped / STATE, out)
    (out / ".x.part").write_text("")
    assert run(out=out)[0] == report
    assert not (out / STATE).exists() and not list(out.glob(".*"))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), DAMAGED["a bit"]], ids=["gone", "bit"])
@pytest.mark.parametrize(
    ("save", "name"), [("model", "model.safetensors"), ("model", "tokenizer.json"), ("delta", DELTA), ("delta", DELTA_FACTS)]
)
def test_a_finished_run_whose_files_are_damaged_is_not_reported_as_finished(run, finished, damage, save, name):
    _, out = finished(save)
    damage(out / name)
    with pytest.raises(FinetuneError, match=rf"{name}: (was altered|is missing).*run the same command again"):
        run(out=out, save=save)


def test_a_finished_run_is_shown_where_nothing_can_be_written(run, finished, monkeypatch):
    report, out = finished()

    def refuse(_):
        raise FileError("read-only")

    monkeypatch.setattr(output, "locked", refuse)
    assert run(out=out)[0] == report


def test_a_folder_that_cannot_be_written_is_refused_before_loading(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dbes.finetuning.run.load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file: cannot be written"):
        run(out=tmp_path / "file")
    with pytest.raises(FileError, match="cannot be written"):
        run(out=Path("/proc/nowhere"))


def test_a_disk_without_room_is_refused_before_loading(run, delta, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("dbes.finetuning.run.load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(FinetuneError, match=r"the checkpoint needs 0\.00 GB, and 0\.00 GB of this disk are free; make room"):
        run(out=tmp_path / "run")
    with pytest.raises(FinetuneError, match="make room"):
        merge(str(tiny_checkpoint), delta, tmp_path / "merged")


def test_one_run_at_a_time_in_a_folder(run, delta, tiny_checkpoint, tmp_path):
    with locked(tmp_path):
        for go in (lambda: run(out=tmp_path), lambda: merge(str(tiny_checkpoint), delta, tmp_path)):
            with pytest.raises(FileError, match=rf"another run is writing here \(process {os.getpid()} on "):
                go()


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "other.safetensors", "tokenizer.json", DELTA_FACTS])
def test_nothing_that_is_there_is_overwritten_or_mixed_with(run, delta, tiny_checkpoint, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FinetuneError, match="choose another --out folder"):
        merge(str(tiny_checkpoint), delta, tmp_path)
    if name != "tokenizer.json":
        with pytest.raises(FinetuneError, match="choose another --out folder"):
            run(out=tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_what_was_written_is_read_back(run, tmp_path, monkeypatch):
    real = output.replace_tensor

    def careless(base, key, value, places):
        real(base, key, value * 1.5, places)

    monkeypatch.setattr(output, "replace_tensor", careless)
    with pytest.raises(FinetuneError, match="is not what was trained"):
        run(out=tmp_path)
    assert not (tmp_path / "config.json").exists() and not list(tmp_path.glob(".*")) and (tmp_path / STATE).exists()

    def elsewhere(base, key, value, places):
        real(base, key, value, places)
        with places["model.safetensors"].open("r+b") as file:
            file.seek(base.tensors["model.norm.weight"].start)
            file.write(b"\1")

    monkeypatch.setattr(output, "replace_tensor", elsewhere)
    with pytest.raises(FinetuneError, match=r"differs from .* in what was not trained"):
        run(out=tmp_path)


def test_rows_beyond_the_dtype_of_the_files_are_refused(tiny_checkpoint, run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).to(torch.float16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "half")
    with pytest.raises(FinetuneError, match=r"beyond what torch\.float16 holds; lower --lr"):
        run(model=tmp_path / "half", lr=1e5, warmup=0.0, steps=1)


def merge_command(base, delta, out):
    return [sys.executable, "-m", "dbes.cli", "merge", str(base), str(delta), "--out", str(out)]


def killed_at(command, seconds):
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def test_a_merge_stopped_at_any_write_is_finished_by_the_same_command(delta, tiny_checkpoint, tmp_path, monkeypatch):
    whole = merge(str(tiny_checkpoint), delta, tmp_path / "whole")
    other = altered(delta, tmp_path / "other", lambda tensors: tensors | {FIRST: tensors[FIRST] + 1})
    places = ["replace"] * (len(listing(whole)) + 1) + ["unlink"]  # the mark, every file; and the mark's end
    for number, name in enumerate(places):
        out, calls, real = tmp_path / str(number), [], getattr(Path, name)

        def stopped(path, *arguments, number=number, calls=calls, real=real, **named):
            calls.append(path)
            if len(calls) == number + 1 or path.name == MERGING:
                raise KeyboardInterrupt
            return real(path, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                merge(str(tiny_checkpoint), delta, out)
        if number > 1:
            with pytest.raises(FinetuneError, match="unfinished merge of another delta or base"):
                merge(str(tiny_checkpoint), other, out)
        assert merge(str(tiny_checkpoint), delta, out) == out
        assert listing(out) == listing(whole), number


def test_the_mark_of_a_merge_that_wrote_nothing_stops_no_other(delta, tiny_checkpoint, tmp_path, monkeypatch):
    other = altered(delta, tmp_path / "other", lambda tensors: tensors | {FIRST: tensors[FIRST] + 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FileError, match=r"cannot be written \(No space left on device\)"):
            merge(str(tiny_checkpoint), other, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MERGING]
    merge(str(tiny_checkpoint), delta, tmp_path / "out")
    assert not (tmp_path / "out" / MERGING).exists()


@pytest.mark.slow
def test_merge_killed_at_random_moments_is_finished_by_the_same_command(delta, tiny_checkpoint, tmp_path):
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert killed_at(merge_command(tiny_checkpoint, delta, whole), 300) == 0
    length, moments = time.monotonic() - began, random.Random(0)
    for number in range(8):
        out = tmp_path / str(number)
        killed_at(merge_command(tiny_checkpoint, delta, out), length * moments.uniform(0.5, 1.1))
        assert killed_at(merge_command(tiny_checkpoint, delta, out), 300) == 0
        assert listing(out) == listing(whole)


@pytest.mark.slow
def test_finetune_killed_at_random_moments_is_finished_by_the_same_command(tiny_checkpoint, tiny_task, tmp_path):
    def line(out):
        return command(tiny_checkpoint, tiny_task, tmp_path, out, 6)

    began = time.monotonic()
    assert killed_at(line(tmp_path / "whole"), 300) == 0
    length, moments = time.monotonic() - began, random.Random(1)
    for number in range(8):
        out = tmp_path / str(number)
        for _ in range(2):
            killed_at(line(out), length * moments.uniform(0.4, 1.1))
        assert killed_at(line(out), 300) == 0
        assert same_weights(out, tmp_path / "whole") and listing(out).keys() == listing(tmp_path / "whole").keys()
