"""Metrics of your own: a function of a layer's expert counts gets its chance level, interval, bound and place in every report.

Run it alone, or give one of its metrics to the command line:

    dbes score results/.../trace --metric examples/own_metric.py:ASSOCIATION --output-path scored
"""

from __future__ import annotations

import sys

import numpy as np

import dbes


def association(counts: np.ndarray) -> np.ndarray:
    """Each domain's part of Cramer's V squared, [domains], from counts [domains, experts]: 0 alike, 1 no expert serves two domains."""
    usage = counts / counts.sum(axis=1, keepdims=True)
    used = usage[:, usage.sum(axis=0) > 0]
    mean = used.mean(axis=0)
    return ((used - mean) ** 2 / mean).sum(axis=1) / (len(counts) - 1)


def top_expert(counts: np.ndarray) -> float:
    """Load of the busiest expert, 1 = as much as the mean of all."""
    return float(counts.sum(axis=0).max() / counts.sum(axis=0).mean())


ASSOCIATION = dbes.Metric(
    name="association",
    function=association,
    title="Association",
    meaning="Cramer's V squared of domains and experts",
    per_domain=True,
)

BUSIEST = dbes.Metric(
    name="top_expert",
    function=top_expert,
    title="Busiest expert",
    meaning="Load of the busiest expert as a multiple of the mean",
    zero=1.0,
    bound=None,  # no ideal: the score is the distance from an even load
    chance=False,  # it compares no domains
)


def main() -> None:
    trace = dbes.record("embedded", limit=int(sys.argv[1]) if len(sys.argv) > 1 else None)
    result = dbes.score(trace, metrics=[ASSOCIATION, BUSIEST])
    for name in result.own_metrics:
        model = result.record(name)
        print(f"{name}: {model.value:.3f}, by chance {model.null:.3f}, ideal {model.reference:.3f}, p = {model.p:.3g}")
        print(f"  score {model.score:.3f}, 95 % interval {model.score_low:.3f} to {model.score_high:.3f}")


if __name__ == "__main__":
    main()
