"""Windows of documents, and which of them share a forward: a pure function of their lengths and of a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from dbes.models import LoadedModel
    from dbes.models.sites import RoutingSite

Batching = Literal["padded", "equal lengths", "one at a time"]
"""What may share a batch without changing the routing: any windows, windows of one length, or none."""

ACTIVATION_BYTES = 16 * 2**20
"""On a CPU a batch is as large as lets the experts' inputs (tokens x slots x hidden, float32) stay near the caches: measured on a
260 M-parameter OLMoE, 1,024 tokens are 1.5 times as fast as 4,096; a 4 M-parameter one is fastest with 8,192."""

CPU_BATCH_TOKENS = (512, 8_192)
ACCELERATOR_BATCH_TOKENS = 16_384

PADDING_LIMIT = 0.1
"""Largest share of padding in a batch whose size was not asked for."""


@dataclass(frozen=True)
class Window:
    """A run of tokens of one document that the model sees at once.

    Attributes:
        document: index of the document.
        document_id: its id in the benchmark; names it in errors and picks its noise.
        start: position of the first token in the document.
        token_ids: int32 [tokens], without special tokens.
    """

    document: int
    document_id: str
    start: int
    token_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


def automatic_budget(loaded: LoadedModel, sites: Sequence[RoutingSite]) -> int:
    """Tokens per batch when nobody asks for a number; it changes no count."""
    if loaded.device != "cpu":
        return ACCELERATOR_BATCH_TOKENS
    hidden = getattr(loaded.model.config.get_text_config(), "hidden_size", None) or 1024
    fewest, most = CPU_BATCH_TOKENS
    return min(most, max(fewest, ACTIVATION_BYTES // (4 * hidden * max(site.top_k for site in sites))))


def batches(windows: Sequence[Window], budget: int, *, by_count: bool, batching: Batching, extra: int) -> Iterator[list[Window]]:
    """The windows, longest first (what does not fit in memory fails at once), in batches of about equal lengths."""
    ordered = longest_first(windows)
    while ordered:
        count = first_batch(ordered, budget, by_count=by_count, batching=batching, extra=extra)
        yield ordered[:count]
        ordered = ordered[count:]


def longest_first(windows: Sequence[Window]) -> list[Window]:
    return sorted(windows, key=lambda window: (-len(window), window.document, window.start))


def first_batch(ordered: Sequence[Window], budget: int, *, by_count: bool, batching: Batching, extra: int) -> int:
    """How many of the windows, which are in the order of `longest_first`, share the next batch; at least one.

    Args:
        budget: tokens, padding included, or windows (``by_count``) of a batch.
        extra: special tokens of every window.
    """
    width, tokens = len(ordered[0]) + extra, 0
    for count, window in enumerate(ordered):
        if count:
            padded = (count + 1) * width
            wasted = 1 - (tokens + len(window) + extra) / padded
            full = count >= budget if by_count else padded > budget or wasted > PADDING_LIMIT
            apart = batching == "one at a time" or (batching == "equal lengths" and len(window) != len(ordered[0]))
            if full or apart:
                return count
        tokens += len(window) + extra
    return len(ordered)
