"""Locks that the system lets go of when a process dies, so that a crash leaves none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not kept apart
    fcntl = None

FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def lock(handle: int) -> bool:
    """Whether the open file is ours now; True too where the system or its file system knows no locks: then runs are not kept apart."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if problem.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


class Held:
    """A file that is locked as long as this process holds it, however the process ends; it says who holds it.

    Attributes:
        before: what it said when it was taken: who held it last.
    """

    def __init__(self, handle: int, before: str) -> None:
        self._handle, self.before = handle, before

    @classmethod
    def take(cls, path: Path, note: str) -> Held | None:
        """The file (made where missing); None where another process, or another part of this one, holds it, or there is no such folder.

        Raises:
            OSError: it cannot be made or locked.
        """
        try:
            handle = os.open(path, FLAGS | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return None
        try:
            if lock(handle):
                held = cls(handle, os.read(handle, 4096).decode("utf-8", "replace"))
                held.say(note)
                return held
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def say(self, note: str) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, note.encode(), 0)

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def add(self, note: str) -> None:
        """Say more, where it is still held."""
        if self._handle >= 0:
            os.pwrite(self._handle, note.encode(), os.fstat(self._handle).st_size)


def is_held(path: Path) -> bool:
    """Whether some process holds the file, which may be missing."""
    try:
        handle = os.open(path, FLAGS)
    except FileNotFoundError:
        return False
    try:
        return not lock(handle)
    finally:
        os.close(handle)
