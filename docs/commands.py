"""Writes ``commands.md`` from the help of every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import typer

from dbes.cli import app

PAGE = Path(__file__).with_name("commands.md")

HEAD = """# Commands

Written by `make docs` from `dbes COMMAND --help`. Answers go to stdout, progress and errors to stderr. 0: it went well; 1: it did not, the
line says why; 2: wrong usage; 130: interrupted (Ctrl-C), the same command resumes.
"""

WIDTH = 110


def page() -> str:
    """The text of the page."""
    root = typer.main.get_command(app)
    return HEAD + "".join(f"\n## {name}\n\n```\n{text}\n```\n" for name, text in helped(root, "dbes", None))


def helped(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """Every command below one, with its help."""
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, info_name=name.split()[-1], parent=parent, **width)
    if parent is not None:
        yield name, command.get_help(context).rstrip()
    for below in getattr(command, "commands", {}):
        yield from helped(command.commands[below], f"{name} {below}", context)  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
