"""Routes and counts as tables: parquet, CSV or JSON lines, written a shard or a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dbes.files import refused_by_system, replacing
from dbes.scoring.counts import Counts
from dbes.scoring.tables import FORMULA_STARTS
from dbes.trace.store import Trace
from dbes.trace.types import PIECE_TOKENS, RoutingShape, TokenRoutes

TABLES = ("parquet", "csv", "jsonl")

ROWS = ("counts", "documents", "routes")
"""What a row is of: an expert in a domain, an expert in a document, a token at a layer."""


Write = Callable[[pa.RecordBatch], None]
"""Adds a batch to a table."""


def write_table(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, format: str) -> int:
    """Write a table, whole or not at all, a batch at a time; how many rows it has.

    Args:
        format: one of ``TABLES``.

    Raises:
        FileError: it cannot be written.
    """
    rows = 0
    opened = {"parquet": _parquet, "csv": _csv, "jsonl": _lines}[format]
    with replacing(path) as temporary, refused_by_system(path), opened(temporary, schema) as write:
        for batch in batches:
            write(batch)
            rows += batch.num_rows
    return rows


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Write]:
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        yield writer.write_batch


@contextmanager
def _csv(path: Path, schema: pa.Schema) -> Iterator[Write]:
    """Lists as numbers with spaces between; text that a spreadsheet would run stands behind an apostrophe."""
    flat = pa.schema([field if not pa.types.is_list(field.type) else pa.field(field.name, pa.string()) for field in schema])
    with pyarrow.csv.CSVWriter(path, flat) as writer:
        yield lambda batch: writer.write(pa.record_batch([_flat(column) for column in batch.columns], schema=flat))


@contextmanager
def _lines(path: Path, schema: pa.Schema) -> Iterator[Write]:
    """One JSON object a row."""
    with path.open("w", encoding="utf-8") as file:

        def write(batch: pa.RecordBatch) -> None:
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                file.write(json.dumps(dict(zip(schema.names, values, strict=True)), ensure_ascii=False, allow_nan=False) + "\n")

        yield write


def _flat(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        return pa.array([None if each is None else " ".join(f"{value:.9g}" for value in each) for each in column.to_pylist()], pa.string())
    if pa.types.is_string(column.type):
        return pa.array([f"'{each}" if each.startswith(FORMULA_STARTS) else each for each in column.to_pylist()], pa.string())
    return column


COUNTS = pa.schema([("domain", pa.string()), ("layer", pa.int32()), ("expert", pa.int32()), ("count", pa.int64())])
DOCUMENTS = pa.schema([("document", pa.string()), *COUNTS])
ROUTES = pa.schema([
    ("document", pa.string()), ("domain", pa.string()), ("position", pa.int32()), ("token_id", pa.int32()), ("layer", pa.int32()),
    ("experts", pa.list_(pa.int32())), ("weights", pa.list_(pa.float32())),
])  # fmt: skip


def count_batches(counts: Counts, *, by_document: bool) -> Iterator[pa.RecordBatch]:
    """(token, slot) pairs that chose each expert, of every domain, or of every document (only the experts it uses); a layer a batch."""
    shape = counts.shape
    for column, layer in enumerate(shape.layers):
        sums = counts.layer(column)
        experts = shape.experts[column]
        hits = (sums.hits if by_document else sums.by_domain(sums.hits))[:, 0, :experts]
        row, expert = np.nonzero(hits if by_document else np.ones_like(hits))
        domain = shape.document_domain[row] if by_document else row
        columns = [
            *([_named(shape.document_ids, row)] if by_document else []),
            _named(shape.domains, domain),
            pa.array(np.full(len(row), layer), pa.int32()),
            pa.array(expert, pa.int32()),
            pa.array(np.rint(hits[row, expert]).astype(np.int64)),
        ]
        yield pa.record_batch(columns, schema=DOCUMENTS if by_document else COUNTS)


def route_batches(trace: Trace) -> Iterator[pa.RecordBatch]:
    """The experts of every token at every layer where one ran, in the order of the recording; some thousand tokens a batch."""
    for routes in trace.with_columns("token_ids", "weights"):
        for begin in range(0, len(routes), PIECE_TOKENS):
            yield _route_batch(routes.take(slice(begin, begin + PIECE_TOKENS)), trace.shape)


def _route_batch(routes: TokenRoutes, shape: RoutingShape) -> pa.RecordBatch:
    ran = routes.ids != np.iinfo(routes.ids.dtype).max
    lengths = ran.sum(axis=2)
    row, column = np.nonzero(lengths)
    offsets = np.r_[0, np.cumsum(lengths[row, column])].astype(np.int32)
    tokens, weights = routes.token_ids, routes.weights
    unknown = pa.nulls(len(row))
    return pa.record_batch(
        [
            _named(shape.document_ids, routes.document[row]),
            _named(shape.domains, shape.document_domain[routes.document[row]]),
            pa.array(routes.positions[row], pa.int32()),
            unknown.cast(pa.int32()) if tokens is None else pa.array(tokens[row], pa.int32()),
            pa.array(np.asarray(shape.layers)[column], pa.int32()),
            pa.ListArray.from_arrays(offsets, pa.array(routes.ids[ran].astype(np.int32))),
            unknown.cast(pa.list_(pa.float32())) if weights is None
            else pa.ListArray.from_arrays(offsets, pa.array(weights[ran].astype(np.float32))),
        ],
        schema=ROUTES,
    )  # fmt: skip


def _named(names: tuple[str, ...], index: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), pa.array(names, pa.string())).cast(pa.string())


def logical_count(counts: Counts, domain: int | None) -> np.ndarray:
    """(token, slot) pairs that chose each expert, int64 [1, layers, experts], of a domain or of all.

    There is a row for every decoder layer up to the last MoE layer, as servers number the layers of the whole model; those of dense layers
    are 0.
    """
    shape = counts.shape
    found = np.zeros((1, max(shape.layers) + 1, shape.width), np.int64)
    hits = counts.by_domain(lambda sums: sums.hits)
    found[0, list(shape.layers)] = np.rint(hits.sum(axis=0) if domain is None else hits[domain])
    return found
