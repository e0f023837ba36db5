"""Command lines that a reader can paste into the shell dbes was started from."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def command(words: Iterable[object]) -> str:
    """How these words are given to dbes from here, quoted."""
    return " ".join([_program(), *(shlex.quote(str(word)) for word in words)])


def option(name: str, value: object, *, default: object = None) -> list[str]:
    """``--name value``; ``--name`` for True; nothing for None, False or the default."""
    if value is None or value is False or value == default:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def _program() -> str:
    started = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    if started.stem == "dbes" and started.is_file():
        found = shutil.which("dbes")
        same = found is not None and Path(found).parent.resolve() == started.absolute().parent.resolve()
        return "dbes" if same else shlex.quote(str(started))
    return f"{shlex.quote(sys.executable)} -m dbes.cli"
