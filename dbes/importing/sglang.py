"""Responses of SGLang: ``meta_info.routed_experts`` of /generate, ``sglext.routed_experts`` of the OpenAI endpoints, one a line.

Base64 of raw int32 [length - 1 - routed_experts_start_len, hidden layers, k]; the shape is not sent, so that the config of the model must
say layers and k. Ids are logical. With n > 1 only the first choice has them. Requests that only read a prompt lack the last row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import SettingError, SourceError
from dbes.importing.reading import decoded, records
from dbes.importing.requests import about, length_of, on_tokens, optional_ids
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.text import clipped
from dbes.trace.types import GENERATED, PROMPT

SUFFIXES = (".json", ".jsonl", ".ndjson", ".gz")
ROUTED, START = "routed_experts", "routed_experts_start_len"


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    if sizes.hidden_layers is None or sizes.top_k is None:
        raise SettingError(
            f"{sources[0]}: SGLang sends routing without its shape; give --model-config config.json, which has layers and top-k"
        )
    for source in sources:
        found = False
        for where, record in records(source):
            if (document := _document(source, where, record, sizes, notes)) is not None:
                found = True
                yield document
            else:
                notes.add("{n} responses without routed_experts were left out")
        if not found:
            raise SourceError(f"{source}: holds no routed_experts; SGLang returns them for requests with return_routed_experts")


def of_response(record: Mapping[str, Any], where: str, sizes: ModelSizes, notes: Notes) -> Document | None:
    """One response; None where it has no routing."""
    if sizes.hidden_layers is None or sizes.top_k is None:
        raise SourceError(f"{where}: SGLang sends routing without its shape, and {sizes.where} does not say it")
    return _document(Source(Path(where), where), where, record, sizes, notes)


def _document(source: Source, where: str, record: Mapping[str, Any], sizes: ModelSizes, notes: Notes) -> Document | None:
    holder, usage = _holder(record, where)
    text = holder.get(ROUTED)
    if text is None:
        return None
    if not isinstance(text, str):
        raise SourceError(f"{where}, {ROUTED}: expected base64 of raw int32, found {clipped(text, 40)}")
    assert sizes.hidden_layers is not None and sizes.top_k is not None
    content, row = decoded(text, where=f"{where}, {ROUTED}"), 4 * sizes.hidden_layers * sizes.top_k
    if len(content) % row:
        raise SourceError(
            f"{where}, {ROUTED}: {len(content):,} bytes, no multiple of 4 x {sizes.hidden_layers} layers x top-k {sizes.top_k}; cut short, "
            f"or is {sizes.where} the config of another model?"
        )
    ids = np.frombuffer(content, "<i4").reshape(-1, sizes.hidden_layers, sizes.top_k)
    start = holder.get(START) or 0
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise SourceError(f"{where}, {START}: expected a whole number from 0 on")
    prompt, output = (optional_ids(record.get(name), where=f"{where}, {name}") for name in ("input_ids", "output_ids"))
    before, after = length_of(usage, prompt, output, where=where)
    fewer = 1 if after is not None and after <= 1 else 0
    on_tokens(len(ids), start, before, after, where=where, fewer=fewer)
    if before is not None and after is not None:
        notes.add("{n} requests that only read a prompt lack their last token", int(len(ids) < before + after - 1 - start))
    columns, layers = sizes.columns(sizes.hidden_layers, notes, where=where)
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    notes.add("{n} tokens before routed_experts_start_len were not returned: they are left out", start)
    return Document(
        source=source,
        where=where,
        id=_name(record, where),
        layers=layers,
        ids=ids,
        columns=columns,
        token_ids=None if prompt is None or output is None else np.concatenate([prompt, output])[positions],
        positions=positions,
        phase=None if before is None else np.where(positions < before, PROMPT, GENERATED).astype(np.uint8),
        fields=about(record),
    )


def _holder(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Any]:
    """What holds the routing of a response, and its usage."""
    if isinstance(meta := record.get("meta_info"), dict):
        return meta, meta
    choices = record.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    if not isinstance(first, dict):
        raise SourceError(f"{where}, choices: expected JSON objects")
    usage = record.get("usage")
    if len(choices or ()) > 1 and isinstance(usage, dict):
        usage = {name: value for name, value in usage.items() if name != "completion_tokens"}  # it counts those of all choices
    for part in (record, first):
        if isinstance(part.get("sglext"), dict):
            return part["sglext"], usage
    return {}, usage


def _name(record: Mapping[str, Any], where: str) -> str:
    meta = record.get("meta_info")
    for value in (record.get("id"), record.get("rid"), meta.get("id") if isinstance(meta, dict) else None):
        if isinstance(value, str | int) and str(value):
            return str(value)
    return where
