"""Documents of Hugging Face data sets; the only file that knows the ``datasets`` library, which is loaded when first needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dbes.documents import DatasetSource, Document, row_document
from dbes.errors import TaskError


class UnreachableError(TaskError):
    """The hub could not be reached, or does not give this data set to this user (gated, private, renamed)."""


def documents(task_file: Path, domain: str, source: DatasetSource, limit: int | None) -> list[Document]:
    """Documents of one split in its order; rows without text and rows whose ``skip_where`` field is filled are left out.

    A data set that starts with ``.`` or ``/`` is a folder, relative to the task file.

    Raises:
        UnreachableError: the data set cannot be had.
        TaskError: a field that the task names is not in the data set.
    """
    where = f"{task_file}: domains.{domain}: data set {source.dataset!r}"
    table = _load(task_file, source, where)
    needed = [name for name in (source.skip_where,) if name is not None]
    if missing := [name for name in needed if name not in table.column_names]:
        raise TaskError(f"{where}: no field {missing[0]!r}; it has {', '.join(table.column_names)}")
    found: list[Document] = []
    for number, row in enumerate(table):
        if limit is not None and len(found) >= limit:
            break
        # the row number is part of the fallback id, so it stays the same when a limit is given
        document = row_document(row, source, domain=domain, fallback_id=f"{domain}/{number}", where=f"{where} row {number}")
        if document is not None:
            found.append(document)
    return found


def _load(task_file: Path, source: DatasetSource, where: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    local = source.dataset.startswith((".", "/"))
    path = str((task_file.parent / source.dataset).resolve()) if local else source.dataset
    revision = None if local or source.dataset in ("parquet", "json") else source.revision
    try:
        return datasets.load_dataset(path, source.config, split=source.split, revision=revision, data_files=source.data_files)
    except (OSError, HfHubHTTPError, DatasetsError) as error:
        # OSError covers ConnectionError, offline mode and FileNotFoundError (DatasetNotFoundError: also what a gated one says)
        raise UnreachableError(f"{where} (revision {source.revision}) cannot be read: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise TaskError(f"{where}: config {source.config!r}, split {source.split!r}: {error}") from error
