"""The texts of the tokens of a trace: what stands beside it as ``vocabulary.json``, and how neighbours read together.

Tokenizers that work on bytes cut characters beyond ASCII into several tokens. Decoded one by one these are replacement marks; kept as
bytes, neighbours can be put together again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbes.errors import DbesError
from dbes.text import lone_surrogate

TokenText = str | bytes
"""Text of a token; bytes where they are no whole characters."""


def shown(text: TokenText) -> str:
    """One token by itself: bytes that are no whole characters as ``<E4 B8>``."""
    return joined([text])[0]


def joined(texts: Sequence[TokenText]) -> list[str]:
    """The texts of neighbouring tokens. A character that several tokens share stands at the first; nothing is left for the others.

    Bytes that make no character with their neighbours are written ``<E4 B8>``.
    """
    if not any(isinstance(text, bytes) for text in texts):
        return [str(text) for text in texts]
    parts = [text if isinstance(text, bytes) else text.encode() for text in texts]
    content = b"".join(parts)
    owner = [place for place, part in enumerate(parts) for _ in part]
    found: list[list[str | int]] = [[] for _ in parts]
    at = 0
    while at < len(content):
        length = _length(content[at])
        try:
            found[owner[at]].append(content[at : at + length].decode())
            at += length
        except UnicodeDecodeError:
            found[owner[at]].append(content[at])
            at += 1
    return ["".join(_written(each)) for each in found]


def joined_vocabularies(parts: Sequence[Mapping[int, TokenText]], *, error: type[DbesError]) -> dict[int, TokenText]:
    """The texts of several vocabularies together.

    Raises:
        error: a token has another text in one than in another: they are of different tokenizers.
    """
    found: dict[int, TokenText] = {}
    for part in parts:
        for token, text in part.items():
            if found.setdefault(token, text) != text:
                raise error(f"token {token} is {shown(found[token])!r} in one and {shown(text)!r} in another: of different tokenizers")
    return found


def _length(first: int) -> int:
    """Bytes of a UTF-8 character by its first."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1


def _written(parts: Sequence[str | int]) -> list[str]:
    lines: list[str] = []
    odd: list[str] = []
    for part in [*parts, ""]:
        if isinstance(part, int):
            odd.append(f"{part:02X}")
            continue
        if odd:
            lines.append(f"<{' '.join(odd)}>")
            odd = []
        lines.append(part)
    return lines


def as_json(vocabulary: Mapping[int, TokenText]) -> dict[str, Any]:
    """Texts as strings, bytes as ``{"bytes": "e4b8"}``."""
    return {str(token): text if isinstance(text := vocabulary[token], str) else {"bytes": text.hex()} for token in sorted(vocabulary)}


def from_json(content: Any, *, where: Path, error: type[DbesError]) -> dict[int, TokenText]:
    """What `as_json` wrote; files of earlier versions hold strings only.

    Raises:
        error: no object of token ids and texts.
    """
    found: dict[int, TokenText] = {}
    for token, text in content.items() if isinstance(content, dict) else [("", content)]:
        if isinstance(text, dict) and set(text) == {"bytes"}:
            text = _from_hex(text["bytes"])
        if not (token.isascii() and token.isdigit() and len(token) < 20) or not isinstance(text, str | bytes):
            raise error(f"{where}: expected token ids with their texts; it is for display only, remove it")
        if isinstance(text, str) and lone_surrogate(text) is not None:
            text = text.encode("utf-8", "replace").decode()
        found[int(token)] = text
    return found


def _from_hex(digits: Any) -> bytes | None:
    try:
        return bytes.fromhex(digits)
    except (TypeError, ValueError):
        return None
