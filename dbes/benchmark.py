"""From a task file to documents: read a YAML, check it strictly, give back the texts of each domain in a fixed order.

A task names its domains and where their texts are: local files (JSON lines, parquet, plain text; gzip allowed) or data sets
of the Hugging Face hub. Nothing is downloaded for local files. Importing this module loads neither torch, datasets nor pandas.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from dbes import file_data, hub_data
from dbes.documents import DatasetSource, Document, FileSource, Strict, row_document
from dbes.errors import TaskError
from dbes.separability import word_separability

ROOT = Path(__file__).resolve().parent.parent
"""Where tasks/ and benchmark_data/ are, whatever the current folder is."""

FALLBACK = "embedded"


def _kind(value: Any) -> str:
    given = value if isinstance(value, Mapping) else vars(value) if isinstance(value, BaseModel) else {}
    return "dataset" if "dataset" in given else "files"


DomainSource = Annotated[
    Annotated[FileSource, Tag("files")] | Annotated[DatasetSource, Tag("dataset")], Discriminator(_kind)
]


class Task(Strict):
    """A benchmark: its domains and where their texts are. ``version`` is raised by any change that could alter a score."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    version: Annotated[int, Field(ge=1)]
    description: str = ""
    window: Annotated[int, Field(ge=2)] = 512
    domains: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_ -]*$")], DomainSource]
    _path: Path = PrivateAttr(default=Path("task.yaml"))

    @model_validator(mode="after")
    def _at_least_two_domains(self) -> Task:
        if len(self.domains) < 2:
            raise ValueError(f"{len(self.domains)} domain given; specialization compares domains, so at least 2 are needed")
        return self

    @property
    def path(self) -> Path:
        """The YAML this task was read from; its files are relative to the folder of it."""
        return self._path


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error (YAML would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_task(name_or_path: str | Path) -> Task:
    """The task of a YAML file, or of the tasks that come with dbes by name (``embedded``, ``smoke``, ``full``).

    Raises:
        TaskError: no such task or file, not YAML, unknown or missing keys, wrong types, fewer than two domains.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = ROOT / "tasks" / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in (ROOT / "tasks").glob("*.yaml")))
            raise TaskError(f"no task is called {str(name_or_path)!r}; there are {known}, or give the path of a .yaml file")
    try:
        # a SafeLoader: no Python object can be built from the file
        content = _UniqueKeys(path.read_text("utf-8")).get_single_data()
    except FileNotFoundError:
        raise TaskError(f"{path}: no such task file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path}: not readable as YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise TaskError(f"{path}: a task is a mapping with name, version and domains, not {type(content).__name__}")
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        raise TaskError("\n".join(f"{path}: {_told(problem)}" for problem in error.errors())) from None
    task._path = path.resolve()
    return task


def list_tasks() -> list[Task]:
    """The tasks that come with dbes, by name."""
    return [load_task(path) for path in sorted((ROOT / "tasks").glob("*.yaml"))]


def read_documents(task: Task, *, limit: int | None = None, embedded_fallback: bool = False) -> list[Document]:
    """All documents of a task, domain by domain in the order of the file; at most ``limit`` of each domain (the first ones).

    With ``embedded_fallback``, a task whose hub data cannot be had gives the embedded documents of the same domains instead,
    every one marked ``stand_in``, after a warning: never a mixture of both, whose lengths and formats would differ by domain.

    Raises:
        TaskError: a missing or altered file, a line that is no JSON, text that is no UTF-8, a missing field, an empty text
            (an error for files; a hub row without text is left out), a domain without documents, an id given twice.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit is {limit}; at least 1 document of each domain is needed")
    documents: list[Document] = []
    for domain, source in task.domains.items():
        wanted = min((n for n in (limit, source.limit) if n is not None), default=None)
        if isinstance(source, FileSource):
            found = _file_documents(task, domain, source, wanted)
        else:
            try:
                found = hub_data.documents(task.path, domain, source, wanted)
            except hub_data.UnreachableError as error:
                if not embedded_fallback:
                    raise TaskError(f"{error}. Log in or go online, or allow the embedded fallback") from error
                return _stand_ins(task, limit, str(error))
        if not found:
            raise TaskError(f"{task.path}: domains.{domain}: no documents")
        documents += found
    _check_ids(task, documents)
    return documents


def _stand_ins(task: Task, limit: int | None, reason: str) -> list[Document]:
    embedded = load_task(FALLBACK)
    if strange := sorted(set(task.domains) - set(embedded.domains)):
        raise TaskError(f"{reason}. The embedded sample cannot stand in: it has no domain {strange[0]!r}")
    warnings.warn(
        f"{reason}. Reading the EMBEDDED sample in place of task {task.name!r}: the scores are not those of {task.name!r}", stacklevel=3
    )
    rows = [document for document in read_documents(embedded, limit=limit) if document.domain in task.domains]
    return [Document(**{**vars(document), "stand_in": True}) for document in rows]


def task_fingerprint(task: Task, documents: Sequence[Document]) -> str:
    """sha256 over window, version and every document's id, domain, source and text: equal only when the same texts were read."""
    digest = hashlib.sha256(json.dumps([task.version, task.window]).encode())
    for document in documents:
        row = [document.id, document.domain, document.source_document, document.text]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def separability(documents: Sequence[Document], seed: int = 0) -> float:
    """Cross-validated accuracy of a bag-of-words classifier of the domains; chance is 1 / domains, 1 = words tell everything.

    Recall of each domain: ``dbes.separability.word_separability``.
    """
    return word_separability(documents, seed=seed).accuracy


def _file_documents(task: Task, domain: str, source: FileSource, limit: int | None) -> list[Document]:
    found: list[Document] = []
    for name in source.files:
        for path in file_data.matching(task.path, domain, name):
            if limit is not None and len(found) >= limit:
                return found
            file_data.check_digest(path, source.sha256.get(name))
            for number, row in file_data.rows(path, source.format):
                where = f"{path}:{number}"
                document = row_document(row, source, domain=domain, fallback_id=f"{domain}/{path.name}:{number}", where=where)
                if document is None:
                    if source.skip_where is not None and row[source.skip_where]:
                        continue
                    shown = source.template or source.text_field or "text"
                    identity = row.get(source.id_field or "id", number)
                    raise TaskError(f"{where}: field {shown!r} is empty (id {identity!r}); remove the row or fill it")
                found.append(document)
                if limit is not None and len(found) >= limit:
                    break
    return found


def _check_ids(task: Task, documents: Iterable[Document]) -> None:
    first: dict[str, str] = {}
    for document in documents:
        if document.id in first:
            raise TaskError(f"{task.path}: id {document.id!r} is given twice (domains {first[document.id]} and {document.domain})")
        first[document.id] = document.domain


def _told(problem: Mapping[str, Any]) -> str:
    """One problem of pydantic in the words of the task file: field, what is wrong, what was given."""
    path = [str(step) for step in problem["loc"] if step != "[key]"]
    if len(path) > 2 and path[0] == "domains" and path[2] in ("files", "dataset"):
        del path[2]
    name = ".".join(path) or "task"
    message = {"extra_forbidden": "unknown key", "missing": "required key is missing"}.get(problem["type"])
    return f"{name}: {message or problem['msg'].removeprefix('Value error, ')}" + (
        "" if message or not path else f" (given: {str(problem.get('input'))[:80]!r})"
    )
