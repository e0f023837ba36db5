"""Routes from the arrays of somebody else, with their checks; see ``Trace.from_arrays``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbes.errors import TraceError
from dbes.trace.manifest import shape_problems
from dbes.trace.shards import validate_routes
from dbes.trace.types import NOISE_SCALES, RoutingShape, TokenRoutes, document_starts, storage_dtype


def routes_from_arrays(
    given: Mapping[str, Any],
    *,
    domain: np.ndarray | Sequence[int],
    domains: Sequence[str],
    layers: Sequence[int],
    experts: int | Sequence[int],
    document_ids: Sequence[str] | None,
    document_source: Sequence[str] | None,
) -> tuple[RoutingShape, TokenRoutes]:
    """Shape and routes, in order of (document, position).

    Args:
        given: the arrays with an axis of tokens, by name; None where there is none.

    Raises:
        TraceError: shapes disagree, ids out of range, an expert twice in one row, a document outside ``domain``.
    """
    ids, document, domain = (np.asarray(each) for each in (given["ids"], given["document"], domain))
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
        raise TraceError(f"ids: expected integers [tokens, layers, k], got {ids.dtype} {ids.shape}")
    counts = (experts,) * len(layers) if isinstance(experts, int | np.integer) else tuple(experts)
    names = tuple(document_ids) if document_ids is not None else tuple(str(i) for i in range(len(domain)))
    if not (len(layers) == len(counts) == ids.shape[1]):
        raise TraceError(f"ids have {ids.shape[1]} layers, but {len(layers)} layer numbers and {len(counts)} expert counts were given")
    for name, indices in (("domain", domain), ("document", document)):
        if indices.size and not np.issubdtype(indices.dtype, np.integer):
            raise TraceError(f"{name}: expected integer indices, got {indices.dtype}")
    if domain.ndim != 1 or len(domain) == 0 or domain.min() < 0 or domain.max() >= len(domains):
        raise TraceError(f"domain: expected an index below {len(domains)} for every document")
    if len(names) != len(domain):
        raise TraceError(f"{len(names)} document ids for {len(domain)} documents")
    if document.shape != (len(ids),) or (len(document) and (document.min() < 0 or document.max() >= len(domain))):
        raise TraceError(f"document: expected {len(ids)} indices below {len(domain)} (the documents that `domain` lists)")
    widest = max(counts)
    if ids.size and (ids.min() < -1 or ids.max() >= widest):
        raise TraceError(f"ids out of range: {ids.min()}..{ids.max()}, expected -1 (missing) or 0..{widest - 1}")
    shape = RoutingShape(
        layers=tuple(int(layer) for layer in layers),
        experts=tuple(int(count) for count in counts),
        top_k=tuple(min(ids.shape[2], int(count)) for count in counts),
        domains=tuple(domains),
        document_domain=domain.astype(np.int32),
        document_ids=names,
        document_source=None if document_source is None else tuple(document_source),
    )
    for problem in shape_problems(shape):
        raise TraceError(problem)
    routes = _in_order({**given, "ids": ids, "document": document}, shape)
    validate_routes(routes, shape, where="ids")
    return shape, routes


def _in_order(given: Mapping[str, Any], shape: RoutingShape) -> TokenRoutes:
    ids, document, positions = given["ids"], given["document"], given["positions"]
    if positions is not None and np.shape(positions) != document.shape:
        raise TraceError(f"positions: expected shape {document.shape}, got {np.shape(positions)}")
    order = np.argsort(document, kind="stable") if positions is None else np.lexsort((positions, document))
    in_order = bool(np.all(order == np.arange(len(order))))
    rows: np.ndarray | slice = slice(None) if in_order else order

    def column(name: str, expected: tuple[int, ...], dtype: type) -> np.ndarray | None:
        if given[name] is None:
            return None
        array = np.asarray(given[name])
        if array.shape != expected:
            raise TraceError(f"{name}: expected shape {expected}, got {array.shape}")
        return array[rows].astype(dtype)

    per_layer = ids.shape[:2]
    places = column("positions", ids.shape[:1], np.int32)
    return TokenRoutes(
        ids=ids[rows].astype(storage_dtype(shape.width)),
        document=document[rows].astype(np.int32),
        positions=_order_within(document[rows]) if places is None else places,
        token_ids=column("token_ids", ids.shape[:1], np.int32),
        phase=column("phase", ids.shape[:1], np.uint8),
        weights=_as_recorded(column("weights", ids.shape, np.float32)),
        logit_margins=column("margins", per_layer, np.float32),
        selection_margins=column("selection_margins", per_layer, np.float32),
        scaled_margins=column("scaled_margins", per_layer, np.float32),
        kept=column("kept", (*per_layer, len(NOISE_SCALES)), np.uint8),
    )


def _as_recorded(weights: np.ndarray | None) -> np.ndarray | None:
    """Gate weights in float16, as a recording keeps them; as they are where those of a token are too large or too small for it."""
    if weights is None or not weights.size:
        return weights
    largest, least = weights.max(axis=-1), np.finfo(np.float16).smallest_normal / np.finfo(np.float16).eps
    held = (largest == 0) | ((largest >= least) & (largest <= np.finfo(np.float16).max))
    return weights.astype(np.float16) if held.all() else weights


def _order_within(document: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... along each run of equal documents."""
    starts = document_starts(document)
    lengths = np.diff(np.r_[starts, len(document)])
    return (np.arange(len(document)) - np.repeat(starts, lengths)).astype(np.int32)
