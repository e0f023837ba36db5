"""The verdict claims no more than the tests do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dbes.results import CalibratedRecord, ModelFacts, Result, TaskFacts
from dbes.verdict import verdict

NAN = math.nan


def record(layer: int | None, domain: str | None, p: float, score: float = 0.31, **more: float) -> CalibratedRecord:
    numbers = dict.fromkeys(("value", "null", "corrected", "ci_low", "ci_high", "reference", "score_low", "score_high"), 0.1)
    return CalibratedRecord(metric="specialization", layer=layer, domain=domain, **{**numbers, "p": p, "score": score, **more})


def result(*records: CalibratedRecord, **more: Any) -> Result:
    return Result(status="ok", created="now", model=ModelFacts(name="m"), task=TaskFacts(name="t"), calibrated=records, **more)


def four_layers(*p: float) -> list[CalibratedRecord]:
    return [record(layer, None, value) for layer, value in enumerate(p)]


def test_specialization_in_every_layer() -> None:
    domains = [record(None, "law", 0.001, 0.4), record(None, "general", 0.2, 0.1), record(None, "code", 0.001, 0.3)]
    text = verdict(result(record(None, None, 0.000999), *four_layers(0.001, 0.001, 0.001, 0.001), *domains))
    assert text == (
        "Domain specialization is above chance in 4 of 4 layers (p < 0.001): 31% of the ideal domain router; "
        "strongest for law, weakest for general (not above chance: general)."
    )


def test_layers_are_counted_after_false_discovery_control() -> None:
    text = verdict(result(record(None, None, 0.02), *four_layers(0.04, 0.6, 0.7, 0.001)))
    assert "in 1 of 4 layers (p = 0.02)" in text


def test_chance_is_called_chance_even_if_a_layer_stands_out() -> None:
    text = verdict(result(record(None, None, 0.3, 0.01), *four_layers(0.001, 0.9, 0.9, 0.9)))
    assert text.startswith("No specialization") and "p = 0.3" in text and "of 4 layers" not in text


@pytest.mark.parametrize(
    ("control", "low", "high", "words"),
    [
        pytest.param(0.1, 0.05, 0.15, "3.1 times what a frozen random router", id="above the control"),
        pytest.param(0.0, 0.05, 0.15, "far above what", id="control near zero"),
        pytest.param(0.3, -0.1, 0.1, "no more than a frozen random router", id="not above the control"),
        pytest.param(0.5, -0.3, -0.1, "less than a frozen random router", id="below the control"),
        pytest.param(0.2, NAN, NAN, "(random-router control: 20%)", id="no interval"),
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
