"""Tiny random models of every Mixture-of-Experts causal-LM family transformers offers, and which families those are.

`discovered` reads the answer out of transformers, so that a release with a new family fails the tests until it is covered.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig

EXPERTS, TOP_K, LAYERS, VOCABULARY, HIDDEN = 8, 2, 4, 128, 32

REPRESENTATIVES = (
    "olmoe", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama4_text", "nemotron_h", "dbrx", "doge", "longcat_flash",
)  # fmt: skip
"""Families that differ most: the plain one; groups and a bias; experts from a table; biases and interleaved rows; scores in place of
ids; no gate; flat weights; rows of an embedding; zero experts. The default tests run these, the slow ones every other."""

# transformers 5.23: DbrxAttention reads rope_theta, which its config class lacks
DbrxAttentionConfig.rope_theta = 10000.0

COMPOSITE = {
    "dots3_note": "dots3_note_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}
"""Model types with a vision part, and the type of their text part, which is the family that is tested."""

NOT_MOE = {"bamba"}
"""Model types whose source mentions experts but which have none."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "expert_num"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "first_k_dense", "topk_group"), 1),
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings", "max_seq_len"), VOCABULARY),
    **dict.fromkeys(("num_attention_heads", "n_heads", "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "swa_v_head_dim", "global_head_dim", "v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "qk_head_dim", "index_head_dim", "index_topk", "router_hidden_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), 48),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 64),
    **dict.fromkeys(("mamba_d_conv", "mamba_dt_rank", "mamba_n_heads", "mamba_num_heads", "conv_kernel", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("n_group", "num_expert_group", "n_groups", "mamba_expand", "o_groups", "hc_mult", "num_layers"), 2),
    # an attention indexer of few heads often scores keys exactly 0, and ties fall as the width of the batch has it
    "index_n_heads": 32,
    "zero_expert_num": 4,
    "mamba_n_groups": 1,
    "num_nextn_predict_layers": 0,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small values for the fields of any family's config that has them."""

ALTERNATING = ["linear_attention", "full_attention"] * 2
LATENT = {"axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite"} | {
    "glm_moe_dsa",
    "kimi_linear",
    "longcat_flash",
}
"""Families with latent attention, where every head has its own key."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "layer_types": ALTERNATING, "num_mtp_layers": 0},
    "dbrx": {
        "n_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": HIDDEN},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {"head_dim": 16, "layer_types": ["full_attention"] * LAYERS},
    "gemma4_text": {"enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ALTERNATING, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def representatives(families: Iterable[str]) -> list[Any]:
    """Values for ``parametrize``: all these families, of which only the representatives are tested by default."""
    return [family if family in REPRESENTATIVES else pytest.param(family, marks=pytest.mark.slow) for family in families]


@functools.cache
def discovered() -> tuple[str, ...]:
    """Model types of causal LMs whose source speaks of experts; composite types stand for their text part."""
    found = set()
    source = Path(transformers.__file__).parent / "models"
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(model_type).removesuffix("_text")
        for path in (source / module).glob("modeling_*.py"):
            if re.search(r"^class \w*(Experts|MoE|Moe|MOE|SparseMoeBlock)\b", path.read_text("utf-8"), re.MULTILINE):
                found.add(COMPOSITE.get(model_type, model_type))
    return tuple(sorted(found - NOT_MOE))


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of the family that builds in a moment."""
    kind = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {name: value for name, value in SIZES.items() if name in names}
    heads = {"num_key_value_heads": 4} if model_type in LATENT else {}
    return kind(**{**values, **heads, **SPECIAL.get(model_type, {}), **changes})


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model of the family whose routers and biases have a real spread."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    kind = getattr(transformers, names if isinstance(names, str) else names[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(tiny_config(model_type, **changes)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "correction_bias" in name or name.endswith("expert_bias") or "balancing_biases" in name:
                    tensor.copy_(torch.randn_like(tensor) * 0.05)
                elif name.endswith("tid2eid"):  # deepseek_v4: experts by token id, from the checkpoint; zero when random
                    tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(dim=-1)[:, : tensor.shape[1]])
                elif tensor.is_floating_point() and ("router" in name or "gate." in name) and tensor.dim() == 2:
                    tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


def character_tokenizer(*, special: bool = True) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, with a <s> put before a text."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {chr(code): 4 + place for place, code in enumerate(range(32, 127))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if special:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=10**9
    )


SENSES: dict[str, Any] = {
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers", "num_layers"), 1),
    **dict.fromkeys(("hidden_size", "out_hidden_size", "d_model", "output_dim", "text_hidden_size", "adapter_in_dim"), HIDDEN),
    **dict.fromkeys(("adapter_out_dim", "adapter_input_size", "output_channels", "output_proj_dims", "downsample_hidden_size"), HIDDEN),
    **dict.fromkeys(("projection_hidden_dim", "projection_intermediate_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads", "num_key_value_heads"), 4),
    "head_dim": 8,
    "image_size": 28,
    "num_position_embeddings": 16,
    "position_embedding_size": 64,
    "vocab_size": VOCABULARY,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "deepstack_visual_indexes": [0],
    "layer_types": ["full_attention"],
    "mlp_layer_types": ["sparse"],
    "per_layer_config": {},
    "patch_sizes": (16,),
    "hidden_sizes": (HIDDEN,),
    "depths": (1,),
}
"""Small values for the fields of configs of the parts that see and hear."""

TOKENS_OF_SENSES = {"vision_start_token_id": 100, "image_token_id": 101, "video_token_id": 102} | {
    "audio_token_id": 103,
    "audio_start_token_id": 104,
}


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": list(sections), **more}}


TEXT_PARTS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], "moe_k": TOP_K, **_sections(1, 1, 2)},
    "glm4v_moe_text": {"head_dim": 16, **_sections(2, 1, 1, partial_rotary_factor=0.5)},
    "glm5_next_text": {
        "num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0, "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
    },
    "mistral_large4_text": {"num_key_value_heads": 4},
    "qwen3_omni_moe_text": _sections(2, 1, 1),
    "qwen3_vl_moe_text": _sections(2, 1, 1),
}  # fmt: skip
"""What the text parts of composite models need besides `SIZES` and `SPECIAL`."""

NOT_CAUSAL = {"diffusion_gemma": "two routers in layer 0"}
"""Composite types with experts that dbes refuses, and why: an encoder and a decoder."""

TOWER = {"num_hidden_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 28}
OTHER_TOWERS = {
    "aria": {"model_type": "idefics3_vision", "patch_size": 14, **TOWER},
    "diffusion_gemma": {"model_type": "gemma4_vision", "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64, **TOWER},
    "mistral_large4": {"model_type": "pixtral", "patch_size": 14, "head_dim": 8, **TOWER},
}
"""Vision parts that may be of any type."""


@functools.cache
def composites() -> tuple[str, ...]:
    """Model types with a text part and others, whose source speaks of experts."""
    found = set()
    source = Path(transformers.__file__).parent / "models"
    for model_type in {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}:
        if not {"text_config", "thinker_config"} & set(CONFIG_MAPPING[model_type].sub_configs):
            continue
        for path in (source / model_type_to_module_name(model_type)).glob("modeling_*.py"):
            if re.search(r"^class \w*(Experts|MoE|Moe|MOE|SparseMoeBlock)\b", path.read_text("utf-8"), re.MULTILINE):
                found.add(model_type)
    return tuple(sorted(found))


def tiny_composite(model_type: str) -> PreTrainedModel:
    """A random model of a composite type with all its parts, of the class that its checkpoints name."""
    kind = CONFIG_MAPPING[model_type]
    parts: dict[str, Any] = {}
    for name, part in kind.sub_configs.items():
        if name == "text_config":
            parts[name] = _text_part(part)
        elif name == "thinker_config":
            parts[name] = _thinker(part)
        elif name == "talker_config":
            parts[name] = _talker(part)
        else:
            parts[name] = _part(part, SENSES) if dataclasses.is_dataclass(part) else OTHER_TOWERS[model_type]
    if "thinker" in model_type:
        parts |= TOKENS_OF_SENSES
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    built = getattr(transformers, next(mapping[model_type] for mapping in mappings if model_type in mapping))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(kind(**parts)).eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if ("router" in name or "gate." in name) and tensor.dim() == 2:
                    tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


def _text_part(kind: Any) -> dict[str, Any]:
    return _part(kind, SIZES) | SPECIAL.get(kind.model_type, {}) | TEXT_PARTS.get(kind.model_type, {})


def _thinker(kind: Any) -> dict[str, Any]:
    parts = {name: _text_part(part) if name == "text_config" else _part(part, SENSES) for name, part in kind.sub_configs.items()}
    return TOKENS_OF_SENSES | parts


def _talker(kind: Any) -> dict[str, Any]:
    parts = {name: _part(part, SIZES) | _sections(2, 1, 1) for name, part in kind.sub_configs.items()}
    parts["text_config"]["shared_expert_intermediate_size"] = 16
    return {"spatial_merge_size": 2, "thinker_hidden_size": HIDDEN, **parts}


def _part(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    inner = {name: _part(part, sizes) for name, part in kind.sub_configs.items() if dataclasses.is_dataclass(part)}
    return {name: value for name, value in sizes.items() if name in names} | inner
