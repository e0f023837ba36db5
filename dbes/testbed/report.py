"""The report of a grid: tables as parquet and JSON, one HTML page that needs nothing else, and the findings in words."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dbes.errors import MixError
from dbes.files import replacing, write_json, write_text
from dbes.testbed.experiments import Findings, analyse
from dbes.testbed.grid import read_grid

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

COLUMNS: dict[str, tuple[str, ...]] = {
    "arms": ("arm", "seeds", "specialization", "above_frozen", "score", "as_trained", "utilization", "trained_utilization", "max_violation",
             "dead_experts", "dropped",
             "bits_per_byte", "nats_per_token", "tokens_per_cpu_second"),
}  # fmt: skip
"""Columns of the page's tables; the files have all of them."""


def write_report(folder: Path) -> Path:
    """Write ``report/`` below a grid's folder and return its page.

    Raises:
        MixError: no grid there, or no finished cell.
    """
    about, records = read_grid(folder)
    if not records:
        raise MixError(f"{folder}: no cell is finished yet")
    findings = analyse(about, records)
    out = folder / "report"
    for name, table in findings.tables.items():
        with replacing(out / f"{name}.parquet") as path:
            table.to_parquet(path, index=False)
        write_json(out / f"{name}.json", json.loads(str(table.to_json(orient="records", double_precision=6))))
    failed = [{"arm": r["arm"], "seed": r["seed"], "error": r["error"]} for r in records if r["status"] != "ok"]
    write_json(
        out / "verdicts.json",
        [{"experiment": v.experiment, "claim": v.claim, "outcome": v.outcome, "sentence": v.sentence} for v in findings.verdicts],
    )
    write_text(out / "FINDINGS.md", findings_markdown(about, records, findings))
    write_text(out / "index.html", page(about, records, findings, failed))
    return out / "index.html"


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
        f"{len(done)} cells ({len(records) - len(done)} failed) of {seeds} seeds on the mix `{about['mix']}` "
        f"({', '.join(about['domains'])}); {spent:,.0f} CPU-seconds of training. "
        "Intervals: 95 % over seeds; contrasts are paired by seed (same data, same initial weights). "
        "Specialization is normalised information between experts and domains, jackknifed over held-out documents."
    )


def page(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], findings: Findings, failed: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page."""
    parts = [
        f"<h1>Routing testbed: {html.escape(about['preset'])}</h1><p>{html.escape(_facts(about, records))}</p>",
        "<h2>Verdicts</h2>",
        "".join(
            f'<div class="verdict {verdict.outcome.replace(" ", "-")}"><b>{html.escape(verdict.claim)}: {verdict.outcome}.</b> '
            f"{html.escape(verdict.sentence)}</div>"
            for verdict in findings.verdicts
        ),
    ]
    for name, table in findings.tables.items():
        if table.empty:
            continue
        parts.append(f"<h2>{html.escape(TITLES[name])}</h2>")
        parts += [interval_chart(table, column, title) for column, title in CHARTS.get(name, ()) if column in table]
        parts.append(_html_table(table))
    if failed:
        parts.append("<h2>Failed cells</h2>" + _html_table(pd.DataFrame(failed)))
    return _PAGE.replace("{{body}}", "\n".join(parts))


def interval_chart(table: pd.DataFrame, column: str, title: str, *, width: int = 760) -> str:
    """A row per arm with its mean and interval, as SVG."""
    label = "metric" if "metric" in table else "arm"
    rows = [row for row in table.to_dict("records") if math.isfinite(row[column])]
    if not rows:
        return ""
    ends = [(_end(row, f"{column}_low", row[column]), _end(row, f"{column}_high", row[column])) for row in rows]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    # The axis holds 0 unless the values are far from it, as losses are: there the differences are what matters.
    low = min(0.0, low) if low < 0.5 * high else low - 0.05 * (high - low)
    high = high + 0.04 * (high - low) or 1.0
    left, step, top = 270, 20, 34
    span = (width - left - 80) / ((high - low) or 1.0)
    body = []
    for place in range(5):
        value = low + (high - low) * place / 4
        x = left + (value - low) * span
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{top + step * len(rows)}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{top - 10}" text-anchor="middle">{value:.3g}</text>')
    for index, (row, (start, stop)) in enumerate(zip(rows, ends, strict=True)):
        y, x = top + step * index + step / 2, left + (row[column] - low) * span
        body.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(str(row[label]))}</text>')
        body.append(f'<line class="bar" x1="{left + (start - low) * span:.1f}" x2="{left + (stop - low) * span:.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle cx="{x:.1f}" cy="{y}" r="4"><title>{row[column]:.4g}</title></circle>')
        body.append(f'<text x="{width - 70}" y="{y + 4:.1f}">{row[column]:.3f}</text>')
    height = top + step * len(rows) + 8
    heading = f'<text class="title" x="{left}" y="12">{html.escape(title)}</text>'
    return (
        f'<svg role="img" aria-label="{html.escape(title)}" viewBox="0 0 {width} {height}" width="{width}">{heading}{"".join(body)}</svg>'
    )


def _end(row: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = row.get(name, math.nan)
    return float(value) if value is not None and math.isfinite(value) else otherwise


def _html_table(table: pd.DataFrame) -> str:
    shown = [column for column in (COLUMNS["arms"] if "specialization" in table else table.columns) if column in table]
    shown = [column for column in shown if not column.endswith(("_low", "_high"))]
    head = "".join(f"<th>{html.escape(column.replace('_', ' '))}</th>" for column in shown)
    rows = []
    for row in table.to_dict("records"):
        rows.append("<tr>" + "".join(f"<td>{_shown(row, column)}</td>" for column in shown) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _shown(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return html.escape(str(value))
    if not math.isfinite(value):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        text += f" <small>[{low:.3f}, {high:.3f}]</small>"
    return text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Routing testbed</title><style>
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e6e6); --line: light-dark(#d5d9de, #3a3f45); }
:root { --mark: light-dark(#1f5fa8, #7fb4f0); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
small { opacity: .7; }
svg { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .title { font-weight: 600; } svg .tick { opacity: .7; }
svg circle { fill: var(--mark); } svg .bar { stroke: var(--mark); stroke-width: 2; } svg .grid { stroke: var(--line); }
.verdict { border-left: 4px solid var(--line); padding: .3rem .8rem; margin: .5rem 0; }
.reproduces { border-color: #2b8a3e; } .does-not-reproduce { border-color: #c92a2a; } .undecided { border-color: #e67700; }
</style></head><body>
{{body}}
</body></html>
"""
