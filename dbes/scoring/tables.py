"""What goes beside ``result.json``: tidy tables for pandas, R or a spreadsheet, and the large matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as encode_safetensors

from dbes.errors import DbesError, ResultError
from dbes.files import discard, read_bytes, regular, replacing, sha256_of, sorted_metadata, write_bytes
from dbes.results import PAGE_FILE, RESULT_FILE, Result
from dbes.scoring.metrics import usage_of
from dbes.text import clipped, printable

if TYPE_CHECKING:
    from dbes.scoring.score import Scores

SCORES, USAGE, MATRICES = "scores", "expert_usage", "matrices.safetensors"

REPLICATES = "replicates.safetensors"
"""Scores with each document left out (float32 [documents, layers + 1], see ``Scores``), ``document_domain``, and the documents' ids
as JSON in the metadata."""

COMPANIONS = (f"{SCORES}.parquet", f"{SCORES}.csv", f"{USAGE}.parquet", f"{USAGE}.csv", MATRICES, REPLICATES)
"""What `save_scores` writes beside ``result.json``."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A text cell that begins so would be run as a formula by a spreadsheet."""

USAGE_KEYS = ("domain", "layer", "expert")
USAGE_NUMBERS = ("hits", "share", "lift", "lift_high", "q")
USAGE_FACTS = ("specialist", "unknown")
"""Columns of the expert usage that the page reads: of each row, its numbers, and what is true of it."""

AGAIN = "write it again with `dbes score`"


def usage_table(scores: Scores) -> pd.DataFrame:
    """One row per domain, layer and expert: hits, shares, lift with interval, test, and whether it is a specialist.

    ``share`` is the share of the domain's slots; ``token_share`` hits / tokens of the domain (OLMoE, eq. 7); ``mass_share`` the
    share of gate weight.
    """
    totals, table = scores.totals, scores.specialists
    shape = totals.shape
    domain, column, expert = np.nonzero(np.broadcast_to(np.asarray(shape.experts)[:, None] > np.arange(shape.width), table.hits.shape))
    at = (domain, column, expert)
    active = totals.active
    with np.errstate(invalid="ignore", divide="ignore"):
        token_share = table.hits / active[..., None]
    mass = np.full(table.hits.shape, np.nan) if totals.mass is None else usage_of(totals.mass)
    columns = {
        "domain": np.asarray(shape.domains, object)[domain],
        "layer": np.asarray(shape.layers)[column],
        "expert": expert,
        "hits": table.hits[at],
        "share": table.share[at],
        "token_share": token_share[at],
        "mass_share": mass[at],
    }
    for name in ("lift", "lift_low", "lift_high", "z", "p", "q", "replicated", "unknown", "specialist"):
        columns[name] = getattr(table, name)[at]
    return pd.DataFrame(columns)


def save_scores(scores: Scores, folder: Path, result: Result) -> Result:
    """Write a result with its tables and matrices and return it with their sha256; ``result.json`` goes first and comes last.

    So a folder with a ``result.json`` holds all that belongs to it, whenever the writing was cut off. A page of an earlier result
    is removed.

    Args:
        result: that of the scores, with what its maker adds to it.

    Raises:
        FileError: something cannot be written.
    """
    discard(folder / RESULT_FILE)
    discard(folder / PAGE_FILE)
    written = write_tables(scores, folder)
    result = result.model_copy(update={"files": {**result.files, **{path.name: sha256_of(path) for path in written}}})
    result.save(folder)
    return result


def write_tables(scores: Scores, folder: Path) -> list[Path]:
    """Write scores and expert usage as parquet and CSV, the matrices and the replicates; returns their paths."""
    written: list[Path] = []
    for name, table in ((SCORES, scores.result.to_dataframe()), (USAGE, usage_table(scores))):
        parquet, text = folder / f"{name}.parquet", folder / f"{name}.csv"
        with replacing(parquet) as temporary:
            table.to_parquet(temporary, index=False)
        with replacing(text) as temporary:
            spreadsheet_safe(table).to_csv(temporary, index=False)
        written += [parquet, text]
    arrays = {name: np.ascontiguousarray(array) for name, array in scores.arrays.items()}
    write_bytes(folder / MATRICES, encode_safetensors(arrays))
    shape = scores.left_out
    replicates = {name: np.ascontiguousarray(array) for name, array in scores.replicates.items()}
    replicates["document_domain"] = np.asarray(shape.document_domain, np.int32)
    about = {"documents": json.dumps(shape.document_ids), "domains": json.dumps(shape.domains)}
    write_bytes(folder / REPLICATES, sorted_metadata(encode_safetensors(replicates, metadata=about)))
    return [*written, folder / MATRICES, folder / REPLICATES]


def read_safetensors(path: Path, *, error: type[DbesError], hint: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a safetensors file.

    Args:
        hint: what to do about a damaged one, for the message.

    Raises:
        error: missing, not a regular file, damaged, or of a dtype that numpy does not have.
    """
    content = read_bytes(path, error=error)
    try:
        arrays = parse_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise error(f"{path}: cannot be read as safetensors ({clipped(str(problem))}); {hint}") from None
    return header.get("__metadata__") or {}, arrays


def read_parquet(path: Path, *, error: type[DbesError], hint: str) -> pd.DataFrame:
    """The table in a parquet file.

    Raises:
        error: missing, not a regular file, or damaged.
    """
    from pyarrow import ArrowException

    regular(path, error=error)
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError, TypeError, KeyError, ArrowException) as problem:
        raise error(f"{path}: cannot be read as parquet ({clipped(str(problem))}); {hint}") from None


def spreadsheet_safe(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with an apostrophe before text that a spreadsheet would run as a formula, and control characters written out."""
    safe = table.copy()
    for name in safe.columns:
        if safe[name].dtype == object or isinstance(safe[name].dtype, pd.StringDtype):
            safe[name] = [_cell(cell) if isinstance(cell, str) else cell for cell in safe[name]]
    return safe


def _cell(text: str) -> str:
    return printable(f"'{text}" if text.startswith(FORMULA_STARTS) else text)


def read_usage(folder: Path, result: Result) -> pd.DataFrame | None:
    """The expert usage beside a result, or None where there is none.

    Raises:
        ResultError: the table is there but cannot be read, or belongs to another result.
    """
    path = folder / f"{USAGE}.parquet"
    if not path.exists():
        return None
    table = read_parquet(path, error=ResultError, hint=AGAIN)
    rows = [(name, layer, expert) for name in result.task.domains for layer, experts in _sizes(result) for expert in range(experts)]
    if len(table) != len(rows):
        told = f"{len(table)} rows, expected {len(rows)} (domains x experts of all layers)"
        raise ResultError(f"{path}: {told}: not the table of this result; {AGAIN}")
    if missing := {*USAGE_KEYS, *USAGE_NUMBERS, *USAGE_FACTS} - set(table.columns):
        raise ResultError(f"{path}: no column {', '.join(sorted(missing))}: not the table of this result; {AGAIN}")
    for names, right in ((("layer", "expert", *USAGE_NUMBERS), is_numeric_dtype), (USAGE_FACTS, is_bool_dtype)):
        if wrong := [name for name in names if not right(table[name])]:
            raise ResultError(f"{path}: {wrong[0]} holds {table[wrong[0]].dtype}, not the table of this result; {AGAIN}")
    hits = table["hits"].to_numpy(float)
    if not (np.isfinite(hits) & (hits >= 0) & (hits < 2**53)).all():
        raise ResultError(f"{path}: hits: expected counts; {AGAIN}")
    if set(zip(*(table[name].tolist() for name in USAGE_KEYS), strict=True)) != set(rows):
        raise ResultError(f"{path}: its domains, layers and experts are not those of this result; {AGAIN}")
    return table


def _sizes(result: Result) -> list[tuple[int, int]]:
    return list(zip(result.model.layers, result.model.experts, strict=True))


def read_arrays(folder: Path, result: Result) -> dict[str, np.ndarray]:
    """The matrices beside a result; empty where there are none.

    Raises:
        ResultError: they cannot be read, or belong to another result.
    """
    path = folder / MATRICES
    if not path.exists():
        return {}
    arrays = read_safetensors(path, error=ResultError, hint=AGAIN)[1]
    expected = (len(result.model.layers), len(result.task.domains), len(result.task.domains))
    similarity = arrays.get("similarity")
    if similarity is not None and (similarity.shape != expected or similarity.dtype.kind != "f"):
        raise ResultError(f"{path}: similarity is {similarity.dtype} {similarity.shape}, expected floats {expected}; {AGAIN}")
    return arrays
