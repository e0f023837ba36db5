"""A model of a checkpoint's architecture with random weights, small enough to run anywhere in a second.

Kept: family, number of experts, top-k, groups, biases, zero-computation experts, which layers are dense, layer types. Cut: hidden
sizes, heads, vocabulary, number of layers. Its routing means nothing; that it can be read as the big model's will be, does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dbes.errors import ModelError
from dbes.models import build, text_config_of
from dbes.models.sites import find_sites

HEADS, HEAD, HIDDEN, VOCABULARY = 4, 8, 32, 128

SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "model_max_length"), 512),
    **dict.fromkeys(("num_attention_heads", "n_heads", "linear_num_value_heads", "linear_num_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_global_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim", "v_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("rotary_dim", "kv_lora_rank", "hidden_size_per_layer_input", "hc_lowrank", "indexer_head_dim", "o_lora_rank"), HEAD),
    **dict.fromkeys(("qk_head_dim", "index_head_dim", "q_lora_rank", "router_hidden_size", "ple_embed_dim"), 16),
    **dict.fromkeys(("index_topk", "index_block_size", "indexer_budget", "chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "gated_norm_rank", "d_rel"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "rel_extent", "keep_window_size"), 64),
    **dict.fromkeys(("mamba_n_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "mamba_num_heads"), 16),
    "o_groups": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
}
LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def miniature(config: Any, *, seed: int = 0, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture of ``config`` with random float32 weights, scaled down to a few layers and narrow ones.

    Raises:
        ModelError: the architecture cannot be scaled down, or is not a Mixture-of-Experts model.
    """
    text = text_config_of(config)
    depth = next((getattr(text, name) for name in LAYERS if isinstance(getattr(text, name, None), int)), 4)
    problem: Exception | None = None
    for layers in sorted({min(depth, count) for count in (4, 6, 8, 16, depth)}):
        try:
            small = type(text).from_dict(_cut(text.to_dict(), depth, layers))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = build(small, dtype=torch.float32, trust_remote_code=trust_remote_code)
                _fill_empty(model)
            find_sites(model)
            return model.eval()
        except ModelError as missing:
            problem = missing  # the first MoE layer may lie further up
        except Exception as broken:
            if not isinstance(problem, ModelError):
                problem = broken
    if isinstance(problem, ModelError):
        raise problem
    raise ModelError(f"{type(text).__name__}: cannot be scaled down ({type(problem).__name__}: {problem}); give the weights") from problem


def _cut(values: dict[str, Any], depth: int, layers: int) -> dict[str, Any]:
    cut: dict[str, Any] = {}
    for name, value in values.items():
        if name in LAYERS:
            cut[name] = layers
        elif name in TOKENS:
            cut[name] = TOKENS[name]
        elif name == "per_layer_config" and isinstance(value, dict):
            cut[name] = {layer: _cut(part, depth, layers) for layer, part in value.items() if int(layer) < layers}
        elif isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
            cut[name] = _cut(value, depth, layers)
        elif isinstance(value, list) and len(value) == depth and depth > layers:
            cut[name] = value[:layers]
        elif isinstance(value, list) and name.endswith(("layers", "layer_ids", "layer_idx")) and all(type(item) is int for item in value):
            cut[name] = [item for item in value if item < layers]
        elif type(value) is int and name in SMALL:
            cut[name] = min(value, SMALL[name])
        elif name.endswith("_end_index") and type(value) is int:
            cut[name] = min(value, layers - 1)
        elif name != "quantization_config":
            cut[name] = value
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_key_value_heads" in values:
        cut["num_key_value_heads"] = cut["num_attention_heads"]
    if values.get("qk_nope_head_dim") and (values.get("head_dim") or 0) > (values.get("qk_rope_head_dim") or 0):
        cut["head_dim"] = cut["qk_nope_head_dim"] + cut["qk_rope_head_dim"]  # of a whole query, not of its rotated part
    rotation = cut.get("rope_parameters")
    if isinstance(rotation, dict) and isinstance(rotation.get("mrope_section"), list):
        cut["rope_parameters"] = {**rotation, "mrope_section": _sections(cut, rotation)}
    return cut


def _sections(cut: dict[str, Any], rotation: dict[str, Any]) -> list[int]:
    """How the rotated pairs of a head are shared by time, height and width."""
    pairs = int((cut.get("head_dim") or HEAD) * (rotation.get("partial_rotary_factor") or 1)) // 2
    share, first, second = pairs // 3, *rotation["mrope_section"][:2]
    rest = pairs - 2 * share
    return [share, share, rest] if first == second else [rest, share, share]  # height and width stay alike


@torch.no_grad()
def _fill_empty(model: nn.Module) -> None:
    """Tables that only a checkpoint fills are zero after construction: without this no token would be routed sensibly."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and not parameter.any():
            parameter.normal_(std=0.02)
    for site in find_sites(model):
        for buffer in site.router.buffers() if site.router is not None else ():
            if buffer.ndim == 2 and not buffer.is_floating_point() and buffer.shape[1] == site.top_k and not buffer.any():
                buffer.copy_(torch.rand(len(buffer), site.num_experts).argsort(dim=-1)[:, : site.top_k])
