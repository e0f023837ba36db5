"""Entries as token sequences that know which of their tokens count, and as batches of one length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbes.errors import FinetuneError, RecordingError
from dbes.models.token_text import token_bytes
from dbes.models.windows import asked, known_special_tokens, padded, refuse_unknown
from dbes.tasks.entries import Entry
from dbes.text import lone_surrogate


@dataclass(frozen=True)
class Sample:
    """A run of tokens.

    Attributes:
        ids: int64 [tokens].
        counted: bool [tokens], whether the prediction of this token counts; never the first.
        text_bytes: UTF-8 bytes of the text that the counted tokens stand for.
    """

    ids: np.ndarray
    counted: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right.

    Attributes:
        inputs: ``input_ids`` int64 [samples, tokens], and ``attention_mask`` where there is padding.
        counted: bool [samples, tokens].
    """

    inputs: dict[str, Tensor]
    counted: Tensor

    @property
    def tokens(self) -> int:
        """Predictions that count."""
        return int(self.counted.sum())


def encode(entry: Entry, tokenizer: Any, *, end: bool, known: int | None = None) -> Sample:
    """The tokens of an entry.

    A conversation is what the chat template renders; the assistant's turns count, with the mark that ends them. A text has the
    special tokens that the tokenizer puts before it.

    Args:
        end: let the end-of-text token follow a text or completion and count (training); without it, only text counts.
        known: how many token ids the model knows (`dbes.models.windows.embedding_rows`); None leaves them unchecked.

    Raises:
        FinetuneError: a conversation, and the tokenizer has no chat template, one that fails on it, or one that rewrites earlier
            turns; a token that the model does not know.
    """
    conversation = bool(entry.messages)
    segments = _rendered(entry, tokenizer) if conversation else list(entry.segments)
    before = [] if conversation else _before(tokenizer)
    found, problem = asked(lambda: _tokens(segments, tokenizer))
    if found is None:
        raise FinetuneError(f"{entry.name}: the tokenizer ({type(tokenizer).__name__}) cannot read it ({problem})")
    ids, marks, first = found
    last = tokenizer.eos_token_id
    if end and not conversation and last is not None:
        ids, marks = [*ids, last], [*marks, True]
    whole = np.asarray([*before, *ids], np.int64)
    if known is not None:
        refuse_unknown(whole, known, tokenizer, name=entry.name, error=FinetuneError)
    counted = np.asarray([False] * len(before) + marks, bool)
    text_bytes = sum(len(text.encode()) for text, marked in segments if marked)
    if len(counted) and counted[0]:
        counted[0], text_bytes = False, text_bytes - first  # nothing stands before the first token, so it cannot be predicted
    return Sample(whole, counted, max(text_bytes, 0))


def windows(sample: Sample, length: int) -> list[Sample]:
    """The sample in runs of at most ``length`` tokens that share one token, so that every counted one is predicted once.

    Runs in which nothing counts are left out. Bytes go with the share of counted tokens.
    """
    total, found = int(sample.counted.sum()), []
    for start in range(0, max(len(sample.ids) - 1, 0), length - 1):
        counted = sample.counted[start : start + length].copy()
        counted[0] = False
        if counted.any():
            found.append(Sample(sample.ids[start : start + length], counted, round(sample.text_bytes * int(counted.sum()) / total)))
    return found


def pack(samples: Iterable[Sample], length: int) -> list[Sample]:
    """Samples one after the other, cut into runs of ``length`` tokens; a text may attend to the one before it."""
    kept = list(samples)
    if not kept:
        return []
    joined = Sample(
        np.concatenate([sample.ids for sample in kept]),
        np.concatenate([sample.counted for sample in kept]),
        sum(s.text_bytes for s in kept),
    )
    return windows(joined, length)


def training_samples(entries: Sequence[Entry], tokenizer: Any, *, length: int, packing: bool, known: int | None = None) -> list[Sample]:
    """What is trained on: plain texts packed or each in runs of its own; conversations and completions always by themselves.

    Raises:
        FinetuneError: as `encode`; nothing in the data counts.
    """
    plain = [encode(entry, tokenizer, end=True, known=known) for entry in entries if entry.is_plain]
    found = pack(plain, length) if packing else [part for sample in plain for part in windows(sample, length)]
    for entry in entries:
        if not entry.is_plain:
            found += windows(encode(entry, tokenizer, end=True, known=known), length)
    if not found:
        raise FinetuneError("the data is empty: not one token of it counts in the loss")
    return found


def full_rows(
    entries: Iterable[Entry], tokenizer: Any, *, length: int, tokens: int, rows: int = 8, known: int | None = None
) -> list[Tensor]:
    """Texts one after the other as batches of token ids, int64 [rows, length] each; about ``tokens`` of them, nothing padded.

    What is left over is dropped; texts that fill no row at all are one shorter row. No text: no batch.
    """
    kept: list[np.ndarray] = []
    for entry in entries:
        if sum(map(len, kept)) >= tokens:
            break
        kept.append(encode(entry, tokenizer, end=True, known=known).ids)
    joined = np.concatenate(kept)[: max(tokens, length)] if kept else np.zeros(0, np.int64)
    return cut_rows(joined, length=length, rows=rows)


def cut_rows(ids: np.ndarray, *, length: int, rows: int = 8) -> list[Tensor]:
    """Token ids as batches, int64 [rows or fewer, length] each. What is left over is dropped, unless it is all there is."""
    count = len(ids) // length
    if not count:
        return [torch.from_numpy(ids.astype(np.int64)[None])] if len(ids) else []
    return list(torch.from_numpy(ids[: count * length].astype(np.int64).reshape(count, length)).split(rows))


def collate(samples: Sequence[Sample], *, padding: int) -> Batch:
    """The samples as one batch."""
    ids, mask = padded([sample.ids for sample in samples], padding=padding)
    counted = np.zeros(ids.shape, bool)
    for row, sample in enumerate(samples):
        counted[row, : len(sample.counted)] = sample.counted
    inputs = {"input_ids": torch.from_numpy(ids)}
    if not mask.all():
        inputs["attention_mask"] = torch.from_numpy(mask)
    return Batch(inputs, torch.from_numpy(counted))


def _before(tokenizer: Any) -> list[int]:
    """Special tokens the tokenizer puts before a text."""
    try:
        return list(known_special_tokens(tokenizer)[0])
    except RecordingError as problem:
        raise FinetuneError(str(problem)) from None


def _tokens(segments: Sequence[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[bool], int]:
    """Ids, marks, and the bytes of the first token."""
    if not getattr(tokenizer, "is_fast", False):
        parts = [(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], marked) for text, marked in segments]
        ids = [token for part, _ in parts for token in part]
        return ids, [marked for part, marked in parts for _ in part], token_bytes(tokenizer, ids[0]) if ids else 0
    text = "".join(part for part, _ in segments)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marked_character = np.concatenate([np.full(len(part), marked) for part, marked in segments] or [np.zeros(0, bool)])
    # a token that reaches from a prompt into its completion holds some of it, so it counts
    marks = [bool(marked_character[start:stop].any()) for start, stop in found["offset_mapping"]]
    stop = found["offset_mapping"][0][1] if marks else 0
    return list(found["input_ids"]), marks, len(text[:stop].encode())


def _rendered(entry: Entry, tokenizer: Any) -> list[tuple[str, bool]]:
    """The conversation as the chat template writes it, cut where the assistant begins and ends to speak."""
    if not getattr(tokenizer, "chat_template", None):
        raise FinetuneError(
            f"{entry.name}: this is a conversation, and the model's tokenizer has no chat template; "
            "use a tokenizer that has one, or give prompt and completion"
        )
    messages, segments, done = list(entry.messages), [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # a template may refuse to render no message at all
        opened = _templated(entry, tokenizer, messages[:place], add_generation_prompt=True) if place else ""
        closed = _templated(entry, tokenizer, messages[: place + 1])
        if not closed.startswith(opened) or not opened.startswith(done):
            raise FinetuneError(
                f"{entry.name}: the chat template of this tokenizer rewrites earlier turns, so the assistant's words cannot be found "
                "in it; give prompt and completion"
            )
        segments += [(opened[len(done) :], False), (closed[len(opened) :], place >= entry.first)]
        done = closed
    return segments


def _templated(entry: Entry, tokenizer: Any, messages: Sequence[Any], **options: Any) -> str:
    text, problem = asked(lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options))
    if not isinstance(text, str):
        raise FinetuneError(
            f"{entry.name}: the chat template of this tokenizer refuses the conversation "
            f"({problem or f'it gives {type(text).__name__}, expected text'}); change its messages, or give prompt and completion"
        )
    if lone_surrogate(text) is not None:
        raise FinetuneError(f"{entry.name}: the chat template of this tokenizer writes half of a surrogate pair, which is no character")
    return text
