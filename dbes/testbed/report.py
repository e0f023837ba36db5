"""The report of a grid: tables as parquet and JSON, one HTML page that needs nothing else, and the findings in words."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dbes.errors import MixError
from dbes.files import check_writable, replacing, write_json, write_text
from dbes.testbed.experiments import Findings, Verdict, analyse
from dbes.testbed.grid import read_grid
from dbes.text import printable

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


OUTCOMES = {
    "reproduces": ("✓", "reproduce"),
    "does not reproduce": ("✗", "do not reproduce"),
    "undecided": ("?", "undecided"),
    "not measured": ("–", "not measured"),
}
"""Outcomes of a verdict, with the sign and the words of the page."""


PAGE = "report/index.html"


def write_report(folder: Path) -> Path:
    """Write ``report/`` below a grid's folder and return its page.

    Raises:
        MixError: no grid there, or no finished cell.
        FileError: it cannot be written.
    """
    about, records = read_grid(folder)
    if not records:
        raise MixError(f"{folder}: no cell is finished yet")
    check_writable(folder / PAGE)
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
    write_text(out / "FINDINGS.md", printable(findings_markdown(about, records, findings), lines=True))
    write_text(folder / PAGE, printable(page(about, records, findings, failed), lines=True))
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
        f"{len(done)} cells ({len(records) - len(done)} failed) of {seeds} seeds on the mix `{about['mix']}` "
        f"({', '.join(about['domains'])}); {spent:,.0f} CPU-seconds of training. "
        "Intervals: 95 % over seeds; contrasts are paired by seed (same data, same initial weights). "
        "Specialization is normalised information between experts and domains, jackknifed over held-out documents."
    )


def page(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], findings: Findings, failed: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page."""
    shown = [(name, TITLES[name], table) for name, table in findings.tables.items() if not table.empty]
    links = [
        ("verdicts", "Verdicts"),
        *((name, re.split("[:,]", title)[0]) for name, title, _ in shown),
        *([("failed", "Failed")] if failed else []),
    ]
    facts = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(_facts(about, records)))
    counts = Counter(verdict.outcome for verdict in findings.verdicts)
    tally = ", ".join(f"{counts[outcome]} {words}" for outcome, (_, words) in OUTCOMES.items() if counts[outcome])
    parts = [
        f'<p class="eyebrow">Routing testbed</p><h1>{html.escape(str(about["preset"]))}</h1><p class="lead">{facts}</p>',
        f'<section id="verdicts"><h2>Verdicts</h2><p>{tally}.</p>{"".join(map(_verdict, findings.verdicts))}</section>',
    ]
    for name, title, table in shown:
        charts = [interval_chart(table, column, axis) for column, axis in CHARTS.get(name, ()) if column in table]
        drawn = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
        parts.append(f'<section id="{name}"><h2>{html.escape(title)}</h2>{drawn}{_html_table(table, title)}</section>')
    if failed:
        parts.append(f'<section id="failed"><h2>Failed cells</h2>{_html_table(pd.DataFrame(failed), "Failed cells")}</section>')
    nav = "".join(f'<a href="#{name}">{html.escape(words)}</a>' for name, words in links)
    return _PAGE.replace("{{nav}}", nav).replace("{{body}}", "\n".join(parts))


def _verdict(verdict: Verdict) -> str:
    sign, _ = OUTCOMES.get(verdict.outcome, ("", ""))
    badge = f'<span class="badge"><span aria-hidden="true">{sign} </span>{html.escape(verdict.outcome)}</span>'
    claim = html.escape(verdict.claim[:1].upper() + verdict.claim[1:])
    kind = verdict.outcome.replace(" ", "-")
    return f'<div class="card verdict {kind}"><p><b>{claim}</b> {badge}</p><p>{html.escape(verdict.sentence)}</p></div>'


def interval_chart(table: pd.DataFrame, column: str, title: str) -> str:
    """A row per arm with its name, its mean and interval on a common axis, and its number; as wide as its place.

    Rows are separate drawings with positions in percent, so that text keeps its size on a narrow screen.
    """
    label = "metric" if "metric" in table else "arm"
    rows = [row for row in table.to_dict("records") if math.isfinite(row[column])]
    if not rows:
        return ""
    ends = [(_end(row, f"{column}_low", row[column]), _end(row, f"{column}_high", row[column])) for row in rows]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    # The axis holds 0 unless the values are far from it, as losses are: there the differences are what matters.
    low = min(0.0, low) if low < 0.5 * high else low - 0.05 * (high - low)
    high = high + 0.04 * (high - low) or 1.0
    low, high = (low, high) if high > low else (low, low + 1.0)

    def at(value: float) -> str:
        return f"{2 + 96 * (value - low) / (high - low):.2f}%"

    ticks = _ticks(low, high)
    grid = "".join(f'<line class="{"zero" if tick == 0 else "grid"}" x1="{at(tick)}" x2="{at(tick)}" y1="0" y2="100%"/>' for tick in ticks)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    digits += not math.isclose((ticks[1] - ticks[0]) * 10**digits, round((ticks[1] - ticks[0]) * 10**digits))
    marks = "".join(f'<text x="{at(tick)}" y="14" text-anchor="middle">{tick:.{digits}f}</text>' for tick in ticks)
    body = []
    for row, (start, stop) in zip(rows, ends, strict=True):
        name = html.escape(str(row[label])).replace("/", "/<wbr>")
        told = f"{row[column]:.4g}" + (f" [{start:.4g}, {stop:.4g}]" if stop > start else "")
        mark = f'<line class="interval" x1="{at(start)}" x2="{at(stop)}" y1="50%" y2="50%"/><circle cx="{at(row[column])}" cy="50%" r="4"/>'
        drawing = f'<span class="track"><svg><title>{told}</title>{grid}{mark}</svg></span>'
        body.append(f'<div class="row"><span class="label">{name}</span>{drawing}<span class="value">{row[column]:.3f}</span></div>')
    axis = (
        f'<div class="row axis"><span class="label"></span><span class="track"><svg>{marks}</svg></span><span class="value"></span></div>'
    )
    described = f"{html.escape(title)} of {len(rows)} {label}s; the table below has the numbers"
    return (
        f'<div class="card chart"><h3>{html.escape(title)}</h3><div role="img" aria-label="{described}">{"".join(body)}{axis}</div></div>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside the axis, four to nine of them."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = max((factor * size for factor in (1, 2, 2.5, 5) if factor * size <= rough * 1.000001), default=size)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _end(row: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = row.get(name, math.nan)
    return float(value) if value is not None and math.isfinite(value) else otherwise


def _html_table(table: pd.DataFrame, title: str) -> str:
    shown = [column for column in (COLUMNS["arms"] if "specialization" in table else table.columns) if column in table]
    shown = [column for column in shown if not column.endswith(("_low", "_high"))]
    head = "".join(f'<th scope="col">{html.escape(column.replace("_", " "))}</th>' for column in shown)
    rows = []
    for row in table.to_dict("records"):
        rows.append("<tr>" + "".join(f"<td>{_shown(row, column)}</td>" for column in shown) + "</tr>")
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Table: {html.escape(title)}">{body}</div></div>'


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
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>Routing testbed</title><style>
:root { color-scheme: light dark; --back: light-dark(#f6f7f9, #0f1216); --card: light-dark(#fff, #171b21);
  --ink: light-dark(#14181f, #e9edf2);
  --soft: light-dark(#525c69, #a7b1be); --line: light-dark(#dde1e7, #2c333d); --mark: light-dark(#0b5cad, #7fb8ff);
  --chip: light-dark(#eef1f5, #222933); --good: light-dark(#0a6b4b, #6fd7ae); --bad: light-dark(#b3261e, #ff9d94);
  --open: light-dark(#8a5200, #ffb066); }
* { box-sizing: border-box; } html { scroll-padding-top: 60px; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { position: sticky; top: 0; z-index: 5; background: var(--card); border-bottom: 1px solid var(--line); }
nav { max-width: 1320px; margin: auto; padding: 8px 20px; display: flex; gap: 4px; overflow-x: auto; scrollbar-width: thin; }
nav a { color: var(--soft); text-decoration: none; padding: 6px 9px; border-radius: 8px; font-size: .9rem; white-space: nowrap; }
nav a:hover { background: var(--chip); color: var(--ink); } :focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 20px 72px; }
.eyebrow { text-transform: uppercase; letter-spacing: .08em; font-size: .74rem; color: var(--soft); font-weight: 600; margin: 0; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 6px; }
h2 { font-size: 1.3rem; margin: 0 0 8px; } h3 { font-size: 1rem; margin: 0 0 8px; }
.lead, section > p { color: var(--soft); max-width: 90ch; margin: 0 0 12px; }
section { margin-top: 40px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; min-width: 0;
  margin-bottom: 12px; }
.verdict { border-left: 5px solid var(--kind); --kind: var(--line); padding: 10px 16px; } .verdict p { margin: 0; overflow-wrap: anywhere; }
.verdict p + p { color: var(--soft); font-size: .92rem; margin-top: 3px; }
.badge { display: inline-block; color: var(--kind); border: 1px solid; border-radius: 999px; padding: 0 9px; font-size: .78rem;
  white-space: nowrap; }
.reproduces { --kind: var(--good); } .does-not-reproduce { --kind: var(--bad); } .undecided { --kind: var(--open); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 12px; margin-bottom: 12px; }
.charts .card { margin: 0; }
.row { display: grid; grid-template-columns: minmax(90px, 34%) 1fr 3.6em; align-items: stretch; column-gap: 10px; font-size: .84rem; }
.label { align-self: center; text-align: right; overflow-wrap: anywhere; line-height: 1.25; padding: 2px 0; }
.value { align-self: center; text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; min-height: 21px; }
.track svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.track text { font-size: 11px; fill: var(--soft); } .track circle { fill: var(--mark); }
.track .interval { stroke: var(--mark); stroke-width: 2.5; }
.track .grid { stroke: var(--line); } .track .zero { stroke: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; min-width: 86px; }
tbody tr:last-child td { border: 0; }
:is(th, td):first-child { text-align: left; position: sticky; left: 0; background: var(--card); white-space: normal; min-width: 130px; }
td small { display: block; color: var(--soft); } code { background: var(--chip); border-radius: 5px; padding: 1px 5px; }
@media (max-width: 640px) { main { padding: 20px 12px 56px; } nav { padding: 6px 12px; } h1 { font-size: 1.6rem; }
  .row { grid-template-columns: 1fr 3.6em; padding-top: 5px; } .row .label { grid-column: 1 / -1; text-align: left; padding: 0; } }
</style></head><body>
<header><nav aria-label="Sections">{{nav}}</nav></header>
<main>
{{body}}
</main></body></html>
"""
