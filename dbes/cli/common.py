"""What commands share: options, errors turned into exit codes, the progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dbes.errors import DbesError, MixError, SettingError, TaskError, refusal
from dbes.text import json_text, printable, unknown

if TYPE_CHECKING:
    from dbes.evaluation.pipeline import Progress

FAILED, USAGE = 1, 2


def one_of(kind: str, known: Sequence[str], told: str, *names: str) -> Any:
    """An option that takes one of some names.

    Args:
        kind: what a name is of; told: its help; names: of the option, where it is not its parameter's.
    """

    def check(given: str | None) -> str | None:
        if given is not None and given not in known:
            raise SettingError(unknown(kind, given, known))
        return given

    return typer.Option(*names, callback=check, metavar="|".join(known), help=told)


SeedOption = Annotated[int, typer.Option(min=0, help="Seed of permutations, reference router and random-router control.")]
PermutationsOption = Annotated[int, typer.Option(min=0, help="Shuffles of the documents' domain labels that make the chance level.")]
MetricOption = Annotated[
    list[str] | None, typer.Option(metavar="FILE.py:NAME", help="A metric of your own, a dbes.Metric in a Python file (may be repeated).")
]
StrataOption = Annotated[
    str, typer.Option(metavar="KIND,...", help="Score strata of tokens, and their differences: entropy, position, token-class, frequency.")
]
FormatOption = Annotated[str, one_of("format", ("table", "json"), "table to read, json for a pipe.")]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]


def names(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def say(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Prints text, with whatever a terminal would obey in it written out."""
    typer.echo(printable(text, lines=True), err=err, nl=nl)


def say_json(text: str) -> None:
    """Prints JSON that means the same, with whatever a terminal would obey in it written out."""
    typer.echo(json_text(text))


def stdout() -> Any:
    """The terminal for tables: no markup is read from names, and nothing in them reaches the terminal's own commands."""
    from dbes.reporting.terminal import harmless

    return harmless()


def errors() -> AbstractContextManager[None]:
    """Turns dbes's own errors, and what the system refuses, into one line on stderr and the exit code.

    Anything else is a defect and keeps its traceback. A reader that closed the pipe (``| head``) is no error to tell.
    """
    return _Told()


class _Told(AbstractContextManager[None]):
    def __exit__(self, _: object, problem: BaseException | None, __: object) -> None:
        if problem is None or isinstance(problem, BrokenPipeError):
            return
        if isinstance(problem, DbesError):
            tell(str(problem))
            raise typer.Exit(USAGE if isinstance(problem, TaskError | MixError | SettingError) else FAILED) from None
        if (reason := refusal(problem)) is not None:
            files = [problem.filename, problem.filename2] if isinstance(problem, OSError) else []
            tell(": ".join([*(str(name) for name in files if name is not None), reason]))
            raise typer.Exit(FAILED) from None


class Guarded(TyperGroup):
    """The program: whatever a command raises is told in one line, and so is what dbes notes by the way."""

    def invoke(self, ctx: Any) -> Any:
        notes = logging.getLogger("dbes")
        handler = _Notes()
        notes.addHandler(handler)
        try:
            with errors():
                return super().invoke(ctx)
        finally:
            notes.removeHandler(handler)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


def tell(message: str) -> None:
    """One message to stderr, in one line, with characters that a terminal would obey made visible."""
    typer.echo(f"dbes: {printable(message)}", err=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr with tokens per second and time left; a line per stage where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("loading", total=None, rate="")
        seen: set[str] = set()

        def report(stage: str, done: int, total: int) -> None:
            unit = "half passes" if stage == "masking" else "tokens"
            if stage not in seen:
                seen.add(stage)
                if not console.is_terminal:
                    say(f"{stage} {total:,} {unit}" if total else stage, err=True)
            speed = bars.tasks[0].speed
            rate = f"{speed:,.0f} tokens/s" if speed and unit == "tokens" else ""
            bars.update(bar, description=stage, completed=done, total=total or None, rate=rate)

        yield report
