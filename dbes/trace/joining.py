"""Traces of other documents of the same model as one; what lies on disk is read from there, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dbes.errors import TraceError
from dbes.text import clipped
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape
from dbes.trace.vocabulary import joined_vocabularies


def join_traces(traces: Sequence[Trace], *, provenance: Mapping[str, Any] | None = None) -> Trace:
    """One trace of the documents of several, in order; nothing is copied, ``save`` writes it as a folder of its own.

    Documents that have only numbers are numbered again.

    Args:
        provenance: added to that of the first.

    Raises:
        TraceError: other layers, experts, top_k, domains or model; a document id that stands in two; a control, or a draw of it, in some
            only; a token that has another text in one than in another.
    """
    if not traces:
        raise TraceError("nothing to join: no traces were given")
    shapes = [trace.shape for trace in traces]
    same_router(shapes, [trace.provenance for trace in traces])
    controls = [trace.control for trace in traces if trace.control is not None]
    if controls and len(controls) < len(traces):
        raise TraceError(f"{len(controls)} of {len(traces)} traces have a random-router control: all of them must, or none")
    ids = tuple(document for shape in shapes for document in shape.document_ids)
    if all(shape.numbered for shape in shapes):
        ids = tuple(map(str, range(len(ids))))
    if len(set(ids)) < len(ids):
        twice, times = Counter(ids).most_common(1)[0]
        raise TraceError(f"document {clipped(twice)!r} is in {times} of the traces; documents that are joined need ids of their own")
    sources = None
    if any(shape.document_source for shape in shapes):
        sources = tuple(source for shape in shapes for source in shape.document_source or shape.document_ids)
    return Trace(
        shape=replace(
            shapes[0],
            document_domain=np.concatenate([shape.document_domain for shape in shapes]),
            document_ids=ids,
            document_source=sources,
        ),
        provenance={**traces[0].provenance, **(provenance or {})},
        control=join_traces(controls) if controls else None,
        vocabulary=joined_vocabularies([trace.vocabulary for trace in traces], error=TraceError),
        parts=tuple(traces),
    )


def same_router(shapes: Sequence[RoutingShape], provenances: Sequence[Mapping[str, Any]]) -> None:
    """Refuse recordings of different routers.

    Raises:
        TraceError: other layers, experts, top_k or domains, or another model, revision or tokenizer as far as they say.
    """
    for number, (shape, about) in enumerate(zip(shapes, provenances, strict=True)):
        for name in ("layers", "experts", "top_k", "domains"):
            if (here := getattr(shape, name)) != (first := getattr(shapes[0], name)):
                raise TraceError(f"number {number + 1} has {name} {clipped(list(here))}, the first {clipped(list(first))}")
        for name in ("model", "revision", "tokenizer_sha256"):
            here, first = about.get(name), provenances[0].get(name)
            if here is not None and first is not None and here != first:
                raise TraceError(f"number {number + 1} is of another {name}: {clipped(here)}, the first {clipped(first)}")
