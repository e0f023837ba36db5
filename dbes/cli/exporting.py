"""`dbes export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbes.cli.common import one_of, say


def export(
    source: Annotated[Path, typer.Argument(help="Folder of a result or trace; for formats of an expert path the file of `dbes paths`.")],
    out: Annotated[Path, typer.Option(help="File to write; a logical-count is safetensors where it ends so, else JSON.")],
    format: Annotated[
        str,
        one_of(
            "format",
            ("parquet", "csv", "jsonl", "logical-count", "peft", "esft", "prune-list", "vllm-substitution"),
            "parquet, csv, jsonl: a table; logical-count: for servers that place experts by load; of an expert path: peft, esft, "
            "prune-list (experts to keep and drop), vllm-substitution.",
        ),
    ],
    rows: Annotated[
        str,
        one_of(
            "kind of rows",
            ("counts", "documents", "routes"),
            "Of a table: counts of every domain, layer and expert; the same of documents; routes of every token at every layer.",
        ),
    ] = "counts",
    domain: Annotated[str | None, typer.Option(help="Of a logical-count: this domain only.")] = None,
) -> None:
    """Write a recording, its counts, or an expert path as a file that another tool reads."""
    from dbes.exporting.export import NOTES
    from dbes.exporting.export import export as run

    say(run(source, out, format=format, rows=rows, domain=domain))
    if format in NOTES:
        say(NOTES[format], err=True)
