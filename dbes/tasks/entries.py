"""What is trained on and what is measured on: entries of files and tasks, held-out ones set apart by their source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dbes.errors import FinetuneError, SettingError
from dbes.tasks import local
from dbes.tasks.documents import Document
from dbes.tasks.rows import KNOWN, kind_of, plain_text, prompt_and_completion, turns
from dbes.tasks.task import Task, load_task, read_documents
from dbes.text import clipped, unknown

TASK = "task:"
TARGET = "data"
"""Name of the target domain when the data is a file."""

HELD_OUT = 0.2


class Sourced(Protocol):
    """What is parted by its source."""

    @property
    def source(self) -> str: ...


Kept = TypeVar("Kept", bound=Sourced)


@dataclass(frozen=True)
class Item:
    """A question with choices; ``right`` is the index of the correct one."""

    question: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One text, conversation, or prompt with its completion.

    Attributes:
        source: entries with the same source are never parted between training and held-out.
        segments: (text, whether its tokens count in the loss), in order; empty for a conversation.
        messages: role and content, for the chat template of the tokenizer; loss on the assistant's turns from number ``first`` on.
        item: the multiple-choice question in it, if any.
        where: file and row it was read from, for messages.
    """

    id: str
    source: str
    segments: tuple[tuple[str, bool], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    first: int = 0
    item: Item | None = None
    where: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return self.where or f"text {self.id!r}"

    @property
    def is_plain(self) -> bool:
        """Plain text, which may be packed with other texts into one sequence."""
        return len(self.segments) == 1


@dataclass(frozen=True, kw_only=True)
class Data:
    """Entries to train on, and held-out entries by domain (``target`` and all other domains of the task).

    Attributes:
        digest: sha256 over the training entries, in order.
        elsewhere: what is not held out of every other domain: never trained on, for protection (`dbes.finetuning.protection`).
    """

    target: str
    training: tuple[Entry, ...]
    heldout: Mapping[str, tuple[Entry, ...]]
    digest: str
    elsewhere: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)


def prepare_data(source: str, *, tasks: str | Path | Task = "embedded", limit: int | None = None) -> Data:
    """The data of a run.

    Args:
        source: a file (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, .parquet; .gz of these but .parquet), or ``task:DOMAIN``.
        tasks: the task whose domains are measured before and after; of each domain the held-out fifth.
        limit: held-out entries of each domain at most.

    Raises:
        SettingError: the task has no such domain.
        FinetuneError: no such file, no entries, too few to hold some out, rows that are neither text, conversation nor
            prompt with completion.
        TaskError: the task cannot be read.
    """
    task = load_task(tasks)
    domain = source.removeprefix(TASK) if source.startswith(TASK) else None
    if domain is not None and domain not in task.domains:
        raise SettingError(unknown(f"domain of task {task.name!r}", domain, task.domains))
    by_domain: dict[str, list[Entry]] = {name: [] for name in task.domains}
    for document in read_documents(task):
        by_domain[document.domain].append(entry_of_document(document))
    target = domain if domain is not None else TARGET
    if domain is None:
        by_domain = {target: read_entries(Path(source)), **by_domain}
    training, kept = hold_out(by_domain[target], where=source)
    heldout, elsewhere = {target: kept[:limit]}, {}
    for name, entries in by_domain.items():
        if name != target:
            elsewhere[name], kept = hold_out(entries, where=name)
            heldout[name] = kept[:limit]
    return Data(
        target=target,
        training=tuple(training),
        heldout={name: tuple(part) for name, part in heldout.items()},
        digest=_digest(training),
        elsewhere={name: tuple(part) for name, part in elsewhere.items()},
    )


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        FinetuneError: missing or empty file, or a row that is neither text, conversation nor prompt with completion.
    """
    if not path.exists():
        raise FinetuneError(f"{path}: there is no such file; give a file, or {TASK}DOMAIN for a domain of the task")
    rows = local.rows(path, None, error=FinetuneError)
    entries = [entry for number, row in rows if (entry := _entry_of_row(row, number, path)) is not None]
    if not entries:
        raise FinetuneError(f"{path}: the data is empty: not one row has a text")
    return entries


def hold_out(entries: Sequence[Kept], *, where: str) -> tuple[list[Kept], list[Kept]]:
    """(training, held-out) entries or texts: a fifth of the sources, the same ones in every run, whatever the order and the seed.

    Raises:
        FinetuneError: fewer than two sources.
    """
    order = by_hash({entry.source for entry in entries})
    if len(order) < 2:
        raise FinetuneError(
            f"{where}: {len(order)} text; at least 2 are needed, because some are held out to measure on. "
            "Give one text per line of a .jsonl file"
        )
    kept = {source: rank for rank, source in enumerate(order[: max(1, round(HELD_OUT * len(order)))])}
    training = [entry for entry in entries if entry.source not in kept]
    # by the hash, so that a limit takes no particular part of the file
    heldout = sorted((entry for entry in entries if entry.source in kept), key=lambda entry: kept[entry.source])
    return training, heldout


def by_hash(sources: Collection[str], salt: str = "") -> list[str]:
    """Source texts in an order that is the same in every run, and another with every salt: the first few are no particular part."""
    return sorted(sources, key=lambda source: hashlib.sha256(f"{salt}{source}".encode()).digest())


def entry_of_document(document: Document) -> Entry:
    """The text of a document, its source and its item."""
    item = multiple_choice(document.question or "", document.choices, document.answer)
    return Entry(id=document.id, source=document.source_document or document.id, segments=((document.text, True),), item=item)


def _entry_of_row(row: Mapping[str, Any], number: int, path: Path) -> Entry | None:
    where = f"{path}:{number}"

    def text(value: Any, name: str) -> str:
        return plain_text(value, name, where, error=FinetuneError)

    given = row.get("id")
    identity = f"{path.name}:{number}" if given is None else text(given, "id")
    source = text(row.get("source_document") or identity, "source_document")
    prompt, completion = row.get("prompt"), row.get("completion")
    if (found := turns(row, where, error=FinetuneError)) is not None:
        return Entry(id=identity, source=source, messages=_learnable(found, where), where=where)
    if isinstance(prompt, list) and isinstance(completion, list):
        whole = turns({"messages": [*prompt, *completion]}, where, error=FinetuneError) or ()
        return Entry(id=identity, source=source, messages=_learnable(whole, where), first=len(prompt), where=where)
    if (pair := prompt_and_completion(row, where, error=FinetuneError)) is not None:
        if not pair[1].strip():
            raise FinetuneError(f"{where}: the completion is empty, so there is nothing to learn")
        item = _item(row, pair[0], pair[1].strip(), where)
        return Entry(id=identity, source=source, segments=((pair[0], False), (pair[1], True)), item=item, where=where)
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            return None
        question = row.get("question")
        item = _item(row, question if isinstance(question, str) else "", row.get("answer"), where)
        return Entry(id=identity, source=source, segments=((text(row["text"], "text"), True),), item=item, where=where)
    named = ["text", "messages", *(("prompt", "completion") if {"prompt", "completion"} <= set(row) else ())]
    told = ", ".join(f"{name} is {kind_of(row[name])}" for name in named if name in row)
    raise FinetuneError(
        f"{where}: a row has text, {KNOWN}; "
        + (f"here {told}" if told else f"this one has {clipped(', '.join(map(str, row)), 300) or 'no fields'}")
    )


def _item(row: Mapping[str, Any], question: str, answer: Any, where: str) -> Item | None:
    """The multiple-choice question of a row, if any; its choices are text or numbers."""
    item = multiple_choice(question, row.get("choices"), answer)
    if item is not None:
        plain_text(question, "question", where, error=FinetuneError)
        for place, choice in enumerate(row["choices"]):
            plain_text(choice, f"choices[{place}]", where, error=FinetuneError)
    return item


def _learnable(messages: Sequence[Mapping[str, Any]], where: str) -> tuple[Mapping[str, Any], ...]:
    if not any(message["role"] == "assistant" for message in messages):
        raise FinetuneError(f"{where}: no message has the role assistant, so there is nothing to learn")
    return tuple(messages)


def multiple_choice(question: str, choices: Any, answer: Any) -> Item | None:
    """The item, when there is a question and the answer is one of the choices: its text, its index, or its letter."""
    if not question.strip() or not isinstance(choices, list | tuple) or len(choices) < 2 or answer is None:
        return None
    texts, given = tuple(map(str, choices)), str(answer).strip()
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    for names in (texts, [str(index) for index in range(len(texts))], letters):
        if given in names:
            return Item(question, texts, names.index(given))
    return None


def _digest(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.id, entry.segments, entry.messages, entry.first], default=str).encode() + b"\n")
    return digest.hexdigest()
