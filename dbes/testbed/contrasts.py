"""The finished cells of a grid by arm and seed, and contrasts between arms paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Value = Callable[[Mapping[str, Any]], float | None]
"""Reads one number from a cell's record."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95 % t-interval; the ends are NaN for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]" if self.seeds > 1 else f"{self.mean:.3g} (one seed)"


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with the 95 % interval of Student's t; NaN values are left out."""
    kept = np.asarray([value for value in values if value is not None and math.isfinite(value)], float)
    if not len(kept):
        return Interval(math.nan, math.nan, math.nan, 0)
    half = float(stats.t.ppf(0.975, len(kept) - 1) * kept.std(ddof=1) / math.sqrt(len(kept))) if len(kept) > 1 else math.nan
    return Interval(float(kept.mean()), float(kept.mean()) - half, float(kept.mean()) + half, len(kept))


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)


SPECIALIZATION: Value = lambda record: record["calibrated"]["specialization_normalized"]["corrected"]  # noqa: E731
SHARE: Value = lambda record: record["calibrated"]["specialization_normalized"]["score"]  # noqa: E731
LOSS: Value = lambda record: float(np.mean(list(record["bits_per_byte"].values())))  # noqa: E731
NATS: Value = lambda record: float(np.mean(list(record["nats_per_token"].values())))  # noqa: E731
AS_TRAINED: Value = lambda record: (record.get("as_trained") or record["calibrated"])["specialization_normalized"]["corrected"]  # noqa: E731
TRAINED_UTILIZATION: Value = lambda record: (record.get("as_trained") or record["companions"])["utilization"]  # noqa: E731
UTILIZATION: Value = lambda record: record["companions"]["utilization"]  # noqa: E731


class Grid:
    """The finished cells of a grid, by arm and seed."""

    def __init__(self, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        self.experiments: Mapping[str, list[str]] = about["experiments"]
        self.failed = [record for record in records if record["status"] != "ok"]
        self.cells = {(record["arm"], record["seed"]): record for record in records if record["status"] == "ok"}

    def arms(self, experiment: str) -> list[str]:
        """The arms of an experiment that have a finished cell, in the preset's order."""
        return [arm for arm in self.experiments.get(experiment, []) if self.seeds(arm)]

    def seeds(self, arm: str) -> list[int]:
        return sorted(seed for name, seed in self.cells if name == arm)

    def values(self, arm: str, value: Value) -> list[float]:
        return [number(value(self.cells[arm, seed])) for seed in self.seeds(arm)]

    def mean(self, arm: str, value: Value) -> Interval:
        return interval(self.values(arm, value))

    def differences(self, arm: str, other: str, value: Value) -> list[float]:
        """Arm minus other for every seed that both have: same initial weights, same data."""
        seeds = sorted(set(self.seeds(arm)) & set(self.seeds(other)))
        return [number(value(self.cells[arm, seed])) - number(value(self.cells[other, seed])) for seed in seeds]

    def contrast(self, arm: str, other: str, value: Value) -> Interval:
        return interval(self.differences(arm, other, value))
