"""Paired differences between models, corrected over their table, and the ranks that they allow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dbes.scoring.resampling import holm

LEVEL = 0.05
"""Two models are told apart when the paired test, corrected over all pairs of the table (Holm), stays below this."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Score of one model minus that of another on the same documents; ``adjusted``: p after Holm over the tests of its table.

    ``of``: ``score``, or ``excess``: then scores and difference are excesses over each model's own random router.
    """

    first: str
    second: str
    metric: str
    depth: str
    score_first: float
    score_second: float
    difference: float
    low: float
    high: float
    p: float
    adjusted: float = math.nan
    of: str = "score"


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Place by a metric: 1 + the models that are significantly better, and the last place that cannot be excluded."""

    place: int
    last: int

    def __str__(self) -> str:
        return str(self.place) if self.place == self.last else f"{self.place} ({self.place}–{self.last})"


def corrected(tests: list[Difference]) -> list[Difference]:
    """The tests with p-values corrected after Holm: the chance of any false difference in the table stays below its level."""
    return [replace(test, adjusted=value) for test, value in zip(tests, holm([test.p for test in tests]).tolist(), strict=True)]


def ranks_of(labels: list[str], pairs: Sequence[Difference]) -> dict[str, Rank]:
    """Ranks by tested differences only: models that cannot be told apart from the best share place 1, and so on.

    ``place`` is 1 + the number of significantly better models, ``last`` the number of models that are not significantly worse.
    """
    better, worse = Counter[str](), Counter[str]()
    for pair in pairs:
        if pair.adjusted <= LEVEL and {pair.first, pair.second} <= set(labels):
            winner, loser = (pair.first, pair.second) if pair.difference > 0 else (pair.second, pair.first)
            better[loser] += 1
            worse[winner] += 1
    return {label: Rank(place=1 + better[label], last=len(labels) - worse[label]) for label in labels}
