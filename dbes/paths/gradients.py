"""What only the model itself can tell of its cells: gradients on a domain's text, and the loss when a cell gives nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbes.errors import PathError
from dbes.models.execution import frozen
from dbes.models.losses import in_batches, padded_nats
from dbes.models.masking import masked
from dbes.models.sites import expert_slices, expert_weights, find_sites

Windows = Sequence[np.ndarray]
"""Runs of token ids that the model sees at once, int [tokens] each."""


def gradient_norms(model: Any, windows: Windows, *, batch_tokens: int = 4096) -> np.ndarray:
    r"""Squared norm of the gradient of every cell, float64 [layers, experts].

    .. math:: \Big\| \nabla_{\theta_{l,e}} \tfrac1T \sum_t -\ln p(x_{t+1} | x_{\le t}) \Big\|^2

    of the mean loss over all predicted tokens: batches are added up before the norm is taken, so how the text is batched does not
    matter. Cells that a narrow layer does not have are 0. Nothing of the model changes; its gradients are dropped.

    Raises:
        PathError: no window has two tokens; the loss is not a number.
        ModelError: the weights of one expert cannot be told from those of the others.
    """
    sites = find_sites(model)
    owned = [[expert_slices(site, expert) for expert in range(site.num_experts)] for site in sites]
    wanted = {id(parameter): parameter for layer in owned for slices in layer for parameter, _ in slices}.values()
    predicted = sum(max(len(window) - 1, 0) for window in windows)
    if not predicted:
        raise PathError("gradient: no text with at least two tokens in this domain")
    norms = np.zeros((len(sites), max(site.num_experts for site in sites)))
    with frozen(model):
        model.zero_grad()
        for parameter in wanted:
            parameter.requires_grad_(True)
        try:
            for nats in _summed_nats(model, windows, batch_tokens):
                loss = nats / predicted
                if not torch.isfinite(loss):
                    raise PathError("gradient: the loss on this domain is not a number; check the checkpoint")
                loss.backward()
            for row, layer in enumerate(owned):
                for expert, slices in enumerate(layer):
                    # a parameter without gradient: no token of these texts reached it
                    gradients = [cut(parameter.grad) for parameter, cut in slices if parameter.grad is not None]
                    norms[row, expert] = sum(float(gradient.double().pow(2).sum()) for gradient in gradients)
        finally:
            model.zero_grad()
    return norms


@torch.no_grad()
def masking_effects(model: Any, windows: Sequence[Windows], *, batch_tokens: int = 8192) -> np.ndarray:
    """Nats per token added on each domain's windows when one cell's output is zero, float64 [domains, layers, experts].

    One forward over all windows for every cell.
    """
    sites = find_sites(model)
    base = [mean_loss(model, own, batch_tokens=batch_tokens) for own in windows]
    effects = np.zeros((len(windows), len(sites), max(site.num_experts for site in sites)))
    for row, site in enumerate(sites):
        for expert in range(site.num_experts):
            with masked(model, [(site.layer, expert)]):
                for domain, own in enumerate(windows):
                    effects[domain, row, expert] = mean_loss(model, own, batch_tokens=batch_tokens) - base[domain]
    return effects


@torch.no_grad()
def mean_loss(model: Any, windows: Windows, *, batch_tokens: int = 8192) -> float:
    """Nats per predicted token over windows; NaN where there is nothing to predict."""
    predicted = sum(max(len(window) - 1, 0) for window in windows)
    total = sum(map(float, _summed_nats(model, windows, batch_tokens)))
    return total / predicted if predicted else float("nan")


def expert_parameters(model: Any) -> np.ndarray:
    """Parameters of one routed expert of each MoE layer, int64 [layers]."""
    return np.asarray([sum(view.numel() for view in expert_weights(site, 0)) for site in find_sites(model)], np.int64)


def _summed_nats(model: Any, windows: Windows, batch_tokens: int) -> Iterator[Tensor]:
    """Nats of all predicted tokens, batch by batch."""
    kept = [window for window in windows if len(window) > 1]
    for members in in_batches(list(map(len, kept)), batch_tokens):
        losses, real = padded_nats(model, [kept[place] for place in members], masked=True)
        yield losses[real].sum()
