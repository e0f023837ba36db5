"""What a score means, as rows that every form of a result shows: its size, the word, the position, the random router, decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dbes.results import Result
from dbes.scoring.placebo import KINDS
from dbes.scoring.portions import share_of_position, share_of_word, word_covered, word_unknown
from dbes.scoring.resolution import SIGNIFICANCE, cannot_tell
from dbes.wording import p_cell, portion, share, shares, size_word


def meaning_rows(result: Result) -> list[tuple[str, str]]:
    """Pairs of name and text about specialization; empty where it was not computed."""
    try:
        record = result.record("specialization")
    except KeyError:
        return []
    known = not math.isnan(record.score) and not cannot_tell(result)
    size = "cannot be told" if not known else size_word(record.score) if record.p <= SIGNIFICANCE else "none shown"
    covered = word_covered(result)
    word, place = share_of_word(record), share_of_position(record)
    if math.isnan(record.lexical):
        told = f"the share of the word is unknown: {word_unknown(result)}"
    elif math.isnan(word):
        told = "not told: specialization is not clearly above 0"
    else:
        told = f"{portion(word)} (of the {share(covered)} of tokens that occur in several texts)"
    excess = share(record.excess, sign=True)
    if not math.isnan(record.excess_low):
        excess += f" ({shares(record.excess_low, record.excess_high, sign=True)})"
    rows = [
        ("Size", size),
        ("Share of the word", told),
        ("Share of the position", portion(place)),
        ("Excess over the random router", excess),
    ]
    rows.append(("Domain of an unseen text named", decoded_words(result)))
    placebo = _placebo(result).get("summary", {}).get("random", {})
    if placebo.get("domains"):
        told = f"{_interval(placebo)}, told apart in {placebo['rejected']} of {placebo['domains']}"
        rows.append(("Placebo: domains split at random", told))
    return rows


def placebo_rows(result: Result) -> list[tuple[str | None, str, str, str, str]]:
    """What the halves of a domain show that was split at random, and by length: the domain (None: all), and score and p of either.

    Empty where no domain has enough source texts to be split.
    """
    found = _placebo(result)
    names = [name for name in result.task.domains if name in found.get(KINDS[0], {})]
    splits = [(None, found.get("summary", {})), *((name, {kind: found.get(kind, {}).get(name, {}) for kind in KINDS}) for name in names)]
    return [
        (name, _interval(random), _holm(random), _interval(length), _holm(length))
        for name, split in splits
        for random, length in [[split.get(kind, {}) for kind in KINDS]]
        if names
    ]


def _placebo(result: Result) -> Mapping[str, Any]:
    return result.companions.get("placebo", {})


def _interval(split: Mapping[str, float | None]) -> str:
    score, low, high = (split.get(name) for name in ("score", "score_low", "score_high"))
    return share(score) if low is None or high is None else f"{share(score)} ({shares(low, high)})"


def _holm(split: Mapping[str, float | None]) -> str:
    p = split.get("p_holm", split.get("p"))
    return p_cell(math.nan if p is None else p)


def named(result: Result) -> float | None:
    """How often the domain of an unseen text is named from its routing at all layers, 0 to 1; None where it is not known."""
    accuracy = result.companions.get("decoding", {}).get("model", {}).get("accuracy")
    return None if accuracy is None or math.isnan(accuracy) else float(accuracy)


def decoded_words(result: Result) -> str:
    """How often the domain of an unseen text is named, beside chance and what its words tell: ``92.1% (chance 12.5%, ...)``."""
    accuracy, model = named(result), result.companions.get("decoding", {}).get("model", {})
    if accuracy is None:
        return share(None)
    words = model.get("bag_of_words")
    beside = "" if words is None or math.isnan(words) else f", from its words {share(words)}"
    return f"{share(accuracy)} (chance {share(model.get('chance'))}{beside})"
