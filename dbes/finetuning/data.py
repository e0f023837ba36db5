"""What is trained on and what is measured on: entries of files and tasks, held-out ones set apart by their source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbes import file_data
from dbes.benchmark import load_task, read_documents
from dbes.documents import Document
from dbes.errors import FinetuneError, TaskError

TASK = "task:"
TARGET = "data"
"""Name of the target domain when the data is a file."""

HELD_OUT = 0.2


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
    """

    id: str
    source: str
    segments: tuple[tuple[str, bool], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    first: int = 0
    item: Item | None = None

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


def prepare_data(source: str, *, tasks: str | Path = "embedded", limit: int | None = None) -> Data:
    """The data of a run.

    Args:
        source: a file (.jsonl, .ndjson, .json, .txt, .md, .parquet; .gz of these but .json), or ``task:DOMAIN``.
        tasks: the task whose domains are measured before and after; of each domain the held-out fifth.
        limit: held-out entries of each domain at most.

    Raises:
        FinetuneError: no such file or domain, no entries, too few to hold some out, rows that are neither text, conversation nor
            prompt with completion.
        TaskError: the task cannot be read.
    """
    task = load_task(tasks)
    domain = source.removeprefix(TASK) if source.startswith(TASK) else None
    if domain is not None and domain not in task.domains:
        raise FinetuneError(f"no domain is called {domain!r}; task {task.name!r} has {', '.join(task.domains)}")
    by_domain: dict[str, list[Entry]] = {name: [] for name in task.domains}
    for document in read_documents(task):
        by_domain[document.domain].append(_entry_of_document(document))
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
    if not path.is_file():
        raise FinetuneError(f"{path}: there is no such file; give a file, or {TASK}DOMAIN for a domain of the task")
    try:
        rows = list(_json_rows(path) if path.suffix == ".json" else file_data.rows(path, None))
    except TaskError as problem:
        raise FinetuneError(str(problem)) from None
    entries = [entry for number, row in rows if (entry := _entry_of_row(row, number, path)) is not None]
    if not entries:
        raise FinetuneError(f"{path}: the data is empty: not one row has a text")
    return entries


def hold_out(entries: Sequence[Entry], *, where: str) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out) entries: a fifth of the sources, the same ones in every run, whatever the order and the seed.

    Raises:
        FinetuneError: fewer than two sources.
    """
    rank = {source: hashlib.sha256(source.encode()).hexdigest() for source in {entry.source for entry in entries}}
    order = sorted(rank, key=lambda source: rank[source])
    if len(order) < 2:
        raise FinetuneError(
            f"{where}: {len(order)} text; at least 2 are needed, because some are held out to measure on. "
            "Give one text per line of a .jsonl file"
        )
    kept = set(order[: max(1, round(HELD_OUT * len(order)))])
    training = [entry for entry in entries if entry.source not in kept]
    # by the hash, so that a limit takes no particular part of the file
    heldout = sorted((entry for entry in entries if entry.source in kept), key=lambda entry: rank[entry.source])
    return training, heldout


def _entry_of_document(document: Document) -> Entry:
    item = multiple_choice(document.question or "", document.choices, document.answer)
    return Entry(id=document.id, source=document.source_document or document.id, segments=((document.text, True),), item=item)


def _entry_of_row(row: Mapping[str, Any], number: int, path: Path) -> Entry | None:
    where, identity = f"{path}:{number}", str(row.get("id", f"{path.name}:{number}"))
    source = str(row.get("source_document") or identity)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("messages"), list):
        return Entry(id=identity, source=source, messages=_messages(row["messages"], where))
    if isinstance(prompt, list) and isinstance(completion, list):
        return Entry(id=identity, source=source, messages=_messages([*prompt, *completion], where), first=len(prompt))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise FinetuneError(f"{where}: the completion is empty, so there is nothing to learn")
        item = multiple_choice(prompt, row.get("choices"), completion.strip())
        return Entry(id=identity, source=source, segments=((prompt, False), (completion, True)), item=item)
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            return None
        item = multiple_choice(str(row.get("question") or ""), row.get("choices"), row.get("answer"))
        return Entry(id=identity, source=source, segments=((row["text"], True),), item=item)
    raise FinetuneError(
        f"{where}: a row has text, messages, or prompt and completion; this one has {', '.join(map(str, row)) or 'no fields'}"
    )


def _messages(rows: Sequence[Any], where: str) -> tuple[Mapping[str, Any], ...]:
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get("role"), str) or "content" not in row:
            raise FinetuneError(f"{where}: every message has role and content, not {str(row)[:80]!r}")
    if not any(row["role"] == "assistant" for row in rows):
        raise FinetuneError(f"{where}: no message has the role assistant, so there is nothing to learn")
    return tuple(rows)


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


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (UnicodeDecodeError, ValueError) as problem:
        raise FinetuneError(f"{path}: not JSON: {problem}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise FinetuneError(f"{path}: a .json file holds a list of objects; one object per line belongs in a .jsonl file")
    yield from enumerate(content, start=1)


def _digest(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.id, entry.segments, entry.messages, entry.first], default=str).encode() + b"\n")
    return digest.hexdigest()
