"""Texts of tokens: parts of characters are kept as bytes and put together again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dbes.errors import TraceError
from dbes.models.token_text import BYTE_OF, text_bytes, token_bytes, token_texts
from dbes.trace.vocabulary import as_json, from_json, joined, shown


def byte_level() -> PreTrainedTokenizerFast:
    """One token for each byte, and two for two bytes."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = "".join(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("中")[0][0])
    tokenizer = Tokenizer(BPE(vocab={piece: place for place, piece in enumerate([*pieces, whole[1:]])}, merges=[(whole[1], whole[2])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Pieces of SentencePiece, with bytes for what it does not know."""
    pieces = ["<unk>", "▁", "▁the", "t", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_the_table_of_bytes_is_that_of_the_library() -> None:
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTE_OF.values()) == list(range(256))


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", ["中文 naïve", "😀👨‍👩‍👧 é", "नमस्ते", "plain"])
def test_characters_over_several_tokens_are_put_together(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert any(isinstance(each, bytes) for each in texts.values()) is (not text.isascii())
    found = joined([texts[token] for token in ids])
    assert "".join(found).strip() == text and len(found) == len(ids)


def test_a_token_by_itself_shows_its_bytes() -> None:
    tokenizer = byte_level()
    first, rest = tokenizer("中", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, [first, rest])
    assert texts == {first: b"\xe4", rest: b"\xb8\xad"}
    assert [shown(texts[first]), shown(texts[rest]), shown("x")] == ["<E4>", "<B8 AD>", "x"]
    assert token_bytes(tokenizer, rest) == 2 and text_bytes(tokenizer, [first, rest]) == 3


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", b"\xe4", b"\xb8\xad", "b"], ["a", "中", "", "b"]),
        ([b" \xe4", b"\xb8\xad.", b"\xf0\x9f", b"\x98", b"\x80"], [" 中", ".", "😀", "", ""]),
        ([b"\xe4", "a"], ["<E4>", "a"]),
        ([b"\x80", b"\xe4\xb8"], ["<80>", "<E4 B8>"]),
        (["old \ufffd", b"\xc3", b"\xa9"], ["old \ufffd", "é", ""]),
        ([], []),
    ],
)
def test_joined_by_hand(texts, expected) -> None:
    assert joined(texts) == expected


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.lists(st.integers(0, 120), max_size=20))
def test_joining_gives_back_any_text_however_it_is_cut(text: str, cuts: list[int]) -> None:
    content = text.encode()
    places = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    parts = [content[start:stop] for start, stop in pairwise(places)]
    assert "".join(joined(parts)) == text


class Broken:
    """A tokenizer whose decoding fails, or gives what is no text."""

    def __init__(self, decoded, piece) -> None:
        self.decoded, self.piece = decoded, piece

    def decode(self, _):
        if isinstance(self.decoded, BaseException):
            raise self.decoded
        return self.decoded

    def convert_ids_to_tokens(self, _):
        if isinstance(self.piece, BaseException):
            raise self.piece
        return self.piece


class Strange(Exception):
    pass


@pytest.mark.parametrize(
    ("decoded", "piece", "expected"),
    [
        (Strange("no"), "▁word", "▁word"),
        (KeyError(7), IndexError(), "<7>"),
        (None, None, "<7>"),
        ("\ud83d", None, "?"),
        ("\ud83d", "\ud83d", "?"),
        ("\ufffd", b"\xe4\xb8", b"\xe4\xb8"),
        ("\ufffd", "\ufffd", "\ufffd"),
        (NotImplementedError(), b"ok", "ok"),
    ],
)
def test_a_failing_decode_still_gives_text(decoded, piece, expected) -> None:
    assert token_texts(Broken(decoded, piece), [7]) == {7: expected}


def test_vocabulary_file_keeps_bytes_and_reads_old_ones() -> None:
    vocabulary = {5: b"\xe4\xb8", 3: "drei"}
    text = json.dumps(as_json(vocabulary))
    assert text == '{"3": "drei", "5": {"bytes": "e4b8"}}'
    assert from_json(json.loads(text), where=Path("v"), error=TraceError) == vocabulary
    assert from_json({"1": "old \ufffd"}, where=Path("v"), error=TraceError) == {1: "old \ufffd"}
    for content in ([], {"x": "a"}, {"1": 2}, {"1": {"bytes": "zz"}}, {"1": {"bytes": 3}}, {"1": None}, {"-1": "a"}):
        with pytest.raises(TraceError, match="expected token ids with their texts"):
            from_json(content, where=Path("v"), error=TraceError)
