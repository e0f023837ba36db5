"""Tiny models of stock architectures: what is trained here loads in plain transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from dbes.testbed.settings import ModelSettings

SIZES = {"1m": (64, 4, 1024), "4m": (128, 4, 2048), "12m": (192, 6, 3072)}
"""Hidden size, layers, and the width of all experts of a layer together: 1.0, 3.9 and 12 M parameters with the usual vocabularies."""


def shape_of(settings: ModelSettings) -> tuple[int, int, int]:
    """Hidden size, layers and the width of one expert: more experts are narrower ones, so the parameters stay the same."""
    hidden, layers, width = SIZES[settings.size]
    return settings.hidden or hidden, settings.layers or layers, settings.intermediate or max(8, width // settings.experts)


def build_model(settings: ModelSettings, *, seed: int) -> PreTrainedModel:
    """A freshly initialised model in float32; equal settings and seed give equal weights.

    The router's weights are drawn apart, so that their standard deviation changes nothing else.
    """
    hidden, layers, width = shape_of(settings)
    shared = {
        "vocab_size": settings.vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_experts_per_tok": settings.top_k,
        "max_position_embeddings": settings.max_positions,
        "tie_word_embeddings": True,
        "norm_topk_prob": settings.normalise,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "use_cache": True,
    }
    heads = max(1, hidden // 32)
    torch.manual_seed(seed)
    if settings.architecture == "olmoe":
        model: PreTrainedModel = OlmoeForCausalLM(
            OlmoeConfig(num_experts=settings.experts, intermediate_size=width, num_attention_heads=heads, **shared)
        )
    else:
        model = DeepseekV3ForCausalLM(
            DeepseekV3Config(
                n_routed_experts=settings.experts,
                moe_intermediate_size=width,
                intermediate_size=4 * hidden,
                n_shared_experts=1,
                first_k_dense_replace=0,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                q_lora_rank=None,
                kv_lora_rank=hidden // 2,
                qk_rope_head_dim=16,
                qk_nope_head_dim=16,
                v_head_dim=32,
                n_group=1,
                topk_group=1,
                num_mtp_layers=0,
                routed_scaling_factor=1.0,
                **shared,
            )
        )
    std = hidden**-0.5 if settings.router_std == "1/sqrt(hidden)" else float(settings.router_std)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.normal_(0.0, std, generator=generator)
    # Sorted by expert, one grouped product: as exact as the loop over experts and faster on a CPU.
    model.set_experts_implementation("grouped_mm")
    return model


def routers_of(model: nn.Module) -> list[Any]:
    """The router modules, first layer first: each has ``weight``, ``num_experts`` and ``top_k``."""
    return [module for module in model.modules() if isinstance(module, OlmoeTopKRouter | DeepseekV3TopkRouter)]
