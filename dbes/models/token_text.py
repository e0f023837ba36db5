"""What a token stands for, asked of a tokenizer: its text, or its bytes where it is only a part of a character."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dbes.models.windows import asked
from dbes.text import lone_surrogate
from dbes.trace.vocabulary import TokenText

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
