"""Shards of a trace: one file of routes, read with its checks, and what no top-k router can have produced."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import load as parse_safetensors

from dbes.errors import TraceError
from dbes.files import read_bytes, regular
from dbes.text import clipped
from dbes.trace.manifest import ShardEntry
from dbes.trace.types import GENERATED, LOGIT_NOISE, NOISE_SCALES, RoutingShape, TokenRoutes

REQUIRED = ("ids", "document", "positions")
KNOWN = tuple(column.name for column in fields(TokenRoutes))

KINDS = {"ids": "u", "document": "iu", "positions": "iu", "token_ids": "iu", "phase": "u", "logit_stable": "u", "kept": "u"}
"""numpy kinds of each array; all others are floats."""

UNKNOWN = 255
"""Mark of ``kept`` and ``logit_stable`` where a row had no score."""


def check_header(path: Path, entry: ShardEntry) -> None:
    """Refuse a shard whose header alone shows that it is none, or not the one the manifest means; its arrays are not read.

    Raises:
        TraceError: missing, not a regular file, not safetensors, other arrays or another number of tokens.
    """
    regular(path, error=TraceError, missing=f"{path}: this shard of the trace is missing; record again with --overwrite")
    try:
        with safetensors.safe_open(path, framework="numpy") as shard:
            sizes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return  # said with its sha256 when it is read: a truncated shard rather than one that is none
    _check_names(path, sizes.keys())
    if sizes["document"] != [entry.tokens]:
        raise TraceError(f"{path}: document has shape {sizes['document']}, the manifest says {entry.tokens} tokens")


def read_shard(path: Path, entry: ShardEntry, shape: RoutingShape) -> TokenRoutes:
    """The routes in a shard.

    Raises:
        TraceError: it cannot be read, was altered, is no shard, has rows of other documents, or holds impossible routes.
    """
    content = read_bytes(path, error=TraceError, missing=f"{path}: this shard of the trace cannot be read (no such file)")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise TraceError(f"{path}: sha256 differs from the manifest: the shard is truncated or was altered; record again with --overwrite")
    try:
        arrays = parse_safetensors(content)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise TraceError(f"{path}: not a shard of a dbes trace ({clipped(str(problem))})") from None
    _check_names(path, arrays.keys())
    routes = TokenRoutes(**arrays)
    if routes.document.ndim != 1 or len(routes) != entry.tokens:
        raise TraceError(f"{path}: {len(routes)} tokens, the manifest says {entry.tokens}")
    validate_routes(routes, shape, where=str(path))
    if len(routes) and (routes.document[0] < entry.first_document or routes.document[-1] > entry.last_document):
        raise TraceError(
            f"{path}: rows of documents {routes.document[0]} to {routes.document[-1]}, "
            f"the manifest says {entry.first_document} to {entry.last_document}"
        )
    return routes


def _check_names(path: Path, names: object) -> None:
    found = set(names)  # pyright: ignore[reportArgumentType]
    if wrong := [f"{name} missing" for name in REQUIRED if name not in found] + [f"unknown {clipped(n)}" for n in found - set(KNOWN)]:
        raise TraceError(f"{path}: not a shard of a dbes trace ({clipped(', '.join(sorted(wrong)))})")


def validate_routes(routes: TokenRoutes, shape: RoutingShape, *, where: str) -> None:
    """Refuse routes that no top-k router can have produced.

    Raises:
        TraceError: wrong shapes or kinds of numbers, an id at or above the layer's number of experts, an expert twice in one row or
            more experts than the layer's top-k, a document out of range or out of order, positions that go back, weights that are
            not finite.
    """
    _check_arrays(routes, shape, where=where)
    if not len(routes):
        return
    document = routes.document
    if document.min() < 0 or document.max() >= len(shape.document_domain) or np.any(document[1:] < document[:-1]):
        raise TraceError(f"{where}: document indices must ascend within 0..{len(shape.document_domain) - 1}")
    if routes.positions.min() < 0 or np.any((routes.positions[1:] < routes.positions[:-1]) & (document[1:] == document[:-1])):
        raise TraceError(f"{where}: positions must ascend within each document, from 0 on")
    _check_ids(routes, shape, where=where)
    if routes.token_ids is not None and routes.token_ids.min() < 0:
        raise TraceError(f"{where}: token_ids below 0")
    if routes.phase is not None and routes.phase.max() > GENERATED:
        raise TraceError(f"{where}: phase {routes.phase.max()}, expected 0 (prompt) or 1 (generated)")
    ran = routes.ids != np.iinfo(routes.ids.dtype).max
    if routes.weights is not None and not np.isfinite(routes.weights[ran]).all():
        raise TraceError(f"{where}: weights hold NaN or infinity; leave weights out where they are unknown")
    for name, array, most in (("logit_stable", routes.logit_stable, 2 ** len(LOGIT_NOISE) - 1), ("kept", routes.kept, shape.slots)):
        if array is not None and ((array > most) & (array != UNKNOWN)).any():
            raise TraceError(f"{where}: {name} above {most} (or {UNKNOWN} where there is no score)")


def _check_arrays(routes: TokenRoutes, shape: RoutingShape, *, where: str) -> None:
    tokens, layers = len(routes.document), len(shape.layers)
    ids = routes.ids
    if ids.ndim != 3 or ids.shape[:2] != (tokens, layers) or ids.shape[2] < shape.slots:
        raise TraceError(f"{where}: ids have shape {ids.shape}, expected {(tokens, layers, shape.slots)}")
    per_layer = (tokens, layers)
    sizes = {
        "ids": ids.shape, "weights": ids.shape, "document": (tokens,), "positions": (tokens,), "token_ids": (tokens,), "phase": (tokens,),
        "kept": (*per_layer, len(NOISE_SCALES)),
    }  # fmt: skip
    for name, array in routes.arrays().items():
        if array.shape != sizes.get(name, per_layer):
            raise TraceError(f"{where}: {name} has shape {array.shape}, expected {sizes.get(name, per_layer)}")
        if array.dtype.kind not in KINDS.get(name, "f"):
            raise TraceError(f"{where}: {name} has dtype {array.dtype}, expected {'integers' if name in KINDS else 'floats'}")


def _check_ids(routes: TokenRoutes, shape: RoutingShape, *, where: str) -> None:
    missing = np.iinfo(routes.ids.dtype).max
    slots = np.ascontiguousarray(np.moveaxis(routes.ids, 2, 0))
    for column, (layer, experts, top_k) in enumerate(zip(shape.layers, shape.experts, shape.top_k, strict=True)):
        here = slots[:, :, column]
        ran = here != missing
        if experts < missing and (wrong := (here >= experts) & ran).any():
            raise TraceError(f"{where}: ids out of range at layer {layer}: {int(here[wrong][0])}, but the layer has {experts} experts")
        if top_k < len(slots) and ran.sum(axis=0).max() > top_k:
            raise TraceError(f"{where}: a row of layer {layer} has more than top_k = {top_k} experts")
    for slot in range(1, len(slots)):
        for other in range(slot):
            twice = (slots[slot] == slots[other]) & (slots[slot] != missing)
            if twice.any():
                token, column = np.argwhere(twice)[0]
                raise TraceError(
                    f"{where}: expert {int(slots[slot, token, column])} stands twice in row {token} at layer {shape.layers[column]}: "
                    "duplicate ids in a row mean that the source did not record routing (for example all zero)"
                )
