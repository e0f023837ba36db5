"""Frozen experts with gradients to their inputs alone, which need a third of the memory that gradients to weights would.

Of the frozen part of a layer one tensor [slots, 2 x intermediate] is kept for the backward pass; the plain way keeps five.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import _grouped_linear


class FrozenExperts(torch.autograd.Function):
    """Weighted outputs of frozen experts, [slots, hidden], for slots sorted by expert.

    Arguments of ``apply``: hidden [tokens, hidden]; weights [slots]; the experts module; token of each slot, int64 [slots]; expert
    of each slot, int64 [slots]; running count of slots by expert, int32 [experts].
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, weights: Tensor, module: Any, tokens: Tensor, ids: Tensor, offsets: Tensor
    ) -> Tensor:
        up, down = names(module)
        projected = project(module, hidden.index_select(0, tokens), up, ids, offsets)
        output = project(module, activate(module, projected), down, ids, offsets)
        ctx.module, ctx.shape, ctx.dtypes = module, hidden.shape, (hidden.dtype, weights.dtype)
        ctx.save_for_backward(projected, weights, tokens, ids, offsets)
        return output.mul_(weights[:, None]) if output.dtype == weights.dtype else output * weights[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        projected, weights, tokens, ids, offsets = ctx.saved_tensors
        module = ctx.module
        up, down = names(module)
        back = _transposed(module, gradient, down, offsets)
        with torch.enable_grad():
            projected = projected.detach().requires_grad_(True)
            activated = activate(module, projected)
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            # <gradient, W a + b> = <W^T gradient, a> + <gradient, b>: the output itself need not be kept
            weight_gradient = (back * activated.detach()).sum(-1, dtype=torch.float32)
            if module.has_bias:
                weight_gradient += (gradient * getattr(module, f"{down}_bias").detach()[ids]).sum(-1, dtype=torch.float32)
            weight_gradient = weight_gradient.to(ctx.dtypes[1])
        hidden_gradient = None
        if ctx.needs_input_grad[0]:
            (inner,) = torch.autograd.grad(activated, projected, (back * weights[:, None]).to(activated.dtype))
            rows = _transposed(module, inner, up, offsets).to(ctx.dtypes[0])
            hidden_gradient = torch.zeros(ctx.shape, dtype=rows.dtype, device=rows.device).index_add_(0, tokens, rows)
        return hidden_gradient, weight_gradient, None, None, None, None


class SumOverSlots(torch.autograd.Function):
    """Sum of each token's k slots, [tokens, hidden], in the order of its choices, of slots [tokens * k, hidden] in another order.

    The gradient is a plain gather, where indexing's own would add row by row.
    """

    @staticmethod
    def forward(ctx: Any, slots: Tensor, order: Tensor, k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        ctx.save_for_backward(order)
        ctx.k = k
        return slots.index_select(0, inverse).view(-1, k, slots.shape[-1]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, order // ctx.k), None, None


def project(module: Any, rows: Tensor, name: str, ids: Tensor, offsets: Tensor) -> Tensor:
    """Rows, sorted by expert, through the module's fused and frozen weight of this name, as transformers itself does it."""
    bias = getattr(module, f"{name}_bias").detach()[ids] if module.has_bias else None
    return _grouped_linear(rows, getattr(module, name).detach(), offsets, bias=bias, is_transposed=module.is_transposed)


def activate(module: Any, values: Tensor) -> Tensor:
    return module._apply_gate(values) if module.has_gate else module.act_fn(values)


def names(module: Any) -> tuple[str, str]:
    """The first and second projection of an experts module."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _transposed(module: Any, rows: Tensor, name: str, offsets: Tensor) -> Tensor:
    return _grouped_linear(rows, getattr(module, name).detach(), offsets, is_transposed=not module.is_transposed)
