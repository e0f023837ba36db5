"""Rows of the local files a task names: JSON lines, JSON arrays, CSV, parquet, plain text; gzip allowed.

Files are read piece by piece and within bounds, so that neither a huge file nor a small one that unpacks to a huge one takes all
memory: what is asked for is what is read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dbes.errors import DbesError, TaskError
from dbes.files import opened, sha256_of
from dbes.schema import parse_json
from dbes.text import clipped

Format = Literal["jsonl", "json", "csv", "parquet", "text", "lines"]
"""How a file is read. ``json``: an array of objects or of texts, or objects one after the other, as in ``jsonl``. ``csv``: a line of names,
then rows, parted by the one of comma, semicolon and tab that the first line has most of. ``text``: a file is one text; ``lines``: every
line is one."""

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".txt": "text", ".md": "text",
}  # fmt: skip

ROW_BYTES, FILE_BYTES = 2**27, 2**31
"""Bytes of one line (or of a file that is one text), and of all lines read of a file, unpacked."""

JSON_BYTES = 2**28
"""Bytes of a JSON array, which is read as a whole."""

ROWS, BLANK_LINES = 2**22, 2**20
"""Rows of a file, and empty lines beyond ten for each row."""


def matching(task_file: Path, domain: str, name: str) -> list[Path]:
    """The files a name of a task means, relative to the task file; sorted where ``*`` matches several."""
    where = f"{task_file}: domains.{domain}.files"
    try:
        if "*" in name:
            root = Path(name).anchor or str(task_file.parent)
            found = sorted(path for path in Path(root).glob(name.removeprefix(Path(name).anchor)) if path.is_file())
        else:
            path = task_file.parent / name
            found = [path] if path.exists() else []
    except (OSError, ValueError, NotImplementedError) as problem:
        raise TaskError(f"{where}: {clipped(name)} is no name of a file ({clipped(str(problem))})") from None
    if not found:
        raise TaskError(f"{where}: no file {name!r} in {task_file.parent}")
    return found


def check_digest(path: Path, expected: str | None) -> None:
    """Raises TaskError when the file is not the one the task was written for."""
    if expected is None:
        return
    with opened(path, error=TaskError):
        found = sha256_of(path)
    if found != expected:
        raise TaskError(f"{path}: sha256 is {found}, the task says {expected}: the file was altered")


def kind_of_file(path: Path) -> Format | None:
    """How a file is read by its suffix, ``.gz`` apart; None where that does not tell."""
    return SUFFIXES.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


def rows(path: Path, kind: Format | None, *, error: type[DbesError] = TaskError) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a file, counted from 1 (where lines are rows, the line of the file).

    Args:
        kind: see `Format`; None goes by the suffix.
        error: what to raise.

    Raises:
        error: unknown suffix, no regular file, damaged gzip or parquet, text that is no UTF-8, a line that is no JSON object, a row of
            a CSV with more or fewer values than names, or more than the bounds of this module.
    """
    kind = kind or kind_of_file(path)
    if kind is None:
        raise error(f"{path}: format not told by the suffix; name it {', '.join(SUFFIXES)} (or .gz of these) or give format")
    found = _parquet(path, error) if kind == "parquet" else _texts(path, kind, path.suffix == ".gz", error)
    for count, row in enumerate(found):
        if count == ROWS:
            raise error(f"{path}: more than {ROWS:,} rows; split the file, or set a limit")
        yield row


def _texts(path: Path, kind: str, zipped: bool, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    with opened(path, error=error) as file:
        content: Any = gzip.GzipFile(fileobj=file) if zipped else file
        try:
            yield from READERS[kind](path, content, error)
        except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
            raise error(f"{path}: damaged gzip file: {problem}") from problem
        except OSError as problem:
            raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem


def _whole(path: Path, content: Any, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    found = content.read(ROW_BYTES + 1)
    if len(found) > ROW_BYTES:
        raise error(f"{path}: one text of more than {ROW_BYTES:,} bytes; cut it into documents")
    text = _decoded(found, path, 1, error)
    if "\0" in text:
        raise error(f"{path}: holds NUL characters, so it is no text in UTF-8 (perhaps UTF-16); convert the file to UTF-8")
    yield 1, {"id": path.name, "text": text.strip()}


def _json_lines(path: Path, content: Any, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in _lines(path, content, error):
        row = parse_json(text, where=f"{path}:{number}", error=error)
        if not isinstance(row, dict):
            raise error(f"{path}:{number}: a line is a JSON object with named fields, not {type(row).__name__}")
        yield number, row


def _text_lines(path: Path, content: Any, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in _lines(path, content, error):
        yield number, {"text": text.strip()}


def _json(path: Path, content: Any, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    """An array; or, where the first character opens an object, JSON lines, which are often called .json too."""
    content = io.BufferedReader(content) if not hasattr(content, "peek") else content
    if not content.peek(ROW_BYTES)[:4096].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_lines(path, content, error)
        return
    found = content.read(JSON_BYTES + 1)
    if len(found) > JSON_BYTES:
        raise error(f"{path}: an array of more than {JSON_BYTES:,} bytes; write one object per line into a .jsonl file")
    for number, row in enumerate(parse_json(found, where=path, error=error), start=1):
        if not isinstance(row, dict | str):
            raise error(f"{path}: entry {number} of the array is {type(row).__name__}, expected an object with named fields, or a text")
        yield number, row if isinstance(row, dict) else {"text": row}


def _csv(path: Path, content: Any, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV as RFC 4180 has them: quoted values may hold line breaks; a row's number is its last line."""
    # numbers of lines are the reader's: a quoted value has empty lines of its own
    lines = (text + "\n" for _, text in _lines(path, content, error, blanks=True))
    first = next(lines, "")
    reader = csv.reader(itertools.chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    csv.field_size_limit(ROW_BYTES)
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise error(f"{path}:1: two columns are called {twice[0]!r}")
        for values in reader:
            if len(values) == len(names):
                yield reader.line_num, dict(zip(names, values, strict=True))
            elif any(value.strip() for value in values):
                raise error(f"{path}:{reader.line_num}: {len(values)} values, but the first line names {len(names)} columns")
    except csv.Error as problem:
        raise error(f"{path}:{reader.line_num}: not CSV ({problem}); values with quotes or line breaks stand in quotes") from None


def _lines(path: Path, content: Any, error: type[DbesError], *, blanks: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file without their ends; those without text only where ``blanks`` says so."""
    number = size = blank = 0
    # only \n ends a line: str.splitlines would also break at U+2028, which JSON allows inside a string
    while line := content.readline(ROW_BYTES + 1):
        number, size = number + 1, size + len(line)
        if len(line) > ROW_BYTES:
            raise error(f"{path}:{number}: a line of more than {ROW_BYTES:,} bytes")
        if size > FILE_BYTES:
            raise error(f"{path}: more than {FILE_BYTES:,} bytes; split the file, or set a limit")
        if line.isspace():
            blank += 1
            if blank > BLANK_LINES + 10 * (number - blank):
                raise error(f"{path}: {blank:,} of its first {number:,} lines are empty; this is no file of rows")
        text = _decoded(line, path, number, error).rstrip("\r\n")
        if blanks or text.strip():
            yield number, text


READERS = {"text": _whole, "lines": _text_lines, "jsonl": _json_lines, "json": _json, "csv": _csv}


def _decoded(content: bytes, path: Path, number: int, error: type[DbesError]) -> str:
    """The text of a line, or of a whole file; a byte-order mark is taken from its beginning."""
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as problem:
        line = number + content.count(b"\n", 0, problem.start)
        hint = "it looks like UTF-16; " if number == 1 and content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise error(f"{path}:{line}: not UTF-8 (byte {problem.start}); {hint}convert the file to UTF-8") from problem


def _parquet(path: Path, error: type[DbesError]) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow import parquet as arrow_parquet

    number = 0
    with opened(path, error=error) as content:
        try:
            file = arrow_parquet.ParquetFile(content)
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise error(f"{path}: two columns are called {twice[0]!r}")
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except UnicodeDecodeError as problem:
            raise error(f"{path}: a text after row {number} is not UTF-8 (byte {problem.start})") from problem
        except (OSError, ArrowException) as problem:
            raise error(f"{path}: not readable as parquet: {clipped(str(problem), 200)}") from problem
