"""Special tokens, ids and padding of tokenizers of every kind, and texts that a tokenizer or a model cannot read."""

from __future__ import annotations

import numpy as np
import pytest
from families import character_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from dbes.errors import RecordingError
from dbes.models.windows import known_special_tokens, padded, padding_id, refuse_unknown, special_tokens, token_ids


def built(vocabulary: list[str], *, template: str = "<s> $A", **parts) -> PreTrainedTokenizerFast:
    """A tokenizer of characters, or of words with ``words``."""
    ids = {piece: place for place, piece in enumerate(["<pad>", "<s>", "</s>", *vocabulary])}
    model = WordLevel(ids, unk_token=parts.pop("unknown", "<pad>")) if parts.pop("words", False) else BPE(vocab=ids, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class Python(PreTrainedTokenizer):
    """A tokenizer without Rust: one token for each character, those it knows."""

    def __init__(self, characters: str, **named) -> None:
        self.characters = {character: 3 + place for place, character in enumerate(characters)}
        super().__init__(bos_token="<s>", eos_token="</s>", **named)

    @property
    def vocab_size(self) -> int:
        return 3 + len(self.characters)

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 1, "</s>": 2, **self.characters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_) -> list[str]:
        if not text:
            raise IndexError("no text")
        return [character for character in text if character in self.characters]

    def _convert_token_to_id(self, token: str) -> int:
        return {"<s>": 1, "</s>": 2}.get(token, self.characters.get(token, 0))

    def _convert_id_to_token(self, index: int) -> str:
        return {1: "<s>", 2: "</s>"}.get(index) or next((name for name, place in self.characters.items() if place == index), "?")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0, 2] if token_ids_1 is None else [1, *token_ids_0, 2, 2, *token_ids_1, 2]


METASPACE = {
    "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "decoder": decoders.Metaspace(prepend_scheme="first"),
}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        pytest.param(character_tokenizer(), ((1,), ()), id="before"),
        pytest.param(character_tokenizer(special=False), ((), ()), id="none"),
        pytest.param(built(["x", "y"]), ((1,), ()), id="no letter a"),
        pytest.param(built(["ก", "ข"]), ((1,), ()), id="letters that no probe has"),
        pytest.param(built(["ก", "ข"], template="<s> <s> $A </s>"), ((1, 1), (2,)), id="twice before and once after"),
        pytest.param(built(["x", "y"], template="$A </s>"), ((), (2,)), id="after"),
        pytest.param(built(["eins", "zwei"], words=True), ((1,), ()), id="words, the others unknown"),
        pytest.param(built([*"▁xyz", "<unk>"], **METASPACE), ((1,), ()), id="a space put before a text"),
        pytest.param(built([*"xyz"], normalizer=normalizers.Strip()), ((1,), ()), id="a text is stripped"),
        pytest.param(Python("xyz"), ((1,), (2,)), id="in Python, refusing an empty text, more for a pair"),
        pytest.param(Python("กข"), ((1,), (2,)), id="in Python, without Latin letters"),
    ],
)
def test_special_tokens_depend_on_no_text(tokenizer, expected) -> None:
    assert special_tokens(tokenizer) == expected
    assert known_special_tokens(tokenizer) == expected == known_special_tokens(tokenizer)


def test_texts_show_special_tokens_where_nothing_else_does() -> None:
    class Few(Python):
        def decode(self, *_, **__):
            raise ValueError("cannot")

    tokenizer = Few("ᚠᚢ")
    with pytest.raises(RecordingError, match="no text shows which special tokens"):
        special_tokens(tokenizer)
    assert special_tokens(tokenizer, ["ᚠᚢᚠ"]) == ((1,), (2,))


def test_special_tokens_that_cannot_be_told_are_refused() -> None:
    class Moody(Python):
        def build_inputs_with_special_tokens(self, token_ids_0, *_):
            return [1, *token_ids_0] if len(token_ids_0) < 3 else [*token_ids_0, 2]

    class Insisting(Python):
        def _tokenize(self, text: str, **_) -> list[str]:
            return ["<s>", *super()._tokenize(text)]

        def build_inputs_with_special_tokens(self, token_ids_0, *_):
            return token_ids_0

    with pytest.raises(RecordingError, match="cannot be told from the text"):
        special_tokens(Moody("abc"), ["abc", "a"])
    with pytest.raises(RecordingError, match="even when asked for none"):
        special_tokens(Insisting("abch"))


def test_a_tokenizer_that_changes_is_looked_at_again() -> None:
    tokenizer = character_tokenizer()
    assert known_special_tokens(tokenizer) == ((1,), ())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert known_special_tokens(tokenizer) == ((), (2,))


def test_a_text_that_a_tokenizer_refuses_is_named() -> None:
    class Picky(Python):
        def _tokenize(self, text: str, **_) -> list[str]:
            if "|" in text:
                raise ValueError("disallowed special token")
            return super()._tokenize(text)

    texts = ["abc", "b", "a|c"]
    with pytest.raises(RecordingError, match=r"text 2: the tokenizer \(Picky\) cannot read it \(ValueError: disallowed special token\)"):
        token_ids(Picky("abc"), texts, names=lambda place: f"text {place}")
    with pytest.raises(RecordingError, match=r"text 1: .*half of a surrogate pair at character 1"):
        token_ids(character_tokenizer(), ["a", "b\ud83d"], names=lambda place: f"text {place}")
    words = built(["eins"], words=True, unknown="nowhere")  # the library raises a bare Exception for a word it does not know
    with pytest.raises(RecordingError, match=r"text 0: the tokenizer .* cannot read it"):
        token_ids(words, ["zwei"], names=lambda place: f"text {place}")


@pytest.mark.parametrize(("rows", "expected"), [(5, 4), (4, 2), (3, 2), (2, 0)])
def test_padding_is_a_token_that_the_model_knows(rows: int, expected: int) -> None:
    tokenizer = built(["x"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 4
    assert padding_id(tokenizer, rows) == expected


def test_tokens_beyond_the_embedding_are_named() -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    ids = np.asarray(tokenizer("a<|tool|>", add_special_tokens=False)["input_ids"])
    refuse_unknown(ids, len(tokenizer), tokenizer, name="text 'x'")
    with pytest.raises(RecordingError, match=r"text 'x': token '<\|tool\|>' \(id 99, at position 1\) is beyond .* embedding of 99 tokens"):
        refuse_unknown(ids, 99, tokenizer, name="text 'x'")


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = padded([np.asarray([5, 6]), np.asarray([7])], padding=9)
    assert ids.tolist() == [[5, 6], [7, 9]] and mask.tolist() == [[1, 1], [1, 0]]
