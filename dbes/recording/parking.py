"""Hidden states that wait on disk until their layer is to run: memory that is given back, and filled again."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dbes.files import refused_by_system


class Parking:
    """A nameless file, gone with the process, that holds the memory of tensors; there is room for all from the beginning.

    What a tensor shares memory with goes and comes back with it.
    """

    def __init__(self, folder: Path, size: int) -> None:
        """
        Raises:
            FileError: the file system has no room for ``size`` bytes.
        """
        self.folder, self.size, self.used = folder, 0, 0
        with refused_by_system(folder, doing="used for hidden states; give more --max-memory or another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed on leaving)
            try:
                self._grow(size)
            except OSError:
                self._file.close()
                raise

    def __enter__(self) -> Parking:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def park(self, tensor: Tensor, place: tuple[int, int] | None = None) -> Parked:
        """Write the tensor's memory and give it back.

        Args:
            place: offset and size of an earlier parking that may be overwritten.
        """
        storage = tensor.untyped_storage()
        offset, room = place or (self.used, 0)
        if storage.nbytes() > room:
            offset, room = self.used, storage.nbytes()
            self.used += room
        held = storage if storage.device.type == "cpu" else storage.cpu()
        content = _memory_of(held)
        with refused_by_system(self.folder, doing="used for hidden states"):
            self._grow(self.used)
            while len(content):
                written = os.pwrite(self._file.fileno(), content, offset + storage.nbytes() - len(content))
                content = content[written:]
        parked = Parked(self, storage, storage.nbytes(), (offset, room))
        storage.resize_(0)
        return parked

    def fill(self, target: torch.UntypedStorage, offset: int) -> None:
        content = _memory_of(target)
        with refused_by_system(self.folder, doing="read"):
            while len(content):
                count = os.preadv(self._file.fileno(), [content], offset)
                if not count:
                    raise OSError("the file of hidden states is shorter than what was written")
                offset, content = offset + count, content[count:]

    def _grow(self, size: int) -> None:
        if size > self.size:
            # else a full disk would be met in the middle of the work
            os.posix_fallocate(self._file.fileno(), self.size, size - self.size)
            self.size = size


class Parked:
    """Memory that was written to a file; ``place`` may be used again once it is back."""

    def __init__(self, parking: Parking, storage: torch.UntypedStorage, size: int, place: tuple[int, int]) -> None:
        self.parking, self.storage, self.size, self.place = parking, storage, size, place

    def back(self) -> None:
        """The memory as it was, at the same tensors."""
        self.storage.resize_(self.size)
        if self.storage.device.type == "cpu":
            self.parking.fill(self.storage, self.place[0])
            return
        read = torch.UntypedStorage(self.size)
        self.parking.fill(read, self.place[0])
        self.storage.copy_(read)


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a decoder layer works on: the first tensor it is given."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _memory_of(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a storage of this machine's memory; torch would never again resize one that it has shown to numpy."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
