"""Parts of a result that are read strictly: numbers, settings, companions, and what is kept of the user's own metrics."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from dbes.schema import Number, Open, Strict, Whole


class NumberKeyed(dict[int, Any]):
    """A mapping by whole number that also answers to the number written as text, as JSON has it."""

    def __missing__(self, key: object) -> Any:
        if isinstance(key, str) and key.lstrip("-").isdigit():
            return self[int(key)]
        raise KeyError(key)


class Part(Strict):
    """What is written as strict JSON."""

    model_config = ConfigDict(ser_json_inf_nan="null")


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
    strata: tuple[str, ...] = ()


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


class OwnMetric(Part):
    """What a result keeps of a metric of the user's own, see `dbes.Metric`; its values stand among ``calibrated``."""

    title: str
    meaning: str = ""
    per_domain: bool
    unit: Literal["domains", "documents"]
    counts: Literal["hits", "mass", "primaries"]
    zero: Number
    bound: Literal["ideal"] | float | None
    better: Literal["higher", "lower"]
    chance: bool
    version: Whole
    sha256: str | None
    place: str = ""

    @property
    def identity(self) -> str:
        """All but its words and its place; only values of one identity are compared."""
        return self.model_dump_json(exclude={"title", "meaning", "place"})


class StratumScore(Part):
    """One metric of a stratum, all domains together. ``layer`` None: mean over layers; the rest as in ``CalibratedRecord``."""

    metric: str
    layer: int | None
    value: Number
    null: Number
    corrected: Number
    ci_low: Number
    ci_high: Number
    p: Number
    reference: Number
    score: Number
    score_low: Number
    score_high: Number


class Stratum(Part):
    """Some of the tokens: how many, their share of those that are in a stratum, and the source texts that they are in."""

    name: str
    tokens: Whole
    share: Number
    documents: Whole
    scores: tuple[StratumScore, ...] = ()

    def score(self, metric: str, layer: int | None = None) -> StratumScore | None:
        """The score of a metric, of the model by default; None where there is none."""
        return next((each for each in self.scores if (each.metric, each.layer) == (metric, layer)), None)


class StrataDifference(Part):
    """The score of one stratum less that of another, mean over layers, paired over the documents that have tokens in both.

    Attributes:
        matched: on the same tokens, which are a share ``covered`` of all that are in a stratum.
        p: two-sided; p_holm: over the pairs of strata of the kind.
        reason: why it is unknown.
    """

    first: str
    second: str
    metric: str
    matched: bool
    difference: Number = math.nan
    low: Number = math.nan
    high: Number = math.nan
    p: Number = math.nan
    p_holm: Number = math.nan
    covered: Number = math.nan
    reason: str | None = None


class Strata(Part):
    """Tokens divided by one thing that is known of them. ``reason``: why the trace cannot be divided so."""

    by: str
    reason: str | None = None
    strata: tuple[Stratum, ...] = ()
    differences: tuple[StrataDifference, ...] = ()
    notes: tuple[str, ...] = ()
