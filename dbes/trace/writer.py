"""Shards of a trace folder, written one after the other; what an interrupted run wrote is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as encode_safetensors

from dbes.errors import TraceError
from dbes.files import discard, write_bytes, write_json, write_text
from dbes.trace.manifest import MANIFEST, TRACE_SCHEMA, Manifest, ShardEntry, digest, read_manifest, sealed
from dbes.trace.types import RoutingShape, TokenRoutes
from dbes.trace.vocabulary import TokenText, as_json

VOCABULARY = "vocabulary.json"


class TraceWriter:
    """Appends shards to a trace folder; what was written whole before an interruption is kept and resumed from.

    Opening a folder that holds an unfinished recording **of the same thing** (shape and provenance equal) resumes it:
    ``next_document`` is the first document still to be recorded. Anything else in the folder is an error, and without ``begin`` so is
    nothing.
    """

    def __init__(self, folder: Path, shape: RoutingShape, provenance: Mapping[str, Any], *, begin: bool = True) -> None:
        self.folder = folder
        self._manifest = Manifest(
            schema_version=TRACE_SCHEMA,
            complete=False,
            layers=shape.layers,
            experts=shape.experts,
            top_k=shape.top_k,
            domains=shape.domains,
            document_domain=tuple(int(domain) for domain in shape.document_domain),
            document_ids=shape.document_ids,
            document_source=shape.document_source,
            provenance=json.loads(json.dumps(dict(provenance))),
            shards=(),
        )
        if (folder / MANIFEST).is_file():
            earlier = read_manifest(folder)
            whole = tuple(entry for entry in earlier.shards if (folder / entry.name).is_file())
            same = earlier.model_copy(update={"complete": False, "shards": ()}) == self._manifest
            if not same or earlier.complete or len(whole) != len(earlier.shards):
                told = ", ".join(_other_facts(earlier, self._manifest)) or ("finished" if earlier.complete else "shards are missing")
                raise TraceError(f"{folder}: holds another recording ({told}); choose another folder or --overwrite")
            self._manifest = earlier
        elif begin:
            self._save()
        else:
            raise TraceError(f"{folder}: holds no recording")

    @property
    def shards(self) -> int:
        return len(self._manifest.shards)

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        return self._manifest.shards

    @property
    def identity(self) -> str:
        """sha256 of what is recorded, without how far it is."""
        return digest(self._manifest.model_copy(update={"complete": False, "shards": ()}).model_dump(mode="json"))

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self._manifest.shards)

    @property
    def next_document(self) -> int:
        """First document that no whole shard holds yet."""
        return self._manifest.shards[-1].last_document + 1 if self._manifest.shards else 0

    def keep(self, shards: Sequence[ShardEntry]) -> None:
        """These are the shards, whoever wrote them; what was known of others is forgotten."""
        self._manifest = self._manifest.model_copy(update={"shards": tuple(shards)})
        self._save()

    def grow(self, shape: RoutingShape) -> None:
        """More documents (and domains) follow those of before: an import learns of them as it reads. Sizes of the router stay."""
        update = {
            "domains": shape.domains,
            "document_domain": tuple(shape.document_domain.tolist()),
            "document_ids": shape.document_ids,
            "document_source": shape.document_source,
        }
        self._manifest = self._manifest.model_copy(update=update)

    def write(self, routes: TokenRoutes, *, last_document: int | None = None) -> None:
        """Add one shard. ``last_document`` says up to where documents are done when the last of them have no token."""
        last = last_document
        if last is None:
            last = int(routes.document[-1]) if len(routes) else self.next_document - 1
        entry = write_shard(self.folder, self.shards, routes, documents=(self.next_document, last + 1))
        self.keep((*self._manifest.shards, entry))

    def finish(self, *, vocabulary: Mapping[int, TokenText] | None = None, provenance: Mapping[str, Any] | None = None) -> None:
        """Mark the trace complete; ``provenance`` adds facts known only at the end (counts, seconds are not among them).

        Shards beyond the last, of a longer recording that was broken off and overwritten, are removed.
        """
        own = {entry.name for entry in self._manifest.shards}
        for path in self.folder.glob("shard-*.safetensors"):
            if path.name not in own and path.stem.removeprefix("shard-").isdigit():
                discard(path)
        if vocabulary:
            write_text(self.folder / VOCABULARY, json.dumps(as_json(vocabulary), ensure_ascii=False))
        update: dict[str, Any] = {"complete": True}
        if provenance:
            update["provenance"] = {**self._manifest.provenance, **provenance}
        self._manifest = self._manifest.model_copy(update=update)
        self._save()

    def _save(self) -> None:
        write_json(self.folder / MANIFEST, sealed(self._manifest))


def write_shard(folder: Path, number: int, routes: TokenRoutes, *, documents: tuple[int, int]) -> ShardEntry:
    """Write one shard, of [first, last + 1) documents; what the manifest will say of it."""
    content = encode_safetensors({name: np.ascontiguousarray(array) for name, array in routes.arrays().items()})
    entry = ShardEntry(
        name=f"shard-{number:05d}.safetensors",
        tokens=len(routes),
        first_document=documents[0],
        last_document=documents[1] - 1,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_bytes(folder / entry.name, content)
    return entry


def _other_facts(one: Manifest, other: Manifest) -> list[str]:
    """Names of what differs between two recordings, besides how far they are."""
    fields_of = [name for name in Manifest.model_fields if name not in ("complete", "shards", "provenance")]
    told = [name for name in fields_of if getattr(one, name) != getattr(other, name)]
    facts = sorted({*one.provenance, *other.provenance})
    return [f"another {name}" for name in (*told, *(name for name in facts if one.provenance.get(name) != other.provenance.get(name)))]
