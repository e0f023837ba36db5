"""A document, where it comes from, and how a row of a file or data set becomes one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbes.errors import TaskError
from dbes.tasks.rows import KNOWN, kind_of, plain_text, whole_text
from dbes.tasks.sources import RowFields
from dbes.text import clipped

NO_TEXT = "no text"
"""Why a row is left out whose fields of text are all null or empty."""


@dataclass(frozen=True)
class Document:
    """One text of a domain: the unit of all statistics.

    Attributes:
        id: unique in the task.
        domain: one of the task's domains.
        text: never empty; what a model reads.
        question, answer, choices: for items with an answer; the text contains the question.
        source_document: identity of the source text this one was cut from, when the file names it.
        synthetic: generated rather than found.
        stand_in: an embedded document read in place of a hub data set that could not be reached.
        source: the collection it was taken from: as the task calls it, else what the row says, else the data set.
    """

    id: str
    domain: str
    text: str
    question: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    source_document: str | None = None
    synthetic: bool = False
    stand_in: bool = False
    source: str | None = None


def left_out(row: Mapping[str, Any], fields: RowFields, *, where: str) -> str | None:
    """Why a row is left out; None for one that is read."""
    if fields.skip_where is not None and not _empty(_taken(row, fields.skip_where, where)):
        return f"{fields.skip_where} is filled"
    for name in fields.require:
        if _empty(_taken(row, name, where)):
            return f"{name} is empty"
    for name, wanted in fields.filter.items():
        if _taken(row, name, where) not in (wanted if isinstance(wanted, list) else [wanted]):
            return f"another {name}"
    return None


def _empty(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def documents_of(
    rows: Iterable[tuple[int, Mapping[str, Any]]], fields: RowFields, *, domain: str, limit: int | None, place: Place
) -> tuple[list[Located], Counter[str]]:
    """The documents of numbered rows, at most ``limit``, and how many rows were left out by reason.

    Raises:
        TaskError: as `row_document`.
    """
    found: list[Located] = []
    without: Counter[str] = Counter()
    for number, row in rows:
        where = f"{place.where}{number}"
        if (reason := left_out(row, fields, where=where)) is not None:
            without[reason] += 1
            continue
        # the number of the row is part of the fallback id, so it stays the same when a limit is given
        fallback = f"{domain}/{place.label}{number}"
        document = row_document(row, fields, domain=domain, fallback_id=fallback, where=where)
        if document is None:
            without[NO_TEXT] += 1
            continue
        if document.source is None and place.source is not None:
            document = replace(document, source=place.source)
        own = str(number) if document.id == fallback else document.id
        found.append(Located(document, own_id=own, source=place.identity, labels=place.labels, where=where))
        if limit is not None and len(found) >= limit:  # what is beyond is not read
            break
    return found, without


def row_document(row: Mapping[str, Any], fields: RowFields, *, domain: str, fallback_id: str, where: str) -> Document | None:
    """The document of one row, or None when its text is empty or null.

    Args:
        where: file and row, for messages.

    Raises:
        TaskError: a field that the task names is not in the row, or a field that is used is no text.
    """
    text = _text(row, fields, where)
    if text is None:
        return None
    identity = _taken(row, fields.id_field, where) if fields.id_field is not None else row.get("id")
    if identity is None and fields.id_field is None:
        identity = fallback_id
    name = fields.id_field or "id"
    identity = plain_text(identity, name, where)
    if not identity.strip():
        raise TaskError(f"{where}: field {name!r} is empty, expected an id")
    source = row.get("source_document")
    synthetic = row.get("synthetic")
    if not isinstance(synthetic, bool | None):
        raise TaskError(f"{where}: field 'synthetic' is {clipped(repr(synthetic), 40)}, expected true or false")
    return Document(
        id=identity, domain=domain, text=text,
        question=_optional(row, fields.question_field, "question", where),
        answer=_optional(row, fields.answer_field, "answer", where),
        choices=_choices(row, fields, where),
        source_document=None if source is None or source == "" else plain_text(source, "source_document", where),
        synthetic=bool(synthetic),
        source=fields.source or _optional(row, None, "source", where),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where numbered rows are read.

    Attributes:
        where: for messages; the number of the row is put behind it.
        label: stands before the number in the id of a row that has none.
        identity, labels: as of `Located`.
        source: what the documents are said to come from where neither task nor row says it.
    """

    where: str
    label: str
    identity: str
    labels: tuple[str, ...]
    source: str | None = None


@dataclass(frozen=True)
class Located:
    """A document and where it was read.

    Attributes:
        own_id: its id in its file: the row's, or the number of the row.
        source: identity of the file, or of the split of a data set.
        labels: names of the file or source for ids that must be told apart, the shorter first; empty for a data set without a name.
        where: file and row.
    """

    document: Document
    own_id: str
    source: str
    labels: tuple[str, ...]
    where: str


def with_distinct_ids(found: Sequence[Located]) -> list[Document]:
    """The documents, with ids of their own.

    An id is unique within its file. Where two files (or splits) share an id, as files do that both number their rows from 0, all
    ids of these files become ``domain/file:id``, or ``domain/id`` for a data set; all others stay as they are.

    Raises:
        TaskError: an id given twice in a file, or in a file that is read twice.
    """
    seen: dict[tuple[str, str], Located] = {}
    files: dict[str, set[str]] = {}
    for each in found:
        identity = each.document.id
        files.setdefault(identity, set()).add(each.source)
        _refuse_twice(seen.setdefault((each.source, identity), each), each)
    shared = {source for sources in files.values() if len(sources) > 1 for source in sources}
    if not shared:
        return [each.document for each in found]
    called: dict[tuple[str, str], set[str]] = {}
    for each in found:
        if each.source in shared and each.labels:
            called.setdefault((each.document.domain, each.labels[0]), set()).add(each.source)
    taken: dict[str, Located] = {}
    documents = []
    for each in found:
        document = each.document
        if each.source in shared:
            domain, label = document.domain, ""
            if each.labels:
                label = each.labels[len(called[domain, each.labels[0]]) > 1] + ":"
            document = replace(document, id=f"{domain}/{label}{each.own_id}")
        _refuse_twice(taken.setdefault(document.id, each), each, document.id)
        documents.append(document)
    return documents


def _refuse_twice(first: Located, again: Located, identity: str | None = None) -> None:
    if first is not again:
        domains = f"{first.document.domain} and {again.document.domain}"
        shown = clipped(repr(identity or again.document.id))
        raise TaskError(f"{again.where}: id {shown} is given twice (domains {domains}), first at {first.where}")


def _taken(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        first, _, rest = name.partition(".")
        if rest and isinstance(row.get(first), Mapping):
            return _taken(row[first], rest, f"{where}: {first}")
        raise TaskError(f"{where}: no field {name!r}; the row has {clipped(', '.join(map(str, row)), 300)}")
    return row[name]


def _text(row: Mapping[str, Any], fields: RowFields, where: str) -> str | None:
    """The text of a row; None where there is none."""
    if fields.template is None:
        name = fields.text_field or "text"
        if fields.text_field is None and name not in row:
            found = whole_text(row, where, error=TaskError)
            if found is None:
                shown = clipped(", ".join(map(str, row)), 300)
                raise TaskError(f"{where}: no field 'text', and no {KNOWN}: give text_field or template; the row has {shown}")
            return found or None
        value = _taken(row, name, where)
        if value is not None and not isinstance(value, str):
            raise TaskError(f"{where}: field {name!r} is {kind_of(value)}, expected text")
        return plain_text(value, name, where) if value is not None and value.strip() else None
    values = {name: _taken(row, name, where) for name in re.findall(r"\{([^{}]*)\}", fields.template)}
    if all(value is None for value in values.values()):
        return None
    texts = {name: plain_text(value, name, where, lists=True) for name, value in values.items()}
    if not any(text.strip() for text in texts.values()):
        return None
    return re.sub(r"\{([^{}]*)\}", lambda match: texts[match[1]], fields.template).strip()


def _optional(row: Mapping[str, Any], named: str | None, usual: str, where: str) -> str | None:
    """The text of a field that may be missing or null; one that the task does not name is left alone where it is no text."""
    value = _taken(row, named, where) if named is not None else row.get(usual)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value)
    try:
        return plain_text(value, named or usual, where, lists=True)
    except TaskError:
        if named is None and not isinstance(value, str):
            return None
        raise


def _choices(row: Mapping[str, Any], fields: RowFields, where: str) -> tuple[str, ...] | None:
    """The choices: one field that holds a list of them, or several fields with one each."""
    names = fields.choices_fields
    if names is not None and len(names) > 1:
        return tuple(plain_text(_taken(row, name, where), name, where) for name in names)
    name = names[0] if names else "choices"
    value = _taken(row, name, where) if names else row.get(name)
    if not isinstance(value, list | tuple):
        if names and value is not None:
            raise TaskError(f"{where}: field {name!r} is {kind_of(value)}, expected a list of choices")
        return None
    return tuple(plain_text(part, f"{name}[{place}]", where) for place, part in enumerate(value))
