"""A trace: the recorded routing of one model over one benchmark, in memory or as a folder of shards.

Folder layout: ``manifest.json`` (what was recorded, and each shard's name, rows and sha256), ``shard-00000.safetensors``...,
``vocabulary.json`` (text of the token ids that occur, see `dbes.models.token_text`; for display only) and, where a random-router control
was recorded in the same pass, ``control/`` with a trace of the same documents and tokens; of several draws of the random router each is
the control of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from pydantic import ValidationError

from dbes.errors import TraceError
from dbes.schema import first_problem, read_json
from dbes.showing import Shown, sizes
from dbes.trace.arrays import routes_from_arrays
from dbes.trace.manifest import MANIFEST, Provenance, ShardEntry, digest, read_manifest
from dbes.trace.shards import REQUIRED, check_header, read_shard
from dbes.trace.types import RoutingShape, TokenRoutes, pieces_of
from dbes.trace.vocabulary import TokenText, from_json
from dbes.trace.writer import VOCABULARY, TraceWriter

SHARD_TOKENS = 1 << 16
"""Tokens of a shard at most where a trace in memory is saved, as far as documents allow."""

CONTROL = "control"
TRACE_FOLDER = "trace"
"""Where an evaluation keeps its routes beside the result."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace(Shown):
    """Routing of one model over one benchmark: iterate over it to read its shards one at a time.

    Attributes:
        shape: sizes of the router and domains of the documents.
        provenance: model, revision, tokenizer hash, task fingerprint, dtype, versions, ... as JSON values.
        control: the same tokens through a frozen random router on the same representation, if it was recorded; further draws of the
            random router follow as the control's control.
        vocabulary: text of token ids, for display; bytes of those that are only a part of a character.
        path: the folder it lies in, or None when it is in memory only.
        parts: the traces it is joined of, see ``joining``; each numbers its documents from 0.
        kept: int [documents], of the parts' documents the tokens that are kept from the beginning; None: all, see ``matching``.
        seal: sha256 of its manifest, by which what was made from it is known again; None in memory.
    """

    shape: RoutingShape
    provenance: Mapping[str, Any] = field(default_factory=dict)
    control: Trace | None = None
    vocabulary: Mapping[int, TokenText] = field(default_factory=dict)
    path: Path | None = None
    entries: tuple[ShardEntry, ...] = ()
    loaded: tuple[TokenRoutes, ...] = ()
    parts: tuple[Trace, ...] = ()
    kept: np.ndarray | None = field(default=None, compare=False)
    seal: str | None = None
    _checked: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def about(self) -> tuple[str, dict[str, str]]:
        shape, draws = self.shape, len(self.controls)
        facts = {"model": str(self.provenance.get("model") or ""), "router": sizes(len(shape.layers), shape.experts, shape.top_k)}
        facts["texts"] = f"{len(shape.document_ids):,} documents of {len(shape.domains)} domains, {self.tokens:,} tokens"
        facts["random routers"] = str(draws) if draws else "none"
        return "Trace", facts | {"folder": "" if self.path is None else str(self.path)}

    def __iter__(self) -> Iterator[TokenRoutes]:
        """The shards in order of documents; a document never spans two shards. Shards on disk are checked as they are read."""
        return self.with_columns(*(column.name for column in fields(TokenRoutes)))

    def with_columns(self, *names: str) -> Iterator[TokenRoutes]:
        """The shards with no more than these columns (besides ids, document and positions).

        The first reading of a shard checks its sha256 and its routes; later ones only that the file was not touched since.
        """
        yield from self.loaded
        for entry in self.entries:
            assert self.path is not None
            path = self.path / entry.name
            stamp = _stamp(path)
            if stamp is None or self._checked.get(entry.name) != stamp:
                routes = read_shard(path, entry, self.shape)
                if stamp is not None:
                    self._checked[entry.name] = stamp
                yield routes
            else:
                with safetensors.safe_open(path, framework="numpy") as shard:
                    wanted = {*REQUIRED, *names} & set(shard.keys())
                    yield TokenRoutes(**{name: shard.get_tensor(name) for name in wanted})
        for part, first in self._starts():
            for routes in part.with_columns(*names):
                yield self._of_part(routes, first)

    def _of_part(self, routes: TokenRoutes, first: int) -> TokenRoutes:
        """Routes of a part with the numbers that its documents have here, and of the tokens that are kept."""
        found = replace(routes, document=(routes.document + first).astype(np.int32))
        return found if self.kept is None else found.take(np.flatnonzero(found.positions < self.kept[found.document]))

    def _starts(self) -> Iterator[tuple[Trace, int]]:
        """The traces it is joined of, and the first document of each."""
        first = 0
        for part in self.parts:
            yield part, first
            first += len(part.shape.document_ids)

    def documents(self, wanted: np.ndarray, *names: str) -> Iterator[TokenRoutes]:
        """The rows of some documents, bool [documents], with no more than these columns (besides ids, document and positions)."""
        for routes in self.loaded:
            yield routes.take(np.flatnonzero(wanted[routes.document]))
        for entry in self.entries:
            if not wanted[entry.first_document : entry.last_document + 1].any():
                continue
            assert self.path is not None
            path = self.path / entry.name
            if self._checked.get(entry.name) != (stamp := _stamp(path)) or stamp is None:
                routes = read_shard(path, entry, self.shape)
                yield routes.take(np.flatnonzero(wanted[routes.document]))
                continue
            with safetensors.safe_open(path, framework="numpy") as shard:
                rows = np.flatnonzero(wanted[shard.get_tensor("document")])
                runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
                found = {}
                for name in {*REQUIRED, *names} & set(shard.keys()):
                    column = shard.get_slice(name)
                    found[name] = np.concatenate([column[int(run[0]) : int(run[-1]) + 1] for run in runs if len(run)] or [column[:0]])
                yield TokenRoutes(**found)
        for part, first in self._starts():
            for routes in part.documents(wanted[first : first + len(part.shape.document_ids)], *names):
                yield self._of_part(routes, first)

    @property
    def controls(self) -> tuple[Trace, ...]:
        """The recorded draws of the random router."""
        return () if self.control is None else (self.control, *self.control.controls)

    @property
    def tokens(self) -> int:
        """Tokens of all documents; where these are cut, at most so many: a document can lack positions."""
        parts = (*map(len, self.loaded), *(entry.tokens for entry in self.entries), *(part.tokens for part in self.parts))
        return sum(parts) if self.kept is None else min(sum(parts), int(self.kept.sum()))

    @classmethod
    def from_arrays(
        cls,
        ids: np.ndarray,
        *,
        document: np.ndarray,
        domain: np.ndarray | Sequence[int],
        domains: Sequence[str],
        layers: Sequence[int],
        experts: int | Sequence[int],
        weights: np.ndarray | None = None,
        margins: np.ndarray | None = None,
        token_ids: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        phase: np.ndarray | None = None,
        selection_margins: np.ndarray | None = None,
        scaled_margins: np.ndarray | None = None,
        kept: np.ndarray | None = None,
        document_ids: Sequence[str] | None = None,
        document_source: Sequence[str] | None = None,
        vocabulary: Mapping[int, TokenText] | None = None,
        provenance: Mapping[str, Any] | None = None,
        control: Trace | None = None,
    ) -> Trace:
        """A trace of routing recorded elsewhere.

        Args:
            ids: int [tokens, layers, k], executed experts; -1 marks a slot that did not run. Order of slots means nothing.
            document: int [tokens], the text each token came from.
            domain: int [documents], index of each document's domain in ``domains``.
            domains: names of the domains.
            layers: the model's own layer numbers, one per column of ``ids``.
            experts: number of routed experts, one for all layers or one per layer. Never inferred from the ids.
            weights: float [tokens, layers, k], gate weights. Without them what needs weights is NaN. Kept in float16, as a recording
                keeps them, unless those of a token are too large or too small for it.
            margins: float [tokens, layers], router-logit margin z_(k) - z_(k+1); NaN where unknown.
            token_ids: int [tokens].
            positions: int [tokens], place in the document; by default the order of the rows of a document.
            phase: int [tokens], 0 prompt, 1 generated.
            selection_margins, scaled_margins, kept: see ``TokenRoutes``.
            document_ids: names of the documents; mere numbers by default, which say nothing about what was read.
            document_source: the source text each document was cut from; documents of one source are one unit of all statistics.
            vocabulary: texts of token ids, for display.
            provenance: see ``Trace``. Results are compared where ``provenance["task"]["fingerprint"]`` is equal; without one it is made
                from the document ids, the domains and the prompts' token ids, and where only numbers are known there is none.

        Raises:
            TraceError: shapes disagree, ids out of range, an expert twice in one row, a document outside ``domain``.
        """
        shape, routes = routes_from_arrays(
            {
                "ids": ids, "document": document, "weights": weights, "margins": margins, "token_ids": token_ids, "positions": positions,
                "phase": phase, "selection_margins": selection_margins, "scaled_margins": scaled_margins, "kept": kept,
            },
            domain=domain, domains=domains, layers=layers, experts=experts, document_ids=document_ids, document_source=document_source,
        )  # fmt: skip
        try:
            Provenance.model_validate(dict(provenance or {}))
        except ValidationError as problem:
            raise TraceError(f"provenance: {first_problem(problem)}") from None
        return cls(shape=shape, provenance=dict(provenance or {}), control=control, vocabulary=dict(vocabulary or {}), loaded=(routes,))

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """The trace in a folder; shards are read, and their sha256 checked, only when they are iterated over.

        Raises:
            TraceError: no manifest, another schema version, an unfinished recording, one that contradicts itself, a shard that is
                missing or no shard, a control of other documents.
        """
        trace, inner = cls._loaded(Path(path)), Path(path) / CONTROL
        if not (inner / MANIFEST).is_file():
            return trace
        control = cls.load(inner)
        for name in ("layers", "experts", "domains", "document_domain"):
            if not np.array_equal(getattr(trace.shape, name), getattr(control.shape, name)):
                raise TraceError(f"{control.path}: {name} are not those of the trace it lies in; record again with --overwrite")
        return replace(trace, control=control)

    @classmethod
    def _loaded(cls, folder: Path) -> Trace:
        manifest = read_manifest(folder)
        if not manifest.complete:
            raise TraceError(
                f"{folder}: the recording was not finished ({len(manifest.shards)} shards so far); "
                "run the same evaluate command again to resume it"
            )
        for entry in manifest.shards:
            check_header(folder / entry.name, entry)
        return cls(
            shape=manifest.shape,
            provenance=manifest.provenance,
            vocabulary=read_vocabulary(folder / VOCABULARY),
            path=folder,
            entries=manifest.shards,
            seal=digest(manifest.model_dump(mode="json")),
        )

    def save(self, path: str | Path) -> Trace:
        """Write the trace (and its control) as a folder and return the trace that reads it."""
        folder = Path(path)
        writer = TraceWriter(folder, self.shape, self.provenance)
        # the last shard also answers for documents without tokens, so each shard is written when the next one is at hand
        parts = (piece for routes in self for piece in (pieces_of(routes, SHARD_TOKENS) if len(routes) else [routes]))
        routes = next(parts, None)
        while routes is not None:
            following = next(parts, None)
            writer.write(routes, last_document=len(self.shape.document_ids) - 1 if following is None else None)
            routes = following
        if self.control is not None:
            self.control.save(folder / CONTROL)
        writer.finish(vocabulary=self.vocabulary)
        return Trace.load(folder)


def read_vocabulary(path: Path) -> dict[int, TokenText]:
    """Text of token ids; nothing where there is no such file."""
    return from_json(read_json(path, error=TraceError), where=path, error=TraceError) if path.exists() else {}


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of last change of a file; None where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
