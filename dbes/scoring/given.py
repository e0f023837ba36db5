"""Counts from numbers that somebody else counted: per document, or of whole domains where no documents are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from dbes.errors import TraceError
from dbes.schema import first_problem
from dbes.scoring.layer_counts import LayerCounts, layer_of, one_layer
from dbes.scoring.texts import TextReader
from dbes.trace.manifest import Provenance, shape_problems
from dbes.trace.types import RoutingShape

NO_TOKENS = "made from counts, not from tokens: n-grams, overlap of neighbours, stiffness and token identity are unknown and NaN"
NO_DOCUMENTS = (
    "only counts of whole domains are known: values without documents have no chance level, interval or test, so these are NaN; "
    "give counts of documents to have them"
)

Sizes = int | Sequence[int]


def given_documents(
    hits: np.ndarray,
    *,
    domains: Sequence[str],
    document_domain: np.ndarray | Sequence[int],
    layers: Sequence[int] | None,
    experts: Sizes | None,
    top_k: Sizes,
    mass: np.ndarray | None = None,
    tokens: np.ndarray | Sequence[int] | None = None,
    active: np.ndarray | None = None,
    document_ids: Sequence[str] | None = None,
    document_source: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of the counts, see ``Counts.from_arrays``."""
    hits = np.asarray(hits)
    if hits.ndim != 3:
        raise TraceError(f"hits: expected [documents, layers, experts], got {hits.shape}")
    layers = range(hits.shape[1]) if layers is None else layers
    experts = int(hits.shape[2]) if experts is None else experts
    names = tuple(map(str, range(len(hits)))) if document_ids is None else tuple(document_ids)
    domain = np.asarray(document_domain)
    if domain.shape != hits.shape[:1] or (domain.size and not np.issubdtype(domain.dtype, np.integer)):
        raise TraceError(f"document_domain: expected {len(hits)} indices, one for each document of hits, got {domain.dtype} {domain.shape}")
    shape = RoutingShape(
        layers=tuple(map(int, layers)),
        experts=_for_each("experts", experts, layers),
        top_k=_for_each("top_k", top_k, layers),
        domains=tuple(domains),
        document_domain=domain.astype(np.int32),
        document_ids=names,
        document_source=None if document_source is None else tuple(document_source),
    )
    for problem in shape_problems(shape):
        raise TraceError(problem)
    try:
        Provenance.model_validate(dict(provenance or {}))
    except ValidationError as problem:
        raise TraceError(f"provenance: {first_problem(problem)}") from None
    size = (len(hits), len(shape.layers), shape.width)
    hits = _checked("hits", hits, size, shape, whole=True)
    slots = hits.sum(axis=-1, dtype=np.float64)
    top = np.asarray(shape.top_k)
    length = np.ceil(slots / top).max(axis=1) if tokens is None else _checked("tokens", np.asarray(tokens), size[:1], shape, whole=True)
    if (over := np.argwhere(slots > length[:, None] * top)).size:
        document, column = over[0]
        raise TraceError(
            f"hits: {slots[document, column]:,.0f} at layer {shape.layers[column]} of document {names[document]!r}, "
            f"more than its {length[document]:,.0f} tokens x top_k {top[column]}"
        )
    if (over := np.argwhere(hits > length[:, None, None])).size:
        document, column, expert = over[0]
        raise TraceError(
            f"hits: expert {expert} of layer {shape.layers[column]} has {hits[document, column, expert]:,.0f} in document "
            f"{names[document]!r} of {length[document]:,.0f} tokens; a token chooses an expert at most once"
        )
    ran = np.minimum(length[:, None], slots) if active is None else _checked("active", np.asarray(active), size[:2], shape, whole=True)
    arrays = {
        "hits": hits.astype(np.float32 if hits.max(initial=0) < 2**24 else np.float64),
        "active": ran.astype(np.float64),
    }
    if mass is not None:
        arrays["mass"] = _checked("mass", np.asarray(mass), size, shape).astype(np.float32)
    whole = length.astype(np.int64)

    def read(column: int) -> LayerCounts:
        return layer_of(one_layer(shape, column), whole, {name: array[:, column] for name, array in arrays.items()})

    texts = TextReader(shape).done()
    about = {"provenance": dict(provenance or {}), "texts": texts, "grouped": False, "notes": (NO_TOKENS,)}
    return {"shape": shape, "tokens": whole, "read": read, **about}


def given_domains(hits: np.ndarray, *, domains: Sequence[str], **more: Any) -> dict[str, Any]:
    """The fields of the counts, see ``Counts.from_domains``."""
    if np.ndim(hits) != 3 or len(hits) != len(domains):
        raise TraceError(f"hits: expected [domains, layers, experts] of {len(domains)} domains, got {np.shape(hits)}")
    found = given_documents(hits, domains=domains, document_domain=np.arange(len(domains)), document_ids=domains, **more)
    texts = replace(found["texts"], fingerprint=None)
    return {**found, "by_documents": False, "notes": (NO_DOCUMENTS, NO_TOKENS), "texts": texts}


def _for_each(name: str, sizes: Sizes, layers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(sizes, int | np.integer):
        return (int(sizes),) * len(layers)
    if len(sizes) != len(layers):
        raise TraceError(f"{name}: {len(sizes)} entries for {len(layers)} layers")
    return tuple(map(int, sizes))


def _checked(name: str, array: np.ndarray, expected: tuple[int, ...], shape: RoutingShape, *, whole: bool = False) -> np.ndarray:
    """The array when it can be counts (or masses): of this shape, finite, not below 0, and 0 beyond a layer's last expert."""
    if array.shape != expected or array.dtype.kind not in "iuf":
        raise TraceError(f"{name}: expected numbers {expected}, got {array.dtype} {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise TraceError(f"{name}: expected finite numbers, not below 0")
    if whole and array.dtype.kind == "f" and (array != np.floor(array)).any():
        raise TraceError(f"{name}: expected whole numbers")
    if array.max(initial=0) >= 2**53:
        raise TraceError(f"{name}: numbers of 2^53 and more are not exact")
    for column, experts in enumerate(shape.experts) if len(expected) == 3 else ():
        if array[:, column, experts:].any():
            raise TraceError(f"{name}: experts beyond the {experts} of layer {shape.layers[column]} have some")
    return array
