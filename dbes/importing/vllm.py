"""Routing that vLLM returns: arrays of requests (.npy, .npz), dumps of RequestOutput, and responses of its servers, one a line.

A request has rows for prompt + output - 1 - routed_experts_prompt_start tokens: the last token that was generated never ran. Version 0.21
splits them in two (``prompt_routed_experts``, ``routed_experts``), with -1 where the prefix came from a cache. Layers are those with
experts, or all decoder layers with zeros at dense ones. Ids are logical.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import SourceError
from dbes.importing.reading import integers, npy_file, npz, records
from dbes.importing.requests import about, length_of, on_tokens, optional_ids
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.trace.types import GENERATED, PROMPT

SUFFIXES = (".npy", ".npz", ".json", ".jsonl", ".ndjson", ".gz")
SPLIT, ROUTED, START = "prompt_routed_experts", "routed_experts", "routed_experts_prompt_start"
NONE_RETURNED = (
    "holds no routed_experts. vLLM returns them with enable_return_routed_experts, not while streaming (only the final chunk of "
    "/inference/v1/generate has them), and its Rust front end never does"
)


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    for source in sources:
        found = False
        for request in _requests(source, notes):
            found = True
            yield _document(source, request, sizes, notes)
        if not found:
            raise SourceError(f"{source}: {NONE_RETURNED}")


def of_response(record: Mapping[str, Any], where: str, sizes: ModelSizes, notes: Notes) -> Document | None:
    """The first answer of one response, or of a RequestOutput as a mapping; None where it has no routing."""
    request = next(iter(_of_record(record, where)), {})
    if request.get(ROUTED) is None and request.get(SPLIT) is None:
        return None
    return _document(Source(Path(where), where), request, sizes, notes)


def _requests(source: Source, notes: Notes) -> Iterator[dict[str, Any]]:
    """Of each request: where, id, text, routed, split, start, prompt and output (token ids), fields."""
    if source.name.endswith(".npy"):
        yield {"where": str(source), "id": source.name.removesuffix(".npy"), ROUTED: npy_file(source)}
        return
    if source.name.endswith(".npz"):
        yield from _of_arrays(source)
        return
    for where, record in records(source):
        for request in _of_record(record, where):
            if request.get(ROUTED) is None and request.get(SPLIT) is None:
                notes.add("{n} responses without routed_experts were left out")
            else:
                yield request


def _of_arrays(source: Source) -> Iterator[dict[str, Any]]:
    stem = source.name.removesuffix(".npz")
    with npz(source) as arrays:
        if ROUTED in arrays or SPLIT in arrays:
            names = (ROUTED, SPLIT, START, "prompt_token_ids", "token_ids")
            known: dict[str, Any] = {name: arrays[name] for name in names if name in arrays}
            start = known.pop(START, None)
            if start is not None and (start.size != 1 or start.dtype.kind not in "iu"):
                raise SourceError(f"{source}, {START}: expected one whole number")
            yield {"where": str(source), "id": stem, **known, START: None if start is None else int(start.reshape(-1)[0])}
            return
        for name in arrays:
            yield {"where": f"{source}, {name}", "id": f"{stem}/{name}", ROUTED: arrays[name]}


def _of_record(record: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The choices of a response, the outputs of a RequestOutput, or the record itself."""
    name = next((str(record[key]) for key in ("request_id", "id") if isinstance(record.get(key), str | int)), None)
    name = where if name is None else name
    key = next((key for key in ("choices", "outputs") if isinstance(record.get(key), list)), None)
    parts = record[key] if key is not None else [record]
    for number, part in enumerate(parts):
        place = where if key is None else f"{where}, {key}[{number}]"
        if not isinstance(part, dict):
            raise SourceError(f"{place}: expected a JSON object")
        usage = part.get("usage", record.get("usage"))
        if len(parts) > 1 and isinstance(usage, dict):
            usage = {field: count for field, count in usage.items() if field != "completion_tokens"}  # of all choices together
        both = {**{field: record[field] for field in (SPLIT, START, "prompt_token_ids") if field in record}, **part}
        yield {
            "where": place,
            "id": name if len(parts) == 1 else f"{name}/{part.get('index', number)}",
            "text": name,
            "fields": about(record),
            **{field: both.get(field) for field in (ROUTED, SPLIT, START, "prompt_token_ids", "token_ids")},
            "usage": usage,
        }


def _document(source: Source, request: dict[str, Any], sizes: ModelSizes, notes: Notes) -> Document:
    where = request["where"]
    routed, given = _rows(request.get(ROUTED), f"{where}, {ROUTED}"), _rows(request.get(SPLIT), f"{where}, {SPLIT}")
    parts = [part for part in (given, routed) if part is not None]
    parts = [part for part in parts if len(part)] or parts[:1]  # one generated token has no row
    if len({part.shape[1:] for part in parts}) > 1:
        raise SourceError(f"{where}: {SPLIT} {parts[0].shape} and {ROUTED} {parts[1].shape} are of other layers or slots")
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    start = request.get(START) or 0
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise SourceError(f"{where}, {START}: expected a whole number from 0 on")
    prompt = optional_ids(request.get("prompt_token_ids"), where=f"{where}, prompt_token_ids")
    output = optional_ids(request.get("token_ids"), where=f"{where}, token_ids")
    before, after = length_of(request.get("usage"), prompt, output, where=where)
    if given is not None and before is None and len(given):
        before = start + len(given)
    on_tokens(len(ids), start, before, after, where=where)
    columns, layers = sizes.columns(ids.shape[1], notes, where=where)
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    notes.add("{n} tokens before routed_experts_prompt_start were not returned: they are left out", start)
    texts = None if prompt is None or output is None else np.concatenate([prompt, output])[positions]
    return Document(
        source=source,
        where=where,
        id=request["id"],
        text=request.get("text"),
        layers=layers,
        ids=ids,
        columns=columns,
        token_ids=texts,
        positions=positions,
        phase=None if before is None else np.where(positions < before, PROMPT, GENERATED).astype(np.uint8),
        fields=request.get("fields", {}),
    )


def _rows(value: Any, where: str) -> np.ndarray | None:
    if value is None:
        return None
    found = value if isinstance(value, np.ndarray) else integers(value, where=where, axes=3)
    if found.ndim != 3 or found.dtype.kind not in "iu":
        raise SourceError(f"{where}: {found.dtype} {found.shape}, expected whole numbers [rows, layers, k]")
    return found if found.size or len(found) == 0 else found[:0]
