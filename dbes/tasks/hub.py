"""Documents of Hugging Face data sets; the only file that knows the ``datasets`` library, which is loaded when first needed."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import TaskError
from dbes.tasks.documents import Located, Place, documents_of
from dbes.tasks.sources import DatasetSource, named_fields
from dbes.text import clipped

PATIENCE = 10.0
"""Seconds that the hub may take to say whether it has a data set; asked once, before anything is read."""

BUFFER = 10_000
"""Rows of a stream, from its beginning, that a sample is drawn from."""

PACKAGED = ("parquet", "json", "csv", "text", "arrow")
"""Formats that stand for a data set where ``data_files`` names the files."""

ROW_FIELDS = ("id", "text", "question", "answer", "choices", "source", "source_document", "synthetic")
"""Fields that are read though no task names them."""


class UnreachableError(TaskError):
    """The hub could not be reached, or does not give this data set to this user (gated, private, renamed)."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a data set's name stands for now.

    Attributes:
        path: a name of the hub, or a folder.
        revision: the commit, or None where there is none or the hub could not be asked.
        offline: read what the cache holds, and do not ask again.
    """

    path: str
    revision: str | None
    offline: bool = False


def documents(task_file: Path, domain: str, source: DatasetSource, limit: int | None) -> tuple[list[Located], Counter[str], str | None]:
    """Documents of one split in its order, how many rows were left out by reason, and the revision that was read, where it is known.

    A data set that starts with ``.`` or ``/`` is a folder, relative to the task file.

    Raises:
        UnreachableError: the data set cannot be had.
        TaskError: a field that the task names is not in the data set, or is no text; no such config or split.
    """
    where = f"{task_file}: domains.{domain}: data set {source.dataset!r}"
    resolved = _resolved(task_file, source, where)
    table = _load(source, resolved, where)
    columns: list[str] | None = table.column_names
    if columns is not None:
        needed = [name.partition(".")[0] if name not in columns else name for name in named_fields(source)]
        if missing := [name for name in needed if name not in columns]:
            raise TaskError(f"{where}: no field {missing[0]!r}; it has {clipped(', '.join(columns), 300)}")
        if source.template is not None or source.text_field is not None:  # what is not read is not decoded: images, archives of test cases
            table = table.select_columns([name for name in columns if name in needed or name in ROW_FIELDS])
    label = f"{source.source}:" if source.source else ""
    place = Place(
        where=f"{where} row ",
        label=label,
        identity=repr((source.dataset, source.config, source.split, source.revision, source.data_files, source.source)),
        labels=(source.source, source.source) if source.source else (),
        source=source.dataset,
    )
    found, left = documents_of(_rows(table, source, where), source, domain=domain, limit=limit, place=place)
    return found, left, resolved.revision


def _rows(table: Any, source: DatasetSource, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers in the split: in its order or, with a seed, in a random one."""
    try:
        if source.seed is None:
            yield from enumerate(table)
            return
        if source.streaming:  # without the library's own shuffling, which forgets the numbers and can wait for its threads
            table = list(itertools.islice(table, BUFFER))
        for number in np.random.default_rng(source.seed).permutation(len(table)):
            yield int(number), table[int(number)]
    except OSError as error:  # a stream is fetched while it is read
        raise UnreachableError(f"{where}: lost while it was read: {_line(error)}") from error


def _resolved(task_file: Path, source: DatasetSource, where: str) -> Resolved:
    """The folder, or the commit of the hub: asked for once, so that a hub that is away is noticed at once and not after many tries."""
    if source.dataset.startswith((".", "/")):
        folder = (task_file.parent / source.dataset).resolve()
        _check_folder(folder, where)
        return Resolved(path=str(folder), revision=None)
    name, revision = source.dataset, source.revision
    if name in PACKAGED:
        files = source.data_files or ""
        remote = re.match(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/convert/\w+|[^/]+))?/", files if isinstance(files, str) else files[0])
        if remote is None:
            return Resolved(path=name, revision=None)
        name, revision = remote[1], remote[2]
    commit, offline = _commit(name, revision, where)
    return Resolved(path=source.dataset, revision=commit, offline=offline)


def _commit(name: str, revision: str | None, where: str) -> tuple[str | None, bool]:
    """The commit that a revision of a data set is now, and whether the hub is out of reach."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (of the HTTP client, which is one or another)
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return None, True
    try:
        found = HfApi().dataset_info(name, revision=revision, timeout=PATIENCE)
    except GatedRepoError as error:
        raise UnreachableError(f"{where}: {_gated(name)}") from error
    except RevisionNotFoundError as error:
        raise TaskError(f"{where}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise UnreachableError(f"{where}: the hub has none of this name, or not for you (for a private one: `hf auth login`)") from error
    except HFValidationError as error:
        raise TaskError(f"{where}: {_line(error)}") from error
    except HfHubHTTPError as error:
        raise UnreachableError(f"{where} (revision {revision or 'main'}) cannot be read: {_line(error)}") from error
    except (HTTPError, OSError):  # no answer
        return None, True
    if found.gated and get_token() is None:
        raise UnreachableError(f"{where}: {_gated(name)}")
    script = f"{name.rpartition('/')[2]}.py"
    if any(each.rfilename == script for each in found.siblings or ()):
        raise TaskError(f"{where}: {_script(script)}")
    return found.sha, False


def _gated(name: str) -> str:
    return (
        f"is gated: accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login` (or set HF_TOKEN); "
        "or go without it: `dbes tasks prepare ... --allow-missing`"
    )


def _script(name: str) -> str:
    return (
        f"is a loading script ({name}); datasets 5 runs none. Read the hub's own conversion instead: revision: refs/convert/parquet, "
        "data_files: CONFIG/SPLIT/*.parquet"
    )


def _load(source: DatasetSource, resolved: Resolved, where: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    local = source.dataset.startswith((".", "/"))
    revision = None if local or source.dataset in PACKAGED else resolved.revision or source.revision
    files = None if source.data_files is None else {source.split: source.data_files}
    try:
        with _from_cache_if(resolved.offline):
            return datasets.load_dataset(
                resolved.path, source.config, split=source.split, revision=revision, data_files=files, streaming=source.streaming
            )
    except (OSError, HfHubHTTPError, DatasetsError) as error:
        # OSError covers ConnectionError, offline mode and FileNotFoundError (DatasetNotFoundError: also what a gated one says)
        told = _line(error)
        if "gated" in told:
            raise UnreachableError(f"{where}: {_gated(source.dataset)}") from error
        kind = TaskError if local else UnreachableError
        if resolved.offline:
            told = "the hub cannot be reached, and the cache does not hold it"
        raise kind(f"{where} (revision {source.revision or 'main'}) cannot be read: {told}") from error
    except (ValueError, RuntimeError) as error:
        told = _line(error)
        if found := re.search(r"scripts are no longer supported, but found (\S+)", told):
            raise TaskError(f"{where}: {_script(found[1])}") from error
        raise TaskError(f"{where}: config {source.config!r}, split {source.split!r}: {told}") from error


@contextmanager
def _from_cache_if(offline: bool) -> Iterator[None]:
    """Inside the block both libraries read their caches and ask nobody: what they would do had the user said that there is no network."""
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


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
