"""Documents to a trace: checked, cut where they are long, and written shard by shard as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import SourceError, TraceError
from dbes.importing.domain_map import DomainMap
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import MISSING, Document, Notes
from dbes.text import clipped
from dbes.trace.manifest import shape_problems
from dbes.trace.shards import validate_routes
from dbes.trace.types import RoutingShape, TokenRoutes, storage_dtype
from dbes.trace.writer import TraceWriter

SHARD_TOKENS = 1 << 15
"""Tokens of a shard at most; longer documents are cut to pieces, which stay one unit of all statistics."""

COLUMNS = ("token_ids", "phase", "weights", "logit_margins")
MASS = 65_000.0
"""Gate weights are kept as float16, whose largest number this is about."""


def write_routes(
    documents: Iterator[Document], folder: Path, domains: DomainMap, sizes: ModelSizes, notes: Notes, provenance: Mapping[str, Any]
) -> None:
    """Write the trace of all documents to a new folder.

    Raises:
        SourceError: documents of other layers, experts or slots, or some with token ids (phase, weights) and some without; ids out of
            range, an expert twice in a row, unequal slots at layers; a document given twice; nothing that the domain map knows.
        SettingError: nobody says how many experts the model has.
    """
    sink: _Sink | None = None
    for document in documents:
        place = domains.place(document.source, document.id, document.fields, otherwise=None)
        if place is None:
            notes.add("{n} documents were left out by the domain map, or fit no entry of it")
            continue
        if not document.ids.shape[0]:
            notes.add("{n} documents without a row of routing were left out")
            continue
        if sink is None:
            sink = _Sink(document, folder, sizes, notes, provenance)
        sink.add(document, place.domain, place.document or document.text)
    if sink is None:
        raise SourceError("nothing was imported: no document with routing fits an entry of the domain map")
    domains.tell(notes)
    sink.finish()


class _Sink:
    """Collects documents until they fill a shard."""

    def __init__(self, first: Document, folder: Path, sizes: ModelSizes, notes: Notes, provenance: Mapping[str, Any]) -> None:
        self.first, self.folder, self.notes, self.provenance = first, folder, notes, provenance
        self.experts = sizes.agreed("experts", first.experts, where=first.where, option="--experts")
        self.slots = sizes.agreed("top_k", first.ids.shape[2], where=first.where, option="--top-k")
        if self.slots > self.experts:
            raise SourceError(f"{first.where}: {self.slots} slots, but the model has {self.experts} experts")
        self.layers = first.layers
        self.told = sizes.moe_layers is not None
        self.chosen = np.zeros(len(first.layers), bool)
        self.columns = {name for name in COLUMNS if getattr(first, name) is not None}
        self.writer: TraceWriter | None = None
        self.waiting: list[tuple[Document, TokenRoutes]] = []
        self.tokens = 0
        self.domains: dict[str, int] = {}
        self.document_domain: list[int] = []
        self.ids: dict[str, str] = {}
        self.texts: list[str] = []

    def add(self, document: Document, domain: str, text: str | None) -> None:
        self._alike(document)
        pieces = -(-len(document.ids) // SHARD_TOKENS)
        if pieces > 1:
            self.notes.add(f"{{n}} documents of more than {SHARD_TOKENS:,} tokens were cut to pieces, which stay one unit")
        for number in range(pieces):
            piece = _part(document, number) if pieces > 1 else document
            if piece.id in self.ids:
                raise SourceError(f"{piece.where}: document {clipped(piece.id)!r} stands in {self.ids[piece.id]} too")
            self.ids[piece.id] = piece.where
            self.texts.append(text or document.id)
            self.document_domain.append(self.domains.setdefault(domain, len(self.domains)))
            if self.waiting and self.tokens + len(piece.ids) > SHARD_TOKENS:
                self._flush(len(self.ids) - 1)
            self.waiting.append((piece, self._stored(piece, len(self.ids) - 1)))
            self.tokens += len(piece.ids)

    def finish(self) -> None:
        self._flush(len(self.ids))
        self._refuse_zeros()
        assert self.writer is not None
        shape = self._shape(len(self.ids))
        self._possible(shape)
        self.writer.grow(shape)
        told = {"told": list(self.notes.told())}
        self.writer.finish(provenance={"import": {**self.provenance["import"], **told}})

    def _refuse_zeros(self) -> None:
        """With one expert a token, layers of zeros alone (dense ones, or kernels that record nothing) have no expert twice in a row."""
        if self.slots > 1 or self.chosen.all():
            return
        layer = self.layers[int(np.argmin(self.chosen))]
        seems = f"every token has expert 0 at layer {layer}, which is how a dense layer looks, or a server that did not record routing"
        if not self.told:
            raise SourceError(f"{self.first.where}: {seems}; give --model-config config.json, which tells what it is")
        self.notes.once(seems)

    def _alike(self, document: Document) -> None:
        first, where = self.first, document.where
        if document.layers != self.layers or document.ids.shape[2] != self.slots:
            raise SourceError(
                f"{where}: {document.ids.shape[2]} slots at layers {clipped(list(document.layers))}, but {first.where} has {self.slots} at "
                f"{clipped(list(self.layers))}: of another model?"
            )
        if document.experts is not None and document.experts != self.experts:
            raise SourceError(f"{where}: {document.experts} experts, but {self.experts} before or by --experts")
        for name in COLUMNS:
            if (getattr(document, name) is not None) != (name in self.columns):
                has, lacks = (where, first.where) if name not in self.columns else (first.where, where)
                raise SourceError(f"{has} has {name}, {lacks} has none; import documents with and without {name} apart")

    def _stored(self, document: Document, index: int) -> TokenRoutes:
        """The routes as a trace keeps them; what no router can have chosen is refused when a shard is checked."""
        columns = slice(None) if document.columns is None else list(document.columns)
        ids, where = document.ids[:, columns], document.where
        rows, kind = len(ids), storage_dtype(self.experts)
        if ids.size and (int(ids.max()) >= self.experts or int(ids.min()) < MISSING):
            wrong = np.argwhere((ids >= self.experts) | (ids < MISSING))[0]
            raise SourceError(
                f"{where}: id {int(ids[tuple(wrong)])} in row {wrong[0]} at layer {document.layers[wrong[1]]}, but the model has "
                f"{self.experts} experts (0 to {self.experts - 1}; -1 where there is none)"
            )
        stored = ids.astype(kind)
        self.chosen |= ((stored != 0) & (ids != MISSING)).any(axis=(0, 2))
        weights = None
        if ids.dtype.kind == "i" and (ids < 0).any():
            ran = ids >= 0
            stored[~ran] = np.iinfo(kind).max
            each = ran.sum(axis=2)
            self.notes.add("{n} tokens have no routing (-1): they stay missing", int((each == 0).all(axis=1).sum()))
            if not document.uneven and (each != each[:, :1]).any():
                row, column = np.argwhere(each != each[:, :1])[0]
                raise SourceError(
                    f"{where}: row {row} has {each[row, 0]} experts at layer {document.layers[0]}, but {each[row, column]} at layer "
                    f"{document.layers[column]}; every token takes as many at each (dense layers are dropped by --model-config config.json)"
                )
        if document.weights is not None:
            weights = np.where(stored == np.iinfo(kind).max, 0, document.weights[:, columns]).astype(np.float32)
            if not np.isfinite(weights).all() or (np.abs(weights) > MASS).any():
                raise SourceError(f"{where}: weights hold NaN, infinity or numbers beyond {MASS:,.0f}")
            weights = weights.astype(np.float16)
        positions = np.arange(rows, dtype=np.int32) if document.positions is None else document.positions.astype(np.int32)
        if (np.diff(positions) <= 0).any() or positions[0] < 0:
            raise SourceError(f"{where}: positions must ascend, from 0 on")
        return TokenRoutes(
            ids=stored,
            document=np.full(rows, index, np.int32),
            positions=positions,
            token_ids=None if document.token_ids is None else document.token_ids.astype(np.int32),
            phase=document.phase,
            weights=weights,
            logit_margins=None if document.logit_margins is None else document.logit_margins[:, columns].astype(np.float16),
        )

    def _shape(self, documents: int) -> RoutingShape:
        ids, texts = tuple(self.ids)[:documents], tuple(self.texts[:documents])
        return RoutingShape(
            layers=self.layers,
            experts=(self.experts,) * len(self.layers),
            top_k=(self.slots,) * len(self.layers),
            domains=tuple(self.domains),
            document_domain=np.asarray(self.document_domain[:documents], np.int32),
            document_ids=ids,
            document_source=None if texts == ids else texts,
        )

    def _flush(self, documents: int) -> None:
        """Write what is waiting: the documents up to the number ``documents``."""
        shape = self._shape(documents)
        parts = [routes.arrays() for _, routes in self.waiting]
        routes = TokenRoutes(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        try:
            validate_routes(routes, shape, where="routes")
        except TraceError as problem:
            self._blame(shape)
            raise SourceError(str(problem)) from None
        if self.writer is None:
            self._possible(shape)
            self.writer = TraceWriter(self.folder, shape, self.provenance)
        self.writer.write(routes)
        self.waiting, self.tokens = [], 0

    def _possible(self, shape: RoutingShape) -> None:
        for problem in shape_problems(shape):
            raise SourceError(f"{self.first.where}: {problem}")

    def _blame(self, shape: RoutingShape) -> None:
        """Find the document that cannot be: a shard is checked as a whole, which is many times faster."""
        for document, routes in self.waiting:
            try:
                validate_routes(routes, shape, where=document.where)
            except TraceError as problem:
                hint = "; dense layers are dropped by --model-config config.json" if "stands twice" in str(problem) else ""
                raise SourceError(f"{problem}{hint}") from None


def _part(document: Document, number: int) -> Document:
    """One piece of a long document."""
    rows = slice(number * SHARD_TOKENS, (number + 1) * SHARD_TOKENS)
    cut: dict[str, Any] = {}
    for name in ("ids", *COLUMNS, "positions"):
        array = getattr(document, name)
        cut[name] = None if array is None else array[rows]
    if cut["positions"] is None:
        cut["positions"] = np.arange(rows.start, rows.start + len(cut["ids"]), dtype=np.int32)
    return replace(document, id=f"{document.id}#{number}", **cut)

