"""The leaderboard: a comparison in the terminal, and as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbes.comparison.compare import DEPTHS, Comparison, depth_of, differences, model_score
from dbes.comparison.entries import LeaderboardEntry
from dbes.comparison.ranks import LEVEL, Difference
from dbes.reporting import charts
from dbes.reporting.export import (
    bits_cell,
    entry_note,
    entry_row,
    has_loss,
    order_words,
    phase_rows,
    published_row,
    relation_lines,
    titles,
)
from dbes.reporting.html import render
from dbes.reporting.page import columns
from dbes.scoring.score import REPLICATED
from dbes.text import legible
from dbes.wording import p_cell, plus_minus, portion, share, shares, task_words

CURVE_FIELDS = ("score", "score_low", "score_high", "control")
PAIRED_MODELS = 24
"""Models up to which every pair is compared on the page; above it the table and `dbes compare A B` remain."""


def render_leaderboard(comparison: Comparison) -> str:
    """The HTML of a comparison. The same results give the same bytes."""
    first = comparison.entries[0].result if comparison.entries else None
    payload = leaderboard_payload(comparison)
    return render(
        "leaderboard.html",
        scripts=("page.js", "leaderboard.js"),
        payload=payload,
        title="Leaderboard",
        task=None if first is None else first.task,
        phase="all" if first is None else str(first.settings.get("phase", "all")),
        models=sum(not entry.baseline for entry in comparison.entries),
        baselines=sum(entry.baseline for entry in comparison.entries),
        order=order_words(comparison),
        apart=[(legible(each.name, 80), legible(each.reason, 400)) for each in comparison.apart],
        level=LEVEL,
        accuracy=legible(comparison.accuracy_of, 400),
        loss=has_loss(comparison),
        relations=relation_lines(comparison),
        phases=bool(payload["phases"]["model"]),
    )


def leaderboard_payload(comparison: Comparison) -> dict[str, Any]:
    """Everything the page's script draws from."""
    entries = comparison.entries
    rows = [entry_row(entry, comparison) for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        row["rank_text"] = str(comparison.ranks[entry.label]) if entry.label in comparison.ranks else ""
    with charts.unchecked():
        specs = {"overlay": charts.overlay_spec(), "parallel": charts.parallel_spec()}
        specs["scatter"] = charts.scatter_spec("accuracy", "accuracy", "%")
        specs["scatter-loss"] = charts.scatter_spec("loss", "bits per byte", ".2f")
    return {
        "name": "leaderboard",
        "metric": comparison.metric,
        "accuracy": legible(comparison.accuracy_of, 400),
        "loss": has_loss(comparison),
        "metrics": titles(comparison),
        "depths": [depth for depth, _, _ in DEPTHS],
        "rows": rows,
        "published": [published_row(entry) for entry in entries],
        "phases": columns(
            phase_rows(comparison),
            (
                "model",
                "metric",
                "prompt",
                "prompt_low",
                "prompt_high",
                "generated",
                "generated_low",
                "generated_high",
                "difference",
                "low",
                "high",
                "p",
            ),
        ),
        "curves": columns(curve_rows(entries, comparison.metrics), ("model", "metric", "layer", "depth", *CURVE_FIELDS)),
        "pairs": columns(
            [_pair_row(pair) for pair in _all_pairs(entries)],
            ("first", "second", "metric", "depth", "score_first", "score_second", "difference", "low", "high", "p", "adjusted"),
        ),
        "specs": specs,
    }


def curve_rows(entries: Sequence[LeaderboardEntry], metrics: Sequence[str] = REPLICATED) -> list[dict[str, Any]]:
    """Score of every model at the relative depth of each layer; models with a gap in a metric are left out of it."""
    rows = []
    for entry in entries:
        depth = dict(zip(entry.result.model.layers, depth_of(len(entry.result.model.layers)).tolist(), strict=True))
        for record in entry.result.calibrated:
            if record.metric in metrics and record.domain is None and record.layer is not None:
                if model_score(entry.result, record.metric) is None:
                    continue
                about = {"model": legible(entry.label, 80), "metric": record.metric, "layer": record.layer, "depth": depth[record.layer]}
                rows.append(about | {name: getattr(record, name) for name in CURVE_FIELDS})
    return rows


def _all_pairs(entries: Sequence[LeaderboardEntry]) -> list[Difference]:
    if len(entries) > PAIRED_MODELS:
        return []
    return [found for index, a in enumerate(entries) for b in entries[index + 1 :] for found in differences(a, b)]


def _pair_row(pair: Difference) -> dict[str, Any]:
    return {**vars(pair), "first": legible(pair.first, 80), "second": legible(pair.second, 80)}


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def render_terminal(comparison: Comparison, paired: Sequence[Difference] = (), *, published: bool = False) -> RenderableType:
    """The comparison for ``Console.print``: the table, a paired test of two models, and what stands apart with the reason."""
    tables = [_published_table(comparison)] if published else [_score_table(comparison), _further_table(comparison)]
    parts: list[RenderableType] = [*tables]
    if not published and (phases := phase_rows(comparison)):
        parts.append(_phase_table(phases, titles(comparison)))
    if paired:
        parts.append(difference_table(paired, titles(comparison)))
    rule = (
        f"{order_words(comparison)}: 1 + the models that are significantly better (paired jackknife over the common documents, "
        f"{LEVEL:.0%} over all pairs after Holm); in brackets the places that cannot be excluded. Baselines are not ranked."
    )
    meaning = (
        "Excess: score less the mean of frozen random routers on the same hidden states. Word: share of the score that a router shows "
        "which looks at the token alone. Domain named: how often the domain of an unseen text is named from its routing."
    )
    notes = [] if published else [rule, meaning]
    notes += [f"Accuracy: {comparison.accuracy_of}"] if comparison.accuracy_of and not published else []
    notes += relation_lines(comparison) if not published else []
    notes += [f"{entry.label}: {note}" for entry in comparison.entries if (note := entry_note(entry, comparison.metric))]
    notes += [f"Not in the table: {each.name}: {each.reason}" for each in comparison.apart]
    parts += [Text(legible(note, 600), style="dim") for note in notes]
    return Group(*parts)


def _score_table(comparison: Comparison) -> Table:
    """The score and what it means, in 80 columns: names of models are folded, numbers never."""
    task = comparison.entries[0].result.task if comparison.entries else None
    title = ""
    if task is not None:
        title = f"Task {task_words(legible(task.name, 60), task.version, None if task.fingerprint is None else task.fingerprint[:12])}"
    headings = ("Score", "Excess", "Random router", "Word", "Domain named", *(["Bits per byte"] if has_loss(comparison) else []))
    headings += ("Accuracy",) if comparison.accuracy_of else ()
    table = _model_table(f"{title}: specialization" if title else "", "Rank", *headings)
    for entry in comparison.entries:
        row, rank = entry_row(entry, comparison), comparison.ranks.get(entry.label)
        excess = share(row["excess"], sign=True) + plus_minus(row["excess_low"], row["excess_high"])
        cells = [_score(*(row[f"specialization{end}"] for end in ("", "_low", "_high"))), excess, share(row["random_router"])]
        cells += [portion(row["share_of_word"]), share(row["domain_named"])]
        cells += [bits_cell(row["loss"])] if has_loss(comparison) else []
        cells += [share(row["accuracy"])] if comparison.accuracy_of else []
        table.add_row(_model_name(entry, row), "–" if rank is None else str(rank), *cells)
    return table


def _further_table(comparison: Comparison) -> Table:
    named = titles(comparison)
    metrics = [metric for metric in named if metric != "specialization"]
    table = _model_table("Further metrics", "Layers x experts, k", *(named[metric] for metric in metrics), "Load used")
    for entry in comparison.entries:
        row = entry_row(entry, comparison)
        scores = [_score(row[metric], row[f"{metric}_low"], row[f"{metric}_high"]) for metric in metrics]
        size = f"{row['layers']}x{row['experts']}, {row['k']}"
        table.add_row(_model_name(entry, row), size, *scores, share(row["utilization"]))
    return table


def _model_table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="italic", header_style="bold", padding=(0, 0, 0, 1))
    table.add_column("Model", overflow="fold")
    for heading in headings:
        table.add_column("\n".join(heading.replace("(n = ", "(n=").split()), justify="right", no_wrap=True)
    return table


def _model_name(entry: LeaderboardEntry, row: dict[str, Any]) -> Text:
    return Text(row["model"] + ("  (baseline)" if entry.baseline else ""), style="dim" if entry.baseline else "")


def _published_table(comparison: Comparison) -> Table:
    rows = [published_row(entry) for entry in comparison.entries]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "model"))
    table = Table(title="Published values: uncalibrated, without chance level", title_justify="left", header_style="bold")
    table.add_column("Model", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(Text(row["model"]), *("–" if row.get(name) is None else f"{row[name]:.4f}" for name in names))
    return table


def _phase_table(rows: Sequence[dict[str, Any]], named: Mapping[str, str]) -> Table:
    table = Table(title="Prompt and generated text", title_justify="left", title_style="italic", header_style="bold")
    table.add_column("Model", overflow="fold")
    table.add_column("Metric")
    for heading in ("Prompt", "Generated", "Generated minus prompt", "95 % interval"):
        table.add_column(heading, justify="right")
    for row in rows:
        scores = [_score(row[phase], row[f"{phase}_low"], row[f"{phase}_high"]) for phase in ("prompt", "generated")]
        interval = shares(row["low"], row["high"], sign=True)
        table.add_row(Text(row["model"]), named.get(row["metric"], row["metric"]), *scores, share(row["difference"], sign=True), interval)
    return table


def difference_table(paired: Sequence[Difference], named: Mapping[str, str]) -> Table:
    """Paired differences of two models, those that stay below the level after Holm not dimmed."""
    title = Text(f"{legible(paired[0].first, 60)} minus {legible(paired[0].second, 60)}, paired over the common documents")
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold")
    for heading in ("Metric", "Depth", "First", "Second", "Difference", "95 % interval", "p (Holm)"):
        table.add_column(heading, justify="left" if heading in ("Metric", "Depth") else "right")
    for each in paired:
        style = "" if each.adjusted <= LEVEL else "dim"
        scores = (share(each.score_first), share(each.score_second), share(each.difference, sign=True))
        interval = shares(each.low, each.high, sign=True)
        table.add_row(named.get(each.metric, each.metric), each.depth, *scores, interval, p_cell(each.adjusted), style=style)
    return table


def _score(score: float | None, low: float | None, high: float | None) -> str:
    return share(score) + ("" if score is None else plus_minus(low, high))
