"""Part of the training texts, set apart to choose by: the learning rate, and the step whose weights are kept.

The held-out texts that a report measures before and after are others; nothing is chosen by them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from dbes.finetuning.settings import FinetuneSettings
from dbes.models.choices import sample_nats
from dbes.models.encoding import Sample, training_samples
from dbes.models.execution import mode
from dbes.tasks.entries import Entry, by_hash

SHARE = 0.1
TEXTS = 20
"""Source texts from which on whole ones are set apart; with fewer, sequences of all of them are."""
SEQUENCES = 10
"""Training sequences from which on some can be set apart."""
MOST_TEXTS, MOST_SEQUENCES = 256, 64
CHECKS = 20
COST = 0.2
"""Most of the training's work that checks may take, a forward pass counted as a third of an update."""

Losses = Sequence[tuple[int, float]]
"""(updates so far, validation loss in nats per token), the first after none."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sequences to train on and to choose by.

    Attributes:
        unit: what was set apart: whole source texts; sequences of texts that are trained on too; nothing.
    """

    training: list[Sample]
    validation: list[Sample]
    unit: Literal["texts", "sequences", "nothing"]


def split_validation(entries: Sequence[Entry], tokenizer: Any, settings: FinetuneSettings, *, known: int | None = None) -> Split:
    """A tenth of the source texts (at least 2, at most 256) set apart, the same ones in every run; of that at most 64 sequences.

    With fewer than 20 source texts a tenth of the sequences instead, evenly spread; with fewer than 10 sequences nothing. Nothing
    as well where nothing is to be chosen: a given learning rate, and no early stopping.

    Args:
        known: tokens that the model has embeddings of.

    Raises:
        FinetuneError: nothing in the data counts.
    """

    def samples(kept: Sequence[Entry]) -> list[Sample]:
        return training_samples(kept, tokenizer, length=settings.seq_len, packing=settings.packing, known=known)

    sources = {entry.source for entry in entries}
    chooses = settings.early_stopping or settings.lr == "auto"
    if chooses and len(sources) >= TEXTS:
        apart = set(by_hash(sources, "validation ")[: min(MOST_TEXTS, max(2, round(SHARE * len(sources))))])
        kept = [entry for entry in entries if entry.source in apart]
        return Split(
            training=samples([entry for entry in entries if entry.source not in apart]),
            validation=samples(kept)[:MOST_SEQUENCES],
            unit="texts",
        )
    found = samples(entries)
    if chooses and len(found) >= SEQUENCES:
        count = min(MOST_SEQUENCES, max(2, round(SHARE * len(found))))
        places = {math.floor((number + 0.5) * len(found) / count) for number in range(count)}
        return Split(
            training=[sample for place, sample in enumerate(found) if place not in places],
            validation=[found[place] for place in sorted(places)],
            unit="sequences",
        )
    return Split(training=found, validation=[], unit="nothing")


def validation_loss(model: nn.Module, samples: Sequence[Sample], *, padding: int, accelerator: Any) -> float:
    """Nats per counted token, the same in all processes to the last bit; not finite where the model's numbers are not."""
    nats = eval_nats(model, samples, padding=padding, accelerator=accelerator)
    return float(nats.sum()) / sum(int(sample.counted.sum()) for sample in samples)


def eval_nats(model: nn.Module, samples: Sequence[Sample], *, padding: int, accelerator: Any) -> np.ndarray:
    """Nats of every sample, float64 [samples], measured without dropout; the model is left as it was."""
    with mode(model, training=False), accelerator.autocast():
        return sample_nats(model, samples, padding=padding, accelerator=accelerator)


def bytes_per_token(samples: Sequence[Sample]) -> float:
    """UTF-8 bytes that a counted token stands for, on average."""
    return max(1, sum(sample.text_bytes for sample in samples)) / sum(int(sample.counted.sum()) for sample in samples)


def check_every(steps: int, *, sequences: int, batch_size: int) -> int:
    """Updates between two checks: about 20 checks in a run, fewer where they would take more than a fifth of its work."""
    return min(steps, max(math.ceil(steps / CHECKS), math.ceil(sequences / (3 * batch_size) / COST)))


def best_step(losses: Losses, exceeded: Collection[int] = ()) -> int:
    """Updates after which the loss was lowest, the first such; never one of those after which a protected domain was not kept."""
    return min((pair for pair in losses if pair[0] not in exceeded), key=lambda pair: pair[1])[0]


def stalled(losses: Losses, patience: int, exceeded: Collection[int] = ()) -> bool:
    """Whether the last so many checks brought no new state to keep, by `best_step`."""
    best = best_step(losses, exceeded)
    return sum(step > best for step, _ in losses) >= patience
