"""What a format yields: documents with routes, or tables of counts, and notes about what it left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from dbes.importing.sizes import ModelSizes

MISSING = -1
"""In the ids of a document: a slot of which the source says nothing, or that did not run."""


@dataclass(frozen=True)
class Source:
    """A file to import.

    Attributes:
        path: where it lies.
        name: its path below the folder that was given, that folder's name included; domain maps and messages use it.
    """

    path: Path
    name: str

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class Document:
    """Routes of one text, or of a piece of it.

    Attributes:
        source: the file it came from.
        where: file and line or field, for messages.
        id: name of the document, distinct in an import.
        layers: the model's own numbers of its layers.
        ids: integers [tokens, layers, slots]; MISSING where there is no expert. May lie on disk.
        columns: which layers of ``ids`` and ``weights`` are meant, as many as ``layers``; None: all.
        experts: routed experts of each layer where the file says so.
        token_ids, positions: integers [tokens]; positions count from 0 by default.
        phase: uint8 [tokens], as in ``TokenRoutes``.
        weights: float [tokens, layers, slots].
        logit_margins: float [tokens, layers], as in ``TokenRoutes``; NaN where unknown.
        text: name of the text it is a piece of; by default its own id. Documents of one text are one unit of all statistics.
        fields: what else the file says of it; a domain map can read the domain from here.
        uneven: layers may have run different numbers of slots for one token (a router that can skip).
    """

    source: Source
    where: str
    id: str
    layers: tuple[int, ...]
    ids: np.ndarray
    columns: tuple[int, ...] | None = None
    experts: int | None = None
    token_ids: np.ndarray | None = None
    positions: np.ndarray | None = None
    phase: np.ndarray | None = None
    weights: np.ndarray | None = None
    logit_margins: np.ndarray | None = None
    text: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    uneven: bool = False


@dataclass(frozen=True, kw_only=True)
class CountTable:
    """How often each expert of each layer was chosen.

    Attributes:
        source, where, fields: as of a document.
        id: name of what was counted: the document, where ``by_document``, else a name for the domain if nothing else gives one.
        layers: the numbers that the file gives its layers.
        hits: int64 [layers, experts].
        top_k: experts that a token takes, where the file says so.
        tokens: tokens that were counted, where the file says so exactly.
        by_document: these are the counts of one document.
    """

    source: Source
    where: str
    id: str
    layers: tuple[int, ...]
    hits: np.ndarray
    top_k: int | None = None
    tokens: int | None = None
    by_document: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


Item = Document | CountTable


class Notes:
    """What an import left out or took for granted, counted, in order of first mention."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, text: str, count: int = 1) -> None:
        """Mention something ``count`` more times; ``{n}`` in the text becomes their sum."""
        if count:
            self._counts[text] = self._counts.get(text, 0) + count

    def once(self, text: str) -> None:
        """Mention something, however often it is the case."""
        self._counts[text] = 1

    def told(self) -> tuple[str, ...]:
        return tuple(text.replace("{n}", f"{count:,}") for text, count in self._counts.items())


class Reader(Protocol):
    """Reads the sources of one format, in order, a document or table at a time."""

    def __call__(self, sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Item]: ...
