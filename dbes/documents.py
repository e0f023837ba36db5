"""A document, where it comes from, and how a row of a file or data set becomes one."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dbes.errors import TaskError


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


class Strict(BaseModel):
    """Refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RowFields(Strict):
    """Which fields of a row make a document. ``template`` (``"{question}\\n{answer}"``) or ``text_field``, not both."""

    text_field: str | None = None
    template: str | None = None
    id_field: str | None = None
    question_field: str | None = None
    answer_field: str | None = None
    choices_fields: Annotated[list[str], Field(min_length=1)] | None = None
    skip_where: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

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
    format: Literal["jsonl", "parquet", "text"] | None = None
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = {}

    @model_validator(mode="after")
    def _digests_of_files(self) -> FileSource:
        if stray := sorted(set(self.sha256) - set(self.files)):
            raise ValueError(f"sha256 names {stray[0]!r}, which is not one of files")
        return self


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


def row_document(row: Mapping[str, Any], fields: RowFields, *, domain: str, fallback_id: str, where: str) -> Document | None:
    """The document of one row, or None when the field ``skip_where`` is filled or the text is empty.

    Raises:
        TaskError: a field that the task names is not in the row, or the text is not a string.
    """

    def taken(name: str) -> Any:
        if name not in row:
            raise TaskError(f"{where}: no field {name!r}; the row has {', '.join(map(str, row))}")
        return row[name]

    def optional(named: str | None, usual: str) -> str | None:
        value = taken(named) if named is not None else row.get(usual)
        return None if value is None else _as_text(value)

    if fields.skip_where is not None and taken(fields.skip_where):
        return None
    if fields.template is not None:
        text = re.sub(r"\{([^{}]*)\}", lambda match: _as_text(taken(match[1])), fields.template).strip()
    else:
        name = fields.text_field or "text"
        text = taken(name)
        if not isinstance(text, str):
            raise TaskError(f"{where}: field {name!r} is {type(text).__name__}, expected text")
    if not text.strip():
        return None
    identity = taken(fields.id_field) if fields.id_field is not None else row.get("id", fallback_id)
    named = [taken(name) for name in fields.choices_fields or ()]
    # one field that holds the list of choices, or several fields with one choice each
    choices = row.get("choices") if not named else named[0] if len(named) == 1 else named
    return Document(
        id=str(identity), domain=domain, text=text,
        question=optional(fields.question_field, "question"), answer=optional(fields.answer_field, "answer"),
        choices=tuple(map(_as_text, choices)) if isinstance(choices, list | tuple) else None,
        source_document=row.get("source_document"), synthetic=bool(row.get("synthetic", False)),
    )


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(map(_as_text, value))
    return "" if value is None else str(value)
