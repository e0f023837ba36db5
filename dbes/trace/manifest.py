"""What a trace folder says of itself, read strictly: sizes, documents and shards that agree with each other, and who edited it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, model_validator

from dbes.errors import TraceError
from dbes.schema import Open, Strict, Whole, read_versioned
from dbes.text import clipped
from dbes.trace.types import RoutingShape

TRACE_SCHEMA = 1
MANIFEST = "manifest.json"
SEAL = "sha256"

Index = Annotated[int, Field(ge=0, lt=2**31)]
Experts = Annotated[int, Field(ge=1, lt=2**16)]


class ShardEntry(Strict):
    """One shard of a trace: rows are the tokens of documents [first_document, last_document]."""

    name: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.safetensors$")]
    tokens: Index
    first_document: Index
    last_document: Annotated[int, Field(ge=-1, lt=2**31)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TaskIdentity(Open):
    """The part of a trace's provenance that says which task was read."""

    name: str | None = None
    version: Index | None = None
    fingerprint: str | None = None
    separability: float | None = None
    note: str | None = None
    cautions: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class Provenance(Open):
    """The part of a trace's provenance that scores and reports read."""

    model: str | None = None
    revision: str | None = None
    family: str | None = None
    dtype: str | None = None
    parameters: Whole | None = None
    seed: int | None = None
    versions: dict[str, str | int | float | None] = Field(default_factory=dict)
    task: TaskIdentity | None = None
    slots_without_expert: dict[str, float] = Field(default_factory=dict)


def _known_facts_have_their_types(provenance: dict[str, Any]) -> dict[str, Any]:
    Provenance.model_validate(provenance)
    return provenance


Facts = Annotated[dict[str, Any], AfterValidator(_known_facts_have_their_types)]
"""A provenance as it stands in a file: any facts, of which the known ones have their types."""


class Manifest(Strict):
    """What a trace folder says of itself. ``complete`` is false while a recording is under way or was interrupted."""

    schema_version: int
    complete: bool
    layers: tuple[Index, ...]
    experts: tuple[Experts, ...]
    top_k: tuple[Experts, ...]
    domains: tuple[str, ...]
    document_domain: tuple[Index, ...]
    document_ids: tuple[str, ...]
    document_source: tuple[str, ...] | None = None
    provenance: Facts
    shards: tuple[ShardEntry, ...]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        for problem in (*shape_problems(self), *self._shard_problems()):
            raise ValueError(problem)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _as_written(cls, content: Any, handler: ModelWrapValidatorHandler[Manifest]) -> Manifest:
        return unsealed(content, handler, hint="restore it, or record again with --overwrite")

    def _shard_problems(self) -> Iterator[str]:
        if len({entry.name for entry in self.shards}) != len(self.shards):
            yield "shards: a file is named twice"
        done = 0
        for number, entry in enumerate(self.shards):
            if entry.first_document != done or entry.last_document < entry.first_document - 1:
                yield f"shards.{number}: documents {entry.first_document} to {entry.last_document}, expected them to go on from {done}"
            done = entry.last_document + 1
        if done > len(self.document_ids):
            yield f"shards: they hold {done} documents, document_ids names {len(self.document_ids)}"
        if self.complete and done < len(self.document_ids):
            yield f"shards: complete, but documents {done} to {len(self.document_ids) - 1} are in no shard; record again with --overwrite"

    @property
    def shape(self) -> RoutingShape:
        return shape_of(self)


Value = TypeVar("Value")


def unsealed(content: Any, handler: Callable[[Any], Value], *, hint: str) -> Value:
    """The value of content that holds a hash of itself, or that was made in memory or written before there were such hashes.

    Raises:
        ValueError: the content is not the one of which the hash was made.
    """
    if not isinstance(content, Mapping) or SEAL not in content:
        return handler(content)
    rest = {name: value for name, value in content.items() if name != SEAL}
    read = handler(rest)
    if content[SEAL] != digest(rest):
        raise ValueError(f"was changed after it was written (its own sha256 differs); {hint}")
    return read


class Sizes(Protocol):
    """Sizes of a router, and documents with domains."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def experts(self) -> tuple[int, ...]: ...
    @property
    def top_k(self) -> tuple[int, ...]: ...
    @property
    def domains(self) -> tuple[str, ...]: ...
    @property
    def document_domain(self) -> Any: ...
    @property
    def document_ids(self) -> tuple[str, ...]: ...
    @property
    def document_source(self) -> tuple[str, ...] | None: ...


def shape_of(sizes: Sizes) -> RoutingShape:
    """The shape that a file declares."""
    return RoutingShape(
        layers=sizes.layers,
        experts=sizes.experts,
        top_k=sizes.top_k,
        domains=sizes.domains,
        document_domain=np.asarray(sizes.document_domain, np.int32),
        document_ids=sizes.document_ids,
        document_source=sizes.document_source,
    )


def shape_problems(shape: Sizes) -> Iterator[str]:
    """What cannot be true of a router's sizes and of documents with domains, the worst first."""
    layers, experts, top_k = shape.layers, shape.experts, shape.top_k
    if not len(layers) == len(experts) == len(top_k):
        yield f"layers, experts and top_k have {len(layers)}, {len(experts)} and {len(top_k)} entries"
        return
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
        yield f"layers must be ascending and distinct, at least one and none below 0, got {clipped(list(layers))}"
    for layer, count, k in zip(layers, experts, top_k, strict=True):
        if not 1 <= k <= count:
            yield f"layer {layer}: top_k {k} of {count} experts; expected 1 to {count}"
            break
    documents = len(shape.document_domain)
    if len(shape.document_ids) != documents:
        yield f"document_ids has {len(shape.document_ids)} entries, document_domain {documents}"
    if shape.document_source is not None and len(shape.document_source) != documents:
        yield f"document_source has {len(shape.document_source)} entries, document_domain {documents}"
    if any(not 0 <= domain < len(shape.domains) for domain in shape.document_domain):
        yield f"document_domain: expected indices below {len(shape.domains)}, the number of domains"
    if not documents:
        yield "document_domain: no documents"
    for name, values in (("domains", shape.domains), ("document_ids", shape.document_ids)):
        if (twice := _twice(values)) is not None:
            yield f"{name}: {clipped(twice)!r} is given twice"


def _twice(values: tuple[str, ...]) -> str | None:
    seen: set[str] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of JSON values, the same whatever the order of keys and the white space of the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values with a hash of its own content."""
    content = manifest.model_dump(mode="json")
    return {**content, SEAL: digest(content)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a trace folder.

    Raises:
        TraceError: missing, not JSON, another schema version, changed since it was written, or it contradicts itself.
    """
    missing = f"{folder}: no {MANIFEST} here, so this is not a trace folder"
    return read_versioned(folder / MANIFEST, Manifest, error=TraceError, versions=(TRACE_SCHEMA,), missing=missing)
