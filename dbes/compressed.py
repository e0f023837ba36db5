"""What gzip files unpack to, in bounds: a file of a megabyte can stand for a gigabyte of nothing."""

from __future__ import annotations

import gzip
import io
import zlib

from dbes.errors import DbesError, FileError

GZIP_BYTES, GZIP_FREE, GZIP_RATIO = 2**31, 2**24, 200
"""What a gzip file may unpack to: bytes at most, and beyond the second, times its own size."""


def gunzip(packed: bytes, *, where: object, error: type[DbesError] = FileError, most: int = GZIP_BYTES) -> bytes:
    """What gzip content unpacks to.

    Args:
        where: what it is, for the message.
        most: bytes it may unpack to.

    Raises:
        error: damaged or cut short; it unpacks to more than ``most``, or to so many times its size that it cannot be text (beyond
            16 MiB, more than 200 times).
    """
    bound = min(most, max(GZIP_FREE, GZIP_RATIO * len(packed)))
    parts, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as content:
            while part := content.read(2**20):
                parts.append(part)
                if (size := size + len(part)) > bound:
                    raise error(f"{where}: {len(packed):,} bytes of gzip unpack to more than {bound:,}; unpack the file if that is meant")
    except (OSError, EOFError, zlib.error) as problem:
        raise error(f"{where}: damaged gzip file ({problem})") from None
    return b"".join(parts)
