"""Shards of a trace: one file of routes, read with its checks, and what no top-k router can have produced."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import load as parse_safetensors

from dbes.errors import DbesError, TraceError
from dbes.files import read_bytes, regular
from dbes.text import clipped
from dbes.trace.manifest import ShardEntry
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, PIECE_TOKENS, TEMPLATE, UNKNOWN, RoutingShape, TokenRoutes

REQUIRED = ("ids", "document", "positions")
KNOWN = tuple(column.name for column in fields(TokenRoutes))

PER_TOKEN = ("document", "positions", "token_ids", "phase")
KINDS = {"ids": "u", "document": "iu", "positions": "iu", "token_ids": "iu", "phase": "u", "logit_stable": "u", "kept": "u"}
"""numpy kinds of each array; all others are floats."""


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
    slots = routes.ids.shape[2] if routes.ids.ndim == 3 else 0
    check_arrays(routes.arrays(), (len(routes.document), len(shape.layers), max(slots, shape.slots)), where=where)
    if not len(routes):
        return
    document = routes.document
    if document.min() < 0 or document.max() >= len(shape.document_domain) or np.any(document[1:] < document[:-1]):
        raise TraceError(f"{where}: document indices must ascend within 0..{len(shape.document_domain) - 1}")
    if routes.positions.min() < 0 or np.any((routes.positions[1:] < routes.positions[:-1]) & (document[1:] == document[:-1])):
        raise TraceError(f"{where}: positions must ascend within each document, from 0 on")
    missing = int(np.iinfo(routes.ids.dtype).max)
    check_ids(routes.ids, missing=missing, layers=shape.layers, experts=shape.experts, top_k=shape.top_k, where=where)
    weights = routes.weights
    if weights is not None and not np.isfinite(weights).all() and not np.isfinite(weights[routes.ids != missing]).all():
        raise TraceError(f"{where}: weights hold NaN or infinity; leave weights out where they are unknown")
    check_values(routes.arrays(), shape.slots, where=where)


def check_arrays(
    arrays: Mapping[str, np.ndarray], sizes: tuple[int, int, int], *, where: str, kinds: Mapping[str, str] = KINDS,
    error: type[DbesError] = TraceError,
) -> None:  # fmt: skip
    """Refuse arrays of other shapes or kinds of numbers than (tokens, layers, slots) mean.

    Args:
        kinds: numpy kinds of each array; all others are floats.
    """
    per_token, per_slot = sizes[:1], dict.fromkeys(("ids", "weights"), sizes)
    expected = {**per_slot, **dict.fromkeys(PER_TOKEN, per_token), "kept": (*sizes[:2], len(NOISE_SCALES))}
    for name, array in arrays.items():
        if array.shape != expected.get(name, sizes[:2]):
            raise error(f"{where}: {name} has shape {array.shape}, expected {expected.get(name, sizes[:2])}")
        if array.dtype.kind not in kinds.get(name, "f"):
            raise error(f"{where}: {name} has dtype {array.dtype}, expected {'integers' if name in kinds else 'floats'}")


def check_ids(
    ids: np.ndarray, *, missing: int, layers: Sequence[int], experts: Sequence[int], top_k: Sequence[int], where: str,
    error: type[DbesError] = TraceError,
) -> None:  # fmt: skip
    """Refuse ids [tokens, layers, slots] out of range, more of them than a layer's top-k, and an expert twice in one row.

    Args:
        missing: the mark of a slot that did not run.
    """
    pieces = (ids[begin : begin + PIECE_TOKENS] for begin in range(0, len(ids), PIECE_TOKENS))
    if all(_possible(piece, missing=missing, experts=np.asarray(experts), top_k=np.asarray(top_k)) for piece in pieces):
        return
    slots = np.ascontiguousarray(np.moveaxis(ids, 2, 0))
    for column, (layer, count, k) in enumerate(zip(layers, experts, top_k, strict=True)):
        here = slots[:, :, column]
        ran = here != missing
        if (wrong := ((here >= count) | (here < 0)) & ran).any():
            raise error(f"{where}: ids out of range at layer {layer}: {int(here[wrong][0])}, but the layer has {count} experts")
        if k < len(slots) and ran.sum(axis=0).max(initial=0) > k:
            raise error(f"{where}: a row of layer {layer} has more than top_k = {k} experts")
    for slot in range(1, len(slots)):
        for other in range(slot):
            twice = (slots[slot] == slots[other]) & (slots[slot] != missing)
            if twice.any():
                token, column = np.argwhere(twice)[0]
                raise error(
                    f"{where}: expert {int(slots[slot, token, column])} stands twice in row {token} at layer {layers[column]}: "
                    "duplicate ids in a row mean that the source did not record routing (for example all zero)"
                )


def _possible(ids: np.ndarray, *, missing: int, experts: np.ndarray, top_k: np.ndarray) -> bool:
    """Whether ids [tokens, layers, slots] pass the checks of `check_ids`; few tokens at a time stay in the processor's cache."""
    slots = np.ascontiguousarray(np.moveaxis(ids, 2, 0))
    absent = slots == missing
    if (((slots >= experts) | (slots < 0)) & ~absent).any() or (len(slots) - absent.sum(axis=0, dtype=np.int32) > top_k).any():
        return False
    some = absent.any()
    for slot in range(1, len(slots)):
        for other in range(slot):
            twice = slots[slot] == slots[other]
            if twice.any() and (not some or (twice & ~absent[slot]).any()):
                return False
    return True


def check_values(arrays: Mapping[str, np.ndarray], slots: int, *, where: str, error: type[DbesError] = TraceError) -> None:
    """Refuse token ids, phases and stability marks that there are not."""
    if "token_ids" in arrays and arrays["token_ids"].min(initial=0) < 0:
        raise error(f"{where}: token_ids below 0")
    if "phase" in arrays and (phase := arrays["phase"]).max(initial=0) > TEMPLATE:
        raise error(f"{where}: phase {phase.max()}, expected 0 (prompt), 1 (generated) or 2 (template)")
    for name, most in (("logit_stable", 2 ** len(LOGIT_NOISE) - 1), ("kept", slots)):
        if name in arrays and ((arrays[name] > most) & (arrays[name] != UNKNOWN)).any():
            raise error(f"{where}: {name} above {most} (or {UNKNOWN} where there is no score)")
