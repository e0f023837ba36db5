"""What reads texts and tells which experts they used: the seam between recording and whatever runs the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dbes.trace.blocks import Block, Contents, Work


class Engine(Protocol):
    """Runs a model over texts. What to run, in which order, what is checked and kept is not its own but the recorder's."""

    @property
    def contents(self) -> Contents:
        """Sizes of the router, and what the blocks hold."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What routed, as JSON values of the trace's provenance: model, revision, dtype, versions, ..."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it was run, as further JSON values of the provenance. A recording is resumed where both are equal."""
        ...

    def blocks(self, work: Work) -> Iterator[Block]:
        """The routes of every token of the texts, once at every layer, in any order; the same whenever it is asked."""
        ...

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:
        """Why ``missing`` of ``tokens`` rows of a layer have no selection score."""
        ...


@runtime_checkable
class PassEngine(Protocol):
    """An engine that reads its weights anew for whatever it is given, and therefore is given several work units at a time."""

    def blocks_of(self, works: Sequence[Work]) -> Iterator[Block]:
        """As `Engine.blocks`, the same for each of the works as if it were alone; a block holds texts of one of them."""
        ...
