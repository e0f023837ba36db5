"""What a checkpoint needs, from its config and the headers of its files alone: parameters, bytes to read, bytes in memory.

Sizes are those of the model built without memory, in the dtype that each tensor would have once loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from dbes.errors import ModelError
from dbes.models.classes import build
from dbes.models.explained import explained
from dbes.models.folder import StoredTensor
from dbes.models.leftovers import LAYER
from dbes.models.sites import expert_slices, find_sites
from dbes.text import clipped

FOLLOWS = torch.float16
"""The dtype that skeletons are built in: what has it takes the dtype that a checkpoint is loaded in, anything else keeps its own."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8}
"""Of the dtypes of safetensors whose name does not end with its bits."""

HIDDEN_COPIES = 16
"""Vectors of the hidden size that a token has at once in a layer, at most: residual, norms, queries, keys, values, attention's output."""


@dataclass(frozen=True, kw_only=True)
class LayerNeeds:
    """One MoE layer: its number, experts, top-k, and the parameters of one expert."""

    layer: int
    experts: int
    top_k: int
    expert_parameters: int


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a model needs; bytes by name of the dtype it is loaded in (``DTYPES``).

    Attributes:
        architecture: name of its class.
        parameters: of the whole model, tied weights once; active: those that one token passes, embeddings included; embedding: those
            in no decoder layer: embeddings, head, last norm.
        layers: its MoE layers; depth: decoder layers, dense ones included.
        hidden: width of what the layers exchange.
        dtype: the checkpoint's own, by its config.
        quantization: name of the way the checkpoint is quantized, None where it is not.
        files: bytes of the tensors of the checkpoint, None where these are not known.
        weights: bytes of parameters and buffers; largest: of the largest decoder layer; outside: of what is in no decoder layer.
    """

    architecture: str
    parameters: int
    active: int
    embedding: int
    layers: tuple[LayerNeeds, ...]
    depth: int
    hidden: int
    dtype: str
    quantization: str | None
    files: int | None
    weights: Mapping[str, int]
    largest: Mapping[str, int]
    outside: Mapping[str, int]

    @property
    def routed(self) -> int:
        """Parameters of all routed experts."""
        return sum(each.experts * each.expert_parameters for each in self.layers)

    def activations(self, dtype: str, tokens: int) -> int:
        """Bytes that a batch of so many tokens takes in one layer, at most: hidden states, and what its chosen experts compute."""
        experts = max((each.top_k * (2 * self.hidden + each.expert_parameters // max(1, self.hidden)) for each in self.layers), default=0)
        return tokens * itemsize(dtype) * (HIDDEN_COPIES * self.hidden + experts)

    def control(self, draws: int = 1) -> int:
        """Bytes of the random routers of all layers, float32 [hidden, experts] each."""
        return draws * sum(4 * self.hidden * each.experts for each in self.layers)

    def host(self, tokens: int, *, draws: int = 1) -> int:
        """Bytes of a work unit's arrays on the host: ids (4 bytes), weights (2), about as much for margins and flips, and controls."""
        return tokens * sum(each.top_k for each in self.layers) * 6 * (2 + draws)

    def memory(self, dtype: str, *, tokens: int) -> int:
        """Bytes of a model that stays in memory while batches of so many tokens pass: loading it, or running it, whichever is more.

        While it is loaded, the tensors of one layer lie there twice: as they are read, and put together.
        """
        running = self.activations(dtype, tokens) + self.control() + self.host(tokens)
        return self.weights[dtype] + max(self.largest[dtype], running)

    def streaming(self, dtype: str, *, tokens: int) -> int:
        """Bytes of a model whose layers are read one by one: one that computes, one that is being read, and what is in no layer."""
        return self.outside[dtype] + 2 * self.largest[dtype] + self.activations(dtype, tokens) + self.control() + self.host(tokens)


def skeleton_of(where: str, config: Any, *, trust_remote_code: bool) -> PreTrainedModel | None:
    """The model without weights, its sites found, before hundreds of GB are downloaded for one that has none; in the dtype ``FOLLOWS``.

    None where a model cannot be built without memory; it is checked once loaded.

    Raises:
        ModelError: it cannot be built, or is not a Mixture-of-Experts model that dbes can record.
    """
    try:
        # the dtype that a model is built in is written into its config
        with explained(where), torch.device("meta"):
            skeleton = build(copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=FOLLOWS)
    except ModelError as problem:
        if isinstance(problem.__cause__, RuntimeError):
            return None
        raise
    find_sites(skeleton)
    return skeleton


def quantization_of(config: Any) -> str | None:
    """``quant_method`` of a config; None where its weights are plain."""
    return (_quantization(config) or {}).get("quant_method")


def stored_as(config: Any) -> str | None:
    """Quantization method, bits and block size of a checkpoint's weights in words, where they are quantized."""
    if (found := _quantization(config)) is None:
        return None
    method, bits, block = (found.get(name) for name in ("quant_method", "bits", "weight_block_size"))
    told = [f"{bits} bits"] * isinstance(bits, int) + [f"blocks of {' x '.join(map(str, block or ()))}"] * isinstance(block, list | tuple)
    return ", ".join([clipped(str(getattr(method, "value", method))), *told])


def _quantization(config: Any) -> dict[str, Any] | None:
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def stays_quantized(method: str | None) -> bool:
    """Whether weights that a checkpoint has quantized in this way lie so in the memory of this machine too."""
    if method == "fp8":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return method is not None and method != "mxfp4"


def measure(skeleton: PreTrainedModel, config: Any, tensors: Mapping[str, StoredTensor] | None = None) -> Needs:
    """What a model needs on this machine.

    Args:
        skeleton: see `skeleton_of`.
        config: what it was built from.
        tensors: those of the files; without them weights that stay quantized are counted as if they did not.
    """
    files = None if tensors is None else sum(stored_bytes(tensor) for tensor in tensors.values())
    plain = {dtype: _by_layer(skeleton, getattr(torch, dtype)) for dtype in DTYPES}
    method = quantization_of(config)
    # what stays quantized lies in memory about as it lies in the files
    kept = files if stays_quantized(method) else None
    scale = {dtype: 1.0 if kept is None else kept / sum(sizes.values()) for dtype, sizes in plain.items()}
    layers = tuple(_layer_needs(site) for site in find_sites(skeleton))
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    idle = sum((each.experts - min(each.top_k, each.experts)) * each.expert_parameters for each in layers)
    largest = {dtype: max(size for layer, size in sizes.items() if layer is not None) for dtype, sizes in plain.items()}
    return Needs(
        architecture=type(skeleton).__name__,
        parameters=parameters,
        active=parameters - idle,
        embedding=sum(parameter.numel() for name, parameter in skeleton.named_parameters() if not LAYER.search(name)),
        layers=layers,
        depth=sum(layer is not None for layer in plain["float32"]),
        hidden=_hidden(skeleton),
        dtype=_own_dtype(config, tensors),
        quantization=method,
        files=files,
        weights={dtype: int(scale[dtype] * sum(sizes.values())) for dtype, sizes in plain.items()},
        largest={dtype: int(scale[dtype] * size) for dtype, size in largest.items()},
        outside={dtype: int(scale[dtype] * sizes.get(None, 0)) for dtype, sizes in plain.items()},
    )


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def stored_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor in its file."""
    numbers = 1
    for length in tensor.shape:
        numbers *= length
    bits = BITS.get(tensor.dtype) or int(tensor.dtype.partition("_")[0].lstrip("BFIUC"))
    return numbers * bits // 8


def _by_layer(skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[int | None, int]:
    """Bytes of parameters and buffers by decoder layer, None for those that are in none, once loaded in a dtype."""
    # transformers keeps some modules in float32 whatever is asked for
    plan = skeleton._get_dtype_plan(dtype)
    wide = build_glob_alternation(list(plan))[0] if plan else None
    kept = set(skeleton.state_dict())
    found: dict[int | None, int] = {}
    for name, tensor in _tensors(skeleton):
        size = (dtype if tensor.dtype == FOLLOWS else tensor.dtype).itemsize
        if wide is not None and tensor.is_floating_point() and name in kept and wide.search(name):
            size = torch.float32.itemsize
        match = LAYER.search(name)
        layer = int(match[1]) if match else None
        found[layer] = found.get(layer, 0) + tensor.numel() * size
    return found


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _layer_needs(site: Any) -> LayerNeeds:
    numbers = 0
    # experts that cannot be told apart count as if every token passed them all
    with suppress(ModelError):
        numbers = sum(cut(parameter).numel() for parameter, cut in expert_slices(site, 0))
    return LayerNeeds(layer=site.layer, experts=site.num_experts, top_k=site.top_k, expert_parameters=numbers)


def _hidden(skeleton: PreTrainedModel) -> int:
    config: Any = skeleton.config.get_text_config()
    found = (getattr(config, name, None) for name in ("hidden_size", "d_model"))
    return next((width for width in found if isinstance(width, int)), 1024)


def _own_dtype(config: Any, tensors: Mapping[str, StoredTensor] | None) -> str:
    """The dtype that a checkpoint is said to be in, or that most of its plain numbers have."""
    for part in (config, config.get_text_config()):
        if (own := getattr(part, "dtype", None)) is not None:
            return str(own).removeprefix("torch.")
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    sizes: dict[str, int] = {}
    for tensor in (tensors or {}).values():
        if name := names.get(tensor.dtype):
            sizes[name] = sizes.get(name, 0) + stored_bytes(tensor)
    return max(sizes, key=lambda name: sizes[name], default="float32")
