"""The split bank: an experts implementation for transformers where a few experts compute with weights of their own.

transformers lets a model's experts modules run another function (`transformers.integrations.moe.ExpertsInterface`). This one
sends the slots (token, chosen expert) of trained experts through a small bank of separate tensors, and all others through
the frozen fused tensor. The fused tensor then needs no gradient, and nothing but the bank has an optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dbes.errors import FinetuneError
from dbes.finetuning.frozen import FrozenExperts, SumOverSlots, activate, names, project
from dbes.finetuning.tensors import ExpertTensor

NAME = "dbes_split_bank"
_BANK = "_dbes_bank"


@dataclass(frozen=True, eq=False)
class Bank:
    """The trained experts of one experts module.

    Attributes:
        previous: the experts implementation the model ran before; runs on where nothing is trained.
        experts: the trained experts, and their tensors by the name of the module's own parameter (``down_proj``, ...).
        places: int64 [experts + 1], e where expert e is frozen, and number of experts + c for the c-th trained one, so that a sort
            puts the trained ones last. The last entry stands for ids beyond the experts.
    """

    previous: str | None
    experts: Mapping[int, Mapping[str, ExpertTensor]]
    places: Tensor


def uses_interface(module: nn.Module) -> bool:
    """Whether the experts module can run another implementation (``@use_experts_implementation`` of transformers)."""
    flags = all(isinstance(getattr(module, name, None), bool) for name in ("has_gate", "has_bias", "is_transposed"))
    return flags and hasattr(type(module).forward, "__wrapped__") and not getattr(module, "_is_expert_parallel", False)


@contextmanager
def banks_installed(model: nn.Module, tensors: Sequence[ExpertTensor]) -> Iterator[None]:
    """Inside the block every experts module of the model runs this implementation, those of the tensors with their bank."""
    modules = {name: module for name, module in model.named_modules() if uses_interface(module)}
    by_module: dict[str, dict[int, dict[str, ExpertTensor]]] = {name: {} for name in modules}
    for tensor in tensors:
        owner, _, own_name = tensor.name.rpartition(".")
        by_module[owner].setdefault(tensor.cell.expert, {})[own_name] = tensor
    configs: dict[int, Any] = {id(module.config): module.config for module in modules.values()}
    before = {key: config._experts_implementation for key, config in configs.items()}
    if NAME in before.values():
        raise FinetuneError("other cells of this model are in training; end that block first")
    ALL_EXPERTS_FUNCTIONS.register(NAME, split_bank_forward)
    try:
        for name, module in modules.items():
            count, experts = _count(module), by_module[name]
            places = torch.arange(count + 1)
            for index, expert in enumerate(experts):
                places[expert] = count + index
            # a plain attribute: the leaves must not turn up among the model's parameters
            module.__dict__[_BANK] = Bank(previous=before[id(module.config)], experts=experts, places=places)
        for config in configs.values():
            # the attribute transformers itself writes when an implementation is set on one config and not on its parts
            config._experts_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        for module in modules.values():
            module.__dict__.pop(_BANK, None)


def split_bank_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [tokens, hidden].

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: int [tokens, k]; top_k_weights: [tokens, k].
    """
    bank: Bank = self.__dict__[_BANK]
    if not bank.experts:
        plain = type(self).forward.__wrapped__
        run = plain if bank.previous in (None, "eager") else ALL_EXPERTS_FUNCTIONS.get(bank.previous, plain)
        return run(self, hidden_states, top_k_index, top_k_weights)
    k, count = top_k_index.shape[-1], _count(self)
    places, order = torch.sort(bank.places.to(top_k_index.device)[top_k_index.reshape(-1)], stable=True)
    counts = torch.bincount(places, minlength=count + len(bank.experts))
    frozen, *trained = [int(counts[:count].sum()), *counts[count:].tolist()]
    tokens, weights, outputs = order // k, top_k_weights.reshape(-1)[order], []
    if frozen:
        offsets = torch.cumsum(counts[:count], 0, dtype=torch.int32)
        outputs.append(_frozen(self, hidden_states, weights[:frozen], tokens[:frozen], places[:frozen], offsets))
    start = frozen
    for tensors, length in zip(bank.experts.values(), trained, strict=True):
        if length:  # an expert without a token has no part in the graph: no gradient, no weight decay, no momentum
            rows = hidden_states.index_select(0, tokens[start : start + length])
            output = _trained(self, rows, weights[start : start + length], tensors).to(outputs[0].dtype if outputs else rows.dtype)
            outputs.append(output * weights[start : start + length, None])
            start += length
    return cast(Tensor, SumOverSlots.apply(torch.cat(outputs), order, k)).to(hidden_states.dtype)


def _frozen(module: Any, hidden: Tensor, weights: Tensor, tokens: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Weighted outputs of frozen experts; see `FrozenExperts`."""
    if not getattr(module, "has_post_expert_norm", False):
        return cast(Tensor, FrozenExperts.apply(hidden, weights, module, tokens, ids, offsets))
    up, down = names(module)
    output = project(module, activate(module, project(module, hidden[tokens], up, ids, offsets)), down, ids, offsets)
    return module.post_expert_norm(output) * weights[:, None]


def _trained(module: Any, rows: Tensor, gates: Tensor, tensors: Mapping[str, ExpertTensor]) -> Tensor:
    """Outputs of one trained expert for the rows routed to it, not yet weighted by their gates."""
    up, down = names(module)

    def through(values: Tensor, name: str) -> Tensor:
        if name in tensors:
            tensors[name].see(values, gates, inputs_first=module.is_transposed)
        if f"{name}_bias" in tensors:
            tensors[f"{name}_bias"].see(torch.ones_like(values[:, :1]), gates, inputs_first=False)
        weight, bias = _value(module, tensors, name), _value(module, tensors, f"{name}_bias") if module.has_bias else None
        return functional.linear(values.to(weight.dtype), weight.T if module.is_transposed else weight, bias)

    return _normalised(module, through(activate(module, through(rows, up)), down))


def _value(module: Any, tensors: Mapping[str, ExpertTensor], name: str) -> Tensor:
    """The trained value in the dtype the module computes in; the frozen rows where this tensor is not trained (biases at low rank)."""
    if name in tensors:
        return tensors[name].value().to(getattr(module, name).dtype)
    return getattr(module, name).detach()[next(iter(tensors.values())).cell.expert]


def _normalised(module: Any, values: Tensor) -> Tensor:
    return module.post_expert_norm(values) if getattr(module, "has_post_expert_norm", False) else values


def _count(module: Any) -> int:
    return getattr(module, names(module)[1]).shape[0]
