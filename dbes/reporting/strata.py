"""Strata of tokens in reports: the rows of their tables, and the terminal's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from dbes.result_parts import Strata, StrataDifference
from dbes.results import Result
from dbes.scoring.resolution import SIGNIFICANCE
from dbes.text import legible
from dbes.wording import UNKNOWN, p_cell, plus_minus, share, shares

TITLES = {
    "entropy": "Entropy of the gate weights",
    "position": "Place in the document",
    "token-class": "Class of the token",
    "frequency": "Frequency of the token",
}

METRIC = "specialization"
"""The metric that reports show; result.json has more."""


@dataclass(frozen=True, kw_only=True)
class StrataRows:
    """One kind of strata as cells of tables, ready to be shown.

    Attributes:
        strata: name, tokens, share, score, interval, p, chance as a share of the ideal router.
        differences: names, difference, interval, p after Holm; and difference, interval, p on the same tokens, or why there is none.
        scores: name, score, low, high as numbers, for a figure.
        significant: of each difference, whether it stands after Holm.
    """

    kind: str
    title: str
    by: str
    reason: str
    strata: list[list[str]]
    differences: list[list[str]]
    scores: list[tuple[str, float, float, float]]
    significant: list[bool]
    notes: list[str]


def strata_rows(result: Result) -> Iterator[StrataRows]:
    """Every kind of strata that was scored."""
    for kind, found in result.strata.items():
        cells, scores = [], []
        for each in found.strata:
            model = each.score(METRIC)
            name, start = legible(each.name, 40), [f"{each.tokens:,}", share(each.share)]
            if model is None:
                cells.append([name, *start, *[UNKNOWN] * 4])
                continue
            chance = model.null / model.reference if model.reference > 0 else math.nan
            numbers = [share(model.score), shares(model.score_low, model.score_high), p_cell(model.p), share(chance)]
            cells.append([name, *start, *numbers])
            scores.append((name, model.score, model.score_low, model.score_high))
        pairs = _pairs(found)
        yield StrataRows(
            kind=kind,
            title=TITLES.get(kind, legible(kind, 40)),
            by=legible(found.by, 300),
            reason=legible(found.reason or "", 200),
            strata=cells,
            differences=[[legible(f"{a} - {b}", 60), *_cells(plain), *_cells(same)] for (a, b), (plain, same) in pairs.items()],
            scores=scores,
            significant=[plain is not None and plain.p_holm <= SIGNIFICANCE for plain, _ in pairs.values()],
            notes=[legible(each, 300) for each in (*found.notes, *_reasons(found))],
        )


def _pairs(found: Strata) -> dict[tuple[str, str], tuple[StrataDifference | None, StrataDifference | None]]:
    """Of every two strata, the difference and that on the same tokens."""
    at = {(each.first, each.second, each.matched): each for each in found.differences if each.metric == METRIC}
    pairs = dict.fromkeys((first, second) for first, second, _ in at)
    return {pair: (at.get((*pair, False)), at.get((*pair, True))) for pair in pairs}


def _reasons(found: Strata) -> list[str]:
    """Why differences are unknown, each reason once."""
    told: dict[str, list[StrataDifference]] = {}
    for each in found.differences:
        if each.reason:
            told.setdefault(("same tokens: " if each.matched else "") + each.reason, []).append(each)
    every = len(found.strata) * (len(found.strata) - 1) // 2
    named = {reason: ", ".join(f"{each.first} - {each.second}" for each in of) for reason, of in told.items()}
    return [reason if len(told[reason]) == every else f"{pairs}: {reason}" for reason, pairs in named.items()]


def _cells(each: StrataDifference | None) -> list[str]:
    if each is None or math.isnan(each.difference):
        return [UNKNOWN, UNKNOWN]
    return [share(each.difference, sign=True) + plus_minus(each.low, each.high), p_cell(each.p_holm)]


def strata_tables(rows: StrataRows) -> list[Table | Text]:
    """One kind of strata in the terminal."""
    title = f"Strata of tokens: {rows.title.lower()}"
    if rows.reason:
        return [Text(f"{title}: {rows.reason}", style="dim")]
    strata = _table(f"{title} (specialization)", "Stratum", "Tokens", "Share", "Score", "95 % interval", "p", "Chance")
    for cells in rows.strata:
        strata.add_row(*cells)
    differences = _table("Differences, paired by document", "Strata", "Difference", "p (Holm)", "Same tokens", "p (Holm)")
    for cells, significant in zip(rows.differences, rows.significant, strict=True):
        differences.add_row(*cells, style="" if significant else "dim")
    return [strata, differences, Text("\n".join(f"{note}." for note in (f"By {rows.by}", *rows.notes)), style="dim")]


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold", padding=(0, 0, 0, 1))
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column("\n".join(heading.split(maxsplit=1)) if heading != "95 % interval" else heading, justify="right", no_wrap=True)
    return table
