"""Calibration files of llama.cpp (GGUF): how often each expert was chosen over one calibration text, which is one domain.

``blk.N.ffn_{gate,up,down}_exps.weight.counts`` hold one number an expert, float32, so exact up to 2^24. The projections of a layer
agree, and every layer sums to chunk_count x chunk_size x k, by which k is known and the file is checked. The older ``.dat`` files, and
GGUF files converted from them, have one count a tensor: nothing about experts can be read from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dbes.errors import SettingError, SourceError
from dbes.files import opened, regular
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import CountTable, Notes, Source
from dbes.text import clipped

SUFFIXES = (".gguf", ".dat")
MAGIC = b"GGUF"
NAME = re.compile(r"blk\.(\d{1,5})\.ffn_(?:gate|up|down|gate_up)_exps\.weight\.counts")
EXACT = 2**24
AGAIN = "make it again with a present llama-imatrix, whose output is GGUF with a count for every expert"


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[CountTable]:
    for source in sources:
        yield _table(source, sizes, notes)


def _table(source: Source, sizes: ModelSizes, notes: Notes) -> CountTable:
    fields, tensors = _contents(source)
    kind = fields.get("general.type")
    if kind != "imatrix" or "general.architecture" in fields:
        raise SourceError(f"{source}: general.type is {clipped(kind)}, expected an imatrix; this looks like a model or another GGUF file")
    layers = _layers(source, tensors)
    hits = np.stack(list(layers.values()))
    if hits.shape[1] == 1:
        raise SourceError(
            f"{source}: one count for each tensor, none for experts: it was converted from a legacy .dat file (or merged with one); {AGAIN}"
        )
    tokens = 1
    for name in ("imatrix.chunk_count", "imatrix.chunk_size"):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SourceError(f"{source}: {name} is {clipped(value)}, so that its counts cannot be checked; {AGAIN}")
        tokens *= value
    columns, numbers = sizes.numbered(tuple(layers), [not row.any() for row in hits], where=str(source))
    hits, inexact = hits[list(columns)], bool((hits >= EXACT).any())
    top_k = _slots(source, hits, numbers, tokens, sizes)
    if inexact:
        notes.add("{n} files have counts of 2^24 and more, which their float32 rounds")
    whole = hits.astype(np.int64)
    whole = np.minimum(whole, tokens)  # a rounded count of an expert that nearly every token chose
    return CountTable(
        source=source,
        where=str(source),
        id=PurePosixPath(source.name).stem,
        layers=numbers,
        hits=whole,
        top_k=top_k,
        tokens=None if inexact else tokens,
        fields={"datasets": clipped(fields.get("imatrix.datasets"), 400)},
    )


def _slots(source: Source, hits: np.ndarray, layers: Sequence[int], tokens: int, sizes: ModelSizes) -> int:
    """Experts that a token takes, by the built-in check."""
    if not np.isfinite(hits).all() or (hits < 0).any() or (hits != np.floor(hits)).any() or hits.max() >= 2**53:
        raise SourceError(f"{source}: counts that are not whole numbers from 0 on")
    sums = hits.astype(np.float64).sum(axis=1)
    rounding = np.where(hits >= EXACT, np.spacing(hits.astype(np.float32)), 0).astype(np.float64).sum(axis=1) / 2
    top_k = sizes.top_k if sizes.top_k is not None else round(float(np.median(sums)) / tokens)
    off = np.abs(sums - tokens * top_k) > rounding
    if not 1 <= top_k <= hits.shape[1] or off.any():
        layer = int(np.argmax(off))
        raise SourceError(
            f"{source}: layer {layers[layer]} sums to {sums[layer]:,.0f}, expected chunk_count x chunk_size x k = {tokens:,} x {top_k} in "
            "every layer: the counts are damaged, or of several texts merged"
        )
    over = hits - (np.where(hits >= EXACT, np.spacing(hits.astype(np.float32)), 0) / 2) > tokens
    if over.any():
        layer, expert = np.argwhere(over)[0]
        raise SourceError(f"{source}: expert {expert} of layer {layers[layer]} was chosen more often than the {tokens:,} tokens there were")
    return top_k


def _layers(source: Source, tensors: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Counts of the experts of each layer, float32; the projections must agree."""
    found: dict[int, np.ndarray] = {}
    for name, array in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            continue
        layer, counts = int(match[1]), array.reshape(-1)
        if array.dtype != np.float32:
            raise SourceError(f"{source}, {name}: {array.dtype}, expected F32")
        if layer in found and not np.array_equal(found[layer], counts):
            raise SourceError(f"{source}: the counts of the projections of layer {layer} differ ({clipped(name)}): the file is damaged")
        found[layer] = counts
    if not found:
        raise SourceError(f"{source}: no counts of experts (blk.N.ffn_*_exps.weight.counts); is it of a Mixture-of-Experts model?")
    widths = {len(counts) for counts in found.values()}
    if len(widths) > 1:
        raise SourceError(f"{source}: layers with {sorted(widths)} experts in one file")
    return dict(sorted(found.items()))


def _contents(source: Source) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a GGUF file."""
    with opened(source.path, error=SourceError) as content:
        magic = content.read(4)
    if magic != MAGIC:
        raise SourceError(f"{source}: not GGUF; a legacy imatrix .dat has one count for each tensor, none for experts: {AGAIN}")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SettingError("imatrix files need the package gguf: pip install 'dbes[gguf]'") from None

    class Bounded(GGUFReader):
        """Past the end of a file the reader would go on with empty arrays, for as many entries as the header claims."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + int(np.dtype(dtype).itemsize) * int(count) > len(self.data):
                raise ValueError("cut short")
            return super()._get(int(offset), dtype, int(count), override_order)

    regular(source.path, error=SourceError)
    try:
        reader = Bounded(source.path)
        fields = {name: each.contents() for name, each in reader.fields.items()}
        return fields, {each.name: np.array(each.data) for each in reader.tensors if NAME.fullmatch(each.name)}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as problem:
        raise SourceError(f"{source}: not a readable GGUF file ({clipped(str(problem))})") from None
