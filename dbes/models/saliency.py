"""How much every expert gives to its layer: REAP's score, gate weight times the norm of the expert's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dbes.errors import ModelError
from dbes.models.execution import forward
from dbes.models.hooks import READERS
from dbes.models.losses import in_batches
from dbes.models.scorekeeper import Scorekeeper
from dbes.models.sites import RoutingSite, find_sites
from dbes.models.windows import padded


@torch.no_grad()
def reap_scores(model: nn.Module, windows: Sequence[np.ndarray], *, batch_tokens: int = 4096) -> np.ndarray:
    r"""REAP's score of every expert (arXiv 2510.13999), float64 [layers, experts].

    .. math:: S_j = \frac{1}{|X_j|} \sum_{x \in X_j} g_j(x) \, \lVert f_j(x) \rVert_2

    over the tokens X_j that were routed to expert j, with the gate weight as the model used it; 0 for an expert without a token. The output
    of a single expert is what the experts module gives when every other slot has weight 0; that these, with their weights, add up to what
    the module gave is checked in every batch.

    Args:
        windows: runs of token ids that the model sees at once, int [tokens] each.

    Raises:
        ModelError: experts are no module that takes ids and weights, or their outputs do not add up.
    """
    sites = find_sites(model)
    for site in sites:
        if site.adapter != "experts":
            raise ModelError(
                f"layer {site.layer} ({site.name}): its experts do not take ids and weights, so that none of their outputs can be had alone"
            )
    sums = np.zeros((2, len(sites), max(site.num_experts for site in sites)))
    for members in in_batches(list(map(len, windows)), batch_tokens):
        ids, real = (torch.from_numpy(part) for part in padded([windows[place] for place in members], padding=0))
        with ExitStack() as stack:
            for layer, site in enumerate(sites):
                for handle in _attach(site, real.reshape(-1).bool(), sums[:, layer]):
                    stack.callback(handle.remove)
            inputs = {"input_ids": ids} | ({} if real.all() else {"attention_mask": real})
            forward(model, whole=False, **inputs)
    return np.divide(sums[0], sums[1], out=np.zeros_like(sums[0]), where=sums[1] > 0)


def _attach(site: RoutingSite, real: Tensor, sums: np.ndarray) -> Iterator[RemovableHandle]:
    given: list[tuple[tuple, dict]] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        # copies: some experts work in place on what they are given
        given[:] = [(tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()})]

    def after(module: nn.Module, _: tuple, output: Any) -> None:
        args, kwargs = given.pop()
        ids, weights = READERS["experts"](site, args, kwargs, Scorekeeper())
        whole, there = output.reshape(len(ids), -1), real.to(ids.device)
        wide = torch.promote_types(whole.dtype, torch.float32)
        total = torch.zeros_like(whole, dtype=wide)
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        for slot in range(ids.shape[1]):
            alone = [_alone(value, hidden, ids, slot) for value in args]
            named = {name: _alone(value, hidden, ids, slot) for name, value in kwargs.items()}
            single = module.forward(*alone, **named).reshape(len(ids), -1).to(wide)
            gate = weights[:, slot].to(wide)
            total += gate[:, None] * single
            routed = there & (ids[:, slot] < site.num_experts)
            chosen = ids[routed, slot].cpu().numpy()
            norms = (gate * single.norm(dim=-1))[routed].double().cpu().numpy()
            sums[0] += np.bincount(chosen, norms, minlength=sums.shape[1])
            sums[1] += np.bincount(chosen, minlength=sums.shape[1])
        if float((total - whole)[there].norm()) > torch.finfo(whole.dtype).eps ** 0.5 * float(total[there].norm()):
            raise ModelError(f"layer {site.layer} ({site.name}): the outputs of single experts do not add up to what all of them gave")

    yield site.experts.register_forward_pre_hook(before, with_kwargs=True)
    yield site.experts.register_forward_hook(after)


def _alone(value: Any, hidden: Tensor, ids: Tensor, slot: int) -> Any:
    """An argument of the experts: the weights, of every slot or of every expert, are 1 for one slot and 0 for the others."""
    if not isinstance(value, Tensor) or value is hidden or not value.is_floating_point():
        return value
    column = ids[:, slot : slot + 1] if value.shape[-1] != ids.shape[-1] else torch.full_like(ids[:, :1], slot)
    return torch.zeros_like(value).reshape(len(ids), -1).scatter(1, column, 1.0).reshape(value.shape)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
