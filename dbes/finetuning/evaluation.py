"""How well a model predicts held-out texts, in bits per byte, and how often it prefers the right choice of an item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import nn

from dbes.errors import FinetuneError
from dbes.models.choices import BATCH_TOKENS, encode_choices, right_choices, sample_nats
from dbes.models.encoding import encode, windows
from dbes.models.execution import mode
from dbes.models.windows import embedding_rows, padding_id
from dbes.tasks.entries import Entry


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


@dataclass(frozen=True, eq=False)
class Measured:
    """One domain's score, and what it is made of.

    Attributes:
        sources: source text of every held-out entry.
        bits: to predict each with, float64 [entries]; text_bytes: its UTF-8 bytes, float64 [entries].
    """

    score: DomainScore
    sources: tuple[str, ...]
    bits: np.ndarray
    text_bytes: np.ndarray


def measure(model: nn.Module, tokenizer: Any, heldout: Mapping[str, Sequence[Entry]], **named: Any) -> dict[str, DomainScore]:
    """Scores of every domain; see `measure_texts`."""
    return scores(measure_texts(model, tokenizer, heldout, **named))


def scores(measured: Mapping[str, Measured]) -> dict[str, DomainScore]:
    """The scores alone."""
    return {name: one.score for name, one in measured.items()}


def measure_texts(
    model: nn.Module,
    tokenizer: Any,
    heldout: Mapping[str, Sequence[Entry]],
    *,
    length: int,
    batch_tokens: int = BATCH_TOKENS,
    accelerator: Any = None,
) -> dict[str, Measured]:
    """Scores of every domain, and of which texts they are made. Texts longer than ``length`` tokens are read in runs that share one token.

    Args:
        accelerator: an ``accelerate.Accelerator``; its processes share the work and all get the whole answer.

    Raises:
        FinetuneError: the loss is NaN or infinite.
    """
    with mode(model, training=False):
        return {name: _score(model, tokenizer, entries, length, batch_tokens, accelerator, name) for name, entries in heldout.items()}


def tracked_scores(measured: Mapping[str, DomainScore]) -> dict[str, float]:
    """The scores as one flat row for a tracker: ``bits_per_byte/DOMAIN``, and ``accuracy/DOMAIN`` where there are items."""
    found = {f"bits_per_byte/{name}": score.bits_per_byte for name, score in measured.items()}
    for name, score in measured.items():
        if score.accuracy is not None and score.accuracy_per_byte is not None:
            found |= {f"accuracy/{name}": score.accuracy, f"accuracy_per_byte/{name}": score.accuracy_per_byte}
    return found


def _score(
    model: nn.Module, tokenizer: Any, entries: Sequence[Entry], length: int, batch_tokens: int, accelerator: Any, name: str
) -> Measured:
    known = embedding_rows(model)
    padding = padding_id(tokenizer, known)
    parts = [windows(encode(entry, tokenizer, end=False, known=known), length) for entry in entries]
    samples = [sample for part in parts for sample in part]
    owner = np.repeat(np.arange(len(entries)), [len(part) for part in parts])
    nats = sample_nats(model, samples, padding=padding, batch_tokens=batch_tokens, accelerator=accelerator)
    text_bytes = np.asarray([sample.text_bytes for sample in samples], np.int64)
    tokens = sum(int(sample.counted.sum()) for sample in samples)
    asking = [(entry, entry.item) for entry in entries if entry.item is not None]
    items = [item for _, item in asking]
    choices = [
        choice for entry, item in asking
        for choice in encode_choices(item, tokenizer, length=length, known=known, where=entry.name)
    ]  # fmt: skip
    right = right_choices(
        -sample_nats(model, choices, padding=padding, batch_tokens=batch_tokens, accelerator=accelerator),
        text_bytes=[choice.text_bytes for choice in choices],
        choices=[len(item.choices) for item in items],
        right=[item.right for item in items],
    ).sum(axis=1)
    total = float(nats.sum())
    if not math.isfinite(total):
        raise FinetuneError(f"domain {name}: the model's loss on held-out texts is {total}; its weights or logits are not numbers")
    if not text_bytes.sum() or not tokens:
        raise FinetuneError(f"domain {name}: its held-out texts have no token to predict")
    score = DomainScore(
        entries=len(entries),
        tokens=tokens,
        bits_per_byte=total / math.log(2) / int(text_bytes.sum()),
        nats_per_token=total / tokens,
        items=len(items),
        accuracy=int(right[0]) / len(items) if items else None,
        accuracy_per_byte=int(right[1]) / len(items) if items else None,
    )
    return Measured(
        score=score,
        sources=tuple(entry.source for entry in entries),
        bits=np.bincount(owner, nats / math.log(2), len(entries)),
        text_bytes=np.bincount(owner, text_bytes, len(entries)),
    )


def ratio_of_sums(more: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    r"""A ratio of sums over texts, [texts] each, and its standard error, 0 where there is one text.

    .. math:: R = \frac{\sum_i d_i}{\sum_i b_i} \qquad SE^2 = \frac{n}{n-1} \frac{\sum_i (d_i - R b_i)^2}{(\sum_i b_i)^2}
    """
    count, whole = len(sizes), float(sizes.sum())
    ratio = float(more.sum()) / whole
    spread = float(np.square(more - ratio * sizes).sum()) * count / (count - 1) if count > 1 else 0.0
    return ratio, math.sqrt(spread) / whole if math.isfinite(spread) else math.nan
