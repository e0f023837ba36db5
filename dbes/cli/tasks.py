"""`dbes tasks`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dbes.cli.common import say, stdout

app = typer.Typer(help="List the tasks; `dbes tasks init FOLDER` begins one of your own, `validate` checks it.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def tasks(context: typer.Context) -> None:
    """List the tasks that ship with dbes."""
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
