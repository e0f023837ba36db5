"""Text from outside as a terminal, a table or a page may show it."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbes.text import HIDDEN, clipped, json_text, label, labels, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("law", "law"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb", r"a\u202eb"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("größe, 数学", "größe, 数学"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_are_kept_where_they_are_meant() -> None:
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\r"


def test_long_names_are_clipped_in_the_middle() -> None:
    assert label("abcdefghij", 7) == "abc…hij"
    assert label("abcdefg", 7) == "abcdefg"
    assert label("") == "(no name)"


@pytest.mark.parametrize(
    "names",
    [
        ["x" * 70 + "a" + "y" * 70, "x" * 70 + "b" + "y" * 70],
        ["a\u200bb", "ab", "a\\u200bb"],
        ["law", "law ", " law", "law\u00a0", "law\ufe0f", "l\u034faw", "la\u00adw"],
        ["é", "e\u0301"],
        ["", " ", "\u3164", "\u2800"],
        ["\x1b[31m", "\\x1b[31m"],
    ],
)
def test_names_that_look_alike_stay_apart(names: list[str]) -> None:
    made = list(labels(names, 40).values())
    assert len({"".join(unicodedata.normalize("NFKC", shown).split()) for shown in made}) == len(names)
    assert all(len(shown) <= 40 for shown in made)


def test_names_that_differ_are_left_as_they_are() -> None:
    assert labels(["law", "code", "Law"]) == {"law": "law", "code": "code", "Law": "Law"}


@given(st.lists(st.text(), unique=True))
def test_labels_are_distinct_short_and_harmless(names: list[str]) -> None:
    made = labels(names, 30)
    assert list(made) == names and len(set(made.values())) == len(names)
    assert not any(unicodedata.category(character) in HIDDEN for shown in made.values() for character in shown)


@given(st.text())
def test_json_says_the_same_without_what_a_terminal_obeys(text: str) -> None:
    written = json_text(json.dumps({"a": text}, ensure_ascii=False, indent=1))
    assert json.loads(written) == {"a": text}
    assert not any(unicodedata.category(character) in HIDDEN for character in written.replace("\n", ""))


def test_values_in_messages_are_short() -> None:
    assert len(clipped([1] * 10**6)) == 80
