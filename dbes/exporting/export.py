"""export(): a trace, its counts or an expert path as a file that another tool reads."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save as encode_safetensors

from dbes.errors import PathError, ResultError, SettingError, TraceError
from dbes.exporting.cells import CONSTANTS, WHOLE_LAYERS, peft, prune_list, substitution
from dbes.exporting.tables import COUNTS, DOCUMENTS, ROUTES, ROWS, TABLES, count_batches, logical_count, route_batches, write_table
from dbes.files import check_writable, write_bytes, write_json
from dbes.paths.types import ExpertPath
from dbes.results import RESULT_FILE, Result
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts
from dbes.scoring.score import read_routes
from dbes.text import unknown
from dbes.trace.store import MANIFEST, TRACE_FOLDER, Trace

LOGICAL = "logical-count"
OF_A_PATH = ("peft", "esft", "prune-list", "vllm-substitution")
FORMATS = (*TABLES, LOGICAL, *OF_A_PATH)

NOTES = {"peft": WHOLE_LAYERS, "vllm-substitution": CONSTANTS}
"""What a format cannot express or leaves to do, by its name."""


def export(
    source: Result | Trace | Counts | ExpertPath | str | Path,
    out: str | Path,
    *,
    format: str,
    rows: str = "counts",
    domain: str | None = None,
) -> Path:
    """A recording, its counts, or an expert path as a file that another tool reads.

    Args:
        source: a trace, counts, or a result that kept its routes, or the folder of one; for ``peft``, ``esft``, ``prune-list`` and
            ``vllm-substitution`` an expert path or its file.
        out: the file. A ``logical-count`` is JSON, or safetensors where the name ends so.
        format: ``parquet``, ``csv`` or ``jsonl``: a table; ``logical-count``: counts of every decoder layer and expert, by which servers
            place experts; ``peft``: layers and experts to adapt; ``esft``: ESFT's expert config; ``prune-list``: experts to keep and to
            drop; ``vllm-substitution``: experts that a constant stands for, as vLLM's config lists them.
        rows: of a table: ``counts`` of every domain, layer and expert; of ``documents``; or ``routes``, every token at every layer.
        domain: of a ``logical-count``: count this domain only.

    Raises:
        SettingError: there is no such format, kind of rows or domain; an argument that the format does not take.
        PathError: a format of an expert path and something else, or the other way round; a path that the format cannot express.
        TraceError, ResultError: the recording cannot be read, or was not kept; ``routes`` of counts.
        FileError: the file cannot be written.
    """
    out = Path(out)
    if format not in FORMATS:
        raise SettingError(unknown("format", format, FORMATS))
    if rows not in ROWS:
        raise SettingError(unknown("kind of rows", rows, ROWS))
    if rows != ROWS[0] and format not in TABLES:
        raise SettingError(f"rows {rows}: only {', '.join(TABLES)} have rows, format {format} has not")
    if domain is not None and format != LOGICAL:
        raise SettingError(f"domain: format {format} holds all domains or is of one already; only {LOGICAL} takes a domain")
    check_writable(out)
    if format in OF_A_PATH:
        _export_path(_path(source, format), out, format)
        return out
    recorded = _recorded(source, format)
    if format == LOGICAL:
        _export_load(counts_of(recorded), out, domain)
        return out
    if rows == "routes":
        if isinstance(recorded, Counts):
            raise TraceError("these are counts, which know no single tokens; rows routes needs the trace")
        write_table(out, route_batches(recorded), ROUTES, format)
        return out
    counts = counts_of(recorded)
    if rows == "documents" and not counts.by_documents:
        raise TraceError("only counts of whole domains are known, not of documents; choose rows counts")
    by_document = rows == "documents"
    write_table(out, count_batches(counts, by_document=by_document), DOCUMENTS if by_document else COUNTS, format)
    return out


def _export_path(path: ExpertPath, out: Path, format: str) -> None:
    if format == "esft":
        path.save(out, format=format)
    else:
        made = {"peft": peft, "prune-list": prune_list, "vllm-substitution": substitution}[format]
        write_json(out, made(path))


def _export_load(counts: Counts, out: Path, domain: str | None) -> None:
    shape = counts.shape
    if domain is not None and domain not in shape.domains:
        raise SettingError(unknown("domain of this recording", domain, shape.domains))
    if len(set(shape.experts)) > 1:
        raise TraceError(
            f"layers have {min(shape.experts)} to {max(shape.experts)} experts; a logical count has equally many in every layer"
        )
    found = logical_count(counts, None if domain is None else shape.domains.index(domain))
    if out.suffix == ".safetensors":
        write_bytes(out, encode_safetensors({"logical_count": found}))
    else:
        write_json(out, {"logical_count": found.tolist()})


def _path(source: object, format: str) -> ExpertPath:
    if isinstance(source, ExpertPath):
        return source
    if isinstance(source, str | Path) and not Path(source).is_dir():
        return ExpertPath.load(source)
    raise PathError(
        f"format {format} is of an expert path; find one with `dbes paths RESULT --domain DOMAIN --out paths.json`, export that"
    )


def _recorded(source: Result | Trace | Counts | ExpertPath | str | Path, format: str) -> Trace | Counts:
    if isinstance(source, Trace | Counts):
        return source
    if isinstance(source, ExpertPath) or (isinstance(source, str | Path) and Path(source).is_file() and Path(source).name != RESULT_FILE):
        raise PathError(f"format {format} is of a recording; an expert path is exported as {', '.join(OF_A_PATH)}")
    folder = source.folder if isinstance(source, Result) else Path(source)
    if folder is None:
        raise ResultError("this result was not written to a folder, where its routes would lie; give the trace or the counts")
    folder = folder.parent if folder.is_file() else folder
    if (folder / RESULT_FILE).is_file():
        if not (folder / TRACE_FOLDER / MANIFEST).is_file():
            raise ResultError(f"{folder}: the routes were not kept beside the result; evaluate again with --save-trace --overwrite")
        return Trace.load(folder / TRACE_FOLDER)
    return read_routes(folder)
