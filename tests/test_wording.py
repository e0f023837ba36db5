"""Numbers as readers see them."""

from __future__ import annotations

import math

import pytest

from dbes.wording import counted, p_cell, p_words, plus_minus, share, shares, span, whole

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (0.1234, 1, False, "12.3%"),
        (0.31, 0, False, "31%"),
        (1.2, 0, False, "120%"),
        (0.0, 1, False, "0.0%"),
        (-0.0, 1, True, "0.0%"),
        (-1e-17, 1, False, "0.0%"),
        (0.0003, 1, False, "0.03%"),
        (0.003, 0, False, "0.3%"),
        (-0.0003, 1, False, "-0.03%"),
        (0.000001, 1, False, "<0.001%"),
        (-0.000001, 1, True, ">-0.001%"),
        (0.05, 1, True, "+5.0%"),
        (-0.05, 1, True, "-5.0%"),
        (NAN, 1, False, "–"),
        (math.inf, 1, False, "–"),
        (None, 1, False, "–"),
    ],
)
def test_a_share_that_is_not_nothing_is_never_written_as_nothing(value: float | None, digits: int, sign: bool, text: str) -> None:
    assert share(value, digits, sign=sign) == text


def test_intervals_have_two_known_ends_or_none() -> None:
    assert shares(-0.0001, 0.2) == "-0.01% to 20.0%"
    assert shares(0.01, 0.2, sign=True) == "+1.0% to +20.0%"
    assert shares(NAN, 0.2) == shares(0.1, None) == "–"
    assert plus_minus(0.1, 0.2) == " ±5.0" and plus_minus(NAN, NAN) == plus_minus(None, 0.1) == ""
    assert plus_minus(0.1, 0.1002) == " ±0.0"


@pytest.mark.parametrize(
    ("p", "cell", "words"),
    [
        (0.0004, "<0.001", "p < 0.001"),
        (0.001, "0.001", "p = 0.001"),
        (0.01, "0.010", "p = 0.01"),
        (0.05, "0.050", "p = 0.05"),
        (0.0501, "0.0501", "p = 0.05"),
        (1.0, "1.000", "p = 1"),
    ],
)
def test_p_values(p: float, cell: str, words: str) -> None:
    assert (p_cell(p), p_words(p)) == (cell, words)
    assert p_cell(NAN) == p_cell(None) == "–"


def test_whole_numbers_keep_every_digit() -> None:
    assert whole(3_942_528) == whole(3_942_528.0) == "3,942,528"
    assert whole(12_345_678_901) == "12,345,678,901"
    assert whole(19.4) == "19.4" and whole(1_000_000.25) == "1,000,000.2"
    assert whole(None) == whole(NAN) == "–"


def test_one_of_a_thing_is_singular() -> None:
    assert counted(1, "layer") == "1 layer" and counted(0, "layer") == "0 layers" and counted(1200, "token") == "1,200 tokens"
    assert span([3, 3]) == "3" and span([5, 3]) == "3 to 5"
