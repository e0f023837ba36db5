"""Command lines that a reader can paste into the shell dbes was started from."""

from __future__ import annotations

from collections.abc import Iterable

from dbes.reporting.commands import program, shell


def command(words: Iterable[object]) -> str:
    """How these words are given to dbes from here, quoted."""
    return f"{program()} {shell(words)}"


def option(name: str, value: object, *, default: object = None) -> list[str]:
    """``--name value``; ``--name`` for True; nothing for None, False or the default."""
    if value is None or value is False or value == default:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]
