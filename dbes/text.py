"""Text from outside (names, ids, tokens, messages of other programs) as a terminal or a log may show it."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that move the cursor, change colours or direction, or show nothing."""


def printable(text: object, *, lines: bool = False) -> str:
    r"""The text with every character that a terminal would obey, or not show, written as its escape (``\x1b``, ``\u202e``).

    Args:
        lines: keep line breaks and tabs, for text of several lines.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        character if character in kept or unicodedata.category(character) not in HIDDEN
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in str(text)
    )  # fmt: skip


def clipped(value: object, most: int = 80) -> str:
    """A value from outside in at most ``most`` characters of one line, for an error message."""
    text = printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."


def lone_surrogate(text: str) -> int | None:
    """Place of the first half of a surrogate pair, which is no character and has no UTF-8; None in proper text."""
    if text.isascii():
        return None
    return next((place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
