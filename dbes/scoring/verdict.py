"""The verdict in words: what a reader may conclude from a result, including that there is nothing to conclude."""

from __future__ import annotations

import math

import numpy as np

from dbes.results import CalibratedRecord, Result
from dbes.scoring.portions import (
    MOSTLY,
    beyond_word,
    follows_position,
    share_of_position,
    share_of_word,
    word_covered,
    word_unknown,
)
from dbes.scoring.resampling import false_discovery_q
from dbes.scoring.resolution import SIGNIFICANCE, cannot_tell, smallest_p, texts_of, why_not
from dbes.wording import counted, p_words, share, shares, size_word, span

TINY = 0.01
"""Scores below this that may be chance, and controls, are told as "less than 1%": digits of noise say nothing."""

WHOLE = 0.1
"""Scores from which decimals are left out."""

COVERED = 0.95
"""Below this share of tokens that the share of the word can be told of, it is said of how many."""

RATIO_FROM = 0.02
"""Scores of the control from which "so many times the control" is told: below, the ratio is mostly noise."""

UNDEFINED = ("one domain only", "has no tokens", "every expert is used")
"""Parts of the warnings that say why specialization is undefined."""


def verdict(result: Result) -> str:
    """Some sentences that claim no more than the tests do: the score, how much of it is the word, the random router, decoding, domains.

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
    size = "" if math.isnan(model.score) or model.score < 0 else f" and {size_word(model.score)}"
    sentences = [
        f"Domain specialization is above chance {_layer_words(result, model.p)}{size}: {_of_ideal(model, 'domain router')}.",
        _portion_words(result, model),
        _control_words(model),
        _decoding_words(result),
        "" if follows_position(model) else _domain_words(result),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


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
    if math.isnan(model.score):
        return f"not measurable (on these texts the ideal {name} shows nothing)"
    if model.score < -TINY / 20:
        return f"below 0 ({share(model.score)} of the ideal {name})"
    if model.score < TINY and not model.p <= SIGNIFICANCE:
        return f"less than 1% of the ideal {name}"
    return f"{share(model.score, 0 if model.score >= WHOLE else 1)} of the ideal {name}"


def _portion_words(result: Result, model: CalibratedRecord) -> str:
    """How much of the score is the word, or its place in the text."""
    if follows_position(model):
        return (
            "It is explained by the position in the text, or by the lengths of texts: position alone gives "
            f"{share(share_of_position(model), 0)} of it. Nothing is shown about the content of domains."
        )
    word, place = share_of_word(model), share_of_position(model)
    beside = f"; position in the text alone gives {share(place, 0)}" if place >= TINY else ""
    if math.isnan(model.contextual_low):
        return f"How much of it is the word is unknown: {word_unknown(result)}{beside}."
    covered = word_covered(result)
    among = f", of the {share(covered, 0)} of tokens that occur in several texts" if covered < COVERED else ""
    if beyond_word(model):
        if math.isnan(word):
            return f"It is more than the token alone gives{among}{beside}."
        told = f"{share(word, 0)} of it is the word: what the token alone gives" if word >= TINY else "None of it is the word by itself"
        return f"{told}{among}{beside}."
    if math.isnan(word):
        return f"How much of it is the word cannot be told{among}: no more is shown than the token alone gives{beside}."
    if word < MOSTLY:
        return f"The token alone gives {share(word, 0)} of it{among}, and it is not shown that routing knows more than the word{beside}."
    return f"Routing follows the word: no more is shown than the token alone gives{among}{beside}."


def _decoding_words(result: Result) -> str:
    """How often the domain of an unseen text is named from its routing, beside chance and the words themselves."""
    model = result.companions.get("decoding", {}).get("model", {})
    accuracy, chance, words = (model.get(name) for name in ("accuracy", "chance", "bag_of_words"))
    if accuracy is None or math.isnan(accuracy) or chance is None:
        return ""
    beside = "" if words is None or math.isnan(words) else f", from its words {share(words, 0)}"
    named = share(accuracy, 0)
    return f"From routing alone, the domain of an unseen text is named in {named} of texts (chance {share(chance, 0)}{beside})."


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
        return "No domain is above chance by itself."
    strongest, weakest = max(above, key=lambda record: record.score), min(records, key=lambda record: record.score)
    text = f"Specialization is strongest for {strongest.domain}, weakest for {weakest.domain}"
    if share(strongest.score) == share(weakest.score):
        text = "Specialization is about the same in all domains"
    return text + (f" (not above chance: {', '.join(str(record.domain) for record in silent)})." if silent else ".")


def _control_words(model: CalibratedRecord) -> str:
    """The score beside what frozen random routers show, which it must exceed to be the router's merit."""
    score, control, low, high = model.score, model.control, model.excess_low, model.excess_high
    if math.isnan(control):
        return ""
    shown = share(control, 0 if control >= WHOLE else 1) if control >= TINY else "less than 1%" if control > 0 else "nothing above chance"
    if math.isnan(low):
        return f"Frozen random routers on the same representation show {shown}."
    others = "what frozen random routers on the same representation show"
    if low > 0:
        ratio = f"{score / control:.1f} times" if control >= RATIO_FROM else "more than"
        excess = f"excess {shares(low, high, sign=True)}"
        return f"The score is {ratio} {others} ({shown}; {excess})."
    if high < 0:
        return f"The score is less than {others} ({shown}): the router does not add to it."
    return f"The score is no more than {others} ({shown}): it is not shown that the router adds to it."
