"""What a task file says of its texts: files, data sets of the hub, texts themselves, several of these; and groups of tasks."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from dbes import schema
from dbes.tasks.local import Format

MOST = 2**31 - 1

Scalar = str | int | float | bool

KINDS = ("dataset", "texts", "sources", "files")


class Strict(schema.Strict):
    """Refuses values of another type too."""

    model_config = ConfigDict(strict=True)


class Origin(Strict):
    """What is known of the texts of one source, for people: nothing of it changes what is read.

    Attributes:
        source: name of the collection; tells the ids of a domain's sources apart where they would be equal.
        licence: as its card states it.
        gated: the hub gives it only to those who logged in and accepted its terms.
        local_only: a prepared copy is not to be passed on.
        origin: where a prepared copy was read from.
    """

    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None
    licence: str | None = None
    gated: bool = False
    local_only: bool = False
    origin: str | None = None


class RowFields(Origin):
    r"""Which fields of a row make a document. ``template`` (``"{question}\n{answer}"``) or ``text_field``, not both.

    A ``text_field`` holds text. Fields of a template hold text, numbers, or lists of these, which are put on lines of their own;
    anything else, null included, is refused: what Python would print for it is no text. A row whose named fields are all null or
    empty has no text. Where neither is given, the text is the field ``text``, or all of a conversation or an instruction with its answer
    (`dbes.tasks.rows`). A name with dots (``context.contexts``) is a field of an object.

    Rows are left out, and counted by reason, where the field ``skip_where`` is filled, where a field of ``require`` is empty, and where
    a field of ``filter`` has another value than the one (or than those of the list) given.
    """

    text_field: str | None = None
    template: str | None = None
    id_field: str | None = None
    question_field: str | None = None
    answer_field: str | None = None
    choices_fields: Annotated[list[str], Field(min_length=1)] | None = None
    skip_where: str | None = None
    require: list[str] = Field(default_factory=list)
    filter: dict[str, Scalar | Annotated[list[Scalar], Field(min_length=1)]] = Field(default_factory=dict)
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


class TextSource(Origin):
    """The texts themselves, one document each; a list of texts stands for it."""

    texts: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1, le=MOST)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"texts": list(given)} if isinstance(given, list | tuple) else given


class DatasetSource(RowFields):
    """A split of a Hugging Face data set (or of a local folder of parquet or JSON files).

    Attributes:
        revision: branch, tag or, to have the same texts for ever, commit; null where none is known: what the main branch holds when it
            is read. Must be given.
        data_files: files of the repository that are read as the split, in place of those that its card names.
        streaming: read no more of the split than is asked for.
        seed: take ``limit`` rows at random in place of the first; of a stream, from its first 10,000.
    """

    dataset: str
    config: str | None = None
    split: str
    revision: str | None
    data_files: str | list[str] | None = None
    streaming: bool = False
    seed: Annotated[int, Field(ge=0, le=MOST)] | None = None

    @model_validator(mode="after")
    def _sample_has_a_size(self) -> DatasetSource:
        if self.seed is not None and self.limit is None:
            raise ValueError("seed: draws limit rows at random, so give limit too")
        return self


def template_fields(template: str) -> list[str]:
    """The fields a template names, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def named_fields(fields: RowFields) -> list[str]:
    """Every field that a source names, each once."""
    text = template_fields(fields.template) if fields.template is not None else [fields.text_field]
    given = [*text, fields.id_field, fields.question_field, fields.answer_field, *(fields.choices_fields or ())]
    return list(dict.fromkeys(name for name in (*given, fields.skip_where, *fields.require, *fields.filter) if name is not None))


def _kind(value: Any) -> str:
    given = value if isinstance(value, Mapping) else vars(value) if isinstance(value, BaseModel) else {}
    if isinstance(value, list | tuple):
        return "texts"
    return next((kind for kind in KINDS if kind in given), "files")


OneSource = Annotated[
    Annotated[FileSource, Tag("files")] | Annotated[DatasetSource, Tag("dataset")] | Annotated[TextSource, Tag("texts")],
    Discriminator(_kind),
]


class SeveralSources(Strict):
    """Texts of one domain from several collections, one after the other, so that what one of them is like is not taken for the domain.

    Each has the keys of a domain, and a ``source``, its name. A limit of documents is shared out among them.
    """

    sources: Annotated[list[OneSource], Field(min_length=1)]

    @model_validator(mode="after")
    def _named_apart(self) -> SeveralSources:
        names = [each.source for each in self.sources]
        if None in names or len(set(names)) < len(names):
            raise ValueError("sources: each needs a `source` of its own, its name")
        return self


DomainSource = Annotated[
    Annotated[FileSource, Tag("files")]
    | Annotated[DatasetSource, Tag("dataset")]
    | Annotated[TextSource, Tag("texts")]
    | Annotated[SeveralSources, Tag("sources")],
    Discriminator(_kind),
]


class Group(Strict):
    """Tasks that are run together: names, and YAML files relative to the group's, of tasks or of other groups."""

    group: Annotated[list[str], Field(min_length=1)]
    description: str = ""
