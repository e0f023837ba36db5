"""Experts that give nothing for a while: the causal check of what a model's cells do for its loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dbes.errors import ModelError, PathError
from dbes.models.execution import is_offloaded
from dbes.models.sites import expert_weights, find_sites


@contextmanager
def masked(model: Any, cells: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Inside the block these cells (layer, expert) add nothing to the residual stream; routing itself is not changed.

    Their weights and biases are zero inside the block and put back, bit for bit, at its end.

    Raises:
        PathError: a layer that is no MoE layer, or an expert that it does not have.
    """
    sites = {site.layer: site for site in find_sites(model)}
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for layer, expert in cells:
            if layer not in sites or not 0 <= expert < sites[layer].num_experts:
                raise PathError(f"cell (layer {layer}, expert {expert}) does not exist: the model's MoE layers are {sorted(sites)}")
            for view in expert_weights(sites[layer], expert):
                kept.append((view, view.clone()))
                view.zero_()
        yield
    finally:
        for view, before in kept:
            view.copy_(before)


def require_maskable(model: Any) -> None:
    """Refuse a model whose experts cannot be masked one by one, before anything is run.

    Raises:
        ModelError: weights that are packed, shared or not in memory.
    """
    if is_offloaded(model):
        raise ModelError("ablate: experts are masked in memory, and this model's weights come and go; give more memory")
    for site in find_sites(model):
        expert_weights(site, 0)
