"""dbes's own small schema for everybody else: one JSON object a line, a document each; see docs/formats.md.

    {"id": "a", "domain": "law", "routes": [[[3, 1], [0, 2]], ...]}                 tokens x layers x slots
    {"id": "b", "domain": "law", "routes": "<base64 of a .npy>", "weights": ..., "token_ids": [...], "phase": [...]}

The first line may be ``{"layers": [1, 2], "experts": 64, "top_k": 6}`` without routes: sizes for all that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from dbes.errors import SourceError
from dbes.importing.reading import floats, integers, records
from dbes.importing.requests import about, optional_ids
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.schema import Strict, validated
from dbes.trace.types import GENERATED

SUFFIXES = (".jsonl", ".ndjson", ".json", ".gz")


class Header(Strict):
    """Sizes for all documents that follow."""

    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    experts: int | None = Field(default=None, ge=1, lt=2**16)
    top_k: int | None = Field(default=None, ge=1, lt=2**16)


class Line(Strict):
    """A document, as it stands in a line."""

    id: str = Field(min_length=1)
    routes: list[Any] | str
    domain: str | None = None
    document: str | None = None
    token_ids: list[Any] | str | None = None
    positions: list[Any] | None = None
    phase: list[Any] | None = None
    weights: list[Any] | str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    for source in sources:
        header = Header()
        for number, (where, record) in enumerate(records(source)):
            if number == 0 and "routes" not in record:
                header = validated(Header, record, where=where, error=SourceError)
                continue
            yield _document(source, where, record, header, sizes, notes)


def _document(source: Source, where: str, record: Mapping[str, Any], header: Header, sizes: ModelSizes, notes: Notes) -> Document:
    line = validated(Line, record, where=where, error=SourceError)
    ids = integers(line.routes, where=f"{where}, routes", axes=3)
    weights = None if line.weights is None else floats(line.weights, where=f"{where}, weights", axes=3)
    if weights is not None and weights.shape != ids.shape:
        raise SourceError(f"{where}, weights: shape {weights.shape}, but routes have {ids.shape}")
    if header.top_k is not None and len(ids) and header.top_k != ids.shape[2]:
        raise SourceError(f"{where}, routes: {ids.shape[2]} slots, but the first line says top_k {header.top_k}")
    if header.layers is not None:
        if len(ids) and len(header.layers) != ids.shape[1]:
            raise SourceError(f"{where}, routes: {ids.shape[1]} layers, but the first line names {len(header.layers)}")
        columns, layers = None, header.layers
    else:
        columns, layers = sizes.columns(ids.shape[1], notes, where=f"{where}, routes")
    per_token = {name: optional_ids(getattr(line, name), where=f"{where}, {name}") for name in ("token_ids", "positions", "phase")}
    for name, array in per_token.items():
        if array is not None and len(array) != len(ids):
            raise SourceError(f"{where}, {name}: {len(array)} entries for {len(ids)} tokens of routes")
    phase = per_token["phase"]
    if phase is not None and phase.max(initial=0) > GENERATED:
        raise SourceError(f"{where}, phase: expected 0 (given text) or 1 (generated)")
    return Document(
        source=source,
        where=where,
        id=line.id,
        text=line.document,
        layers=layers,
        ids=ids,
        columns=columns,
        experts=header.experts,
        token_ids=per_token["token_ids"],
        positions=per_token["positions"],
        phase=None if phase is None else phase.astype(np.uint8),
        weights=weights,
        fields=about(record),
        uneven=True,
    )
