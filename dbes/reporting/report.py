"""report(): a result or an experiment as its page, or as the text of another format."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, overload

from dbes.comparison.compare import Comparison, paired_of
from dbes.errors import FileError, SettingError
from dbes.reporting import export, leaderboard
from dbes.reporting.card import card_section
from dbes.reporting.index import holds_results, write_index
from dbes.reporting.outcome import is_outcome, load_outcome
from dbes.reporting.outcome_card import outcome_card
from dbes.reporting.outcome_page import write_outcome_page
from dbes.reporting.page import page_stands, write_page
from dbes.results import PAGE_FILE, Result, load_result
from dbes.text import json_text, unknown

FORMATS = ("html", "card", "hub", "record")

notes = logging.getLogger("dbes")


@overload
def report(
    result: Result | str | Path, *, format: Literal["html"] = ..., trace: str | Path | None = ..., output: str | Path | None = ...
) -> Path: ...
@overload
def report(
    result: Result | str | Path,
    *,
    format: str,
    trace: str | Path | None = ...,
    output: str | Path | None = ...,
    dataset: str | None = ...,
) -> Path | str: ...
def report(
    result: Result | str | Path,
    *,
    format: str = "html",
    trace: str | Path | None = None,
    output: str | Path | None = None,
    dataset: str | None = None,
) -> Path | str:
    """The page of one result or experiment, a single HTML file that needs no network; or the text of another format.

    Args:
        result: a result that was written, its folder or file, or the folder or file of an experiment of ``dbes intervene``; with
            ``html`` also a folder that holds several results: their index.
        format: ``html``: write the page; ``card``: Markdown (section of a model card, or findings of an experiment); ``hub``:
            metadata of the hub; ``record``: a record of the leaderboard.
        trace: folder of the recorded routes, where they are not beside the result.
        output: page to write; ``report.html`` beside the result by default.
        dataset: with ``hub``, the id of the benchmark's data set on the hub, owner/name.

    Returns:
        The path of the page, or the text.

    Raises:
        SettingError: no such format, one that an experiment does not have, or an argument that does not go with it.
        ResultError: the result cannot be read, or was not written to a folder.
        FileError: the page cannot be written.
    """
    if format not in FORMATS:
        raise SettingError(unknown("format", format, FORMATS))
    if isinstance(result, Result):
        if format == "html":
            if result.folder is None:
                raise SettingError("result: it was not written to a folder, so nothing lies beside it; give output_path when you make it")
            return write_page(result.folder, trace=trace, output=output)
        found = result
    elif is_outcome(result):
        return _outcome(Path(result), format, trace=trace, output=output)
    elif format == "html" and trace is None and holds_results(Path(result)):
        return write_index(result, output=output)
    elif format == "html":
        return write_page(result, trace=trace, output=output)
    else:
        found = load_result(result)
    if format == "card":
        return card_section(found)
    if format == "record":
        return json_text(export.open_record(found))
    if dataset is None:
        raise SettingError("with --format hub the id of the benchmark's data set on the hub is needed: --dataset OWNER/NAME")
    return export.hub_entries(found, dataset=dataset)


def _outcome(path: Path, format: str, *, trace: str | Path | None, output: str | Path | None) -> Path | str:
    if format not in ("html", "card"):
        raise SettingError(f"format {format!r}: an experiment has html and card only")
    if trace is not None:
        raise SettingError("trace: an experiment has no recorded routes")
    return write_outcome_page(path, output=output) if format == "html" else outcome_card(load_outcome(path))


def keep_page(folder: Path) -> None:
    """Write the page of a result unless it stands there whole; where it cannot be written (a read-only disk) that is noted."""
    if page_stands(folder / PAGE_FILE):
        return
    try:
        write_page(folder)
    except FileError as problem:
        if os.access(folder, os.W_OK):
            raise
        notes.warning(str(problem))


def as_text(comparison: Comparison, format: str, *, published: bool = False) -> str:
    """A comparison as CSV, JSON, Markdown, or the leaderboard page.

    Args:
        published: the published, uncalibrated values instead, in CSV and Markdown.
    """
    if format == "csv":
        return export.as_csv(comparison, published=published)
    if format == "json":
        return json_text(export.as_json(comparison, paired_of(comparison))) + "\n"
    if format == "html":
        return leaderboard.render_leaderboard(comparison)
    return export.as_markdown(comparison, paired_of(comparison), published=published)
