"""Text from outside (names, ids, tokens, messages of other programs) as a terminal or a log may show it."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that move the cursor, change colours or direction, or show nothing."""

TOKEN_WIDTH = 32
JOINERS, EMOJI_TAGS = "\u200c\u200d", (0xE0020, 0xE007F)


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


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """What to say of a name that is none of the known ones, which are named, the most alike first."""
    names = list(known)
    close = difflib.get_close_matches(str(given).lower(), names, n=3)
    hint = f", did you mean {close[0]}?" if close else ""
    ordered = ", ".join([*close, *(name for name in names if name not in close)])
    return f"no {kind} is called {clipped(repr(given))}{hint}; there are {ordered}"


def lone_surrogate(text: str) -> int | None:
    """Place of the first half of a surrogate pair, which is no character and has no UTF-8; None in proper text."""
    if text.isascii():
        return None
    return next((place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)


UNSEEN = re.compile("[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters that show nothing although they are letters or marks."""


def label(name: object, most: int = 60) -> str:
    """A name from outside as it may stand in a table, a figure or a line: one line, nothing hidden, clipped in the middle."""
    text = printable(name) or "(no name)"
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def labels(names: Iterable[str], most: int = 60) -> dict[str, str]:
    """A label for each name, no two alike to the eye: where names agree in what can be seen of them, a short hash tells them apart."""
    given = list(dict.fromkeys(names))
    made = {name: label(name, most) for name in given}
    digits = 4
    while True:
        alike = Counter(map(_seen, made.values()))
        double = [name for name in given if alike[_seen(made[name])] > 1]
        if not double:
            return made
        for name in double:
            mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
            made[name] = f"{label(name, most - digits - 2)} ~{mark}"
        digits += 4


def _seen(text: str) -> str:
    """What a reader sees of a text: without characters that show nothing, look-alike forms of one character made one."""
    return " ".join(UNSEEN.sub("", unicodedata.normalize("NFKC", text)).split())


def json_text(text: str) -> str:
    r"""The same JSON, with characters that a terminal would obey written as ``\u009b``: they occur inside its strings only."""
    kept = (each if each == "\n" or unicodedata.category(each) not in HIDDEN else json.dumps(each)[1:-1] for each in text)
    return "".join(kept)


def legible(text: str, width: int = TOKEN_WIDTH) -> str:
    """Text that cannot disturb what stands around it: control and direction characters replaced, shortened.

    Joiners are kept, which emoji and several scripts need, and so are characters that are newer than this Python's Unicode.
    """
    shown = "".join(character if _is_harmless(character) else "�" for character in text[: width + 1])
    return shown if len(text) <= width else shown[:width] + "…"


def _is_harmless(character: str) -> bool:
    category, code = unicodedata.category(character), ord(character)
    if category == "Cn":
        return not (0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)
    return category[0] != "C" or character in JOINERS or EMOJI_TAGS[0] <= code <= EMOJI_TAGS[1]
