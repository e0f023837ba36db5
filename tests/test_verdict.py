"""The verdict claims no more than the tests do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulate_tokens import drawn_sample

from dbes.results import CalibratedRecord, DomainFacts, ModelFacts, Result, TaskFacts
from dbes.scoring.portions import share_of_word
from dbes.scoring.score import score
from dbes.scoring.verdict import verdict
from dbes.trace.store import Trace
from dbes.wording import size_word

NAN = math.nan


def record(layer: int | None, domain: str | None, p: float, score: float = 0.31, **more: float) -> CalibratedRecord:
    numbers = dict.fromkeys(("value", "null", "corrected", "ci_low", "ci_high", "reference", "score_low", "score_high"), 0.1)
    return CalibratedRecord(metric="specialization", layer=layer, domain=domain, **{**numbers, "p": p, "score": score, **more})


def result(*records: CalibratedRecord, **more: Any) -> Result:
    layers = tuple(sorted({each.layer for each in records if each.layer is not None}))
    named = dict.fromkeys(each.domain for each in records if each.domain is not None)
    domains = {name: DomainFacts(documents=9, sources=9, tokens=99) for name in named}
    model = ModelFacts(name="m", layers=layers, experts=(8,) * len(layers), top_k=(2,) * len(layers))
    return Result(status="ok", created="now", model=model, task=TaskFacts(name="t", domains=domains), calibrated=records, **more)


def four_layers(*p: float) -> list[CalibratedRecord]:
    return [record(layer, None, value) for layer, value in enumerate(p)]


def test_specialization_in_every_layer() -> None:
    domains = [record(None, "law", 0.001, 0.4), record(None, "general", 0.2, 0.1), record(None, "code", 0.001, 0.3)]
    text = verdict(result(record(None, None, 0.000999), *four_layers(0.001, 0.001, 0.001, 0.001), *domains))
    assert text == (
        "Domain specialization is above chance in 4 of 4 layers (p < 0.001) and large: 31% of the ideal domain router. "
        "How much of it is the word is unknown: it was not measured. "
        "Specialization is strongest for law, weakest for general (not above chance: general)."
    )


@pytest.mark.parametrize(
    ("score", "more", "words"),
    [
        pytest.param(0.003, {}, "and very small: 0.3% of the ideal domain router.", id="hardly anything"),
        pytest.param(0.012, {}, "and small: 1.2% of the ideal domain router.", id="one percent"),
        pytest.param(1.34, {}, "and very large: 134% of the ideal domain router.", id="above the ideal router"),
        pytest.param(NAN, {}, "not measurable (on these texts the ideal domain router shows nothing)", id="no scale"),
        pytest.param(
            0.008, {"control": 0.004, "excess_low": 0.001, "excess_high": 0.007},
            "The score is more than what frozen random routers on the same representation show (less than 1%; excess +0.1% to +0.7%).",
            id="control of nothing",
        ),
        pytest.param(
            0.05, {"control": -0.004, "excess_low": 0.04, "excess_high": 0.06},
            "more than what frozen random routers on the same representation show (nothing above chance; excess +4.0% to +6.0%)",
            id="control below chance",
        ),
    ],
)  # fmt: skip
def test_scores_that_plain_percentages_would_misstate(score: float, more: dict[str, float], words: str) -> None:
    text = verdict(result(record(None, None, 0.001, score, **more), *four_layers(0.001)))
    assert words in text and " 0%" not in text and "in 1 of 1 layer (" in text and "far above" not in text


def test_a_model_above_chance_without_a_layer_or_a_domain_that_is() -> None:
    domains = [record(None, "law", 0.06, 0.4), record(None, "code", 0.04, 0.3)]
    text = verdict(result(record(None, None, 0.03), *four_layers(0.2, 0.04, 0.06, 0.5), *domains))
    assert "above chance on average over 4 layers (p = 0.03), though in no single one of them" in text
    assert text.endswith("No domain is above chance by itself.")


def test_sizes_have_words() -> None:
    words = [size_word(score) for score in (0.0099, 0.01, 0.05, 0.2, 0.5, 2.0)]
    assert words == ["very small", "small", "moderate", "large", "very large", "very large"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        pytest.param({"lexical": 0.03, "contextual": 0.07, "contextual_low": 0.05, "contextual_high": 0.09, "position": 0.02},
                     "30% of it is the word: what the token alone gives; position in the text alone gives 20%.", id="both"),
        pytest.param({"lexical": -0.01, "contextual": 0.11, "contextual_low": 0.09, "contextual_high": 0.13, "position": -0.01},
                     "None of it is the word by itself.", id="below 0 is nothing"),
        pytest.param({"lexical": 0.11, "contextual": -0.01, "contextual_low": -0.02, "contextual_high": 0.0, "position": 0.0},
                     "Routing follows the word: no more is shown than the token alone gives.", id="above 100 % is the word"),
        pytest.param({"lexical": 0.03, "contextual": 0.07, "contextual_low": -0.05, "contextual_high": 0.19, "position": 0.0},
                     "The token alone gives 30% of it, and it is not shown that routing knows more than the word.", id="wide interval"),
        pytest.param({"lexical": 0.001, "contextual": 0.002, "contextual_low": -0.05, "contextual_high": 0.05, "position": 0.0},
                     "How much of it is the word cannot be told: no more is shown than the token alone gives.", id="a share of nothing"),
    ],
)  # fmt: skip
def test_the_share_of_the_word(parts: dict[str, float], words: str) -> None:
    told = record(None, None, 0.001, corrected=0.1, ci_low=0.08, ci_high=0.12, **parts)
    assert words in verdict(result(told, *four_layers(0.001)))


def planted(router: str, *, token_ids: bool = True, **settings: float) -> Result:
    """The result of routing whose cause is known."""
    sample, shape = drawn_sample(router, np.random.default_rng(1), **settings)
    routes = sample.routes if token_ids else replace(sample.routes, token_ids=None)
    return score(Trace(shape=shape, provenance={"model": router}, loaded=(routes,)), permutations=200)


@pytest.mark.parametrize("router", ["lookup", "noisy"])
def test_a_router_that_looks_at_the_token_only_follows_the_word(router: str) -> None:
    text = planted(router).verdict
    assert "above chance in 1 of 1 layer (p = 0.005) and small" in text
    assert "Routing follows the word: no more is shown than the token alone gives." in text
    assert "From routing alone, the domain of an unseen text is named in" in text and "(chance 25%, from its words " in text


def test_a_router_that_looks_at_the_position_only_is_named_as_such() -> None:
    for token_ids in (True, False):
        text = planted("position", longer=4.0, longest=240, token_ids=token_ids).verdict
        assert "It is explained by the position in the text, or by the lengths of texts: position alone gives " in text
        assert "Nothing is shown about the content of domains." in text
        assert "word:" not in text and "strongest" not in text


def test_a_router_that_knows_the_domain_shows_more_than_the_word() -> None:
    found = planted("domains", effect=0.8)
    word = share_of_word(found.record("specialization"))
    assert 0.05 < word < 0.6 and f"{word:.0%} of it is the word: what the token alone gives." in found.verdict


def test_without_token_ids_the_share_of_the_word_is_unknown() -> None:
    found = planted("domains", effect=0.8, token_ids=False)
    assert "How much of it is the word is unknown: the recording has no token ids." in found.verdict


def test_few_texts_are_warned_of_and_told_as_far_as_they_go() -> None:
    found = planted("domains", effect=0.8, documents=5)
    assert any("have fewer than 8 source texts (5)" in warning for warning in found.warnings)
    assert not any("fewer than 8" in warning for warning in planted("domains", documents=8).warnings)
    assert "of tokens that occur in several texts" in found.verdict


def test_only_a_domain_above_chance_is_called_strongest() -> None:
    domains = [record(None, "law", 0.2, 0.9), record(None, "code", 0.001, 0.3), record(None, "math", 0.001, 0.2)]
    text = verdict(result(record(None, None, 0.001), *four_layers(0.001), *domains))
    assert "strongest for code, weakest for math (not above chance: law)" in text
    alike = [record(None, "law", 0.001, 0.3), record(None, "code", 0.001, 0.3)]
    assert verdict(result(record(None, None, 0.001), *four_layers(0.001), *alike)).endswith(
        "Specialization is about the same in all domains."
    )


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (-0.02, "is below 0 (-2.0% of the ideal router), not more"),
        (-1e-9, "is less than 1% of the ideal router, not"),
    ],
)
def test_chance_without_minus_nothing(score: float, words: str) -> None:
    text = verdict(result(record(None, None, 0.6, score), *four_layers(0.6)))
    assert text.startswith("No specialization found") and words in text and "-0" not in text


def texts(*count: int) -> TaskFacts:
    domains = {f"d{index}": DomainFacts(documents=each, sources=each, tokens=10) for index, each in enumerate(count)}
    return TaskFacts(name="t", domains=domains)


@pytest.mark.parametrize(
    ("sizes", "permutations", "p", "words"),
    [
        ((1, 1), 1000, 1.0, "Too few texts to tell; the smallest possible p is 1 (1 source text in each of 2 domains)"),
        ((3, 3), 1000, 0.04, "Too few texts to tell; the smallest possible p is 0.1 (3 source texts in each of 2 domains)"),
        ((9, 9), 10, 0.09, "Too few permutations to tell; the smallest possible p is 0.091 (10 permutations; run 1,000)"),
    ],
)
def test_too_few_texts_to_tell(sizes: tuple[int, ...], permutations: int, p: float, words: str) -> None:
    found = result(record(None, None, p), *four_layers(p), settings={"permutations": permutations})
    text = verdict(found.model_copy(update={"task": texts(*sizes)}))
    assert text.startswith(words) and "No specialization" not in text and "above chance in" not in text


def test_a_test_that_just_could_have_found_something_says_how_little() -> None:
    found = result(record(None, None, 0.3), *four_layers(0.3), settings={"permutations": 1000}).model_copy(update={"task": texts(4, 4)})
    assert "(p = 0.3, documents as the unit; the smallest possible p is 0.029)" in verdict(found)


def test_layers_are_counted_after_false_discovery_control() -> None:
    text = verdict(result(record(None, None, 0.02), *four_layers(0.04, 0.6, 0.7, 0.001)))
    assert "in 1 of 4 layers (p = 0.02)" in text


def test_chance_is_called_chance_even_if_a_layer_stands_out() -> None:
    text = verdict(result(record(None, None, 0.3, 0.01), *four_layers(0.001, 0.9, 0.9, 0.9)))
    assert text.startswith("No specialization") and "p = 0.3" in text and "of 4 layers" not in text


@pytest.mark.parametrize(
    ("control", "low", "high", "words"),
    [
        pytest.param(0.1, 0.05, 0.15, "3.1 times what frozen random routers", id="above the control"),
        pytest.param(0.0, 0.05, 0.15, "more than what", id="control near zero"),
        pytest.param(0.3, -0.1, 0.1, "no more than what frozen random routers", id="not above the control"),
        pytest.param(0.5, -0.3, -0.1, "less than what frozen random routers", id="below the control"),
        pytest.param(0.2, NAN, NAN, "Frozen random routers on the same representation show 20%.", id="no interval"),
    ],
)
def test_the_control_is_always_told(control: float, low: float, high: float, words: str) -> None:
    told = record(None, None, 0.001, control=control, excess=0.31 - control, excess_low=low, excess_high=high)
    assert words in verdict(result(told, *four_layers(0.001)))


@pytest.mark.parametrize(
    ("records", "more", "words"),
    [
        pytest.param((), {}, "No domain metric was computed", id="nothing computed"),
        pytest.param(
            (record(None, None, NAN, value=NAN),), {"warnings": ("one domain only",)}, "undefined here: one domain only", id="one domain"
        ),
        pytest.param((record(None, None, NAN, value=NAN),), {}, "a domain has no tokens", id="undefined without a warning"),
        pytest.param((record(None, None, NAN),), {}, "nothing can be said about chance", id="no permutation"),
    ],
)
def test_where_nothing_can_be_said_the_verdict_says_so(records: tuple[CalibratedRecord, ...], more: dict[str, Any], words: str) -> None:
    assert words in verdict(result(*records, **more))
