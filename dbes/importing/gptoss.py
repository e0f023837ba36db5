"""Logs of gpt-oss: one JSON file a document, whose ``router_data`` has the experts of every token that was generated but the last.

    {"dataset": ..., "category": ..., "original_prompt": ..., "router_data": [{"token_12": {"layer_0": {"selected_experts": [4 ids],
     "selected_probs": [4 weights]}, ...}}, ...]}

``full_text`` has the texts of all tokens, prompt included. Equal texts get an equal number, which is as good as a token id where tokens
are told apart. Documents of the same prompt are one text. Where no domain map says another, ``dataset`` is the domain. Files of statistics
that lie among the documents are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dbes.errors import SourceError
from dbes.importing.reading import floats, integers, records
from dbes.importing.requests import about
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.text import clipped
from dbes.trace.types import GENERATED

SUFFIXES = (".json", ".jsonl", ".gz")
TOKEN, LAYER = re.compile(r"token_(\d{1,9})"), re.compile(r"layer_(\d{1,5})")


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    words: dict[str, int] = {}
    routed = 0
    unfit: str | None = None
    for source in sources:
        stem = source.name.removesuffix(".gz").rpartition(".")[0]
        for number, (where, record) in enumerate(records(source)):
            if len(sources) > 1 and "router_data" not in record:
                notes.add("{n} records without router_data were left out")
                continue
            name = stem if where == str(source) else f"{stem}/{number}"
            document = _document(source, where, name, record, sizes, notes)
            texts = record.get("full_text")
            if isinstance(texts, list) and document.positions is not None and len(document.positions):
                if (ids := _token_ids(texts, document.positions, words, where)) is None:
                    notes.add("{n} documents were left out: full_text does not have one token more than router_data reaches")
                    unfit = unfit or where
                    continue
                document = replace(document, token_ids=ids)
            routed += 1
            yield document
    if not routed:
        raise SourceError(
            f"{sources[0]}: no record has router_data" if unfit is None
            else f"{unfit}: full_text does not have one token more than router_data reaches, nor in any other document; take it out"
        )  # fmt: skip


def _token_ids(texts: list[Any], positions: np.ndarray, words: dict[str, int], where: str) -> np.ndarray | None:
    """Numbers of the texts of tokens, int32 [tokens]; None where texts and positions are of different tokenizations."""
    if not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{where}: full_text must be the texts of all tokens, or one text")
    if len(texts) != int(positions[-1]) + 2:  # the last token was generated, but never ran
        return None
    return np.asarray([words.setdefault(texts[place], len(words)) for place in positions], np.int32)


def _document(source: Source, where: str, name: str, record: Mapping[str, Any], sizes: ModelSizes, notes: Notes) -> Document:
    rows = record.get("router_data")
    if not isinstance(rows, list):
        raise SourceError(f"{where}: no router_data, a list over tokens")
    positions, layers = [], None
    ids: list[list[Any]] = []
    weights: list[list[Any]] = []
    for number, row in enumerate(rows):
        place = f"{where}, router_data[{number}]"
        position, routed = _only(row, TOKEN, place)
        if layers is None:
            layers = _layers(routed, place)
        elif routed.keys() != layers.keys():
            raise SourceError(f"{place}: {len(routed)} layers, but the first token has {len(layers)}")
        cells = [routed[key] for key in layers]
        if not all(isinstance(cell, dict) and "selected_experts" in cell and "selected_probs" in cell for cell in cells):
            raise SourceError(f"{place}: a layer without selected_experts and selected_probs")
        positions.append(position)
        ids.append([cell["selected_experts"] for cell in cells])
        weights.append([cell["selected_probs"] for cell in cells])
    chosen = integers(ids, where=f"{where}, selected_experts", axes=3)
    probs = floats(weights, where=f"{where}, selected_probs", axes=3)
    if probs.shape != chosen.shape:
        raise SourceError(f"{where}: selected_probs {probs.shape}, but selected_experts {chosen.shape}")
    numbers = tuple((layers or {}).values())
    _known(numbers, sizes, where)
    prompt, fields = record.get("original_prompt"), about(record)
    if isinstance(dataset := fields.get("dataset"), str):
        fields.setdefault("domain", dataset)
    if record.get("has_repetition") is True:
        notes.add("{n} documents repeat themselves (has_repetition): hardly ordinary text; leave_out of a domain map can do without")
    return Document(
        source=source,
        where=where,
        id=name,
        text=f"prompt {hashlib.sha256(prompt.encode('utf-8', 'replace')).hexdigest()[:16]}" if isinstance(prompt, str) and prompt else None,
        layers=numbers,
        ids=chosen,
        weights=probs,
        positions=np.asarray(positions, np.int32),
        phase=np.full(len(positions), GENERATED, np.uint8),
        fields=fields,
    )


def _only(row: Any, name: re.Pattern[str], where: str) -> tuple[int, Mapping[str, Any]]:
    """Number and content of the one token in an entry."""
    if isinstance(row, dict) and len(row) == 1:
        key, value = next(iter(row.items()))
        if (match := name.fullmatch(key)) and isinstance(value, dict):
            return int(match[1]), value
    raise SourceError(f"{where}: expected one token_<position> with its layers, found {clipped(row, 60)}")


def _layers(routed: Mapping[str, Any], where: str) -> dict[str, int]:
    """Numbers of layers by their keys, ascending."""
    found = {key: LAYER.fullmatch(key) for key in routed}
    if not found or not all(found.values()):
        raise SourceError(f"{where}: expected layer_<number>, found {clipped(list(routed), 60)}")
    return dict(sorted(((key, int(match[1])) for key, match in found.items() if match), key=lambda pair: pair[1]))


def _known(layers: tuple[int, ...], sizes: ModelSizes, where: str) -> None:
    if layers and sizes.moe_layers is not None and layers != sizes.moe_layers:
        known = clipped(list(sizes.moe_layers))
        raise SourceError(f"{where}: layers {clipped(list(layers))}, but by {sizes.where} those with experts are {known}")
