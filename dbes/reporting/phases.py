"""Prompt and generated text side by side, as rows of words for terminal and page."""

from __future__ import annotations

import math
from typing import Any

from dbes.results import Result
from dbes.text import label
from dbes.wording import UNKNOWN, counted, p_cell, plus_minus, share

HEADINGS = ("Metric", "Prompt", "Generated", "Difference", "p")
TITLE = "Prompt and generated text: scores ± half of the 95 % interval, and their difference, paired by document"


def answer_rows(result: Result) -> list[tuple[str, str, str, str, str]]:
    """Cells under HEADINGS for every metric that one of them has; nothing where no answers were scored."""
    from dbes.reporting.charts import METRICS  # here, so that the terminal need not load the charts

    rows = []
    for metric, row in result.companions.get("phases", {}).get("metrics", {}).items():
        if row.get("prompt") is None and row.get("generated") is None:
            continue
        sides = [_score(row, name, f"{name}_low", f"{name}_high") for name in ("prompt", "generated")]
        change = _score(row, "difference", "low", "high", sign=True)
        rows.append((METRICS.get(metric, (metric, ""))[0], *sides, change, p_cell(_number(row, "p"))))
    return rows


def answer_note(result: Result) -> str:
    """Where there are answers: how much of the text is prompt and how much generated, and how they were made."""
    phases, about = result.companions.get("phases"), result.settings.get("generation") or {}
    if not phases:
        return ""
    sizes = [f"{name}: {counted(part['tokens'], 'token')} of {counted(part['documents'], 'document')}" for name, part in _sizes(phases)]
    temperature = about.get("temperature", 0)
    how = "the most probable token each time" if not temperature else f"temperature {temperature:g}, top-p {about.get('top_p', 1):g}"
    looping = result.companions.get("loops", {})
    loops, answers = (sum(looping.get(name, {}).values()) for name in ("by_domain", "answers"))
    empty = phases["generated"].get("without") or ()
    missing = f" No generated text in {', '.join(map(label, empty))}: scores that compare all domains are unknown." if empty else ""
    left = " and were left out" if looping.get("dropped") and loops else ""
    return (
        f"{sizes[0]}; {sizes[1]} (answers of up to {about.get('tokens', 0):,} tokens, {how}); {loops:,} of {counted(answers, 'answer')} "
        f"repeat themselves{left}.{missing}"
    )


def _sizes(phases: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    return [(title, phases[name]) for name, title in (("prompt", "Prompt"), ("generated", "generated"))]


def _number(row: dict[str, Any], name: str) -> float:
    found = row.get(name)
    return math.nan if found is None else float(found)


def _score(row: dict[str, Any], *names: str, sign: bool = False) -> str:
    value, low, high = (_number(row, name) for name in names)
    return UNKNOWN if math.isnan(value) else share(value, sign=sign) + plus_minus(low, high)
