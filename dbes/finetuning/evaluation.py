"""How well a model predicts held-out texts, in bits per byte, and how often it prefers the right choice of an item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.finetuning.data import Entry, Item
from dbes.finetuning.encoding import Batch, Sample, collate, encode, padding_id, windows
from dbes.sites import input_device

BATCH_TOKENS = 4096


class DomainScore(BaseModel):
    """One domain's held-out entries.

    Attributes:
        bits_per_byte: bits to predict the texts with, per UTF-8 byte: comparable between domains and tokenizers. Lower is better.
        nats_per_token: the usual loss.
        accuracy: share of items whose right choice has the highest log-likelihood; ``accuracy_per_byte``: per byte of the choice,
            which does not favour short ones. None without items.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    entries: int
    tokens: int
    bits_per_byte: float
    nats_per_token: float
    items: int
    accuracy: float | None
    accuracy_per_byte: float | None


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer: Any,
    heldout: Mapping[str, Sequence[Entry]],
    *,
    length: int,
    batch_tokens: int = BATCH_TOKENS,
    accelerator: Any = None,
) -> dict[str, DomainScore]:
    """Scores of every domain. Texts longer than ``length`` tokens are read in runs that share one token.

    Args:
        accelerator: an ``accelerate.Accelerator``; its processes share the work and all get the whole answer.

    Raises:
        FinetuneError: the loss is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    try:
        found = {name: _score(model, tokenizer, entries, length, batch_tokens, accelerator, name) for name, entries in heldout.items()}
    finally:
        model.train(was_training)
    return found


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """float32 nats of every counted token of the batch, in order; differentiable."""
    device = input_device(model)
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    wanted = batch.counted[:, 1:].to(logits.device)
    # only rows that count are widened to float32: at large vocabularies the logits are the largest tensor of all
    rows, labels = logits[:, :-1][wanted], inputs["input_ids"][:, 1:].to(logits.device)[wanted]
    return nn.functional.cross_entropy(rows.float(), labels, reduction="none")


def _score(
    model: nn.Module, tokenizer: Any, entries: Sequence[Entry], length: int, batch_tokens: int, accelerator: Any, name: str
) -> DomainScore:
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator is not None else (1, 0)
    mine = entries[index::count]
    samples = [part for entry in mine for part in windows(encode(entry, tokenizer, end=False), length)]
    nats = sum((float(losses.double().sum()) for _, losses in _losses(model, tokenizer, samples, batch_tokens)), 0.0)
    items = [entry.item for entry in mine if entry.item is not None]
    right = _right_choices(model, tokenizer, items, length, batch_tokens)
    tokens, octets = sum(int(sample.counted.sum()) for sample in samples), sum(sample.octets for sample in samples)
    sums = torch.tensor([nats, tokens, octets, len(items), *right], dtype=torch.float64)
    if accelerator is not None and count > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    nats, tokens, octets, asked, likely, likely_per_byte = sums.tolist()
    if not math.isfinite(nats):
        raise FinetuneError(f"domain {name}: the model's loss on held-out texts is {nats}; its weights or logits are no numbers")
    if not octets or not tokens:
        raise FinetuneError(f"domain {name}: its held-out texts have no token to predict")
    return DomainScore(
        entries=len(entries),
        tokens=int(tokens),
        bits_per_byte=nats / math.log(2) / octets,
        nats_per_token=nats / tokens,
        items=int(asked),
        accuracy=likely / asked if asked else None,
        accuracy_per_byte=likely_per_byte / asked if asked else None,
    )


def _right_choices(model: nn.Module, tokenizer: Any, items: Sequence[Item], length: int, batch_tokens: int) -> tuple[int, int]:
    """Items whose right choice is the most likely, and is the most likely per byte."""
    entries = [
        Entry(id="", source="", segments=((item.question.rstrip(), False), (f" {choice.strip()}", True)))
        for item in items
        for choice in item.choices
    ]
    samples = [_ending(encode(entry, tokenizer, end=False), length) for entry in entries]
    likelihood = np.zeros(len(samples))
    for places, losses in _losses(model, tokenizer, samples, batch_tokens):
        parts = losses.split([int(samples[place].counted.sum()) for place in places])
        likelihood[places] = [-float(part.double().sum()) for part in parts]
    likely, likely_per_byte, start = 0, 0, 0
    for item in items:
        rows = likelihood[start : start + len(item.choices)]
        octets = np.asarray([len(choice.strip().encode()) or 1 for choice in item.choices])
        start += len(item.choices)
        likely += int(rows.argmax() == item.right)
        likely_per_byte += int((rows / octets).argmax() == item.right)
    return likely, likely_per_byte


def _ending(sample: Sample, length: int) -> Sample:
    """The last ``length`` tokens: a question is shortened from its beginning, never the choice."""
    counted = sample.counted[-length:].copy()
    counted[:1] = False
    return Sample(sample.ids[-length:], counted, sample.octets)


def _losses(model: nn.Module, tokenizer: Any, samples: Sequence[Sample], batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
    """(places of the samples, nats of their counted tokens) by batches of samples of similar length."""
    padding = padding_id(tokenizer)
    for places in _batches([len(sample.ids) for sample in samples], batch_tokens):
        yield places, token_losses(model, collate([samples[place] for place in places], padding=padding)).cpu()


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    members: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        if members and lengths[place] * (len(members) + 1) > batch_tokens:
            yield members
            members = []
        members.append(place)
    if members:
        yield members
