"""Loss, accuracy and ablation of a result in words and rows, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dbes.measures import Measured, Measures
from dbes.results import Result
from dbes.wording import UNKNOWN, counted, p_cell, share, shares

SERIES = ("specialists, in the domain", "specialists, in the others", "same load, in the domain", "same load, in the others")

BESIDE = ("Domain", "Bits per byte", "95 % interval", "Items", "Accuracy", "95 % interval", "Per byte", "Chance")
ABLATION = (
    "Domain", "Cells", "Load", "Control cells", "Control load",
    "Inside", "Outside", "Control inside", "Control outside", "Beyond", "p (Holm)",
)  # fmt: skip

FINDINGS = {
    "drives": "its specialists drive it: without them the loss rises more than without cells of the same load, and more than elsewhere",
    "not alone": "its specialists matter for it, more than cells of the same load, but not clearly more for it than for the other domains",
    "unmatched": "its specialists matter more than the control, but no other cells carry as much of it, so this may be their load alone",
    "no effect": "no effect beyond cells of the same load",
    "worse": "cells of the same load matter more for it than its specialists",
    "no specialists": "no half of the texts finds a specialist, so nothing was masked",
}

METHOD = (
    "Each half of the source texts (by the hash of their id) chose the specialists that were masked while the other half was measured, so "
    "no text measures what it chose; cells are those of either half. The control is other cells of the same layers that carry as much of "
    "the domain; specialists that carry more than all others together stay unmasked. Added bits per byte; intervals and tests pair the "
    "source texts (jackknife) and take the cells as given; p is corrected over the domains (Holm)."
)


def measures_of(result: Result) -> Measures:
    """What was measured beside specialization; empty where nothing was."""
    return result.measures or Measures()


def beside_table(result: Result, names: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of loss and accuracy, without the columns that tell nothing in any row."""
    rows = _beside_rows(result, names)
    told = [place for place in range(len(BESIDE)) if any(row[place] != UNKNOWN for row in rows)]
    return [BESIDE[place] for place in told], [[row[place] for place in told] for row in rows]


def _beside_rows(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    """Loss and accuracy of every domain that has one of them, as `BESIDE`."""
    found, rows = measures_of(result), []
    for domain in result.task.domains:
        loss, accuracy = found.loss.get(domain), found.accuracy.get(domain)
        if loss is None and accuracy is None:
            continue
        row = [names[domain], *([UNKNOWN] * 2 if loss is None else [f"{loss.bits_per_byte.value:.3f}", _interval(loss.bits_per_byte)])]
        if accuracy is None:
            rows.append([*row, *[UNKNOWN] * 5])
            continue
        own = accuracy.accuracy
        told = [share(own.value), shares(own.low, own.high), share(accuracy.accuracy_per_byte.value), share(accuracy.chance)]
        rows.append([*row, f"{accuracy.items:,}", *told])
    return rows


def ablation_rows(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    """What masking did, a row for each domain in which something was masked, as `ABLATION`."""
    rows = []
    for domain, each in measures_of(result).ablation.items():
        if each.beyond is None:
            continue
        figures = (each.inside, each.outside, each.control_inside, each.control_outside)
        cells, drawn = (f"{first}, {second}" for first, second in (each.cells, each.control_cells))
        told = [UNKNOWN if figure is None else f"{figure.value:+.4f}" for figure in figures]
        beyond = f"{each.beyond.value:+.4f} ±{(each.beyond.high - each.beyond.low) / 2:.4f}"
        rows.append([names[domain], cells, share(each.load), drawn, share(each.control_load), *told, beyond, p_cell(each.beyond.p_holm)])
    return rows


def ablation_series(result: Result, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The same as rows of a figure."""
    found = []
    for domain, each in measures_of(result).ablation.items():
        figures = (each.inside, each.outside, each.control_inside, each.control_outside)
        for series, figure in zip(SERIES, figures, strict=True):
            if figure is not None:
                found.append({"label": names[domain], "series": series, **{end: getattr(figure, end) for end in ("value", "low", "high")}})
    return [{key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()} for row in found]


def ablation_verdicts(result: Result, names: Mapping[str, str]) -> list[str]:
    """One line that sums up, and one for each domain."""
    found = measures_of(result).ablation
    if not found:
        return []
    drives = [name for name, each in found.items() if each.finding == "drives"]
    masked = [each for each in found.values() if each.beyond is not None]
    if not masked:
        return ["Ablation: no specialists were found on half of the texts, so there was nothing to mask; nothing can be said."]
    head = f"Ablation: the specialists of {len(drives)} of {counted(len(masked), 'domain')} that have some drive their domain"
    return [f"{head}.", *(f"{names[name]}: {FINDINGS[each.finding]}." for name, each in found.items())]


def measure_notes(result: Result) -> list[str]:
    """What the figures mean."""
    found, told = measures_of(result), []
    if found.loss:
        told.append(
            "Bits per byte of the recorded windows, each read by itself; lower is better. Domains differ in how hard they are to predict."
        )
    if found.accuracy:
        by = "lm-evaluation-harness" if found.accuracy_by == "lm-eval" else "the likeliest choice after the question, without examples"
        told.append(f"Accuracy: {by}; per byte: the likeliest per byte of the choice.")
    return told


def _interval(figure: Measured) -> str:
    return UNKNOWN if math.isnan(figure.low) else f"{figure.low:.3f}–{figure.high:.3f}"
