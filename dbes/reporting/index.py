"""The index of a folder of results: all of them, newest first, with links to their pages and to the comparisons beside them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dbes.errors import DbesError
from dbes.files import check_writable, write_text
from dbes.reporting.html import render
from dbes.results import PAGE_FILE, RESULT_FILE, load_result, result_files
from dbes.scoring.verdict import current_verdict
from dbes.text import legible
from dbes.wording import share, shares

INDEX_FILE = "index.html"


def holds_results(folder: Path) -> bool:
    """Whether a folder is no result, and has some below it."""
    return folder.is_dir() and not (folder / RESULT_FILE).is_file() and next(folder.rglob(RESULT_FILE), None) is not None


def write_index(folder: str | Path, *, output: str | Path | None = None) -> Path:
    """Write ``index.html`` into a folder of results and return its path.

    Raises:
        ResultError: there are no results below it.
        FileError: it cannot be written.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE if output is None else Path(output)
    check_writable(path)
    found = sorted((_row(file.parent, path.parent) for file in result_files([folder])), key=lambda row: row["created"], reverse=True)
    others = sorted(page for page in folder.rglob("*.html") if page.name not in (PAGE_FILE, INDEX_FILE))
    pages = [(str(page.relative_to(folder)), _link(page, path.parent)) for page in others]
    write_text(path, render("index.html", title=legible(folder.resolve().name, 80), rows=found, pages=pages))
    return path


def _row(folder: Path, beside: Path) -> dict[str, Any]:
    """What the index says of one result; of one that cannot be read, why."""
    about: dict[str, Any] = {"model": folder.name, "task": "", "created": "", "score": "", "excess": "", "verdict": "", "page": ""}
    page = folder / PAGE_FILE
    about["page"] = _link(page, beside) if page.is_file() else ""
    try:
        result = load_result(folder)
    except DbesError as problem:
        return about | {"verdict": str(problem)}
    about |= {"model": result.model.name, "task": result.task.name, "created": result.created}
    if result.status != "ok":
        return about | {"verdict": result.error or "failed"}
    record = next((each for each in result.calibrated if (each.metric, each.layer, each.domain) == ("specialization", None, None)), None)
    if record is not None and not math.isnan(record.score):
        about["score"] = f"{share(record.score)} ({shares(record.score_low, record.score_high)})"
        if not math.isnan(record.excess_low):
            about["excess"] = f"{share(record.excess, sign=True)} ({shares(record.excess_low, record.excess_high, sign=True)})"
    return about | {"verdict": current_verdict(result)}


def _link(page: Path, beside: Path) -> str:
    """The page's place seen from the folder of the index, as a link."""
    return quote(os.path.relpath(page.resolve(), beside.resolve()).replace(os.sep, "/"))
