"""gzip in bounds: what is text passes, what is a bomb or damaged is one line."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest

from dbes.compressed import gunzip
from dbes.errors import FileError


def test_gzip_is_unpacked_in_bounds() -> None:
    text = b"a line of text\n" * 1000
    assert gunzip(gzip.compress(text), where="a") == text
    assert gunzip(gzip.compress(text) + gzip.compress(b"and more"), where="a") == text + b"and more"
    with pytest.raises(FileError, match=r"a: .* unpack to more than 10,000"):
        gunzip(gzip.compress(text), where="a", most=10_000)
    with pytest.raises(FileError, match=r"bomb: [\d,]+ bytes of gzip unpack to more than 16,777,216"):
        gunzip(gzip.compress(b"\n" * 2**25), where="bomb")


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:40] + b"\xff\xff" + c[42:], lambda c: c + b"rest", lambda _: b"no gzip"])
def test_damaged_gzip_is_one_line(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(FileError, match="a: damaged gzip file"):
        gunzip(damage(gzip.compress(bytes(range(256)) * 20, mtime=0)), where="a")
