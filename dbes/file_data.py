"""Rows of the local files a task names: JSON lines, parquet, plain text; gzip allowed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dbes.errors import TaskError
from dbes.files import sha256_of

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def matching(task_file: Path, domain: str, name: str) -> list[Path]:
    """The files a name of a task means, relative to the task file; sorted where ``*`` matches several."""
    if "*" in name:
        root = Path(name).anchor or str(task_file.parent)
        found = sorted(path for path in Path(root).glob(name.removeprefix(Path(name).anchor)) if path.is_file())
    else:
        path = task_file.parent / name
        found = [path] if path.is_file() else []
    if not found:
        raise TaskError(f"{task_file}: domains.{domain}.files: no file {name!r} in {task_file.parent}")
    return found


def check_digest(path: Path, expected: str | None) -> None:
    """Raises TaskError when the file is not the one the task was written for."""
    if expected is not None and (found := sha256_of(path)) != expected:
        raise TaskError(f"{path}: sha256 is {found}, the task says {expected}: the file was altered")


def rows(path: Path, kind: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a file, counted from 1 (for JSON lines the line of the file).

    Raises:
        TaskError: unknown suffix, damaged gzip or parquet, text that is no UTF-8, a line that is no JSON object.
    """
    suffixes = path.suffixes
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = kind or SUFFIXES.get(suffixes[-2] if zipped and len(suffixes) > 1 else path.suffix)
    if kind is None:
        raise TaskError(f"{path}: format not told by the suffix; name it {', '.join(SUFFIXES)} (or .gz of these) or give format")
    if kind == "parquet":
        return _parquet(path)
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if zipped else content
        text = content.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: damaged gzip file: {error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
    if kind == "text":
        return iter([(1, {"id": path.name, "text": text.strip()})])
    return _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # only \n ends a line: str.splitlines would also break at U+2028, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{number}: a line is a JSON object with named fields, not {type(row).__name__}")
        yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow import parquet as arrow_parquet

    try:
        found = arrow_parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise TaskError(f"{path}: not readable as parquet: {error}") from error
    yield from enumerate(found, start=1)
