"""An agreement of two recordings in words, in the terminal, and in the forms other tools read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbes.comparison.agreement import Agreement, Share
from dbes.comparison.compare import DEPTHS
from dbes.comparison.ranks import LEVEL, Difference
from dbes.reporting.agreement_page import render_agreement
from dbes.reporting.charts import METRICS
from dbes.reporting.export import markdown_cell, markdown_table
from dbes.reporting.leaderboard import difference_table
from dbes.scoring.tables import spreadsheet_safe
from dbes.text import json_text, legible
from dbes.wording import UNKNOWN, counted, share, shares

NEAR_TIES = 0.5
"""Differences are called mostly near ties where more than this share of them, by the whole interval, lies in the tenth of the smallest
margins; a tenth of them would lie there if margins did not matter."""

LAYER_HEADINGS = ("Layer", "Tokens", "Sets differ", "95 % interval", "Slots kept", "Starts here", "Differed so far")
DOMAIN_HEADINGS = ("Domain", "Documents", "Tokens", "Sets differ", "95 % interval", "Slots kept")
MARGIN_HEADINGS = ("Margin, quantile", "up to", "Sets differ", "95 % interval", "Of all differences")


def words(found: Agreement) -> list[str]:
    """What the recordings show, a sentence each, the main thing first."""
    where = f"{counted(found.tokens, 'token')} of {counted(found.documents, 'document')} at {counted(len(found.layers), 'layer')}"
    if found.identical:
        lines = [f"The recordings are identical: every token chose the same experts ({where})."]
    else:
        lines = [
            f"The expert sets differ in {_told(found.differing)} of all (token, layer) pairs, and {_told(found.kept)} of the slots keep "
            f"their expert ({where}).",
            _depth(found),
            *([_ties(found)] if found.by_margin else []),
        ]
    return lines + ([_scores(found)] if found.scores else [])


def _told(value: Share) -> str:
    interval = shares(value.low, value.high)
    return share(value.value) + ("" if interval == UNKNOWN else f" ({interval})")


def _depth(found: Agreement) -> str:
    first = next(each.layer for each in found.by_layer if each.differing.value > 0)
    return (
        f"It starts at layer {first}: {_told(found.ever)} of the tokens differ at some layer, and half of these have differed by layer "
        f"{found.half_by}."
    )


def _ties(found: Agreement) -> str:
    lowest = found.by_margin[0].part
    if lowest.low > NEAR_TIES:
        kind = "Mostly near ties"
    else:
        kind = "Not mostly near ties" if lowest.high < NEAR_TIES else "Whether they are mostly near ties is open"
    return f"{kind}: {_told(lowest)} of the differences lie in the tenth of the tokens whose margin is smallest."


def _scores(found: Agreement) -> str:
    apart = [each for each in found.scores if each.adjusted <= LEVEL]
    if apart:
        # the table has all; here those of the whole model stand for their parts
        whole = [each for each in apart if each.depth == DEPTHS[0][0]] or apart
        named = "; ".join(f"{_metric(each)} {share(each.difference, 2, sign=True)}, {each.depth}" for each in whole)
        more = f", and {len(apart) - len(whole)} more in the table" if len(apart) > len(whole) else ""
        return f"Scores differ beyond chance, first minus second: {named}{more}."
    widest = max(found.scores, key=lambda each: abs(each.difference))
    if widest.difference == 0:
        return "Every score is the same."
    largest = f"{share(widest.difference, 2, sign=True)} ({_metric(widest)}, {widest.depth})"
    return f"No score differs beyond chance; the largest difference is {largest}."


def _metric(each: Difference) -> str:
    return METRICS[each.metric][0].lower()


def render_terminal(found: Agreement) -> RenderableType:
    """The agreement for ``Console.print``: words, a row per layer, domain and band of margins, the scores, and what was left out."""
    parts: list[RenderableType] = [Text(f"{found.first} and {found.second}", style="bold")]
    parts += [Text(line) for line in words(found)]
    if not found.identical:
        parts.append(plain_table("By layer", LAYER_HEADINGS, _layer_rows(found)))
        parts.append(plain_table("By domain", DOMAIN_HEADINGS, _domain_rows(found)))
        if found.by_margin:
            title = f"By {margin_words(found)} of the first recording, in each layer"
            parts.append(plain_table(title, MARGIN_HEADINGS, _margin_rows(found)))
    if found.scores:
        parts.append(difference_table(found.scores, {name: title for name, (title, _) in METRICS.items()}))
    parts += [Text(legible(f"Note: {note}", 600), style="dim") for note in found.notes]
    return Group(*parts)


def margin_words(found: Agreement) -> str:
    """The margin that the bands are by, in words."""
    return str(found.margin).replace("_", " ").removesuffix("s")


def plain_table(title: str, headings: tuple[str, ...], rows: list[list[str]]) -> Table:
    """A table for the terminal: the first column is text, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold", padding=(0, 0, 0, 1))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _layer_rows(found: Agreement) -> list[list[str]]:
    return [
        [
            str(each.layer), f"{each.compared:,}", share(each.differing.value, 2), shares(each.differing.low, each.differing.high),
            share(each.kept.value, 2), share(each.started.value, 2), share(each.reached.value, 2),
        ]
        for each in found.by_layer
    ]  # fmt: skip


def _domain_rows(found: Agreement) -> list[list[str]]:
    return [
        [
            legible(each.domain, 60), f"{each.documents:,}", f"{each.tokens:,}", share(each.differing.value, 2),
            shares(each.differing.low, each.differing.high), share(each.kept.value, 2),
        ]
        for each in found.by_domain
    ]  # fmt: skip


def _margin_rows(found: Agreement) -> list[list[str]]:
    return [
        [
            f"{each.low:.0%} to {each.high:.0%}", UNKNOWN if math.isnan(each.upper) else f"{each.upper:.3g}",
            share(each.differing.value, 2), shares(each.differing.low, each.differing.high), share(each.part.value),
        ]
        for each in found.by_margin
    ]  # fmt: skip


def as_text(found: Agreement, format: str) -> str:
    """An agreement as CSV (one row per layer), JSON (everything), Markdown, or its page."""
    if format == "csv":
        return spreadsheet_safe(found.to_dataframe()).to_csv(index=False, lineterminator="\n")
    if format == "json":
        return json_text(json.dumps(without_nan(asdict(found)), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"
    return render_agreement(found, words(found)) if format == "html" else _markdown(found)


def without_nan(value: Any) -> Any:
    """JSON values, with null for NaN."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(found: Agreement) -> str:
    lines = [f"Agreement of {markdown_cell(found.first)} and {markdown_cell(found.second)}", ""]
    lines += [f"* {markdown_cell(line, 600)}" for line in words(found)]
    if not found.identical:
        lines += ["", *markdown_table(LAYER_HEADINGS, _layer_rows(found))]
    lines += ["", *(f"* Note: {markdown_cell(note, 600)}" for note in found.notes)] if found.notes else []
    return "\n".join(lines) + "\n"
