"""What a token stands for: its text, or its bytes where it is only a part of a character.

Tokenizers that work on bytes cut characters beyond ASCII into several tokens. Decoded one by one these are replacement marks; kept as
bytes, neighbours can be put together again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbes.errors import DbesError
from dbes.text import lone_surrogate
from dbes.windows import asked

TokenText = str | bytes
"""Text of a token; bytes where they are no whole characters."""

REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> dict[int, TokenText]:
    """What each token stands for. Always an answer, for display: where a tokenizer has none, ``<id>``."""
    return {int(token): token_text_of(tokenizer, int(token)) for token in tokens}


def token_text_of(tokenizer: Any, token: int) -> TokenText:
    """What a token stands for."""
    text, _ = asked(lambda: tokenizer.decode([token]))
    piece, _ = asked(lambda: tokenizer.convert_ids_to_tokens(token))
    if not isinstance(text, str) or lone_surrogate(text) is not None or REPLACEMENT in text:
        content = _bytes(tokenizer, token, piece)
        if content is not None:
            whole, _ = asked(content.decode)
            return whole if whole is not None else content
    if not isinstance(text, str):
        text = piece if isinstance(piece, str) and piece else f"<{token}>"
    elif isinstance(piece, str) and piece.startswith("▁") and text == piece[1:].replace("▁", " "):
        text = " " + text  # decoders of this kind take the space from the beginning of what they decode
    return text.encode("utf-8", "replace").decode()


def text_bytes(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Bytes of the text of a run of tokens, as the tokenizer writes it; of its tokens one by one where it cannot."""
    text, _ = asked(lambda: tokenizer.decode(tokens))
    if isinstance(text, str) and lone_surrogate(text) is None:
        return len(text.encode())
    return sum(token_bytes(tokenizer, token) for token in tokens)


def token_bytes(tokenizer: Any, token: int) -> int:
    """Bytes of text behind a token."""
    text = token_text_of(tokenizer, token)
    return len(text if isinstance(text, bytes) else text.encode())


def _bytes(tokenizer: Any, token: int, piece: Any) -> bytes | None:
    """The bytes of a token of a byte-level tokenizer, or of one that falls back to bytes; None of another kind."""
    if isinstance(piece, bytes):  # tokenizers of remote code on tiktoken
        return piece
    if isinstance(piece, str):
        if found := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        if piece and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
    # mistral-common
    content, _ = asked(lambda: tokenizer.tokenizer.instruct_tokenizer.tokenizer.id_to_byte_piece(token))
    return content if isinstance(content, bytes) else None


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for: GPT-2's table, in which printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_of()


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
            text, _ = asked(lambda text=text: bytes.fromhex(text["bytes"]))
        if not (token.isascii() and token.isdigit() and len(token) < 20) or not isinstance(text, str | bytes):
            raise error(f"{where}: expected token ids with their texts; it is for display only, remove it")
        if isinstance(text, str) and lone_surrogate(text) is not None:
            text = text.encode("utf-8", "replace").decode()
        found[int(token)] = text
    return found
