"""Arrays that are too large for memory, in a file that nobody else sees: it has no name, and is gone with the process."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from dbes.files import PART, refused_by_system

ALIGNMENT = 64


class Spool:
    """Room for arrays in a folder, all of it taken from the disk at once, so that a full one is found before the work.

    The file lives as long as an array in it does.

    Raises:
        FileError: the disk has not this much room, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._used = 0
        size = max(size, mmap.PAGESIZE)
        with refused_by_system(folder, doing=f"given the {size:,} bytes that a work unit needs on this disk"):
            folder.mkdir(parents=True, exist_ok=True)
            # where the system gives no file without a name, and a kill leaves one: `remove_abandoned` takes it away
            with tempfile.TemporaryFile(prefix=".spool.", suffix=PART, dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self._room = mmap.mmap(file.fileno(), size)

    @staticmethod
    def needed(shape: tuple[int, ...], dtype: DTypeLike) -> int:
        """Bytes that an array takes up."""
        return -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT

    def full(self, shape: tuple[int, ...], mark: object, dtype: DTypeLike) -> np.ndarray:
        """An array that holds the mark everywhere."""
        array = np.frombuffer(self._room, dtype, math.prod(shape), self._used).reshape(shape)
        self._used += self.needed(shape, dtype)
        if np.asarray(mark, dtype).tobytes().strip(b"\0"):  # the file itself holds zeros
            for part in array:
                part[...] = mark
                self.release()
        return array

    def release(self) -> None:
        """Take what was written out of the process's memory; it stays in the file."""
        if hasattr(self._room, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._room.madvise(mmap.MADV_DONTNEED)
