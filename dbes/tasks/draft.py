"""A task file to begin with, from a folder of texts: every sub-folder a domain, or every file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dbes.errors import TaskError
from dbes.files import write_text
from dbes.tasks import local
from dbes.tasks.rows import whole_text
from dbes.text import clipped

TEMPLATE = """\
# A task of dbes: the domains whose routing is compared, and where their texts are. Check it with `dbes tasks validate`.
name: {name}
version: 1  # raise it with any change that can alter a score
window: 512  # tokens of a text that a model reads at a time, at most
# description: one line

# Files are relative to this one. The score compares domains, so let them differ in what they are about, not in length or format;
# from about 20 texts a domain on, intervals are reliable. Further keys of a domain: format, text_field, template, id_field, limit.
domains:
"""


def write_draft(folder: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write `draft_task` to a file, by default ``task.yaml`` in the folder, and say where; file names in it are relative to that file.

    Raises:
        TaskError: as `draft_task`; the file is there already.
    """
    where = out or folder / "task.yaml"
    if where.exists() and not overwrite:
        raise TaskError(f"{where}: there already; choose another --out, or --overwrite it")
    write_text(where, draft_task(folder, beside=where.parent))
    return where


def draft_task(folder: Path, *, beside: Path | None = None) -> str:
    """The YAML of a task of the texts in a folder.

    Args:
        beside: folder of the task file, by default the same one.
        folder: its sub-folders are the domains, files at any depth of them their texts; without sub-folders each file is a domain.

    Raises:
        TaskError: no folder, fewer than two domains with files that dbes reads, or rows in which no text can be found.
    """
    if not folder.is_dir():
        raise TaskError(f"{folder}: no folder; give one whose sub-folders hold the texts of a domain each")
    domains = _domains(folder)
    if len(domains) < 2:
        known = ", ".join(local.SUFFIXES)
        raise TaskError(f"{folder}: {len(domains)} domain with files ({known}) found, at least 2 are needed: a sub-folder, or a file, each")
    text = TEMPLATE.format(name=_quoted(_name(folder.resolve().name, "task", spaces=False)))
    for name, paths in domains.items():
        patterns = sorted({_pattern(path, folder, beside or folder) for path in paths})
        text += f"  {_quoted(name)}:\n    files:\n" + "".join(f"      - {_quoted(pattern)}\n" for pattern in patterns) + _field_lines(paths)
    return text


def _domains(folder: Path) -> dict[str, list[Path]]:
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    groups = [(path.name, sorted(_readable(path))) for path in below]
    if not any(paths for _, paths in groups):
        groups = [(path.name.split(".")[0], [path]) for path in sorted(_readable(folder))]
    found: dict[str, list[Path]] = {}
    for given, paths in groups:
        if not paths:
            continue
        name = _name(given, "domain", spaces=True)
        if name in found:
            raise TaskError(f"{folder}: two domains would be called {name!r}; rename one of their folders or files")
        found[name] = paths
    return found


def _readable(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and local.kind_of_file(path) is not None:
            yield path


def _pattern(path: Path, folder: Path, beside: Path) -> str:
    """A pattern for all files of the same kind beside this one; the file itself at the top of the folder."""
    kind = path.suffix if path.suffix != ".gz" else path.with_suffix("").suffix + path.suffix
    named = path if path.parent == folder else path.with_name(f"*{kind}")
    return Path(os.path.relpath(named, beside)).as_posix()


def _field_lines(paths: list[Path]) -> str:
    """Which field of the rows is the text, where that has to be said."""
    row = next((row for path in paths for _, row in local.rows(path, None)), None)
    if row is None or "text" in row or whole_text(row, str(paths[0]), error=TaskError) is not None:
        return ""
    texts = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    if not texts:
        raise TaskError(f"{paths[0]}: no field of its first row holds a text; it has {clipped(', '.join(map(str, row)), 300)}")
    longest = max(texts, key=lambda name: len(texts[name]))
    return f"    text_field: {_quoted(longest)}  # the longest text of the first row, which has {_comment(row)}\n"


def _comment(row: Mapping[str, Any]) -> str:
    return " ".join(clipped(", ".join(map(str, row)), 200).split())


def _name(given: str, otherwise: str, *, spaces: bool) -> str:
    """A name that a task may have, as near as can be."""
    name = re.sub(r"[^A-Za-z0-9_ -]" if spaces else r"[^A-Za-z0-9_.-]", "-", given).strip(" -_.")
    return name if name and name[0].isalnum() else otherwise


def _quoted(value: str) -> str:
    """A scalar of YAML."""
    return yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
