"""`dbes tasks`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dbes.cli.common import say, stdout

app = typer.Typer(
    help="List the tasks; `dbes tasks init FOLDER` begins one of your own, `validate` checks it, `prepare` makes it work offline.",
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def tasks(context: typer.Context) -> None:
    """List the tasks that ship with dbes, and the data sets of the hub they read, with licence and gate."""
    if context.invoked_subcommand is not None:
        return
    from dbes.reporting.tasks import render
    from dbes.tasks.task import list_tasks

    stdout().print(render(list_tasks()))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of texts: a sub-folder for each domain, or a file for each.")],
    out: Annotated[Path | None, typer.Option(help="File to write; by default task.yaml in the folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented task file for a folder of texts."""
    from dbes.tasks.draft import write_draft

    where = write_draft(folder, out, overwrite=overwrite)
    say(f"Written: {where}")
    say(f"Next: dbes tasks validate {shlex.quote(str(where))}")


@app.command()
def validate(file: Annotated[Path, typer.Argument(help="Task YAML.")]) -> None:
    """Check a task file and every document it names, and say what of the texts can pass for a difference between domains."""
    from dbes.evaluation.request import read_benchmark
    from dbes.reporting.tasks import render_documents
    from dbes.tasks.cautions import caution_lines, cautions

    benchmark = read_benchmark(file)
    stdout().print(render_documents(benchmark))
    for line in caution_lines(cautions(benchmark.documents)):
        say(f"Caution: {line}")


@app.command()
def prepare(
    task: Annotated[str, typer.Argument(help="Name of a task, or task YAML.")],
    out: Annotated[Path, typer.Option(help="Folder to write: texts with their sha256, task file and card.")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without sources that cannot be had, and name them.")
    ] = False,
) -> None:
    """Copy a task with all its texts into a folder that needs no network; the same command resumes one that was killed or failed."""
    from dbes.tasks.prepare import prepare as run
    from dbes.tasks.task import load_task

    where, found = run(load_task(task), out, allow_missing=allow_missing, said=lambda line: say(line, err=True))
    for each in found:
        if each.kept is None:
            say(f"Without {each.domain}/{each.name}, so scores are not those of the whole task: {each.cause}", err=True)
    say(f"Written: {where}")
    say(f"Next: dbes evaluate --tasks {shlex.quote(str(where.parent))}")
