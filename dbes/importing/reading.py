"""Bounded readers of what files hold: lines, JSON records, numpy arrays. Nothing is unpickled, nothing unpacks without end."""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tokenize import TokenError
from typing import Any, BinaryIO, NoReturn

import numpy as np

from dbes.compressed import GZIP_FREE, GZIP_RATIO
from dbes.errors import SourceError
from dbes.files import opened, regular
from dbes.importing.types import Source
from dbes.text import clipped

LINE_BYTES = 2**28
"""Bytes of a line, or of a JSON file that is one value, at most."""

MEMBER_BYTES = 2**31
"""Bytes of an array inside an .npz at most."""

DEEP = 24
"""Levels that a JSON record may be nested."""

PICKLED = (
    "it holds pickled Python objects, which can run code and are not read; write it again as plain arrays "
    "(numpy.asarray with a number dtype, numpy.savez) and import that"
)


def lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file that are not blank, with their numbers from 1; ``.gz`` is unpacked as it is read.

    Raises:
        SourceError: it cannot be read, is a damaged gzip file or one of nothing repeated, or has a line that is too long.
    """
    with opened(source.path, error=SourceError) as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b" if isinstance(raw, io.BufferedReader) else False
        content = gzip.GzipFile(fileobj=raw) if packed else raw
        number, size = 0, 0
        try:
            while line := content.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise SourceError(f"{source}, line {number}: longer than {LINE_BYTES:,} bytes")
                size += len(line)
                if packed and size > max(GZIP_FREE, GZIP_RATIO * raw.tell()):
                    raise SourceError(f"{source}: unpacks to more than {GZIP_RATIO} times its size; unpack the file if that is meant")
                if line.strip():
                    yield number, line
        except (OSError, EOFError, zlib.error) as problem:
            what = "damaged gzip file" if packed else "cannot be read"
            raise SourceError(f"{source}, after line {number}: {what} ({problem})") from None


def records(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file with where each stands: one a line, or the whole file as an object or a list of objects.

    Raises:
        SourceError: it cannot be read, is not JSON, or holds something else than objects.
    """
    if source.name.removesuffix(".gz").endswith(".json"):
        parts, size = [], 0
        for _, line in lines(source):
            parts.append(line)
            if (size := size + len(line)) > 4 * LINE_BYTES:
                raise SourceError(f"{source}: more than {4 * LINE_BYTES:,} bytes of JSON in one value; write one object a line (.jsonl)")
        content = parsed(b"".join(parts), where=str(source))
        for number, record in enumerate(content if isinstance(content, list) else [content]):
            where = f"{source}, [{number}]" if isinstance(content, list) else str(source)
            yield where, _object(record, where)
        return
    for number, line in lines(source):
        where = f"{source}, line {number}"
        yield where, _object(parsed(line, where=where), where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{where}: expected a JSON object, found {clipped(value, 40)}")
    return value


def parsed(text: bytes, *, where: str) -> Any:
    """The value of a JSON text, without NaN and infinity.

    `dbes.schema.parse_json` looks at every number in Python; records of routes have millions of them, so here only arrays are checked.

    Raises:
        SourceError: it is none, or nested too deep.
    """
    if _depth(text) > DEEP:
        raise SourceError(f"{where}: nested more than {DEEP} deep")
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as problem:
        raise SourceError(f"{where}: not UTF-8 (byte {problem.start})") from None
    except json.JSONDecodeError as problem:
        raise SourceError(f"{where}: not JSON ({problem.msg}, column {problem.colno})") from None
    except (RecursionError, ValueError) as problem:
        raise SourceError(f"{where}: not strict JSON ({clipped(str(problem))})") from None


def _depth(text: bytes) -> int:
    """How deep brackets are nested, at most; brackets inside strings count too, which can only be too much for text full of them."""
    found = np.frombuffer(text, np.uint8)
    steps = np.zeros(256, np.int8)
    steps[[ord("["), ord("{")]], steps[[ord("]"), ord("}")]] = 1, -1
    deepest, level = 0, 0
    for begin in range(0, len(found), 2**20):
        levels = np.cumsum(steps[found[begin : begin + 2**20]], dtype=np.int32)
        deepest, level = max(deepest, level + int(levels.max(initial=0))), level + int(levels[-1])
    return deepest if deepest <= DEEP else _depth_outside_strings(text)


def _depth_outside_strings(text: bytes) -> int:
    deepest, level, inside, escaped = 0, 0, False, False
    for code in text:
        if inside:
            if escaped:
                escaped = False
            elif code == 0x5C:
                escaped = True
            elif code == 0x22:
                inside = False
        elif code == 0x22:
            inside = True
        elif code in b"[{":
            level += 1
            if (deepest := max(deepest, level)) > DEEP:
                return deepest
        elif code in b"]}":
            level -= 1
    return deepest


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def integers(value: Any, *, where: str, axes: int) -> np.ndarray:
    """Whole numbers with so many axes: nested lists, or the base64 of a .npy file.

    Raises:
        SourceError: something else, rows of unequal length, numbers that are not whole.
    """
    found = _numbers(value, where=where, axes=axes)
    if found.size and found.dtype.kind not in "iu":
        raise SourceError(f"{where}: expected whole numbers, found {found.dtype}")
    return found if found.size else found.astype(np.int64)


def floats(value: Any, *, where: str, axes: int) -> np.ndarray:
    """Finite numbers with so many axes, float32; see `integers`."""
    found = _numbers(value, where=where, axes=axes)
    if found.dtype.kind not in "iuf":
        raise SourceError(f"{where}: expected numbers, found {found.dtype}")
    with np.errstate(over="ignore"):
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise SourceError(f"{where}: holds NaN or infinity")
    return found


def _numbers(value: Any, *, where: str, axes: int) -> np.ndarray:
    if isinstance(value, str):
        found = npy(decoded(value, where=where), where=where)
    elif isinstance(value, list):
        try:
            found = np.asarray(value)
        except (ValueError, OverflowError):
            raise SourceError(f"{where}: rows of unequal length, or something else than numbers") from None
    else:
        raise SourceError(f"{where}: expected a list or the base64 of a .npy file, found {clipped(value, 40)}")
    if found.ndim != axes and not (found.size == 0 and found.ndim <= axes):
        raise SourceError(f"{where}: shape {found.shape}, expected {axes} axes")
    return found if found.ndim == axes else np.zeros((0,) * axes, np.int64)


def decoded(text: str, *, where: str) -> bytes:
    """What base64 stands for."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SourceError(f"{where}: not base64, or cut short") from None


def npy(content: bytes, *, where: str) -> np.ndarray:
    """The array of a .npy file, without a copy where its order of axes allows.

    Raises:
        SourceError: no .npy, pickled, or of another size than its header says.
    """
    shape, fortran, dtype, start = _npy_header(io.BytesIO(content), where)
    _same_size(shape, dtype, len(content) - start, where)
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def npy_file(source: Source) -> np.ndarray:
    """The array of a .npy file, read as it is used."""
    where = str(source)
    size = regular(source.path, error=SourceError).st_size
    with opened(source.path, error=SourceError) as content:
        shape, fortran, dtype, start = _npy_header(content, where)
    _same_size(shape, dtype, size - start, where)
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.memmap(source.path, dtype, "r", offset=start, shape=shape, order="F" if fortran else "C")


def _npy_header(content: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    try:
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(content)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as problem:
        raise SourceError(f"{where}: not a .npy file, or cut short ({clipped(str(problem))})") from None
    if dtype.hasobject:
        raise SourceError(f"{where}: {PICKLED}")
    if dtype.kind not in "iufb":
        raise SourceError(f"{where}: an array of {dtype}, expected numbers")
    if any(length < 0 for length in shape):
        raise SourceError(f"{where}: an axis of negative length")
    return shape, fortran, dtype, content.tell()


def _same_size(shape: tuple[int, ...], dtype: np.dtype, held: int, where: str) -> None:
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != held:
        raise SourceError(f"{where}: {clipped(shape)} of {dtype} need {wanted:,} bytes, the file holds {held:,}: cut short or damaged")


class Members:
    """The arrays of an open .npz file by name, each read when it is asked for."""

    def __init__(self, source: Source, packed: zipfile.ZipFile) -> None:
        self._source, self._packed = source, packed
        found = [entry for entry in packed.infolist() if entry.filename.endswith(".npy")]
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in found}
        if len(self._entries) < len(found):
            raise SourceError(f"{source}: an array stands in it twice")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        """One of the arrays.

        Raises:
            SourceError: as `npy`; it unpacks to too many times its size.
        """
        entry, where = self._entries[name], f"{self._source}, {clipped(name)}"
        if entry.file_size > min(MEMBER_BYTES, max(GZIP_FREE, GZIP_RATIO * entry.compress_size)):
            raise SourceError(
                f"{where}: {entry.compress_size:,} bytes that unpack to {entry.file_size:,}; save it uncompressed if that is meant"
            )
        with self._packed.open(entry) as content:
            return npy(content.read(entry.file_size + 1), where=where)


@contextmanager
def npz(source: Source) -> Iterator[Members]:
    """The arrays of an .npz file.

    Raises:
        SourceError: no .npz, or damaged.
    """
    regular(source.path, error=SourceError)
    try:
        with zipfile.ZipFile(source.path) as packed:
            yield Members(source, packed)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as problem:
        raise SourceError(f"{source}: not an .npz file, or damaged ({clipped(str(problem))})") from None
