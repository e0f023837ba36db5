"""Files are written whole or not at all: to a temporary name beside the target, then renamed; and one run at a time writes a folder.

What the system refuses (a full disk, no permission, a target that is a folder) is a FileError that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dbes.errors import DbesError, FileError, refusal
from dbes.locks import fcntl, lock

LOCK = ".dbes.lock"
PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends well, and is removed when it does not.

    The temporary file is locked until then: what a killed run left under such a name is told apart by having no lock, and the next
    writing of the same file removes it.

    Raises:
        FileError: it cannot be written.
    """
    temporary: Path | None = None
    handle = -1
    try:
        with refused_by_system(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent, of=path.name)
            handle, temporary = _temporary(path)
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
    finally:
        if handle >= 0:
            os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new, locked file beside ``path``: its handle, which holds the lock, and its path."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:200]}.", suffix=PART, dir=path.parent)
        temporary = Path(name)
        if lock(handle) and _same_file(handle, temporary):  # else it was taken for abandoned between creating and locking it
            return handle, temporary
        os.close(handle)


def remove_abandoned(folder: Path, *, of: str | None = None) -> None:
    """Remove temporary files (and folders) of runs that were killed; those that a living run writes to are locked and stay.

    Args:
        of: only those of the file of this name.
    """
    start = "." if of is None else f".{of[:200]}."
    with suppress(OSError):
        for name in [name for name in os.listdir(folder) if name.startswith(start) and name.endswith(PART)]:  # noqa: PTH208
            with suppress(OSError):
                _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    kind = path.lstat().st_mode
    if stat.S_ISDIR(kind):
        shutil.rmtree(path)  # the rest of what `discard` removes
    elif stat.S_ISREG(kind) and fcntl is not None:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        try:
            if lock(handle):
                path.unlink()
        finally:
            os.close(handle)


def discard(path: Path) -> None:
    """Remove a file or a folder; a folder disappears at once, so that a kill never leaves half of it under its name.

    Raises:
        FileError: it cannot be removed.
    """
    with refused_by_system(path, doing="removed"):
        if path.is_dir() and not path.is_symlink():
            doomed = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}.", suffix=PART, dir=path.parent))
            path.replace(doomed / path.name)
            shutil.rmtree(doomed)
        else:
            path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make sure, before long work, that a file can be written at ``path``: that its folder can be made and takes a new file.

    Raises:
        FileError: it cannot; ``path`` is a folder.
    """
    made = _missing(path.parent)
    try:
        with refused_by_system(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name[:200]}.", suffix=PART, dir=path.parent)
            os.close(handle)
            Path(name).unlink()
    finally:
        _remove_empty(made)


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist yet, innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for each in folders:
            each.rmdir()


def refused_by_system(path: Path, *, doing: str = "written", error: type[DbesError] = FileError) -> AbstractContextManager[None]:
    """Turns what the system refuses inside the block (`dbes.errors.refusal`) into ``error``: one line with the file and the reason."""
    return _Refused(path, doing, error)


class _Refused(AbstractContextManager[None]):
    def __init__(self, path: Path, doing: str, error: type[DbesError]) -> None:
        self.path, self.doing, self.error = path, doing, error

    def __exit__(self, _: object, problem: BaseException | None, __: object) -> None:
        if problem is not None and not isinstance(problem, DbesError) and (reason := refusal(problem)) is not None:
            raise self.error(f"{self.path}: cannot be {self.doing} ({reason})") from problem


def regular(path: Path, *, error: type[DbesError] = FileError, missing: str | None = None, most: int | None = None) -> os.stat_result:
    """Facts of a regular file, to be asked before a library opens it by name (a pipe or a device could be endless, or wait for ever).

    Args:
        missing: the whole message where there is no such file.
        most: bytes it may have.

    Raises:
        error: there is none, it is no regular file, or too large.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise error(missing or f"{path}: no such file") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a zero byte
        raise error(f"{path}: cannot be read ({_reason(problem)})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise error(f"{path}: expected a file, this is {kind}")
    if most is not None and status.st_size > most:
        raise error(f"{path}: {status.st_size:,} bytes, expected at most {most:,}")
    return status


def read_bytes(path: Path, *, error: type[DbesError] = FileError, missing: str | None = None, most: int | None = None) -> bytes:
    """The content of a regular file, see `regular`.

    Raises:
        error: as `regular`, or it cannot be read.
    """
    regular(path, error=error, missing=missing, most=most)
    try:
        with path.open("rb") as content:
            found = content.read() if most is None else content.read(most + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({_reason(problem)})") from None
    if most is not None and len(found) > most:  # it grew, or is one of those that say they hold nothing (/proc)
        raise error(f"{path}: more than {most:,} bytes")
    return found


def _reason(problem: Exception) -> str:
    return (problem.strerror if isinstance(problem, OSError) else None) or str(problem)


@contextmanager
def opened(path: Path, *, error: type[DbesError] = FileError, missing: str | None = None) -> Iterator[BinaryIO]:
    """A regular file, open to be read piece by piece; arguments and errors as of `read_bytes`."""
    regular(path, error=error, missing=missing)
    try:
        handle = path.open("rb")
    except OSError as problem:
        raise error(f"{path}: cannot be read ({_reason(problem)})") from None
    with handle:
        yield handle


@contextmanager
def locked(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """The folder (made where missing, and writable) belongs to this process until the block ends, however the process ends.

    The system lets go of the lock when a process dies, so a crash leaves none; temporary files of the dead are removed here.

    Args:
        patience: seconds to wait for another process.

    Raises:
        FileError: another process has it (the message says which), or the folder cannot be written to.
    """
    made = _missing(folder)
    with refused_by_system(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = _taken(folder / LOCK, patience=patience)
    try:
        remove_abandoned(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)
        _remove_empty(made)


def _taken(path: Path, *, patience: float) -> int:
    """An open, locked file; the lock ends with the file."""
    deadline = time.monotonic() + patience
    while True:
        with refused_by_system(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if lock(handle):
                if _same_file(handle, path):  # else its owner removed it between our opening and locking it
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return handle
            elif time.monotonic() >= deadline:
                holder = os.pread(handle, 200, 0).decode("utf-8", "replace") if hasattr(os, "pread") else ""
                raise FileError(
                    f"{path.parent}: another run is writing here ({holder or 'process unknown'}); wait for it, or choose another folder"
                )
            else:
                time.sleep(0.1)
        except OSError as problem:
            os.close(handle)
            raise FileError(f"{path}: cannot be locked ({problem.strerror or problem})") from problem
        except BaseException:
            os.close(handle)
            raise
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


def sorted_metadata(content: bytes) -> bytes:
    """A safetensors file with the keys of its metadata in order: safetensors writes them in another order in every process."""
    header, data = _parts(content)
    if "__metadata__" not in header:
        return content
    header = {**header, "__metadata__": dict(sorted(header["__metadata__"].items()))}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def is_sealed(content: bytes) -> bool:
    """Whether the metadata of a safetensors file holds the sha256 of all else in it, as training states of earlier versions did."""
    try:
        header, data = _parts(content)
        given = header["__metadata__"].pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return given == digest.hexdigest()


def _parts(content: bytes) -> tuple[dict[str, Any], memoryview]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :]


def keep_log_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a JSON-lines log of steps before ``step``, which is all that is left of it afterwards.

    What a killed run logged beyond its last state will be logged again; what follows a damaged line is lost.
    """
    records = []
    if path.is_file():
        for line in read_bytes(path).splitlines():
            try:
                record = json.loads(line)
                if record["step"] < step:
                    records.append(record)
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the run was killed
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    return records


def sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
