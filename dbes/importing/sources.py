"""The files that were given to import, folders taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dbes.errors import SourceError
from dbes.importing.types import Source


def sources_of(given: Sequence[str | Path]) -> tuple[Source, ...]:
    """The files given, and those in the folders given, in order of their paths; hidden files and links out of a folder are left out.

    Raises:
        SourceError: there is no such file or folder, nothing in it, or a file was given twice.
    """
    found: list[Source] = []
    for each in given:
        path = Path(each)
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder")
        inside = list(_files(path)) if path.is_dir() else [Source(path, path.as_posix())]
        if not inside:
            raise SourceError(f"{path}: no file in this folder")
        found += inside
    if not found:
        raise SourceError("nothing to import: give files or folders")
    seen: set[Path] = set()
    for source in found:
        if (resolved := source.path.resolve()) in seen:
            raise SourceError(f"{source}: given twice")
        seen.add(resolved)
    return tuple(found)


def _files(folder: Path) -> Iterator[Source]:
    name = folder.resolve().name
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in inside.parts):
            yield Source(path, f"{name}/{inside.as_posix()}")
