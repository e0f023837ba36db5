"""How far two float32 computations of the same thing may lie apart: measured on the problem at hand, on the machine at hand.

Processors, thread counts and matrix shapes round differently, and a badly conditioned model multiplies that. So nothing is held to a
number: the same thing in float64 is the truth, the distance of *plain* float32 code from it is what rounding does here, and what is
tested may lie no more than a few times farther away. A wrong row, a missing token or a lost gradient lies thousands of times farther.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbes.trace.store import Trace
from dbes.trace.types import TokenRoutes

FACTOR = 16
"""Sums in another order err by as much in another direction; the largest of some thousand such errors by a few times as much."""


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64, its experts in a plain loop (grouped products know no float64)."""
    twin = copy.deepcopy(model)
    if twin.config._experts_implementation == "grouped_mm":
        twin.set_experts_implementation("eager")
    return twin.double()


def allowance(plain: Tensor, truth: Tensor) -> float:
    """Largest difference that rounding explains, where plain code gives ``plain`` for ``truth``."""
    noise = float((plain.double() - truth).abs().max()) if truth.numel() else 0.0
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    return FACTOR * max(noise, torch.finfo(plain.dtype).eps * scale)


def assert_rounding_only(found: Tensor, plain: Tensor, truth: Tensor, name: object = "") -> None:
    """``found`` is as near to the truth as plain code is, but for rounding."""
    apart, allowed = float((found.double() - truth).abs().max()), allowance(plain, truth)
    assert found.shape == truth.shape and apart <= allowed, f"{name}: {apart:.2e} from the truth, rounding explains {allowed:.2e}"


NEAR_TIE = 1e-3
"""Margin between the last chosen and the first rejected expert, in standard deviations of the scores, that float32 rounding may turn."""


def assert_same_routes(one: Trace, other: Trace) -> None:
    """Every token of every document uses the same experts in both traces, whose documents may stand in another order.

    Only a choice that was a near tie may fall differently, and what it then changes: higher layers of this and of later tokens.
    """
    first, second = _by_document(one), _by_document(other)
    assert first.keys() == second.keys()
    turned = 0
    for name, routes in first.items():
        differ = (np.sort(routes.ids, axis=-1) != np.sort(second[name].ids, axis=-1)).any(axis=-1)
        if not differ.any():
            continue
        assert routes.scaled_margins is not None, name
        near = routes.scaled_margins < NEAR_TIE  # never where there is no score
        earlier = np.zeros_like(differ)
        earlier[:, 1:] = np.logical_or.accumulate(np.logical_or.accumulate(differ, axis=0), axis=1)[:, :-1]
        unexplained = np.argwhere(differ & ~near & ~earlier)
        assert not len(unexplained), f"{name}: token, layer {unexplained[0].tolist()} uses other experts, and it was no near tie"
        turned += 1
    assert turned <= max(1, len(first) // 10), f"{turned} of {len(first)} documents with a near tie that fell differently"


def _by_document(trace: Trace) -> dict[str, TokenRoutes]:
    shards = list(trace)
    arrays = {name: np.concatenate([shard.arrays()[name] for shard in shards]) for name in shards[0].arrays()}
    return {name: TokenRoutes(**arrays).take(arrays["document"] == index) for index, name in enumerate(trace.shape.document_ids)}
