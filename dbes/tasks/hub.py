"""Documents of Hugging Face data sets; the only file that knows the ``datasets`` library, which is loaded when first needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dbes.errors import TaskError
from dbes.tasks.documents import DatasetSource, Located, is_skipped, row_document
from dbes.text import clipped


class UnreachableError(TaskError):
    """The hub could not be reached, or does not give this data set to this user (gated, private, renamed)."""


def documents(task_file: Path, domain: str, source: DatasetSource, limit: int | None) -> tuple[list[Located], int]:
    """Documents of one split in its order, and how many rows were left out because they have no text (null or empty).

    Rows whose ``skip_where`` field is filled are left out too, and not counted. A data set that starts with ``.`` or ``/`` is a
    folder, relative to the task file.

    Raises:
        UnreachableError: the data set cannot be had.
        TaskError: a field that the task names is not in the data set, or is no text.
    """
    where = f"{task_file}: domains.{domain}: data set {source.dataset!r}"
    table = _load(task_file, source, where)
    needed = [name for name in (source.skip_where,) if name is not None]
    if missing := [name for name in needed if name not in table.column_names]:
        raise TaskError(f"{where}: no field {missing[0]!r}; it has {', '.join(table.column_names)}")
    key = repr((source.dataset, source.config, source.split, source.revision, source.data_files))
    found: list[Located] = []
    without = 0
    for number, row in enumerate(table):
        if limit is not None and len(found) >= limit:
            break
        here = f"{where} row {number}"
        if is_skipped(row, source, where=here):
            continue
        # the row number is part of the fallback id, so it stays the same when a limit is given
        fallback = f"{domain}/{number}"
        document = row_document(row, source, domain=domain, fallback_id=fallback, where=here)
        if document is None:
            without += 1
            continue
        own = str(number) if document.id == fallback else document.id
        found.append(Located(document, own_id=own, source=key, labels=(), where=here))
    return found, without


def _load(task_file: Path, source: DatasetSource, where: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    local = source.dataset.startswith((".", "/"))
    path = str((task_file.parent / source.dataset).resolve()) if local else source.dataset
    if local:
        _check_folder(Path(path), where)
    revision = None if local or source.dataset in ("parquet", "json") else source.revision
    try:
        return datasets.load_dataset(path, source.config, split=source.split, revision=revision, data_files=source.data_files)
    except (OSError, HfHubHTTPError, DatasetsError) as error:
        # OSError covers ConnectionError, offline mode and FileNotFoundError (DatasetNotFoundError: also what a gated one says)
        kind = TaskError if local else UnreachableError
        raise kind(f"{where} (revision {source.revision}) cannot be read: {_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        raise TaskError(f"{where}: config {source.config!r}, split {source.split!r}: {_line(error)}") from error


def _check_folder(folder: Path, where: str) -> None:
    """Refuse what is no folder, and pipes and devices in it, for which the library would wait."""
    if not folder.is_dir():
        raise TaskError(f"{where}: {folder} is no folder; a data set that starts with . or / is a folder of parquet or JSON files")
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise TaskError(f"{where}: {path} is a pipe, socket or device, expected files")


def _line(error: Exception) -> str:
    """What a library says, with what it says of the cause, in one line."""
    told = [str(each) for each in (error, error.__cause__) if each is not None and str(each)]
    return clipped(" ".join(" ".join(told).split()), 300) or type(error).__name__
