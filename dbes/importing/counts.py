"""Counts that somebody made: CSV ``layer,expert,count``, arrays (.npz), JSON and .pt.

    CSV    a head line with layer, expert, count, and optionally domain and document; rows that are not there are 0
    npz    [layers, experts] or [steps, layers, experts] an array; or a one-dimensional array for each layer, named by its number
    JSON   {"logical_count": [[...]]} as SGLang and KTransformers read it, {layer: [...]}, or {domain: either of these}
    .pt    the same as JSON, with tensors

A file without domains is one domain, named by the file. Layers keep the numbers they have; a config tells dense ones and numbers from 1.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dbes.errors import SourceError
from dbes.importing.reading import lines, npz, records
from dbes.importing.sizes import MOST_LAYERS, ModelSizes
from dbes.importing.torch_files import read_torch
from dbes.importing.types import CountTable, Notes, Source
from dbes.text import clipped

SUFFIXES = (".csv", ".tsv", ".npz", ".json", ".pt", ".gz")
LOGICAL = "logical_count"
UNNAMED = (LOGICAL, "counts", "count", "hits", "expert_counts", "arr_0")
"""Names of an array that say nothing of a domain."""

COLUMNS = {
    "layer": ("layer", "layer_id", "layer_idx", "layer_index"),
    "expert": ("expert", "expert_id", "expert_idx", "expert_index"),
    "count": ("count", "counts", "hits"),
    "domain": ("domain",),
    "document": ("document", "document_id"),
}
LAYER = re.compile(r"(?:layers?[._-]?)?(\d{1,5})")


def read(sources: Sequence[Source], sizes: ModelSizes, _: Notes) -> Iterator[CountTable]:
    for source in sources:
        kind = PurePosixPath(source.name.removesuffix(".gz")).suffix
        if kind in (".csv", ".tsv"):
            yield from _of_csv(source, sizes, "\t" if kind == ".tsv" else ",")
            continue
        if kind == ".npz":
            with npz(source) as arrays:
                content: Any = {name: arrays[name] for name in arrays}
        elif kind == ".pt":
            content = read_torch(source)
        else:
            content = [record for _, record in records(source)]
            content = content[0] if len(content) == 1 else content
        if not isinstance(content, dict) or not content:
            raise SourceError(f"{source}: expected arrays of counts by name, such as {{\"{LOGICAL}\": [[...]]}}")
        yield from _of_names(source, str(source), content, sizes, domain=None)


def _of_names(source: Source, where: str, content: Mapping[Any, Any], sizes: ModelSizes, domain: str | None) -> Iterator[CountTable]:
    """Tables of arrays by name, where names are layers, or domains, or say nothing."""
    content = {name: value for name, value in content.items() if name not in ("average_utilization_rate_over_window", "rank")}
    if all(LAYER.fullmatch(str(name)) for name in content) and not any(isinstance(value, dict) for value in content.values()):
        numbers = [int(LAYER.fullmatch(str(name))[1]) for name in content]  # pyright: ignore[reportOptionalSubscript]
        if len(set(numbers)) < len(numbers):
            raise SourceError(f"{where}: a layer stands in it twice")
        rows = [whole(value, f"{where}, {clipped(str(name))}", 1) for name, value in content.items()]
        if len({len(row) for row in rows}) > 1:
            raise SourceError(f"{where}: layers with {sorted({len(row) for row in rows})} experts in one table")
        order = np.argsort(numbers)
        yield table(source, where, np.stack(rows)[order], [numbers[place] for place in order], sizes, domain=domain)
        return
    layers = content.pop("layers", None)
    for name, value in content.items():
        place = f"{where}, {clipped(str(name))}"
        label = domain if str(name) in UNNAMED else str(name)
        if isinstance(value, dict):
            if domain is not None or not value:
                raise SourceError(f"{place}: nothing that is a table of counts")
            yield from _of_names(source, place, value, sizes, domain=label)
            continue
        hits = whole(value, place, None)
        hits = hits.sum(axis=0) if hits.ndim == 3 else hits
        if hits.ndim != 2:
            raise SourceError(f"{place}: shape {hits.shape}, expected [layers, experts] or [steps, layers, experts]")
        numbers = list(range(len(hits))) if layers is None else whole(layers, f"{where}, layers", 1).tolist()
        if len(numbers) != len(hits):
            raise SourceError(f"{place}: {len(hits)} layers, but `layers` names {len(numbers)}")
        yield table(source, place, hits, numbers, sizes, domain=label)


def table(
    source: Source,
    where: str,
    hits: np.ndarray,
    layers: Sequence[int],
    sizes: ModelSizes,
    *,
    domain: str | None = None,
    document: str | None = None,
    top_k: int | None = None,
    tokens: int | None = None,
) -> CountTable:
    """A table of counts with its layers numbered as in the model, and its width checked.

    Args:
        domain: what the file says its domain is.
        document: id of the document that it is of, where it is of one.

    Raises:
        SourceError: other layers or another number of experts than the model has; a layer of which nothing was counted.
    """
    sizes.agreed("experts", hits.shape[1], where=where, option="--experts")
    columns, numbers = sizes.numbered(layers, [not row.any() for row in hits], where=where)
    return CountTable(
        source=source,
        where=where,
        id=PurePosixPath(source.name.removesuffix(".gz")).stem if document is None else document,
        layers=numbers,
        hits=hits[list(columns)],
        top_k=top_k,
        tokens=tokens,
        by_document=document is not None,
        fields={} if domain is None else {"domain": domain},
    )


def whole(value: Any, where: str, axes: int | None) -> np.ndarray:
    """Counts, int64."""
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        raise SourceError(f"{where}: rows of unequal length, or something else than numbers") from None
    if found.dtype.kind not in "iuf" or (axes is not None and found.ndim != axes):
        raise SourceError(f"{where}: {found.dtype} {found.shape}, expected counts" + (f" with {axes} axes" if axes else ""))
    if found.size and (not np.isfinite(found).all() or found.min() < 0 or found.max() >= 2**53 or (found != np.floor(found)).any()):
        raise SourceError(f"{where}: counts must be whole numbers from 0 to 2^53")
    return found.astype(np.int64)


def _of_csv(source: Source, sizes: ModelSizes, delimiter: str) -> Iterator[CountTable]:
    """The tables of a CSV file: one for each domain and document in it."""
    found: dict[tuple[str | None, str | None], dict[tuple[int, int], int]] = {}
    places: dict[str, int] = {}
    width = 0
    for number, row in _rows(source, delimiter):
        where = f"{source}, line {number}"
        if not places:
            places = _heads(row, where)
            width = len(row)
            continue
        if len(row) != width:
            raise SourceError(f"{where}: {len(row)} columns, the head line has {width}")
        layer, expert, count = (_cell(row[places[name]], name, where) for name in ("layer", "expert", "count"))
        key = tuple(row[places[name]].strip() or None if name in places else None for name in ("domain", "document"))
        cells = found.setdefault((key[0], key[1]), {})
        if layer >= MOST_LAYERS:
            raise SourceError(f"{where}: layer {layer}, expected a number below {MOST_LAYERS}")
        if (layer, expert) in cells:
            raise SourceError(f"{where}: layer {layer}, expert {expert} stands there twice")
        cells[layer, expert] = count
    if not found:
        raise SourceError(f"{source}: no counts in it")
    experts = sizes.agreed("experts", None, where=str(source), option="--experts")
    for (domain, document), cells in found.items():
        layers = sorted({layer for layer, _ in cells})
        hits = np.zeros((len(layers), experts), np.int64)
        at = {layer: place for place, layer in enumerate(layers)}
        for (layer, expert), count in cells.items():
            if expert >= experts:
                raise SourceError(f"{source}: expert {expert} at layer {layer}, but the model has {experts} experts (0 to {experts - 1})")
            hits[at[layer], expert] = count
        yield table(source, str(source), hits, layers, sizes, domain=domain, document=document)


def _rows(source: Source, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines(source):
        try:
            yield number, next(csv.reader([line.decode("utf-8-sig")], delimiter=delimiter, strict=True))
        except (UnicodeDecodeError, csv.Error, StopIteration) as problem:
            raise SourceError(f"{source}, line {number}: not CSV in UTF-8 ({clipped(str(problem))})") from None


def _heads(row: Sequence[str], where: str) -> dict[str, int]:
    """Columns by what they hold."""
    names = [name.strip().lower() for name in row]
    found = {kind: place for kind, known in COLUMNS.items() for place, name in enumerate(names) if name in known}
    if lacking := [kind for kind in ("layer", "expert", "count") if kind not in found]:
        raise SourceError(f"{where}: no column {lacking[0]}; expected a head line with layer, expert, count, found {clipped(row)}")
    return found


def _cell(text: str, name: str, where: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise SourceError(f"{where}: {name} is {clipped(text)!r}, expected a whole number from 0 on")
    return int(text)
