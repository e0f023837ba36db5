r"""Whether protected domains are kept while a learning rate is tried and while a run trains.

Protection bounds what an update of a given size does to other domains; the learning rate sets the size, so a rate chosen by the
target alone can undo it. Therefore some training texts of every protected domain are measured beside the target's validation text.
With :math:`r_d` the rise of domain d and :math:`f` the fall of the target, both in bits per byte since before training, a state is
kept to if for every domain

.. math:: r_d \le \mathrm{KEPT} \cdot \max(f, 0) + \mathrm{NOISE} \cdot SE(r_d)

with the standard error over the domain's texts (`dbes.finetuning.evaluation.ratio_of_sums`). The texts are
never the held-out ones of a report, and not those that the matrices of protection are made of, unless a domain has too few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from dbes.finetuning.choice import Rise
from dbes.finetuning.evaluation import ratio_of_sums
from dbes.finetuning.settings import FinetuneSettings
from dbes.finetuning.validation import eval_nats
from dbes.models.encoding import Sample, encode, windows
from dbes.tasks.entries import Entry, by_hash

KEPT = 0.1
"""The most that a protected domain may rise, as a share of the target's fall."""
NOISE = 2.0
"""Standard errors by which a rise may exceed that: the largest of some ten rises that are only noise."""
TEXTS = 16
"""Texts of each domain at most, of each the first ``LENGTH`` tokens: many short ones tell a change more precisely than a few long ones."""
LENGTH = 128
FEWEST = 8
"""Source texts of a domain from which on a quarter of them is set apart; with fewer the matrices are made of the same texts."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Texts of the protected domains that are measured before training and at every trial and check.

    Attributes:
        samples: by domain, one of each source text.
        shared: domains with too few texts, whose matrices are made of these texts too.
    """

    samples: Mapping[str, Sequence[Sample]]
    shared: tuple[str, ...] = ()

    @property
    def texts(self) -> int:
        return sum(map(len, self.samples.values()))

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for part in self.samples.values() for sample in part)

    def measure(self, model: nn.Module, *, padding: int, accelerator: Any) -> dict[str, list[float]]:
        """Nats of every text, by domain; the same in all processes to the last bit."""
        joined = [sample for part in self.samples.values() for sample in part]
        nats = iter(eval_nats(model, joined, padding=padding, accelerator=accelerator).tolist())
        return {name: [next(nats) for _ in part] for name, part in self.samples.items()}

    def rise(self, before: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]], *, fall: float) -> Rise:
        """The domain that exceeds what is allowed by most, or comes nearest to it.

        Args:
            before, now: nats of every text; not finite: the domain has risen without bound.
            fall: of the target, bits per byte.
        """
        found = []
        for name, part in self.samples.items():
            change, error = ratio([sample.text_bytes for sample in part], np.asarray(now[name]) - np.asarray(before[name]))
            found.append(Rise(domain=name, change=change, allowed=KEPT * max(fall, 0.0) + NOISE * error))
        return max(found, key=lambda rise: (math.inf if rise.change is None else rise.change - rise.allowed, rise.domain))


def ratio(text_bytes: Sequence[int], nats: np.ndarray) -> tuple[float | None, float]:
    """(change in bits per byte, its standard error over texts, 0 where there is one text); None where it is not finite."""
    change, error = ratio_of_sums(nats / math.log(2), np.asarray(text_bytes, np.float64))
    return (change, error) if math.isfinite(change) else (None, 0.0)


def split_protected(
    entries: Mapping[str, Sequence[Entry]], tokenizer: Any, settings: FinetuneSettings, *, known: int | None = None
) -> tuple[dict[str, list[Entry]], Guard]:
    """Entries of protected domains that matrices are made of, and the texts that guard, the same ones in every run.

    Args:
        entries: by domain, none held out.
        known: tokens that the model has embeddings of.

    Raises:
        FinetuneError: a token that the model does not know.
    """
    matrices, samples, shared = {}, {}, []
    length = min(LENGTH, settings.seq_len)
    for name, part in entries.items():
        first: dict[str, Entry] = {}
        for entry in part:
            first.setdefault(entry.source, entry)
        order = by_hash(first, "guard ")
        enough = len(order) >= FEWEST
        apart = order[: min(TEXTS, len(order) // 4)] if enough else order[:TEXTS]
        matrices[name] = [entry for entry in part if entry.source not in apart] if enough else list(part)
        parts = [windows(encode(first[source], tokenizer, end=False, known=known), length)[:1] for source in apart]
        found = [sample for runs in parts for sample in runs if sample.text_bytes]
        if found:
            samples[name] = found
            shared += [] if enough else [name]
    return matrices, Guard(samples=samples, shared=tuple(shared))
