"""How firmly each token's experts were chosen: margins and flips under noise, on the device the router ran on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES

NOISE_ROWS = 4096
"""A power of two of at most 12 bits."""

Keys = TypeVar("Keys", np.ndarray, Tensor)


@dataclass(frozen=True)
class Noise:
    """A frozen table of noise. Which row a token gets depends on its document, position and layer alone, never on its batch.

    Attributes:
        normal: float32 [NOISE_ROWS, classes].
        uniform: float32 [NOISE_ROWS, slots + 1], in [-1, 1).
    """

    normal: Tensor
    uniform: Tensor

    @classmethod
    def drawn(cls, *, classes: int, slots: int, seed: int) -> Noise:
        generator = torch.Generator("cpu").manual_seed(seed)
        normal = torch.randn(NOISE_ROWS, classes, generator=generator)
        return cls(normal=normal, uniform=torch.rand(NOISE_ROWS, slots + 1, generator=generator) * 2 - 1)

    def to(self, device: torch.device) -> Noise:
        return Noise(normal=self.normal.to(device), uniform=self.uniform.to(device))


def noise_keys(document_id: str, positions: np.ndarray) -> np.ndarray:
    """int64 [tokens], what the noise of each token of a document follows from besides the layer."""
    return (np.int64(zlib.crc32(document_id.encode())) << np.int64(32)) + positions.astype(np.int64)


def noise_rows(keys: Keys, layer: int) -> Keys:
    """int64 [tokens], the row of the noise table for each token at a layer.

    Arithmetic modulo 2^64 in signed numbers, the same in numpy and in torch on every device, so that nothing but keys goes there.
    """
    mixed = keys * _signed(0x9E3779B97F4A7C15) + _signed(layer * 0xC2B2AE3D27D4EB4F)
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))  # the mask makes a shift of signed numbers one of unsigned
    return ((mixed * _signed(0xBF58476D1CE4E5B9)) >> 52) & (NOISE_ROWS - 1)


def _signed(value: int) -> int:
    """The number in [-2^63, 2^63) that is the same modulo 2^64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def logit_stiffness(logits: Tensor, choice: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(margin [tokens], stable bits [tokens]) of the raw router logits, as published (RSS).

    Margin: smallest logit among the chosen minus largest among the rejected. Negative where the router selects on something
    else; NaN where every expert is chosen. Bit i: the same stays positive when U(-eps_i, eps_i) is added to these k + 1.
    """
    logits = logits.float()
    chosen = logits.gather(1, choice).sort(dim=-1, descending=True)[0]
    rejected = logits.scatter(1, choice, -torch.inf).amax(dim=-1)
    margin = chosen[:, -1] - rejected
    bits = torch.zeros(len(logits), dtype=torch.uint8, device=logits.device)
    slots = chosen.shape[1]
    for bit, width in enumerate(LOGIT_NOISE):
        stays = (chosen + width * uniform[:, :slots]).amin(dim=-1) > rejected + width * uniform[:, slots]
        bits |= stays.to(torch.uint8) << bit
    return torch.where(margin.isinf(), torch.nan, margin), bits


def selection_stiffness(scores: Tensor, choice: Tensor, normal: Tensor, blocked: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(margin [tokens], margin / std [tokens], kept [tokens, noise scales]) of the score the top-k was taken on.

    Margin: s_(k) - s_(k+1), >= 0, of the scores exactly as the top-k saw them. NaN where nothing was left to reject (a group
    limit left just k experts, or k is all of them): such a choice cannot flip, and ``kept`` is k.
    The standard deviation (divisor: number of experts) and the noise are over the experts that could be chosen: what a group
    limit took out (``blocked``, or -inf) stays out.
    """
    scores = scores.float()
    slots, classes = choice.shape[1], scores.shape[1]
    if classes == slots:
        nothing = scores.new_full((len(scores),), torch.nan)
        return nothing, nothing, torch.full((len(scores), len(NOISE_SCALES)), slots, dtype=torch.uint8, device=scores.device)
    top = scores.topk(slots + 1, dim=-1)[0]
    margin = top[:, slots - 1] - top[:, slots]
    margin = torch.where(margin.isinf(), torch.nan, margin)
    out = scores.isneginf() if blocked is None else scores.isneginf() | blocked
    free = ~out
    count = free.sum(dim=-1).clamp(min=1)
    mean = scores.masked_fill(out, 0).sum(dim=-1) / count
    deviation = (((scores - mean[:, None]).masked_fill(out, 0) ** 2).sum(dim=-1) / count).sqrt()
    candidates = scores.masked_fill(out, -torch.inf)
    kept = torch.full((len(scores), len(NOISE_SCALES)), slots, dtype=torch.uint8, device=scores.device)
    noise = normal[:, :classes] * deviation[:, None]
    reach = noise.amax(dim=-1) - noise.amin(dim=-1)
    for place, scale in enumerate(NOISE_SCALES):
        rows: Tensor | slice = slice(None)
        if scores.device.type == "cpu":  # elsewhere, asking which rows can flip costs more than shaking them all
            rows = (margin <= scale * reach).nonzero()[:, 0]
        shaken = candidates[rows] + scale * noise[rows]
        weakest = shaken.topk(slots, dim=-1)[0][:, -1:]
        kept[rows, place] = (shaken.gather(1, choice[rows]) >= weakest).sum(dim=-1).to(torch.uint8)
    return margin, margin / deviation, kept
