"""Logs of the DBES reference code: JSON lines, one a token, of requests that can alternate.

    {"request_id": "r", "token_index": 3, "output_token_id": 17, "layers": {"0": {"expert_ids": [...], "weights": [...], "logits": [...],
     "next_expert_logit": 0.1}, ...}, ...}

Where logits are there, the router-logit margin (the weakest chosen minus the strongest rejected) is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dbes.errors import SourceError
from dbes.importing.reading import floats, integers, lines, records
from dbes.importing.requests import about
from dbes.importing.sizes import MOST_LAYERS, ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.text import clipped

SUFFIXES = (".jsonl", ".ndjson", ".gz")
REQUEST = re.compile(rb'"request_id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')


@dataclass
class Request:
    """What came of a request so far."""

    where: str
    fields: Mapping[str, Any]
    positions: list[int] = field(default_factory=list)
    token_ids: list[Any] = field(default_factory=list)
    parts: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"ids": [], "weights": [], "margins": []})


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    for source in sources:
        last = _last_lines(source)
        waiting: dict[str, Request] = {}
        layers: tuple[int, ...] | None = None
        for (where, record), (number, line) in zip(records(source), lines(source), strict=True):
            name = record.get("request_id")
            if not isinstance(name, str | int) or isinstance(name, bool):
                raise SourceError(f"{where}: no request_id, so that nobody knows whose token it is")
            found = _layers(record, where)
            layers = tuple(found) if layers is None else layers
            if tuple(found) != layers:
                raise SourceError(f"{where}: layers {clipped(list(found))}, but {clipped(list(layers))} before")
            request = waiting.setdefault(str(name), Request(where, about(record)))
            _add(request, record, found, where)
            if last.get(_key(line)) == number:
                yield _document(source, str(name), waiting.pop(str(name)), layers, sizes, notes)
        for name, request in waiting.items():
            yield _document(source, name, request, layers or (), sizes, notes)


def _last_lines(source: Source) -> dict[bytes, int]:
    """The last line of each request: what is read before it can be let go of after it."""
    return {_key(line): number for number, line in lines(source)}


def _key(line: bytes) -> bytes:
    match = REQUEST.search(line)
    return match[1] if match else b""


def _layers(record: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    layers = record.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise SourceError(f"{where}: no layers with expert_ids")
    found = {}
    for name, cell in layers.items():
        if not (name.isascii() and name.isdigit() and len(name) < 6 and int(name) < MOST_LAYERS) or not isinstance(cell, dict):
            raise SourceError(f"{where}, layers: {clipped(name)}, expected numbers of layers with what they chose")
        found[int(name)] = cell
    return dict(sorted(found.items()))


def _add(request: Request, record: Mapping[str, Any], layers: Mapping[int, Mapping[str, Any]], where: str) -> None:
    index = record.get("token_index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31:
        raise SourceError(f"{where}, token_index: {clipped(index)}, expected a whole number from 0 on")
    request.positions.append(index)
    request.token_ids.append(record.get("output_token_id"))
    cells = list(layers.values())
    ids = integers([cell.get("expert_ids") for cell in cells], where=f"{where}, expert_ids", axes=2)
    request.parts["ids"].append(ids)
    if all(cell.get("weights") is not None for cell in cells):
        weights = floats([cell["weights"] for cell in cells], where=f"{where}, weights", axes=2)
        if weights.shape != ids.shape:
            raise SourceError(f"{where}, weights: shape {weights.shape}, but expert_ids {ids.shape}")
        request.parts["weights"].append(weights)
    request.parts["margins"].append(np.asarray([_margin(cell, ids.shape[1], where) for cell in cells], np.float32))


def _margin(cell: Mapping[str, Any], slots: int, where: str) -> float:
    """Logit of the weakest chosen expert minus that of the strongest rejected; NaN where they are not told."""
    logits, following = cell.get("logits"), cell.get("next_expert_logit")
    if logits is None or following is None:
        return float("nan")
    chosen = floats(logits, where=f"{where}, logits", axes=1)
    if len(chosen) != slots or isinstance(following, bool) or not isinstance(following, int | float):
        raise SourceError(f"{where}, logits: expected those of the {slots} chosen experts, and a number as next_expert_logit")
    return float(chosen.min()) - float(following)


def _document(source: Source, name: str, request: Request, layers: tuple[int, ...], sizes: ModelSizes, notes: Notes) -> Document:
    where = f"{request.where}, request {clipped(name)}"
    order = np.argsort(request.positions, kind="stable")
    positions = np.asarray(request.positions, np.int32)[order]
    if (twice := np.flatnonzero(np.diff(positions) == 0)).size:
        raise SourceError(f"{where}: token_index {positions[twice[0]]} stands there twice")
    if len({part.shape for part in request.parts["ids"]}) > 1:
        raise SourceError(f"{where}: other numbers of experts at other tokens")
    stacked = {kind: np.stack(parts)[order] for kind, parts in request.parts.items() if len(parts) == len(order)}
    columns, numbers = sizes.numbered(layers, [False] * len(layers), where=where)
    notes.add("{n} tokens between others are not in the logs: they stay missing", int((np.diff(positions) - 1).sum()))
    known = all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in request.token_ids)
    return Document(
        source=source,
        where=where,
        id=name,
        layers=numbers,
        ids=stacked["ids"],
        columns=columns,
        weights=stacked.get("weights"),
        logit_margins=stacked["margins"] if np.isfinite(stacked["margins"]).any() else None,
        token_ids=np.asarray(request.token_ids, np.int32)[order] if known else None,
        positions=positions,
        fields=request.fields,
    )
