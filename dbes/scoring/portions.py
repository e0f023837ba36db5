"""Which part of a value is the word, and which its place in the text: shares of what routing says about the domains."""

from __future__ import annotations

import math

from dbes.results import CalibratedRecord, Result

MOSTLY = 0.8
"""From this share of the value on, position explains it where the interval does not contradict."""


def routed(record: CalibratedRecord) -> float:
    """The router's corrected value on the tokens that occur in several source texts, in the unit of ``corrected``; NaN if unknown."""
    return record.lexical + record.contextual


def share_of_word(record: CalibratedRecord) -> float:
    """Share of the value that a router shows that looks at the token alone, 0 to 1.

    NaN without token ids, and where the value is not clearly above 0: a share of nothing says nothing.
    """
    return _share(record.lexical, routed(record), record)


def share_of_position(record: CalibratedRecord) -> float:
    """As ``share_of_word``, of a router that looks at the position in the text alone."""
    return _share(record.position, record.corrected, record)


def follows_position(record: CalibratedRecord) -> bool:
    """Whether the value is what position gives: nearly all of it, and no less than the lower end of the router's interval."""
    return share_of_position(record) >= MOSTLY and record.position >= record.ci_low


def beyond_word(record: CalibratedRecord) -> bool:
    """Whether the router shows more than the token alone gives, by the 95 % interval of the paired difference."""
    return record.contextual_low > 0


def word_unknown(result: Result) -> str:
    """Why the share of the word is not known."""
    if "surrogate_covered" not in result.companions:
        return "it was not measured"
    tokens = word_covered(result)
    if math.isnan(tokens):
        return "the recording has no token ids"
    return "no token occurs in two texts" if tokens == 0 else "its interval cannot be computed"


def word_covered(result: Result) -> float:
    """Share of the tokens looked at that occur in several source texts: of these the share of the word is told. NaN if unknown."""
    key = "bigram" if result.settings.get("surrogate") == "bigram" else "lexical"
    tokens = result.companions.get("surrogate_covered", {}).get(key, {}).get("all")
    return math.nan if tokens is None else float(tokens)


def _share(part: float, value: float, record: CalibratedRecord) -> float:
    reach = record.corrected - record.ci_low
    if not (record.ci_low > 0 and value - reach > 0) or math.isnan(part):
        return math.nan
    return min(max(part / value, 0.0), 1.0)
