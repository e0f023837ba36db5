"""Logs of ESFT: a text file a layer, a line a sequence: ids of all tokens with tabs between, two tabs, and their weights.

Slots are unsorted, so that k must be known (--top-k; 6 in DeepSeek-V2-Lite). A line is a document; a folder holds files of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np

from dbes.errors import SourceError
from dbes.importing.layers import by_layer
from dbes.importing.reading import lines
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.text import clipped

SUFFIXES = (".txt", ".log", ".tsv", ".gz")


def read(sources: Sequence[Source], sizes: ModelSizes, _: Notes) -> Iterator[Document]:
    top_k = sizes.agreed("top_k", None, where=str(sources[0]), option="--top-k")
    for folder, layers in by_layer(sources, sizes).items():
        files = [each for (each,) in layers.values()] if all(len(each) == 1 for each in layers.values()) else None
        if files is None:
            raise SourceError(f"{folder}: several files of one layer; expected one text file a layer in a folder")
        for row in zip_longest(*(lines(source) for source in files)):
            least = min(cell[0] for cell in row if cell is not None)
            short = next((place for place, cell in enumerate(row) if cell is None or cell[0] != least), None)
            if short is not None:
                raise SourceError(f"{files[short]}: has no line {least}, which files of other layers have; cut short?")
            cells = [cell for cell in row if cell is not None]
            number = cells[0][0]
            parsed = [_line(line, top_k, f"{source}, line {number}") for source, (_, line) in zip(files, cells, strict=True)]
            tokens = [len(ids) for ids, _ in parsed]
            if len(set(tokens)) > 1:
                other = next(place for place, count in enumerate(tokens) if count != tokens[0])
                raise SourceError(f"{files[other]}, line {number}: {tokens[other]} tokens, but {tokens[0]} in {files[0].name}")
            yield Document(
                source=files[0],
                where=f"{folder}, line {number} of every file",
                id=f"{folder}/{number}",
                layers=tuple(layers),
                ids=np.stack([ids for ids, _ in parsed], axis=1),
                weights=np.stack([weights for _, weights in parsed], axis=1),
            )


def _line(line: bytes, top_k: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [tokens, slots] of a sequence."""
    parts = line.rstrip(b"\r\n").split(b"\t\t")
    if len(parts) != 2:
        raise SourceError(f"{where}: expected ids, two tabs, weights; found {len(parts)} parts")
    try:
        ids = np.fromiter(map(int, parts[0].split(b"\t")), np.int64)
        weights = np.fromiter(map(float, parts[1].split(b"\t")), np.float32)
    except (ValueError, OverflowError) as problem:
        raise SourceError(f"{where}: not numbers with tabs between ({clipped(str(problem))})") from None
    if len(ids) != len(weights) or len(ids) % top_k:
        raise SourceError(f"{where}: {len(ids)} ids and {len(weights)} weights, expected as many of either, a multiple of top-k {top_k}")
    if (ids < 0).any():
        raise SourceError(f"{where}: id {ids.min()}, expected ids from 0 on")
    return ids.reshape(-1, top_k), weights.reshape(-1, top_k)
