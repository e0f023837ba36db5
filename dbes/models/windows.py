"""Texts as token ids of a model: special tokens, windows, padding. One place for all that feed a model.

Tokenizers are other people's code and may raise anything; what they raise becomes an error that names the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from dbes.errors import DbesError, RecordingError
from dbes.text import clipped, lone_surrogate

PROBES = ("a", "A b", "0", "1.5", "the", ".", "é", "中文", "न", "😀", "<", "_", "\n")
"""Texts by which special tokens are found, besides tokens of the vocabulary and given texts: whatever the tokenizer knows of them."""

VOCABULARY_PROBES, TEXT_PROBES, PROBE_CHARACTERS = 64, 16, 1000
BATCH = 64

Answer = TypeVar("Answer")
Sides = tuple[tuple[int, ...], tuple[int, ...]]


def asked(question: Callable[[], Answer]) -> tuple[Answer | None, str]:
    """What foreign code (a tokenizer, a chat template) answers, or None and why it does not, in one line."""
    try:
        return question(), ""
    except Exception as problem:  # tokenizers in Rust raise bare Exceptions, those of remote code and templates anything
        told = " ".join(str(problem).split())
        return None, clipped(f"{type(problem).__name__}: {told}" if told else type(problem).__name__, 300)


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, names: Callable[[int], str], error: type[DbesError] = RecordingError
) -> list[np.ndarray]:
    """The ids of every text, int32 [tokens] each, without the special tokens around it.

    Args:
        names: name of the text at a place, for messages.

    Raises:
        error: a text that the tokenizer refuses, or that is no Unicode.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        together, _ = asked(lambda some=some: tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])
        if together is not None and len(together) == len(some):
            found.extend(np.asarray(ids, np.int32) for ids in together)
            continue
        for place, text in enumerate(some, start):
            ids, problem = asked(lambda text=text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if ids is None:
                if (at := lone_surrogate(text)) is not None:
                    problem = f"half of a surrogate pair at character {at}, which is no character"
                raise error(f"{names(place)}: the tokenizer ({type(tokenizer).__name__}) cannot read it ({problem})")
            found.append(np.asarray(ids, np.int32))
    return found


def special_tokens(tokenizer: Any, texts: Sequence[str] = ()) -> Sides:
    """The ids a tokenizer puts before and after a text of its own accord.

    Found by comparing texts with and without them: the same ids must stand before and after every one of several texts, so no
    single text, and no letter that the vocabulary may lack, decides.

    Args:
        texts: some that will be tokenized, which must show the same ids.

    Raises:
        RecordingError: texts show different ids, or none shows where the text begins.
    """
    possible: set[Sides] | None = None
    firsts: set[int] = set()
    different: set[tuple[int, ...]] = set()
    given = [texts[place] for place in np.linspace(0, len(texts) - 1, min(len(texts), TEXT_PROBES)).astype(int)] if texts else []
    for probe in (*given, *PROBES, *_pieces(tokenizer)):
        bare, _ = asked(lambda probe=probe: list(tokenizer(probe[:PROBE_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]))
        full, _ = asked(lambda probe=probe: list(tokenizer(probe[:PROBE_CHARACTERS], verbose=False)["input_ids"]))
        if not bare or full is None:
            continue
        firsts.add(bare[0])
        different.add(tuple(bare))
        sides = {
            (tuple(full[:start]), tuple(full[start + len(bare) :]))
            for start in range(len(full) - len(bare) + 1)
            if full[start : start + len(bare)] == bare
        }
        kept = sides if possible is None else possible & sides
        if not kept:
            known = "" if not possible else f"; other texts have {_shown(possible)} around them"
            raise RecordingError(
                f"{type(tokenizer).__name__}: with special tokens {clipped(repr(probe), 40)} becomes {clipped(full)}, without "
                f"{clipped(bare)}{known}; the special tokens it adds cannot be told from the text"
            )
        possible = kept
    always = firsts & (set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)})
    if len(firsts) == 1 and len(different) > 1 and always:
        raise RecordingError(
            f"{type(tokenizer).__name__}: puts the special token {always.pop()} before every text even when asked for none "
            "(add_special_tokens=False), so it would be recorded as text; use a tokenizer that leaves it out"
        )
    if possible is not None and len(possible) == 1:
        return next(iter(possible))
    around, _ = asked(lambda: list(tokenizer("")["input_ids"]))
    if possible is None and around == []:
        return (), ()
    raise RecordingError(
        f"{type(tokenizer).__name__}: no text shows which special tokens it puts before and which after a text "
        f"({_shown(possible) if possible else 'it makes no token of any of them'})"
    )


_SIDES: WeakKeyDictionary[Any, tuple[Any, Sides]] = WeakKeyDictionary()


def known_special_tokens(tokenizer: Any) -> Sides:
    """`special_tokens`, found once for each tokenizer, and again when it treats a text in another way than it did."""
    answer = [asked(lambda text=text: list(tokenizer(text)["input_ids"])) for text in PROBES[:2]]
    remembered, _ = asked(lambda: _SIDES.get(tokenizer))
    if remembered is None or remembered[0] != answer:
        remembered = answer, special_tokens(tokenizer)
        asked(lambda: _SIDES.update({tokenizer: remembered}))
    return remembered[1]


def _pieces(tokenizer: Any) -> Iterator[str]:
    """Texts of some tokens, spread over the vocabulary."""
    size, _ = asked(lambda: len(tokenizer))
    for token in np.unique(np.linspace(0, (size or 1) - 1, VOCABULARY_PROBES).astype(int)).tolist():
        text, _ = asked(lambda token=token: tokenizer.decode([token], skip_special_tokens=True))
        if isinstance(text, str) and text.strip() and lone_surrogate(text) is None:
            yield text


def _shown(sides: set[Sides]) -> str:
    return " or ".join(f"{list(before)} and {list(after)}" for before, after in sorted(sides)[:3])


def embedding_rows(model: Any) -> int:
    """How many token ids a model knows: the rows of its input embedding, which need not be the size of its tokenizer."""
    found, _ = asked(lambda: model.get_input_embeddings())
    rows = getattr(found, "num_embeddings", None) or getattr(getattr(found, "weight", None), "shape", (None,))[0]
    return int(rows or model.config.get_text_config().vocab_size)


def padding_id(tokenizer: Any, rows: int) -> int:
    """A token id that fills up shorter rows: the tokenizer's own where the model knows it. Padding is masked, so any will do."""
    own = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((value for value in own if isinstance(value, int) and 0 <= value < rows), 0)


def refuse_unknown(ids: np.ndarray, rows: int, tokenizer: Any, *, name: str, error: type[DbesError] = RecordingError) -> None:
    """Refuse token ids that the model has no embedding of, as tokenizers have that got tokens which the model did not.

    Args:
        rows: see `embedding_rows`.
        name: of the text, for the message.
    """
    beyond = np.flatnonzero((ids < 0) | (ids >= rows))
    if len(beyond):
        token = int(ids[beyond[0]])
        piece, _ = asked(lambda: tokenizer.convert_ids_to_tokens(token))
        raise error(
            f"{name}: token {clipped(repr(piece))} (id {token}, at position {int(beyond[0])}) is beyond the model's embedding of {rows} "
            "tokens; the tokenizer has tokens that the model was not given: take them out of the text, or use the model's own tokenizer"
        )


def padded(rows: Sequence[np.ndarray], *, padding: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Runs of tokens side by side, padded on the right or on the left: ids int64 [runs, tokens], and mask int64, 1 where there is a
    token."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), padding, np.int64), np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(len(row))
        ids[place, at], mask[place, at] = row, 1
    return ids, mask
