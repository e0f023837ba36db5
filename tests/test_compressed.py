"""gzip in bounds: what is text passes, what is a bomb or damaged is one line."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dbes.compressed import read_gzip
from dbes.errors import FileError


def packed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, mtime=0))
    return path


def test_gzip_is_unpacked_in_bounds(tmp_path: Path) -> None:
    text = b"a line of text\n" * 1000
    assert read_gzip(packed(tmp_path / "a.gz", text)) == text
    (tmp_path / "two.gz").write_bytes(gzip.compress(text) + gzip.compress(b"and more"))
    assert read_gzip(tmp_path / "two.gz") == text + b"and more"
    with pytest.raises(FileError, match=r"a\.gz: .* unpack to more than 10,000"):
        read_gzip(tmp_path / "a.gz", most=10_000)
    with pytest.raises(FileError, match=r"bomb\.gz: [\d,]+ bytes of gzip unpack to more than 16,777,216"):
        read_gzip(packed(tmp_path / "bomb.gz", b"\n" * 2**25))


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:40] + b"\xff\xff" + c[42:], lambda c: c + b"rest", lambda _: b"no gzip"])
def test_damaged_gzip_is_one_line(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.gz").write_bytes(damage(gzip.compress(bytes(range(256)) * 20, mtime=0)))
    with pytest.raises(FileError, match=r"a\.gz: damaged gzip file"):
        read_gzip(tmp_path / "a.gz")


def test_only_regular_files_are_unpacked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gz")
    with pytest.raises(FileError, match="a pipe, socket or device"):
        read_gzip(tmp_path / "pipe.gz")
