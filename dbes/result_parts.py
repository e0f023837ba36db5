"""What is read of a result's settings and companions has its type; what is not read may be anything."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dbes.schema import Open, Whole


def _nan_when_null(number: Any) -> Any:
    return math.nan if number is None else number


Number = Annotated[float, Field(allow_inf_nan=True, strict=True), BeforeValidator(_nan_when_null)]
"""A float whose NaN is written as null: strict JSON has no NaN."""


class _Generation(Open):
    tokens: Whole = 0


class Settings(Open):
    generation: _Generation | None = None
    permutations: Whole = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    limit: Whole | None = None
    phase: Literal["all", "prompt", "generated"] = "all"
    match: Literal["none", "length"] = "none"
    surrogate: Literal["token", "bigram"] = "token"


class _Similarity(Open):
    domains: tuple[str, ...] = ()
    mean_over_layers: tuple[tuple[Number, ...], ...] | None = None


class _Passed(Open):
    tests: Whole = 0
    specialists: Whole = 0
    not_listed: Whole = 0
    by_domain: dict[str, Whole] = Field(default_factory=dict)
    by_lift: dict[str, Whole] = Field(default_factory=dict)


class _Decoded(Open):
    accuracy: Number = math.nan
    accuracy_low: Number = math.nan
    accuracy_high: Number = math.nan
    chance: Number = math.nan
    bits: Number = math.nan
    texts: Whole = 0
    bag_of_words: Number = math.nan
    bag_of_words_texts: Whole = 0


class _Decoding(Open):
    """How often the domain of an unseen text is named from its routing; empty in results of earlier versions."""

    model: _Decoded = _Decoded()
    by_layer: dict[int, _Decoded] = Field(default_factory=dict)


class _Split(Open):
    texts: Whole = 0
    score: Number = math.nan
    score_low: Number = math.nan
    score_high: Number = math.nan
    p: Number = math.nan
    p_holm: Number = math.nan
    p_least: Number = math.nan


class _Splits(Open):
    domains: Whole = 0
    rejected: Whole = 0
    score: Number = math.nan
    score_low: Number = math.nan
    score_high: Number = math.nan
    p: Number = math.nan
    p_least: Number = math.nan


class _Placebo(Open):
    """Each domain's texts split in two, at random and by length, and scored as two domains; empty in results of earlier versions."""

    random: dict[str, _Split] = Field(default_factory=dict)
    length: dict[str, _Split] = Field(default_factory=dict)
    summary: dict[str, _Splits] = Field(default_factory=dict)


class _Covered(Open):
    all: Number = math.nan
    by_domain: dict[str, Number] = Field(default_factory=dict)


class _Phase(Open):
    tokens: Whole = 0
    documents: Whole = 0
    without: tuple[str, ...] = ()


class _Phases(Open):
    """Prompt and generated text scored apart, and the paired difference of both by metric; only where answers were generated."""

    prompt: _Phase = _Phase()
    generated: _Phase = _Phase()
    metrics: dict[str, dict[str, Number]] = Field(default_factory=dict)


class _Loops(Open):
    """Answers that repeat themselves; only where answers were generated."""

    dropped: bool = False
    answers: dict[str, Whole] = Field(default_factory=dict)
    by_domain: dict[str, Whole] = Field(default_factory=dict)
    documents: tuple[str, ...] = ()


class Companions(Open):
    by_layer: dict[str, dict[int, Number]] = Field(default_factory=dict)
    model: dict[str, Number] = Field(default_factory=dict)
    similarity: _Similarity = _Similarity()
    distinct_texts: dict[str, Whole] = Field(default_factory=dict)
    specialists: _Passed = _Passed()
    decoding: _Decoding = _Decoding()
    placebo: _Placebo = _Placebo()
    surrogate_covered: dict[str, _Covered] = Field(default_factory=dict)
    phases: _Phases = _Phases()
    loops: _Loops = _Loops()
