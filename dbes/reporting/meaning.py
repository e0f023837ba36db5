"""What a score means, as rows that every form of a result shows: its size, the word, the position, the random router, decoding."""

from __future__ import annotations

import math

from dbes.results import Result
from dbes.scoring.portions import share_of_position, share_of_word, word_covered, word_unknown
from dbes.scoring.resolution import SIGNIFICANCE, cannot_tell
from dbes.wording import portion, share, shares, size_word


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
    return [*rows, ("Domain of an unseen text named", decoded_words(result))]


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
