"""The examination finds what is there, in seconds, with weights or with a config alone."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import EXPERTS, character_tokenizer, discovered, representatives, tiny_config, tiny_model
from mock_remote_moe import MockMoeConfig, MockMoeForCausalLM
from rich.console import Console
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dbes.errors import ModelError
from dbes.models import doctor
from dbes.models.doctor import examine
from dbes.models.miniature import miniature
from dbes.reporting.doctor import render

INCOMPLETE: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "doge": {"is_moe": True, "num_experts": 16384},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 1, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048, "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50000, "ple_layer_ids": [1], "ple_embed_dim": 512, "hc_count": 2, "hc_lowrank": 64, "heads_per_ngram": 2,
        "eos_token_id": 2,
    },
}  # fmt: skip
"""What the default configs of these families leave to the checkpoint."""


def test_a_model_as_it_is() -> None:
    model = tiny_model("deepseek_v3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = examine(model, ablated_layers=3)
    assert found.ok and found.weights == "given" and found.dense_layers == (0,)
    assert [(layer.layer, layer.experts, layer.top_k) for layer in found.layers] == [(1, EXPERTS, 2), (2, EXPERTS, 2), (3, EXPERTS, 2)]
    for layer in found.layers:
        assert (layer.scores, layer.logits, layer.control, layer.ablation) == ("exact", True, True, True)
        assert layer.slots_counted == layer.slots_expected == 2 * 24 * 2
        assert (layer.router, layer.source) == ("DeepseekV3TopkRouter", "DeepseekV3Experts")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_are_text() -> None:
    rows = examine(tiny_model("longcat_flash")).rows()
    assert [row["layer"] for row in rows] == ["0", "1"] and rows[0]["experts"] == "8 + 4 zero" and rows[0]["slots"] == "96/96"
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert "product keys" in examine(tiny_model("doge")).rows()[0]["selection score"]


def test_a_folder_with_weights(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer here"):  # a recording would stop there too
        examine(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert found.ok and found.weights == "from the folder" and found.architecture == "Qwen3MoeForCausalLM" and not found.notes


def test_a_folder_with_a_config_alone(tmp_path: Path) -> None:
    CONFIG_MAPPING["deepseek_v3"]().save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert found.ok and found.weights == "random, scaled down" and "judges the architecture, not weights or tokenizer" in found.notes[0]
    assert "OK: every layer of this architecture can be recorded" in shown(found)
    assert {(layer.layer, layer.experts, layer.top_k) for layer in found.layers} == {(3, 256, 8)} and found.dense_layers == (0, 1, 2)
    assert found.seconds < 60


def shown(found: doctor.Diagnosis) -> str:
    console = Console(width=200, file=StringIO())
    console.print(render(found))
    return console.file.getvalue()


def test_a_model_that_does_not_run() -> None:
    model = tiny_model("olmoe")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(ModelError, match="OlmoeForCausalLM: the model cannot be run"):
        examine(model)


def test_weights_too_large_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    monkeypatch.setattr(doctor, "WEIGHTS_LIMIT", 10)
    with pytest.raises(ModelError, match="no tokenizer here"):
        examine(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert found.weights == "random, scaled down" and "were not loaded: only their names, shapes and files" in found.notes[0]


@pytest.mark.parametrize("family", representatives(discovered()))
def test_every_family_scales_down(family: str) -> None:
    """From the family's default config, which has the sizes of its first checkpoint."""
    config = CONFIG_MAPPING[family](**INCOMPLETE.get(family, {}))
    model = miniature(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    found = examine(model, ablated_layers=1)
    assert found.ok, found.rows()
    if family != "doge":
        full, top_k = EXPECTED.get(family, (None, None))
        assert full is None or (found.layers[0].experts, found.layers[0].top_k) == (full, top_k)


EXPECTED = {
    "deepseek_v3": (256, 8),
    "olmoe": (64, 8),
    "mixtral": (8, 2),
    "gpt_oss": (128, 4),
    "qwen3_moe": (128, 8),
    "longcat_flash": (512, 12),
}


def test_what_cannot_be_examined(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a Mixture-of-Experts"):
        examine(
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
            )
        )
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a Mixture-of-Experts"):
        examine(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        examine(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(ModelError):
        examine(tmp_path)


def test_faults_are_found() -> None:
    model = tiny_model("deepseek_v4")
    model.model.layers[0].mlp.gate.tid2eid.zero_()
    found = examine(model)
    assert not found.ok and "an expert stands twice in one row" in found.layers[0].problem and found.layers[3].problem is None
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[3].mlp.gate.weight[0] = torch.nan
    assert "NaN or infinity in the gate weights" in examine(model).layers[3].problem
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    found = examine(model)
    assert "routed 0 times in one forward" in found.layers[1].problem and found.rows()[1]["control"] == "NO"


def test_faulty_ids_fail_the_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    from dbes.models import hooks

    real = hooks.READERS["experts"]
    monkeypatch.setitem(hooks.READERS, "experts", lambda *given: ((real(*given)[0] + 1) % EXPERTS, real(*given)[1]))
    found = examine(tiny_model("olmoe"), ablated_layers=2)
    assert [layer.ablation for layer in found.layers] == [False, None, None, False] and not found.ok
    assert "did not change exactly the rows" in found.layers[0].problem
    assert "no top-k over one score per expert returned the experts that ran" in found.layers[0].scores


def test_a_tiny_config_is_a_config() -> None:
    assert tiny_config("olmoe").num_experts == EXPERTS and character_tokenizer()("ab")["input_ids"][0] == 1


def test_experts_that_are_modules_and_a_router_that_draws_random_numbers() -> None:
    assert examine(MockMoeForCausalLM(MockMoeConfig(block="shared")).eval()).ok
    found = examine(MockMoeForCausalLM(MockMoeConfig(block="noisy")).eval())
    assert not found.ok and "the router draws random numbers outside training too" in str(found.layers[0].problem)


class EightBits(nn.Module):
    """A linear map as quantizers put in place of nn.Linear: integers and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


def test_quantized_experts_are_read_and_not_ablated() -> None:
    model = MockMoeForCausalLM(MockMoeConfig(block="mixtral")).eval()
    for layer in model.model.layers[1:]:
        for expert in layer.mlp.experts:
            expert.up, expert.down = EightBits(expert.up), EightBits(expert.down)
    found = examine(model)
    assert found.ok and [layer.ablation for layer in found.layers] == [None, None]
    assert [layer.scores for layer in found.layers] == ["exact", "exact"]
