"""The command line: one function per command, no logic. Answers go to stdout, progress and errors to stderr.

Heavy modules are imported inside the commands, so that ``dbes --help`` answers at once.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version as installed
from typing import Annotated

import typer

from dbes.cli import evaluation, exporting, finetuning, importing, intervention, paths, plan, reports, tasks, testbed
from dbes.cli.common import Guarded
from dbes.text import printable

app = typer.Typer(
    cls=Guarded,
    help="Do the experts of a Mixture-of-Experts language model specialize, in what, and is that more than chance?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for command in (evaluation.evaluate, evaluation.score, reports.report, reports.compare, evaluation.doctor, plan.plan):
    app.command()(command)
app.command("import")(importing.import_)
for command in (paths.paths, exporting.export, finetuning.finetune, finetuning.merge, intervention.intervene):
    app.command()(command)
app.add_typer(tasks.app, name="tasks")
app.add_typer(testbed.app, name="testbed")


@app.callback(invoke_without_command=True)
def told(version: Annotated[bool, typer.Option("--version", help="Say which version of dbes this is.")] = False) -> None:
    if version:
        typer.echo(f"dbes {installed('dbes')}")
        raise typer.Exit


def main() -> None:
    warnings.formatwarning = _warning
    app()


def _warning(message: Warning | str, *_: object) -> str:
    """A warning in one line: where in the code it arose is not the reader's business, and what it quotes may hold anything."""
    return f"dbes: warning: {printable(message)}\n"
