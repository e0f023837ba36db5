"""The verdict in words: what a reader may conclude from a result, including that there is nothing to conclude."""

from __future__ import annotations

import math

import numpy as np

from dbes.results import CalibratedRecord, Result
from dbes.scoring.resampling import false_discovery_q
from dbes.scoring.resolution import SIGNIFICANCE, cannot_tell, smallest_p, texts_of, why_not
from dbes.wording import counted, p_words, share, span

TINY = 0.01
"""Scores below this are told as "less than 1%": rounded, they would read as nothing at all."""

RATIO_FROM = 0.02
"""Scores of the control from which "so many times the control" is told: below, the ratio is mostly noise."""

FAR = 0.1
"""Scores from which a control without any is called far below."""

UNDEFINED = ("one domain only", "has no tokens", "every expert is used")
"""Parts of the warnings that say why specialization is undefined."""


def verdict(result: Result) -> str:
    """One or two sentences that claim no more than the tests do.

    Where the texts are so few that no outcome could have been significant, that is said, and nothing about the router. Layers and
    domains are counted after Benjamini-Hochberg over them, and only when the model's own test passes, so that a router
    without specialization is not given a few layers by chance.
    """
    try:
        model = result.record("specialization")
    except KeyError:
        return "No domain metric was computed."
    if math.isnan(model.value):
        return f"Specialization is undefined here: {_why_undefined(result)}."
    if not result.documents_known:
        return (
            f"Domain information is {model.value:.4f} nats; whether that is more than chance cannot be said: intervals and tests need "
            "counts of documents, and only those of whole domains are known."
        )
    if math.isnan(model.p):
        return "No permutation test was run (permutations = 0), so nothing can be said about chance."
    if cannot_tell(result):
        return _cannot_tell_words(result, model)
    if model.p > SIGNIFICANCE:
        least = smallest_p(result)
        possible = f"; the smallest possible p is {least:.2g}" if least > SIGNIFICANCE / 5 else ""
        return (
            f"No specialization found: domain information is {_of_ideal(model, 'router')}, not more than chance "
            f"({p_words(model.p)}, documents as the unit{possible}). Nothing should be concluded from single layers or experts."
        )
    text = f"Domain specialization is above chance {_layer_words(result, model.p)}: {_of_ideal(model, 'domain router')}"
    if model.score < TINY:
        text += ", though distinguishable from chance"
    if not math.isnan(model.control):
        text += _control_words(model.score, model.control, model.excess_low, model.excess_high)
    return f"{text}{_domain_words(result)}."


def current_verdict(result: Result) -> str:
    """The verdict of a stored result; worded again where nothing could have been found, which older versions did not say."""
    return verdict(result) if result.status == "ok" and cannot_tell(result) else result.verdict


def _why_undefined(result: Result) -> str:
    reasons = [warning for warning in result.warnings if any(part in warning for part in UNDEFINED)]
    return (reasons or ["a domain has no tokens"])[0]


def _cannot_tell_words(result: Result, model: CalibratedRecord) -> str:
    texts = list(texts_of(result).values())
    sources = sum(facts.sources for facts in result.task.domains.values())
    reason, noun = why_not(result), "source text" if max(texts) == 1 else "source texts"
    repeated = ", copies left out," if sum(texts) < sources else ""
    size = f"{span(texts)} {noun}{repeated} in each of {counted(len(texts), 'domain')}"
    if "permutations" in reason:
        size = f"{counted(result.settings['permutations'], 'permutation')}; run 1,000"
    return (
        f"{reason[0].upper()}{reason[1:]} ({size}), so that no router could be told from chance. "
        f"Domain information is {_of_ideal(model, 'router')}; nothing should be concluded from it, from single layers or from experts."
    )


def _of_ideal(model: CalibratedRecord, name: str) -> str:
    """The model's score in words; scores below 0 and above 1, and those without a scale, are not told as plain shares."""
    if math.isnan(model.score) or (not math.isnan(model.reference - model.null) and model.reference < model.null):
        return f"not measurable (on these texts the ideal {name} shows no more than chance itself)"
    if model.score < -TINY / 20:
        return f"below what shuffled labels give ({share(model.score)} of the ideal {name})"
    if model.score < TINY:
        return f"less than 1% of the ideal {name}"
    told = f"{share(model.score, 0)} of the ideal {name}"
    return f"{told}, which is no upper bound here" if model.score > 1.005 else told


def _layer_words(result: Result, p: float) -> str:
    layers = [
        record for record in result.calibrated if record.metric == "specialization" and record.domain is None and record.layer is not None
    ]
    if not layers:
        return f"({p_words(p)})"
    above = int((false_discovery_q(np.array([record.p for record in layers])) <= SIGNIFICANCE).sum())
    if not above:
        return f"on average over {counted(len(layers), 'layer')} ({p_words(p)}), though in no single one of them"
    return f"in {above} of {counted(len(layers), 'layer')} ({p_words(p)})"


def _domain_words(result: Result) -> str:
    """The strongest and the weakest domain; only a domain that is above chance by itself is called strongest."""
    records = [
        record for record in result.calibrated if record.metric == "specialization" and record.layer is None and record.domain is not None
    ]
    if not records:
        return ""
    q = false_discovery_q(np.array([record.p for record in records]))
    above = [record for record, value in zip(records, q.tolist(), strict=True) if value <= SIGNIFICANCE]
    silent = [record for record in sorted(records, key=lambda record: record.score) if record not in above]
    if not above:
        return "; no domain is above chance by itself"
    strongest, weakest = max(above, key=lambda record: record.score), min(records, key=lambda record: record.score)
    text = f"; strongest for {strongest.domain}, weakest for {weakest.domain}"
    if share(strongest.score) == share(weakest.score):
        text = "; about the same in all domains"
    return text + (f" (not above chance: {', '.join(str(record.domain) for record in silent)})" if silent else "")


def _control_words(score: float, control: float, low: float, high: float) -> str:
    shown = share(control, 0) if control >= TINY else "less than 1%" if control > 0 else "nothing above chance"
    if math.isnan(low):
        return f" (random-router control: {shown})"
    if low > 0:
        ratio = f"{score / control:.1f} times" if control >= RATIO_FROM else "far above" if score >= FAR else "above"
        excess = f"excess {share(low, 0, sign=True)} to {share(high, 0, sign=True)}"
        return f", {ratio} what a frozen random router on the same representation shows ({shown}; {excess})"
    if high < 0:
        return f", less than a frozen random router on the same representation shows ({shown}): the router does not add to it"
    return f", no more than a frozen random router on the same representation shows ({shown}): it is not shown that the router adds to it"
