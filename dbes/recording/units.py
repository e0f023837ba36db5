"""Work units: the runs of whole shards that an engine records at a time; a pure function of the documents' lengths.

Batches are formed over a whole unit, so that texts of about one length share them, and shards are cut from it afterwards. A unit is what
is recorded again after an interruption, and what processes share out among each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from dbes.recording.batches import ACCELERATOR_BATCH_TOKENS

SHARD_TOKENS = 65_536
SHARD_BYTES = 12 * 2**20
UNIT_TOKENS = 1_000_000
UNITS = 8
"""A recording is cut into about so many units, so that small ones can be resumed and shared out too, or more of UNIT_TOKENS."""


@dataclass(frozen=True)
class Unit:
    """A run of whole shards.

    Attributes:
        number: its place among the units.
        first_shard: number of its first shard.
        shards: [first, last + 1) documents of each of its shards.
    """

    number: int
    first_shard: int
    shards: tuple[tuple[int, int], ...]

    @property
    def documents(self) -> tuple[int, int]:
        """[first, last + 1)."""
        return self.shards[0][0], self.shards[-1][1]


def work_units(lengths: Sequence[int], bytes_per_token: int, *, shard_tokens: int = SHARD_TOKENS) -> list[Unit]:
    """The units of documents of these lengths in tokens: of one shard at least, and a UNITS-th of all tokens or UNIT_TOKENS."""
    shards = list(shards_of(lengths, bytes_per_token, shard_tokens=shard_tokens))
    starts = [0]
    for low, high in shards:
        starts.append(starts[-1] + sum(lengths[low:high]))
    size = max(1, min(UNIT_TOKENS, -(-starts[-1] // UNITS)))
    runs = [list(run) for _, run in groupby(range(len(shards)), key=lambda place: starts[place] // size)]
    return [Unit(number, run[0], tuple(shards[place] for place in run)) for number, run in enumerate(runs)]


def shards_of(lengths: Sequence[int], bytes_per_token: int, *, shard_tokens: int = SHARD_TOKENS) -> Iterator[tuple[int, int]]:
    """[first, last + 1) documents of each shard: whole documents, bounded in tokens so that a shard fits in memory."""
    # not below one full batch of an accelerator, however many layers a token has
    limit = min(shard_tokens, max(ACCELERATOR_BATCH_TOKENS, SHARD_BYTES // bytes_per_token))
    low, tokens = 0, 0
    for index, length in enumerate(lengths):
        if tokens and tokens + length > limit:
            yield low, index
            low, tokens = index, 0
        tokens += length
    yield low, len(lengths)
