"""From a task file to documents: read a YAML, check it strictly, give back the texts of each domain in a fixed order.

A task names its domains and where their texts are: local files (`dbes.tasks.local.Format`; gzip allowed) or data sets of the
Hugging Face hub. Nothing is downloaded for local files. Importing this module loads neither torch, datasets nor pandas.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from dbes.errors import TaskError
from dbes.schema import line_of, read_yaml
from dbes.shipped import TASKS
from dbes.tasks import hub, local
from dbes.tasks.cautions import by_domain, caution_lines, cautions
from dbes.tasks.documents import NO_TEXT, Document, Located, Place, documents_of, with_distinct_ids
from dbes.tasks.rows import plain_text
from dbes.tasks.separability import word_separability
from dbes.tasks.sources import (
    KINDS,
    MOST,
    DomainSource,
    FileSource,
    Group,
    OneSource,
    SeveralSources,
    Strict,
    TextSource,
)
from dbes.text import clipped, unknown

FALLBACK = "embedded"

PROBLEMS = 8
"""Faults of a task file that one message names at most."""


class Task(Strict):
    """A benchmark: its domains and where their texts are.

    A task is read from a YAML file by `load_task`, or built: ``Task(name="mine", version=1, domains={"law": [text, ...], ...})``. A
    domain is a list of texts or has the keys of `FileSource` (files, relative to the task file or, without one, to the working
    directory), `DatasetSource` (a data set of the hub) or `TextSource`.

    Attributes:
        name: letters, digits, ``_``, ``.`` and ``-``.
        version: raised by any change that could alter a score.
        window: tokens of a document that a model reads at a time, at most.
        domains: source of the texts of each of at least two domains.
        missing: of a prepared copy, the sources it was made without and why, by ``domain/source``.

    Raises:
        TaskError: an unknown or missing field, a wrong value, fewer than two domains; the message names the field.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    version: Annotated[int, Field(ge=1, le=MOST)]
    description: str = ""
    window: Annotated[int, Field(ge=2, le=MOST)] = 512
    domains: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_ -]*$")], DomainSource]
    missing: dict[str, str] = Field(default_factory=dict)
    _path: Path = PrivateAttr(default=Path("task.yaml"))

    @model_validator(mode="after")
    def _at_least_two_domains(self) -> Task:
        if len(self.domains) < 2:
            raise ValueError(f"{len(self.domains)} domain given; specialization compares domains, so at least 2 are needed")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, content: Any, check: Callable[[Any], Task], info: ValidationInfo) -> Task:
        """Faults as one TaskError of one line, also of a task that is built in Python. Stands last, so that it sees those of the others."""
        try:
            return check(content)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            more = [f"and {len(faults) - PROBLEMS} more"] if len(faults) > PROBLEMS else []
            raise TaskError("; ".join([*(_told(fault, info.context) for fault in faults[:PROBLEMS]), *more])) from None

    @property
    def path(self) -> Path:
        """The YAML this task was read from; its files are relative to the folder of it."""
        return self._path

    def parts(self) -> list[tuple[str, OneSource]]:
        """Every source with its domain, in order."""
        return [
            (domain, part)
            for domain, source in self.domains.items()
            for part in (source.sources if isinstance(source, SeveralSources) else [source])
        ]


def load_task(task: str | Path | Task) -> Task:
    """The task of a YAML file, of a prepared folder, or of the tasks that come with dbes by name; a `Task` as it is.

    Raises:
        TaskError: no such task or file, not YAML, unknown or missing keys, wrong types, fewer than two domains; a group of tasks.
    """
    if isinstance(task, Task):
        return task
    path, content = _read(task)
    if "group" in content:
        told = ", ".join(map(str, _checked_group(path, content)))
        raise TaskError(f"{path}: a group of tasks, where one task is needed; name one of {told}")
    try:
        found = Task.model_validate(content, context=path)
    except TaskError as problem:
        raise TaskError(f"{path}: {problem}") from None
    found._path = path.resolve()
    return found


def tasks_of(task: str | Path | Task) -> list[str | Path | Task]:
    """The tasks a name stands for: those of a group and of the groups in it, each once, in order; any other task alone.

    Raises:
        TaskError: as `load_task`; a group that holds itself.
    """
    if isinstance(task, Task):
        return [task]
    found: dict[Path, str | Path | Task] = {}
    for path, member in _members(task, ()):
        found.setdefault(path, member)
    return list(found.values())


def is_group(task: str | Path | Task) -> bool:
    """Whether this names a group of tasks."""
    return not isinstance(task, Task) and "group" in _read(task)[1]


def _members(task: str | Path, above: tuple[Path, ...]) -> list[tuple[Path, str | Path]]:
    """The tasks of a group, or a task alone: the file of each, and how it was named."""
    path, content = _read(task)
    whole = path.resolve()
    if "group" not in content:
        return [(whole, task)]
    if whole in above:
        circle = " > ".join(each.name for each in (*above[above.index(whole) :], path))
        raise TaskError(f"{path}: a group that holds itself ({circle})")
    return [each for member in _checked_group(path, content) for each in _members(member, (*above, whole))]


def _checked_group(path: Path, content: Mapping[str, Any]) -> list[str | Path]:
    """The members of a group's file, their files relative to it."""
    try:
        group = Group.model_validate(content)
    except ValidationError as error:
        raise TaskError(f"{path}: {'; '.join(_told(fault, path) for fault in error.errors(include_url=False)[:PROBLEMS])}") from None
    return [path.parent / name if name.endswith((".yaml", ".yml")) or "/" in name else name for name in group.group]


def _read(task: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a task or group, and what it holds."""
    path = Path(task)
    if path.is_dir() and path.suffix not in (".yaml", ".yml") and (isinstance(task, Path) or not (TASKS / f"{task}.yaml").is_file()):
        found = sorted(path.glob("*.yaml"))
        if len(found) != 1:
            raise TaskError(f"{path}: a folder with {len(found)} files .yaml, where one task is needed; name the file")
        path = found[0]
    elif path.suffix not in (".yaml", ".yml"):
        path = TASKS / f"{task}.yaml"
        if not path.is_file():
            known = sorted(found.stem for found in TASKS.glob("*.yaml"))
            raise TaskError(f"{unknown('task', str(task), known)}, or give the path of a .yaml file")
    content = read_yaml(path, error=TaskError, missing=f"{path}: no such task file")
    if not isinstance(content, dict):
        raise TaskError(f"{path}: a task is a mapping with name, version and domains, not {type(content).__name__}")
    return path, content


def list_tasks() -> list[Task]:
    """The tasks that come with dbes, by name."""
    return [load_task(path) for path in sorted(TASKS.glob("*.yaml")) if not is_group(path)]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The documents of a task.

    Attributes:
        without_text: rows that were left out because they have no text, by domain; domains without any are left out.
    """

    documents: tuple[Document, ...]
    without_text: Mapping[str, int]


def read_documents(task: Task, *, limit: int | None = None, embedded_fallback: bool = False) -> list[Document]:
    """The documents of `read_task`."""
    return list(read_task(task, limit=limit, embedded_fallback=embedded_fallback).documents)


def read_task(task: Task, *, limit: int | None = None, embedded_fallback: bool = False) -> Reading:
    """All documents of a task, domain by domain in the order of the file; at most ``limit`` of each domain (the first ones).

    With ``embedded_fallback``, a task whose hub data cannot be had gives the embedded documents of the same domains instead,
    every one marked ``stand_in``, after a warning: never a mixture of both, whose lengths and formats would differ by domain.

    Raises:
        TaskError: a missing or altered file, a line that is no JSON, text that is no UTF-8, a missing field, a field that is no
            text, a domain without documents (rows without text are left out, and counted), an id given twice in a file.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit is {limit}; at least 1 document of each domain is needed")
    found: list[Located] = []
    without_text: dict[str, int] = {}
    for domain, source in task.domains.items():
        parts = source.sources if isinstance(source, SeveralSources) else [source]
        own: list[Located] = []
        without = 0
        for place, part in enumerate(parts):
            share = None if limit is None else limit // len(parts) + (place < limit % len(parts))
            if share == 0:
                continue
            try:
                read = read_source(task, domain, part, share)
            except hub.UnreachableError as error:
                if not embedded_fallback:
                    raise TaskError(f"{error}. Log in or go online, or allow the embedded fallback") from error
                return Reading(documents=_stand_ins(task, limit, str(error)), without_text={})
            own += read.found
            without += read.left_out[NO_TEXT]
        if not own:
            told = f" ({without} rows have no text)" if without else ""
            raise TaskError(f"{task.path}: domains.{domain}: no documents{told}")
        found += own
        if without:
            without_text[domain] = without
    return Reading(documents=tuple(with_distinct_ids(found)), without_text=without_text)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was read of one source: documents, rows left out by reason, and the revision of a data set, where it is known."""

    found: list[Located]
    left_out: Counter[str]
    revision: str | None = None


def read_source(task: Task, domain: str, part: OneSource, limit: int | None = None) -> Read:
    """The documents of one source of a domain, at most ``limit`` and at most its own.

    Raises:
        TaskError: as `read_task`.
    """
    wanted = min((n for n in (limit, part.limit) if n is not None), default=None)
    if isinstance(part, FileSource):
        found, left_out = _file_documents(task, domain, part, wanted)
    elif isinstance(part, TextSource):
        found, left_out = _given_documents(task, domain, part, wanted)
    else:
        found, left_out, revision = hub.documents(task.path, domain, part, wanted)
        return Read(found=found, left_out=left_out, revision=revision)
    return Read(found=found, left_out=left_out)


def _stand_ins(task: Task, limit: int | None, reason: str) -> tuple[Document, ...]:
    embedded = load_task(FALLBACK)
    if strange := sorted(set(task.domains) - set(embedded.domains)):
        raise TaskError(f"{reason}. The embedded sample cannot stand in: it has no domain {strange[0]!r}")
    warnings.warn(
        f"{reason}. Reading the EMBEDDED sample in place of task {task.name!r}: the scores are not those of {task.name!r}", stacklevel=4
    )
    rows = [document for document in read_documents(embedded, limit=limit) if document.domain in task.domains]
    return tuple(replace(document, stand_in=True) for document in rows)


def task_fingerprint(task: Task, documents: Sequence[Document]) -> str:
    """sha256 over window, version and every document's id, domain, source and text: equal only when the same texts were read."""
    digest = hashlib.sha256(json.dumps([task.version, task.window]).encode())
    for document in documents:
        row = [document.id, document.domain, document.source_document, document.text]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def task_facts(task: Task, reading: Reading) -> dict[str, Any]:
    """What identifies a task that was read, and what is to be known of it: separability where it can be told, cautions, a note."""
    found: dict[str, Any] = {"name": task.name, "version": task.version, "fingerprint": task_fingerprint(task, reading.documents)}
    accuracy = separability(reading.documents)
    if not math.isnan(accuracy):
        found["separability"] = accuracy
    if told := by_domain(cautions(reading.documents)):
        found["cautions"] = told
    notes = []
    if any(document.stand_in for document in reading.documents):
        notes.append("the hub could not be reached: the EMBEDDED sample was read in place of this task")
    if task.missing:
        notes.append(f"prepared without {', '.join(sorted(task.missing))}")
    if reading.without_text:
        told = caution_lines({"rows without text were left out": {domain: f"{count:,}" for domain, count in reading.without_text.items()}})
        notes += told
    return {**found, "note": "; ".join(notes)} if notes else found


def separability(documents: Sequence[Document], seed: int = 0) -> float:
    """Cross-validated accuracy of a bag-of-words classifier of the domains; chance is 1 / domains, 1 = words tell everything.

    Recall of each domain: ``dbes.tasks.separability.word_separability``.
    """
    return word_separability(documents, seed=seed).accuracy


def _file_documents(task: Task, domain: str, source: FileSource, limit: int | None) -> tuple[list[Located], Counter[str]]:
    """The documents of a domain's files, and how many of their rows were left out by reason."""
    found: list[Located] = []
    without: Counter[str] = Counter()
    for name in source.files:
        for path in local.matching(task.path, domain, name):
            if limit is not None and len(found) >= limit:
                return found, without
            local.check_digest(path, source.sha256.get(name))
            labels = (path.name, Path(os.path.relpath(path, task.path.parent)).as_posix())
            if source.source is not None:
                labels = (source.source, f"{source.source}/{labels[1]}")
            place = Place(where=f"{path}:", label=f"{path.name}:", identity=str(path.resolve()), labels=labels)
            left = None if limit is None else limit - len(found)
            own, skipped = documents_of(local.rows(path, source.format), source, domain=domain, limit=left, place=place)
            found += own
            without += skipped
    return found, without


def _given_documents(task: Task, domain: str, source: TextSource, limit: int | None) -> tuple[list[Located], Counter[str]]:
    """The documents of a domain whose texts were given, and how many of these are empty."""
    found = []
    label = f"{source.source}:" if source.source else ""
    for number, given in enumerate(source.texts, start=1):
        if limit is not None and len(found) >= limit:
            break
        where, own = f"task {task.name}: domains.{domain}.texts.{number}", f"{domain}/{label}{number}"
        text = plain_text(given, "text", where)
        if text.strip():
            document = Document(id=own, domain=domain, text=text, source=source.source)
            found.append(Located(document, own_id=own, source=f"{domain}/{label}", labels=(), where=where))
    return found, Counter({NO_TEXT: sum(not given.strip() for given in source.texts)})


def _told(problem: Mapping[str, Any], file: Path | None = None) -> str:
    """One problem of pydantic in the words of the task file: field, what is wrong, what was given, and the line of the file."""
    path = [str(step) for step in problem["loc"] if step != "[key]"]
    # a union names which of its kinds was tried
    if len(path) > 2 and path[0] == "domains" and path[2] in KINDS:
        del path[2]
        if len(path) > 4 and path[2] == "sources":
            del path[4]
    name = clipped(".".join(path), 120) or "task"
    message = {"extra_forbidden": "unknown key", "missing": "required key is missing"}.get(problem["type"])
    line = line_of(file, path) if file is not None else None
    return (
        f"{name}: {message or clipped(problem['msg'].removeprefix('Value error, '), 300)}"
        + ("" if message or not path else f" (given: {clipped(problem.get('input'))!r})")
        + ("" if line is None else f" (line {line})")
    )
