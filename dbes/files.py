"""Files are written whole or not at all: to a temporary name beside the target, then renamed; and one run at a time writes a folder.

What the system refuses (a full disk, no permission, a target that is a folder) is a FileError that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dbes.errors import DbesError, FileError

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not kept apart
    fcntl = None

LOCK = ".dbes.lock"
PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends well, and is removed when it does not.

    Raises:
        FileError: it cannot be written.
    """
    temporary: Path | None = None
    try:
        with refused_by_system(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise


@contextmanager
def refused_by_system(path: Path, *, doing: str = "written", error: type[DbesError] = FileError) -> Iterator[None]:
    """Turns an OSError into ``error``: one line with the file and the reason."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be {doing} ({problem.strerror or problem})") from problem


def read_bytes(path: Path, *, error: type[DbesError] = FileError, missing: str | None = None, most: int | None = None) -> bytes:
    """The content of a regular file (a pipe or a device could be endless, or wait for ever).

    Args:
        missing: the whole message where there is no such file.
        most: bytes it may have.

    Raises:
        error: there is none, it is no regular file, too large, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise error(f"{path}: expected a file, this is {kind}")
        if most is not None and status.st_size > most:
            raise error(f"{path}: {status.st_size:,} bytes, expected at most {most:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise error(missing or f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None


@contextmanager
def opened(path: Path, *, error: type[DbesError] = FileError, missing: str | None = None) -> Iterator[BinaryIO]:
    """A regular file, open to be read piece by piece; arguments and errors as of `read_bytes`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise error(f"{path}: expected a file, this is {kind}")
        handle = path.open("rb")
    except FileNotFoundError:
        raise error(missing or f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    with handle:
        yield handle


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder (made where missing, and writable) belongs to this process until the block ends, however the process ends.

    The system lets go of the lock when a process dies, so a crash leaves none; temporary files of the dead are removed here.

    Raises:
        FileError: another process has it (the message says which), or the folder cannot be written to.
    """
    with refused_by_system(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = _taken(folder / LOCK)
    try:
        for litter in folder.glob(f".*{PART}"):
            with suppress(OSError):
                litter.unlink()
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)


def _taken(path: Path) -> int:
    """An open, locked file; the lock ends with the file."""
    while True:
        with refused_by_system(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path):  # else its owner removed it between our opening and locking it
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except OSError as problem:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace") if hasattr(os, "pread") else ""
            os.close(handle)
            if problem.errno in (errno.EACCES, errno.EAGAIN):
                raise FileError(
                    f"{path.parent}: another run is writing here ({holder or 'process unknown'}); wait for it, or choose another folder"
                ) from None
            raise FileError(f"{path}: cannot be locked ({problem.strerror or problem})") from problem
        os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (no NaN), keys in the order given, one trailing newline."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def keep_log_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a JSON-lines log of steps before ``step``, which is all that is left of it afterwards.

    What a killed run logged beyond its last state will be logged again; what follows a damaged line is lost.
    """
    records = []
    if path.is_file():
        for line in read_bytes(path).splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run was killed
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            if record["step"] < step:
                records.append(record)
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    return records


def sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
