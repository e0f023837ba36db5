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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from dbes.errors import TaskError
from dbes.schema import read_yaml
from dbes.shipped import TASKS
from dbes.tasks import hub, local
from dbes.tasks.cautions import by_domain, caution_lines, cautions
from dbes.tasks.documents import (
    MOST,
    DatasetSource,
    Document,
    FileSource,
    Located,
    Strict,
    TextSource,
    is_skipped,
    row_document,
    with_distinct_ids,
)
from dbes.tasks.rows import plain_text
from dbes.tasks.separability import word_separability
from dbes.text import clipped, unknown

FALLBACK = "embedded"

PROBLEMS = 8
"""Faults of a task file that one message names at most."""


def _kind(value: Any) -> str:
    given = value if isinstance(value, Mapping) else vars(value) if isinstance(value, BaseModel) else {}
    if isinstance(value, list | tuple):
        return "texts"
    return next((kind for kind in ("dataset", "texts") if kind in given), "files")


DomainSource = Annotated[
    Annotated[FileSource, Tag("files")] | Annotated[DatasetSource, Tag("dataset")] | Annotated[TextSource, Tag("texts")],
    Discriminator(_kind),
]


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

    Raises:
        TaskError: an unknown or missing field, a wrong value, fewer than two domains; the message names the field.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    version: Annotated[int, Field(ge=1, le=MOST)]
    description: str = ""
    window: Annotated[int, Field(ge=2, le=MOST)] = 512
    domains: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_ -]*$")], DomainSource]
    _path: Path = PrivateAttr(default=Path("task.yaml"))

    @model_validator(mode="after")
    def _at_least_two_domains(self) -> Task:
        if len(self.domains) < 2:
            raise ValueError(f"{len(self.domains)} domain given; specialization compares domains, so at least 2 are needed")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, content: Any, check: Callable[[Any], Task]) -> Task:
        """Faults as one TaskError of one line, also of a task that is built in Python. Stands last, so that it sees those of the others."""
        try:
            return check(content)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            more = [f"and {len(faults) - PROBLEMS} more"] if len(faults) > PROBLEMS else []
            raise TaskError("; ".join([*map(_told, faults[:PROBLEMS]), *more])) from None

    @property
    def path(self) -> Path:
        """The YAML this task was read from; its files are relative to the folder of it."""
        return self._path


def load_task(task: str | Path | Task) -> Task:
    """The task of a YAML file, or of the tasks that come with dbes by name (``embedded``, ``smoke``, ``full``); a `Task` as it is.

    Raises:
        TaskError: no such task or file, not YAML, unknown or missing keys, wrong types, fewer than two domains.
    """
    if isinstance(task, Task):
        return task
    path = Path(task)
    if path.suffix not in (".yaml", ".yml"):
        path = TASKS / f"{task}.yaml"
        if not path.is_file():
            known = sorted(found.stem for found in TASKS.glob("*.yaml"))
            raise TaskError(f"{unknown('task', str(task), known)}, or give the path of a .yaml file")
    content = read_yaml(path, error=TaskError, missing=f"{path}: no such task file")
    if not isinstance(content, dict):
        raise TaskError(f"{path}: a task is a mapping with name, version and domains, not {type(content).__name__}")
    try:
        found = Task.model_validate(content)
    except TaskError as problem:
        raise TaskError(f"{path}: {problem}") from None
    found._path = path.resolve()
    return found


def list_tasks() -> list[Task]:
    """The tasks that come with dbes, by name."""
    return [load_task(path) for path in sorted(TASKS.glob("*.yaml"))]


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
        wanted = min((n for n in (limit, source.limit) if n is not None), default=None)
        if isinstance(source, FileSource):
            own, without = _file_documents(task, domain, source, wanted)
        elif isinstance(source, TextSource):
            own, without = _given_documents(task, domain, source, wanted)
        else:
            try:
                own, without = hub.documents(task.path, domain, source, wanted)
            except hub.UnreachableError as error:
                if not embedded_fallback:
                    raise TaskError(f"{error}. Log in or go online, or allow the embedded fallback") from error
                return Reading(documents=_stand_ins(task, limit, str(error)), without_text={})
        if not own:
            told = f" ({without} rows have no text)" if without else ""
            raise TaskError(f"{task.path}: domains.{domain}: no documents{told}")
        found += own
        if without:
            without_text[domain] = without
    return Reading(documents=tuple(with_distinct_ids(found)), without_text=without_text)


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
    if reading.without_text:
        told = caution_lines({"rows without text were left out": {domain: f"{count:,}" for domain, count in reading.without_text.items()}})
        notes += told
    return {**found, "note": "; ".join(notes)} if notes else found


def separability(documents: Sequence[Document], seed: int = 0) -> float:
    """Cross-validated accuracy of a bag-of-words classifier of the domains; chance is 1 / domains, 1 = words tell everything.

    Recall of each domain: ``dbes.tasks.separability.word_separability``.
    """
    return word_separability(documents, seed=seed).accuracy


def _file_documents(task: Task, domain: str, source: FileSource, limit: int | None) -> tuple[list[Located], int]:
    """The documents of a domain's files, and how many of their rows have no text."""
    found: list[Located] = []
    without = 0
    for name in source.files:
        for path in local.matching(task.path, domain, name):
            if limit is not None and len(found) >= limit:
                return found, without
            local.check_digest(path, source.sha256.get(name))
            labels = (path.name, Path(os.path.relpath(path, task.path.parent)).as_posix())
            for number, row in local.rows(path, source.format):
                where = f"{path}:{number}"
                if is_skipped(row, source, where=where):
                    continue
                fallback = f"{domain}/{path.name}:{number}"
                document = row_document(row, source, domain=domain, fallback_id=fallback, where=where)
                if document is None:
                    without += 1
                    continue
                own = str(number) if document.id == fallback else document.id
                found.append(Located(document, own_id=own, source=str(path.resolve()), labels=labels, where=where))
                if limit is not None and len(found) >= limit:
                    break
    return found, without


def _given_documents(task: Task, domain: str, source: TextSource, limit: int | None) -> tuple[list[Located], int]:
    """The documents of a domain whose texts were given, and how many of these are empty."""
    found = []
    for number, given in enumerate(source.texts, start=1):
        if limit is not None and len(found) >= limit:
            break
        where, own = f"task {task.name}: domains.{domain}.texts.{number}", f"{domain}/{number}"
        text = plain_text(given, "text", where)
        if text.strip():
            found.append(Located(Document(id=own, domain=domain, text=text), own_id=own, source=domain, labels=(), where=where))
    return found, sum(not given.strip() for given in source.texts)


def _told(problem: Mapping[str, Any]) -> str:
    """One problem of pydantic in the words of the task file: field, what is wrong, what was given."""
    path = [str(step) for step in problem["loc"] if step != "[key]"]
    if len(path) > 2 and path[0] == "domains" and path[2] in ("files", "dataset", "texts"):
        del path[2]
    name = clipped(".".join(path), 120) or "task"
    message = {"extra_forbidden": "unknown key", "missing": "required key is missing"}.get(problem["type"])
    return f"{name}: {message or clipped(problem['msg'].removeprefix('Value error, '), 300)}" + (
        "" if message or not path else f" (given: {clipped(problem.get('input'))!r})"
    )
