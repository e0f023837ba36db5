"""How likely a model finds the choices of an item, and how often the right one is the likeliest: one way for all that measure accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dbes.models.encoding import Sample, collate, encode
from dbes.models.losses import in_batches, token_nats
from dbes.tasks.entries import Entry, Item

BATCH_TOKENS = 4096


def encode_choices(item: Item, tokenizer: Any, *, length: int, known: int | None = None, where: str = "") -> list[Sample]:
    """The question with every one of its choices, of which only the choice counts; ``text_bytes`` are the bytes of the choice, at least 1.

    Args:
        length: tokens at most; a longer question loses its beginning, and so does a choice that is longer by itself.
        known: see `encode`.
        where: name of the text that the item is in, for messages.
    """
    question, samples = (item.question.rstrip(), False), []
    for choice in map(str.strip, item.choices):
        whole = encode(Entry(id="", source="", where=where, segments=(question, (f" {choice}", True))), tokenizer, end=False, known=known)
        samples.append(_ending(whole, length, text_bytes=len(choice.encode()) or 1))
    return samples


def choice_likelihoods(model: nn.Module, samples: Sequence[Sample], *, padding: int, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Log-likelihood in nats of the counted tokens of every sample, float64 [samples]."""
    return -sample_nats(model, samples, padding=padding, batch_tokens=batch_tokens)


@torch.no_grad()
def sample_nats(
    model: nn.Module, samples: Sequence[Sample], *, padding: int, batch_tokens: int = BATCH_TOKENS, accelerator: Any = None
) -> np.ndarray:
    """Nats of the counted tokens of every sample, float64 [samples]; processes share the work and all get the whole."""
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator is not None else (1, 0)
    nats = np.zeros(len(samples))
    mine = range(index, len(samples), count)
    lengths = [len(sample.ids) for sample in samples]
    for members in in_batches(lengths, batch_tokens, order=sorted(mine, key=lambda place: (lengths[place], place))):
        batch = collate([samples[place] for place in members], padding=padding)
        losses = token_nats(model, batch.inputs, batch.counted).cpu()
        parts = losses.split([int(samples[place].counted.sum()) for place in members])
        nats[members] = [float(part.double().sum()) for part in parts]
    # every place is 0 in all processes but one, so that their sum is exact in any order
    return _summed(nats, accelerator) if count > 1 else nats


def _summed(values: np.ndarray, accelerator: Any) -> np.ndarray:
    return accelerator.reduce(torch.from_numpy(values).to(accelerator.device), "sum").cpu().numpy()


def right_choices(likelihood: np.ndarray, *, text_bytes: Sequence[int], choices: Sequence[int], right: Sequence[int]) -> np.ndarray:
    """Whether the right choice of every item is the most likely, and the most likely per byte: bool [2, items].

    Args:
        likelihood: nats of all choices of all items, one item after the other.
        text_bytes: bytes of every choice.
        choices: number of choices of every item.
        right: index of the right choice among those of its item.
    """
    found, start = np.zeros((2, len(choices)), bool), 0
    for place, (count, index) in enumerate(zip(choices, right, strict=True)):
        rows = likelihood[start : start + count]
        per_byte = rows / np.asarray(text_bytes[start : start + count])
        found[:, place] = rows.argmax() == index, per_byte.argmax() == index
        start += count
    return found


def _ending(sample: Sample, length: int, *, text_bytes: int) -> Sample:
    """The last ``length`` tokens: a question is shortened from its beginning."""
    counted = sample.counted[-length:].copy()
    counted[:1] = False
    return Sample(sample.ids[-length:], counted, text_bytes)
