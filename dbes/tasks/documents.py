"""A document, where it comes from, and how a row of a file or data set becomes one."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from dbes import schema
from dbes.errors import TaskError
from dbes.tasks.local import Format
from dbes.tasks.rows import KNOWN, kind_of, plain_text, whole_text
from dbes.text import clipped

MOST = 2**31 - 1


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


class Strict(schema.Strict):
    """Refuses values of another type too."""

    model_config = ConfigDict(strict=True)


class RowFields(Strict):
    r"""Which fields of a row make a document. ``template`` (``"{question}\n{answer}"``) or ``text_field``, not both.

    A ``text_field`` holds text. Fields of a template hold text, numbers, or lists of these, which are put on lines of their own;
    anything else, null included, is refused: what Python would print for it is no text. A row whose named fields are all null or
    empty has no text. Where neither is given, the text is the field ``text``, or all of a conversation or an instruction with its answer
    (`dbes.tasks.rows`).
    """

    text_field: str | None = None
    template: str | None = None
    id_field: str | None = None
    question_field: str | None = None
    answer_field: str | None = None
    choices_fields: Annotated[list[str], Field(min_length=1)] | None = None
    skip_where: str | None = None
    limit: Annotated[int, Field(ge=1, le=MOST)] | None = None

    @model_validator(mode="after")
    def _one_text(self) -> RowFields:
        if self.text_field is not None and self.template is not None:
            raise ValueError("give text_field or template, not both")
        if self.template is not None and not template_fields(self.template):
            raise ValueError(f"template {self.template!r} names no field; write fields in braces, as in '{{question}}'")
        return self


class FileSource(RowFields):
    """Local files of one domain, relative to the task file; ``*`` in a name matches several files in sorted order.

    Plain text: one file is one document. ``sha256`` maps a name of ``files`` to the digest it must have.
    """

    files: Annotated[list[str], Field(min_length=1)]
    format: Format | None = None
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _digests_of_files(self) -> FileSource:
        if stray := sorted(set(self.sha256) - set(self.files)):
            raise ValueError(f"sha256 names {stray[0]!r}, which is not one of files")
        return self


class TextSource(Strict):
    """The texts themselves, one document each; a list of texts stands for it."""

    texts: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1, le=MOST)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"texts": list(given)} if isinstance(given, list | tuple) else given


class DatasetSource(RowFields):
    """A split of a Hugging Face data set (or of a local folder of parquet or JSON files). ``revision`` is required."""

    dataset: str
    config: str | None = None
    split: str
    revision: str
    data_files: str | list[str] | None = None


def template_fields(template: str) -> list[str]:
    """The fields a template names, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def is_skipped(row: Mapping[str, Any], fields: RowFields, *, where: str) -> bool:
    """Whether the field ``skip_where`` of the row is filled."""
    return fields.skip_where is not None and bool(_taken(row, fields.skip_where, where))


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
    )  # fmt: skip


@dataclass(frozen=True)
class Located:
    """A document and where it was read.

    Attributes:
        own_id: its id in its file: the row's, or the number of the row.
        source: identity of the file, or of the split of a data set.
        labels: names of the file for ids that must be told apart, the shorter first; empty for the split of a data set.
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
