"""The verdict in words: what a reader may conclude from a result, including that there is nothing to conclude."""

from __future__ import annotations

import math

import numpy as np

from dbes.results import Result
from dbes.uncertainty import false_discovery_q

SIGNIFICANCE = 0.05


def verdict(result: Result) -> str:
    """One or two sentences that claim no more than the tests do.

    Layers are counted after Benjamini-Hochberg over the layers, and only when the model's own test passes, so that a router
    without specialization is not given a few layers by chance.
    """
    try:
        model = result.record("specialization")
    except KeyError:
        return "No domain metric was computed."
    if math.isnan(model.value):
        return "Specialization is undefined here: " + (result.warnings[0] if result.warnings else "a domain has no tokens") + "."
    if math.isnan(model.p):
        return "No permutation was run, so nothing can be said about chance."
    rows = [record for record in result.calibrated if record.metric == "specialization"]
    layers = [record for record in rows if record.domain is None and record.layer is not None]
    q = false_discovery_q(np.array([record.p for record in layers]))
    above = int((q <= SIGNIFICANCE).sum())
    if model.p > SIGNIFICANCE:
        return (
            f"No specialization: domain information is {model.score:.1%} of the ideal router's, not more than chance "
            f"(p = {model.p:.2g}, documents as the unit). Nothing should be concluded from single layers or experts."
        )
    words = [
        f"Domain specialization is above chance in {above} of {len(layers)} layers ({_p_words(model.p)}): "
        f"{model.score:.0%} of the ideal domain router"
    ]
    if not math.isnan(model.control):
        words.append(_control_words(model.score, model.control, model.excess_low, model.excess_high))
    domains = sorted(
        (record for record in rows if record.layer is None and record.domain is not None),
        key=lambda record: record.score,
    )
    text = "".join(words)
    if domains:
        text += f"; strongest for {domains[-1].domain}, weakest for {domains[0].domain}"
        silent = [record.domain for record in domains if record.p > SIGNIFICANCE]
        if silent:
            text += f" (not above chance: {', '.join(str(domain) for domain in silent)})"
    return text + "."


def _p_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _control_words(score: float, control: float, low: float, high: float) -> str:
    if math.isnan(low):
        return f" (random-router control: {control:.0%})"
    if low > 0:
        ratio = f"{score / control:.1f} times" if control > 0.005 else "far above"
        return f", {ratio} what a frozen random router on the same representation shows ({control:.0%}; excess {low:+.0%} to {high:+.0%})"
    if high < 0:
        return f", less than a frozen random router on the same representation shows ({control:.0%}): the router does not add to it"
    return f", no more than a frozen random router on the same representation shows ({control:.0%}): the router does not add to it"
