"""What commands share: options, errors turned into exit codes, the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbes.errors import DbesError, MixError, TaskError
from dbes.text import printable

if TYPE_CHECKING:
    from dbes.pipeline import Progress

FAILED, USAGE = 1, 2


class Format(StrEnum):
    table = "table"
    json = "json"


SeedOption = Annotated[int, typer.Option(help="Seed of permutations, reference router and random-router control.")]
PermutationsOption = Annotated[int, typer.Option(min=0, help="Shuffles of the documents' domain labels that make the chance level.")]
FormatOption = Annotated[Format, typer.Option(help="table to read, json for a pipe.")]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]


def names(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def stdout() -> Any:
    from rich.console import Console

    console = Console()
    # In a pipe or a log there is no terminal to measure: tables are given room instead of being folded at 80 columns.
    return console if console.is_terminal else Console(width=150)


@contextmanager
def errors() -> Iterator[None]:
    """Turns dbes's own errors, and what the system refuses, into one line on stderr and the exit code.

    Anything else is a defect and keeps its traceback.
    """
    try:
        yield
    except (TaskError, MixError) as problem:
        _told(str(problem))
        raise typer.Exit(USAGE) from None
    except DbesError as problem:
        _told(str(problem))
        raise typer.Exit(FAILED) from None
    except OSError as problem:
        names = [str(name) for name in (problem.filename, problem.filename2) if name is not None]
        _told(f"{' -> '.join(names) or 'the system'}: {problem.strerror or problem}")
        raise typer.Exit(FAILED) from None
    except MemoryError as problem:
        _told(f"out of memory{f' ({problem})' if str(problem) else ''}")
        raise typer.Exit(FAILED) from None


def _told(message: str) -> None:
    typer.echo(f"dbes: {printable(message, lines=True)}", err=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr with tokens per second and time left; a line per stage where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("loading", total=None, rate="")
        seen: set[str] = set()

        def report(stage: str, done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                if not console.is_terminal:
                    print(f"{stage} {total:,} tokens" if total else stage, file=sys.stderr)
            speed = bars.tasks[0].speed
            bars.update(bar, description=stage, completed=done, total=total or None, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield report
