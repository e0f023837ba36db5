"""How far two float32 computations of the same thing may lie apart: measured on the problem at hand, on the machine at hand.

Processors, thread counts and matrix shapes round differently, and a badly conditioned model multiplies that. So nothing is held to a
number: the same thing in float64 is the truth, the distance of *plain* float32 code from it is what rounding does here, and what is
tested may lie no more than a few times farther away. A wrong row, a missing token or a lost gradient lies thousands of times farther.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
