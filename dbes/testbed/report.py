"""The report of a grid: tables as parquet and JSON, one HTML page that needs nothing else, and the findings in words."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dbes.errors import FileError, MixError
from dbes.files import check_writable, replacing, write_json, write_text
from dbes.reporting import charts
from dbes.reporting.html import render
from dbes.reporting.page import slug
from dbes.testbed.experiments import Findings, analyse
from dbes.testbed.grid import Progress, read_grid, run_grid
from dbes.text import label, labels, printable

TITLES = {
    "scope": "Scope: methods by scopes",
    "soft": "Soft domains: documents that hold other domains' text",
    "scale": "Scale: the contrast at three sizes",
    "frozen": "Learned, frozen, re-randomised, hashed",
    "levels": "Token or sequence level: topic against syntax",
    "upstream": "Upstream choices: experts from domain models",
    "probe": "What the representation tells, and what the router uses of it",
    "forking": "The least certain tokens against the others",
    "metrics": "Which metric sees it",
}

CHARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "scope": (
        ("specialization", "normalised specialization"),
        ("as_trained", "normalised specialization, as trained"),
        ("utilization", "utilization"),
        ("bits_per_byte", "bits per byte"),
    ),
    "soft": (("specialization", "normalised specialization"), ("bits_per_byte", "bits per byte")),
    "scale": (("specialization", "normalised specialization"), ("bits_per_byte", "bits per byte")),
    "frozen": (("specialization", "normalised specialization"), ("nats_per_token", "nats per token")),
    "levels": (("topic", "topic information, nats"), ("syntax", "syntax information, nats"), ("bits_per_byte", "bits per byte")),
    "upstream": (("specialization", "normalised specialization"), ("bits_per_byte", "bits per byte")),
    "forking": (("gap", "specialization, forking minus other tokens"),),
    "metrics": (("tau", "Kendall's tau"),),
}
"""Columns drawn for every table, with their axis; a column's interval is in ``<column>_low`` and ``<column>_high``."""

ARM_COLUMNS = (
    "arm", "seeds", "specialization", "above_frozen", "score", "as_trained", "utilization", "trained_utilization", "max_violation",
    "dead_experts", "dropped", "bits_per_byte", "nats_per_token", "tokens_per_cpu_second",
)  # fmt: skip
"""Columns of a table of arms that the page shows; the files have all of them."""

WIDTH = 400

OUTCOMES = {
    "reproduces": ("✓", "reproduce"),
    "does not reproduce": ("✗", "do not reproduce"),
    "undecided": ("?", "undecided"),
    "not measured": ("–", "not measured"),
}
"""Outcomes of a verdict, with the sign and the words of the page."""


PAGE = "report/index.html"


def run_testbed(
    preset: str,
    out: str | Path,
    *,
    mix: str | Path | None = None,
    only: Sequence[str] = (),
    cache: Path = Path("build/testbed"),
    processes: int = 2,
    progress: Progress | None = None,
) -> Path:
    """Train small MoEs under known routers, measure them, and write what the metrics make of them; the page of the report.

    Runs that ``out`` holds already are not trained again, so the same call resumes an interrupted grid.

    Args:
        preset: ``smoke``: a try-out, whose two seeds decide little; ``standard``: every experiment.
        out: folder of the grid.
        mix: another mix than the preset's: ``embedded``, ``packages`` or a folder of JSONL files.
        only: experiments to run; all of them when empty.
        cache: where built mixes are kept.
        processes: runs trained at a time, one thread each; two of them beat one process of two threads.
        progress: called with what is done now, in words.

    Raises:
        SettingError: there is no such preset or experiment.
        MixError: the mix cannot be built, has an empty domain or too few experts for a reference router (checked before any
            training); the folder holds another grid.
        FileError: the folder cannot be written to, or another run is writing there.
        TrainingError: a training process was killed.
    """
    out = Path(out)
    run_grid(preset, out, mix=None if mix is None else str(mix), cache=cache, processes=processes, only=tuple(only), progress=progress)
    try:
        return write_report(out)
    except FileError as problem:
        if os.access(out, os.W_OK) or not (out / PAGE).is_file():
            raise
        if progress is not None:
            progress(f"{problem}; the page is that of an earlier run")
        return out / PAGE


def write_report(folder: Path) -> Path:
    """Write ``report/`` below a grid's folder and return its page.

    Raises:
        MixError: no grid there, or no finished run.
        FileError: it cannot be written.
    """
    about, records = read_grid(folder)
    if not records:
        raise MixError(f"{folder}: no run is finished yet")
    check_writable(folder / PAGE)
    findings = analyse(about, records)
    out = folder / "report"
    for name, table in findings.tables.items():
        with replacing(out / f"{name}.parquet") as path:
            table.to_parquet(path, index=False)
        write_json(out / f"{name}.json", _rows(table))
    failed = [{"arm": r["arm"], "seed": r["seed"], "error": r["error"]} for r in records if r["status"] != "ok"]
    write_json(
        out / "verdicts.json",
        [{"experiment": v.experiment, "claim": v.claim, "outcome": v.outcome, "sentence": v.sentence} for v in findings.verdicts],
    )
    write_text(out / "FINDINGS.md", printable(findings_markdown(about, records, findings), lines=True))
    write_text(folder / PAGE, page(about, records, findings, failed))
    return folder / PAGE


def findings_markdown(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], findings: Findings) -> str:
    """The verdicts as a list: what reproduces, what does not, with numbers."""
    lines = [f"# Findings of the testbed, preset {about['preset']}", "", _facts(about, records), ""]
    for verdict in findings.verdicts:
        lines += [f"* **{verdict.claim}: {verdict.outcome}.** {verdict.sentence}"]
    return "\n".join(lines) + "\n"


def _facts(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    done = [record for record in records if record["status"] == "ok"]
    spent = sum(record["cpu_seconds"] for record in done)
    seeds = len({record["seed"] for record in records})
    return (
        f"{len(done)} runs ({len(records) - len(done)} failed) of {seeds} seeds on the mix `{about['mix']}` "
        f"({', '.join(about['domains'])}); {spent:,.0f} CPU-seconds of training. "
        "Intervals: 95 % over seeds; contrasts are paired by seed (same data, same initial weights). "
        "Specialization is normalised information between experts and domains, jackknifed over held-out documents."
    )


def page(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], findings: Findings, failed: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page."""
    shown = [(name, TITLES[name], table) for name, table in findings.tables.items() if not table.empty]
    shown += [("failed", "Failed runs", pd.DataFrame(failed))] if failed else []
    tables = [_table(*each) for each in shown]
    counts = Counter(verdict.outcome for verdict in findings.verdicts)
    with charts.unchecked():
        specs = {"from zero": charts.named_interval_spec(zero=True), "far from zero": charts.named_interval_spec(zero=False)}
    return render(
        "testbed.html",
        scripts=("page.js", "testbed.js"),
        payload={"name": slug(f"testbed-{about['preset']}"), "tables": tables, "specs": specs},
        title=label(about["preset"]),
        facts=_facts(about, records),
        tally=", ".join(f"{counts[outcome]} {words}" for outcome, (_, words) in OUTCOMES.items() if counts[outcome]),
        signs={outcome: sign for outcome, (sign, _) in OUTCOMES.items()},
        verdicts=findings.verdicts,
        tables=tables,
    )


def _table(name: str, title: str, table: pd.DataFrame) -> dict[str, Any]:
    """A table with the columns that the page shows (the CSV has all) and its figures."""
    columns = [column for column in (ARM_COLUMNS if "specialization" in table else table.columns) if column in table]
    columns = [column for column in columns if not column.endswith(("_low", "_high"))]
    rows, numbers = _rows(table), table.select_dtypes("number")
    words = {column: labels((str(row[column]) for row in rows), WIDTH) for column in columns if column not in numbers}
    return {
        "name": name,
        "title": title,
        "short": re.split("[:,]", title)[0],
        "columns": [
            {"key": key, "label": key.replace("_", " "), "number": key in numbers, "whole": table[key].dtype.kind in "iu"}
            for key in columns
        ],
        "charts": [
            {"column": column, "title": words, "zero": _near_zero(table, column)}
            for column, words in CHARTS.get(name, ())
            if column in table and np.isfinite(table[column]).any()
        ],
        "rows": [{key: words[key][str(value)] if key in words else value for key, value in row.items()} for row in rows],
    }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(str(table.to_json(orient="records", double_precision=6)))


def _near_zero(table: pd.DataFrame, column: str) -> bool:
    """Whether an axis holds 0: unless the values are far from it, as losses are; there the differences are what matters."""
    drawn = table[[each for each in (column, f"{column}_low", f"{column}_high") if each in table]].to_numpy(float)
    return bool(np.nanmin(drawn) < 0.5 * np.nanmax(drawn))
