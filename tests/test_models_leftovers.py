"""Every tensor of a checkpoint is used, or known not to matter and named; anything else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import character_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dbes.errors import ModelError
from dbes.evaluation.pipeline import evaluate
from dbes.models import load_model
from dbes.models.doctor import examine

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, alter: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in alter(load_file(path)).items()}, path, {"format": "pt"})


def refused(folder: Path, match: str) -> None:
    for call in (load_model, examine):
        with pytest.raises(ModelError, match=match) as caught:
            call(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 2}, r"model\.layers\.2\..* left over: the weights hold 3 layers, config\.json names 2"),
        ({"num_hidden_layers": 5}, r"tensors are not in the weights \(first: model\.layers\.3"),
        ({"num_experts": 4}, r"has the shape \[8, .*\] in the weights, \[4, .*\] by config\.json"),
        ({"num_experts": 16}, r"has the shape \[8, .*\] in the weights, \[16, .*\] by config\.json"),
        ({"num_key_value_heads": 2}, r"k_norm\.weight has the shape \[32\] in the weights, \[16\] by config\.json"),
        ({"vocab_size": 100}, r"lm_head\.weight has the shape"),
    ],
)
def test_a_config_of_other_weights(checkpoint: Path, changes: dict[str, int], match: str) -> None:
    edit(checkpoint, **changes)
    refused(checkpoint, match)


def scaled(tensors: Tensors, name: str) -> Tensors:
    """Projections in 8 bits with a scale each, as quantizers outside transformers write them."""
    made = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            scale = tensor.abs().max() / 448
            made |= {key: (tensor / scale).to(torch.float8_e4m3fn), key.removesuffix("weight") + name: scale.reshape(1)}
    return made


@pytest.mark.parametrize("quantization", [None, {"quant_method": "modelopt", "quant_algo": "FP8"}])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_scales_that_are_not_read(checkpoint: Path, name: str, quantization: dict[str, str] | None) -> None:
    change(checkpoint, lambda tensors: scaled(tensors, name))
    if quantization is not None:
        edit(checkpoint, quantization_config=quantization)
    refused(checkpoint, f"{name}.* left over: scales of quantized weights that transformers .* does not read")


@pytest.mark.parametrize("name", ["input_scale", "k_scale", "v_scale", "weight_zero_point"])
def test_a_single_scale_is_enough(checkpoint: Path, name: str) -> None:
    change(checkpoint, lambda tensors: tensors | {f"model.layers.0.self_attn.q_proj.{name}": torch.ones(1)})
    refused(checkpoint, f"q_proj.{name} is left over: scales of quantized weights")


def test_eight_bits_that_transformers_reads(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: scaled(tensors, "weight_scale_inv"))
    change(tmp_path, lambda tensors: {name: tensor[None] if "scale_inv" in name else tensor for name, tensor in tensors.items()})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit(tmp_path, quantization_config=quantization)
    first = load_model(tmp_path).model.model.layers[0].mlp.experts.gate_up_proj
    exact = tiny_model("qwen3_moe").model.layers[0].mlp.experts.gate_up_proj
    assert (first - exact).abs().max() < 0.1 * exact.abs().max()
    edit(tmp_path, num_experts=4)
    refused(tmp_path, "config.json says num_(local_)?experts [48] and num_(local_)?experts [48], which are one setting")
    edit(tmp_path, num_experts=4, num_local_experts=4)  # transformers itself does not compare the shapes of what it dequantizes
    refused(tmp_path, r"has the shape \[8, .*\] in the weights, \[4, .*\] by config\.json")
    edit(tmp_path, num_experts=8, num_local_experts=8)
    lost = "model.layers.0.self_attn.q_proj.weight"
    change(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{lost}_scale_inv"})
    refused(tmp_path, rf"{lost} is F8_E4M3 without a scale")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_are_no_weights(checkpoint: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    change(checkpoint, lambda tensors: tensors | {name: (tensors[name] * 100).to(dtype)})
    refused(checkpoint, f"{name} is stored as .*packed or quantized, and config.json does not say how")


def test_packed_weights_have_another_shape(checkpoint: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    change(checkpoint, lambda tensors: tensors | {name: tensors[name].view(torch.uint8)})
    refused(checkpoint, rf"{name} has the shape \[32, 128\] in the weights, \[32, 32\] by config\.json")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate.e_score_correction_bias", "nonsense"])
def test_tensors_without_a_place(checkpoint: Path, name: str) -> None:
    change(checkpoint, lambda tensors: tensors | {name: torch.ones(8)})
    refused(checkpoint, f"{name} is left over: the model that config.json describes has no place for them")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight"], "layers that predict further tokens"),
        (["mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"], "layers that predict further tokens"),
        (["model.mtp_block.0.mlp.gate.weight"], "layers that predict further tokens"),
        (["model.visual.blocks.0.attn.qkv.weight", "vision_tower.a", "model.vision_tower.layers.9.x"], "parts for images, sound or speech"),
        (["multi_modal_projector.linear_1.weight", "audio_tower.layers.7.fc.weight"], "parts for images, sound or speech"),
        (["model.layers.0.self_attn.rotary_emb.inv_freq"], "buffers that the model computes itself"),
        (["v_head.summary.weight"], "output heads"),
    ],
)
def test_what_does_not_matter_is_named(checkpoint: Path, names: list[str], kind: str) -> None:
    change(checkpoint, lambda tensors: tensors | {name: torch.ones(2, 2) for name in names})
    (note,) = load_model(checkpoint).notes
    assert note == f"{len(names)} tensors of the checkpoint were not loaded, {kind}: {sorted(names)[0]}, ..."
    assert examine(checkpoint).notes == (note,)


def test_notes_reach_the_result(checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    change(checkpoint, lambda tensors: tensors | {"mtp.fc.weight": torch.ones(2, 2)})
    result = evaluate(checkpoint, tasks=tiny_task, output_path=tmp_path / "results", limit=3, permutations=0)
    note = "model: 1 tensors of the checkpoint were not loaded, layers that predict further tokens: mtp.fc.weight, ..."
    assert result.warnings[0] == note


def test_names_that_a_class_ignores_are_looked_at(tmp_path: Path) -> None:
    """glm4_moe ignores every tensor of layer 46, which is the one for further tokens in one of its checkpoints only."""
    model: PreTrainedModel = tiny_model("glm4_moe")
    assert any("46" in pattern for pattern in model._keys_to_ignore_on_load_unexpected)
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors | {"model.layers.46.mlp.gate.weight": torch.ones(8, 32)})
    refused(tmp_path, r"model\.layers\.46\.mlp\.gate\.weight is left over: the weights hold 47 layers, config\.json names 4")
    change(tmp_path, lambda tensors: tensors | {"model.layers.46.eh_proj.weight": torch.ones(2, 2)})
    assert "layers that predict further tokens" in load_model(tmp_path).notes[0]


def test_tensors_that_come_apart_are_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    lost = "model.layers.0.mlp.experts.7.up_proj.weight"
    change(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    refused(tmp_path, r"model\.layers\.0\.mlp\.experts\.gate_up_proj cannot be put together from the weights")
