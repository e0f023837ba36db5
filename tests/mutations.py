"""What can happen to a JSON file outside: every value replaced, renamed or left out, and the file itself damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: dict[str, str] = {
    "null": "null", "text": '"x"', "escapes": '"\\u001b]8;;http://x\\u0007[red]"', "surrogate": '"\\ud800"', "list": "[]", "object": "{}",
    "nested": '{"a": [{"b": []}]}', "deep": "[" * 90 + "]" * 90, "very deep": "[" * 200_000, "true": "true", "negative": "-1", "zero": "0",
    "large": "9" * 39, "huge": "9" * 5000, "fraction": "0.5", "1e300": "1e300", "infinite": "1e999", "NaN": "NaN",
}  # fmt: skip
"""Replacements of a value, as JSON text."""

SLOT = "\u0001slot\u0001"
ELEMENTS = 2
"""Of a list of many values only the first and the last are replaced."""


def places(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every value, at every depth."""
    yield path
    if isinstance(content, dict):
        for key in content:
            yield from places(content[key], (*path, key))
    elif isinstance(content, list):
        for index in sorted({0, len(content) - 1}) if len(content) > ELEMENTS else range(len(content)):
            yield from places(content[index], (*path, index))


def changed(content: Any, path: tuple[str | int, ...], change: str) -> bytes:
    """The JSON text with the value at a place replaced, left out, renamed or doubled."""
    made = json.loads(json.dumps(content))
    if not path:
        return VALUES[change].encode() if change in VALUES else b""
    *above, last = path
    holder = made
    for step in above:
        holder = holder[step]
    if change == "deleted":
        del holder[last]
    elif change == "renamed" and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
    elif change == "doubled" and isinstance(holder, list):
        holder.append(holder[last])
    elif change in VALUES:
        holder[last] = SLOT
    return json.dumps(made).replace(json.dumps(SLOT), VALUES.get(change, "")).encode()


CHANGES = ("deleted", "renamed", "doubled", *VALUES)


def mutations(content: Any, *, most: int | None = None, seed: int = 0) -> list[tuple[str, bytes]]:
    """Name and bytes of damaged versions of a JSON file; ``most``: a random part of them, all kinds of damage to the file itself kept."""
    whole = json.dumps(content).encode()
    draw = random.Random(seed)
    files = {
        "empty": b"", "blank": b" \n", "truncated": whole[: len(whole) // 2], "end missing": whole[:-1], "twice": whole + whole,
        "utf-16": whole.decode().encode("utf-16"), "latin-1": b'"\xe9"', "zeros": bytes(100), "random": draw.randbytes(300),
        "list": b"[" + whole + b"]",
    }  # fmt: skip
    inside = [(path, change) for path in places(content) for change in CHANGES]
    if most is not None and len(inside) > most:
        inside = draw.sample(inside, most)
    return [*files.items(), *((f"{'.'.join(map(str, path))}: {change}", changed(content, path, change)) for path, change in inside)]
