"""Traces of FLAME-MoE (parquet): a file a layer with ``indices`` and ``scores`` of every token, ``token_id`` in a file beside them.

Nothing says where a document ends: the tokens of a folder are one text, written in pieces that stay one unit of all statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dbes.errors import SourceError
from dbes.files import regular
from dbes.importing.layers import by_layer
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes, Source
from dbes.text import clipped

SUFFIXES = (".parquet",)
PIECE = 8192
"""Tokens of a piece."""

IDS, SCORES, TOKEN = "indices", "scores", "token_id"
BATCH_BYTES = 2**28
Columns = dict[str, np.ndarray]


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    named = [(source, _names(source)) for source in sources]
    for source, columns in named:
        if IDS not in columns and TOKEN not in columns:
            raise SourceError(f"{source}: neither {IDS} nor {TOKEN} in it, but {clipped(columns)}")
    texts = [source for source, columns in named if IDS not in columns]
    groups = by_layer([source for source, columns in named if IDS in columns], sizes)
    if not groups:
        raise SourceError(f"{texts[0]}: token ids only; give the files of the layers, too")
    weighted = all(SCORES in columns for _, columns in named if IDS in columns)
    for folder, layers in groups.items():
        beside = [source for source in texts if source.name.startswith(f"{folder}/")] if len(groups) > 1 else texts
        yield from _documents(folder, layers, beside, notes, weighted=weighted)


def _documents(
    folder: str, layers: dict[int, list[Source]], texts: Sequence[Source], notes: Notes, *, weighted: bool
) -> Iterator[Document]:
    wanted = [IDS, SCORES] if weighted else [IDS]
    streams = [_pieces(files, wanted) for files in layers.values()]
    words = _pieces(texts, [TOKEN]) if texts else None
    first, begin = next(iter(layers.values()))[0], 0
    notes.add("{n} folders do not tell where documents end: each is one text, so that nothing can be said of its spread", 1)
    while True:
        parts = [next(stream, None) for stream in streams]
        ids = [part[IDS] for part in parts if part is not None]
        word = None if words is None else next(words, None)
        rows = {0 if part is None else len(part[IDS]) for part in parts}
        if words is not None:
            rows.add(0 if word is None else len(word[TOKEN]))
        if len(rows) > 1:
            raise SourceError(f"{folder}: files of layers, or of token ids, end at different rows (one at {begin + min(rows)}); cut short?")
        if not ids:
            return
        if len({each.shape for each in ids}) > 1:
            raise SourceError(f"{folder}: {IDS} of {sorted({each.shape[1] for each in ids})} experts a token at different layers")
        yield Document(
            source=first,
            where=f"{folder}, rows {begin} to {begin + len(ids[0]) - 1}",
            id=f"{folder}/{begin // PIECE}",
            text=folder,
            layers=tuple(layers),
            ids=np.stack(ids, axis=1),
            weights=np.stack([part[SCORES] for part in parts if part is not None], axis=1) if weighted else None,
            token_ids=None if word is None else word[TOKEN],
            positions=np.arange(begin, begin + len(ids[0]), dtype=np.int32),
        )
        begin += len(ids[0])


def _names(source: Source) -> list[str]:
    with _parquet(source) as file:
        return file.schema_arrow.names


@contextmanager
def _parquet(source: Source) -> Iterator[pq.ParquetFile]:
    regular(source.path, error=SourceError)
    try:
        with pq.ParquetFile(source.path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, TypeError) as problem:
        raise SourceError(f"{source}: not a parquet file, or cut short ({clipped(str(problem))})") from None


def _pieces(files: Sequence[Source], columns: Sequence[str]) -> Iterator[Columns]:
    """The columns of files one after the other, in pieces of PIECE rows; the last is what is left."""
    waiting: list[Columns] = []
    rows = 0
    for source in files:
        for batch in _batches(source, columns):
            waiting.append(batch)
            rows += len(batch[columns[0]])
            while rows >= PIECE:
                if len({part[columns[0]].shape[1:] for part in waiting}) > 1:
                    raise SourceError(f"{source}: rows with other numbers of experts than before")
                whole = {name: np.concatenate([part[name] for part in waiting]) for name in columns}
                yield {name: array[:PIECE] for name, array in whole.items()}
                waiting = [{name: array[PIECE:] for name, array in whole.items()}]
                rows -= PIECE
    if rows:
        yield {name: np.concatenate([part[name] for part in waiting]) for name in columns}


def _batches(source: Source, columns: Sequence[str]) -> Iterator[Columns]:
    with _parquet(source) as file:
        largest = max((file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)), default=0)
        if largest > 64 * BATCH_BYTES:
            raise SourceError(f"{source}: a row group of {largest:,} bytes; write smaller ones")
        for batch in file.iter_batches(batch_size=PIECE, columns=list(columns)):
            if missing := [name for name in columns if name not in batch.schema.names]:
                raise SourceError(f"{source}: no column {missing[0]}")
            yield {name: _array(batch.column(name), f"{source}, {name}") for name in columns}


def _array(column: pa.Array, where: str) -> np.ndarray:
    """Numbers [rows] or, of lists of one length, [rows, length]."""
    listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    values = column.flatten() if listed else column
    if column.null_count or values.null_count:
        raise SourceError(f"{where}: holds empty values")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise SourceError(f"{where}: {values.type}, expected numbers")
    array = np.asarray(values.to_numpy(zero_copy_only=False))
    if not listed:
        return array
    lengths = pc.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        raise SourceError(f"{where}: rows of {lengths.min()} to {lengths.max()} experts")
    return array.reshape(len(lengths), -1)
