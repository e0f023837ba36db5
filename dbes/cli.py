"""The command line: one function per command, no logic. Answers go to stdout, progress and errors to stderr.

Heavy modules are imported inside the commands, so that ``dbes --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbes.errors import DbesError, TaskError

if TYPE_CHECKING:
    from dbes.pipeline import Progress
    from dbes.results import Result

FAILED, USAGE = 1, 2

app = typer.Typer(
    help="Do the experts of a Mixture-of-Experts language model specialize, in what, and is that more than chance?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
tasks_app = typer.Typer(help="List the tasks; `dbes tasks validate FILE` checks one of your own.", rich_markup_mode=None)
app.add_typer(tasks_app, name="tasks")


class Format(StrEnum):
    table = "table"
    json = "json"


class ReportFormat(StrEnum):
    html = "html"
    card = "card"
    hub = "hub"
    record = "record"


class CompareFormat(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    html = "html"


class Phase(StrEnum):
    all = "all"
    prompt = "prompt"
    generated = "generated"


class RouterName(StrEnum):
    recorded = "recorded"
    reference = "reference"
    uniform = "uniform"
    collapsed = "collapsed"
    hash = "hash"


SeedOption = Annotated[int, typer.Option(help="Seed of permutations, reference router and random-router control.")]
PermutationsOption = Annotated[int, typer.Option(min=0, help="Shuffles of the documents' domain labels that make the chance level.")]
FormatOption = Annotated[Format, typer.Option(help="table to read, json for a pipe.")]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or folder; `embedded` is the small checkpoint that ships with dbes.")] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    tasks: Annotated[str, typer.Option(help="Task name or YAML file; several separated by commas.")] = "embedded",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per domain at most.")] = None,
    output_path: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, the checkpoint's own on an accelerator.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, for example auto or cpu.")] = None,
    batch_size: Annotated[str, typer.Option(help="Windows per batch, or auto. Changes no count.")] = "auto",
    seed: SeedOption = 0,
    permutations: PermutationsOption = 1000,
    trust_remote_code: RemoteOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Evaluate again although there is a result.")] = False,
    save_trace: Annotated[bool, typer.Option(help="Keep the recorded routes beside the result.")] = True,
    embedded_fallback: Annotated[
        bool, typer.Option("--embedded-fallback", help="When the hub cannot be reached, use the embedded sample and say so.")
    ] = False,
    format: FormatOption = Format.table,
) -> None:
    """Record a model's routing over a task and score it against chance and the ideal router."""
    from dbes.pipeline import evaluate as run
    from dbes.pipeline import existing_folder
    from dbes.reporting.page import write_page

    size = _batch_size(batch_size)
    for task in tasks.split(","):
        with _errors(), _progress() as progress:
            result = run(
                model,
                tasks=task,
                output_path=output_path,
                revision=revision,
                limit=limit,
                dtype=dtype,
                device_map=device_map,
                batch_size=size,
                seed=seed,
                permutations=permutations,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                save_trace=save_trace,
                embedded_fallback=embedded_fallback,
                progress=progress,
            )
            folder = existing_folder(output_path, result, limit=limit)
            write_page(folder)
        _show(result, format, folder)


@app.command()
def score(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    router: Annotated[RouterName, typer.Option(help="Score the documents as another router would route them.")] = RouterName.recorded,
    phase: Annotated[Phase, typer.Option(help="Which tokens to score.")] = Phase.all,
    seed: SeedOption = 0,
    permutations: PermutationsOption = 1000,
    output_path: Annotated[Path | None, typer.Option(help="Folder to write result and tables to.")] = None,
    format: FormatOption = Format.table,
) -> None:
    """Score a recorded trace again; needs no model."""
    from dbes.reference import imitate
    from dbes.scoring import PHASES, score_tables
    from dbes.tables import write_tables
    from dbes.trace import Trace

    with _errors():
        routes = Trace.load(trace)
        if router is not RouterName.recorded:
            routes = imitate(routes, router.value, seed=seed)
        number = {name: code for code, name in PHASES.items()}[phase.value]
        scores = score_tables(routes, permutations=permutations, seed=seed, phase=number)
        if output_path is not None:
            write_tables(scores, output_path)
            scores.result.save(output_path)
    _show(scores.result, format, output_path)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="Folder of a result, or its result.json.")],
    format: Annotated[
        ReportFormat, typer.Option(help="html page, model card section, hub metadata, or leaderboard record.")
    ] = ReportFormat.html,
    trace: Annotated[Path | None, typer.Option(help="Folder of the recorded routes, where they are not beside the result.")] = None,
    output: Annotated[Path | None, typer.Option(help="Page to write; report.html beside the result by default.")] = None,
    dataset: Annotated[str, typer.Option(help="Hub id of the benchmark's dataset, for the hub metadata.")] = "dbes/embedded",
) -> None:
    """Write the page of one result, a single HTML file that needs no network; the other formats go to stdout."""
    from dbes.reporting.card import card_section
    from dbes.reporting.export import hub_entries, open_record
    from dbes.reporting.page import write_page
    from dbes.results import load_result

    with _errors():
        if format is ReportFormat.html:
            typer.echo(write_page(result, trace=trace, output=output))
        elif format is ReportFormat.card:
            typer.echo(card_section(load_result(result)))
        elif format is ReportFormat.hub:
            typer.echo(hub_entries(load_result(result), dataset=dataset))
        else:
            typer.echo(open_record(load_result(result)))


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Results, or folders with results below them.")],
    by: Annotated[str, typer.Option(help="Metric the models are ranked by.")] = "specialization",
    format: Annotated[CompareFormat, typer.Option(help="How to show the comparison; html is the leaderboard page.")] = CompareFormat.table,
    output: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Show the published, uncalibrated values instead.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check that the results may be published.")] = False,
) -> None:
    """Put results side by side; of two, the paired difference for every metric and layer depth."""
    from dbes.reporting import export, leaderboard
    from dbes.reporting.check import check_all
    from dbes.reporting.compare import compare as run
    from dbes.reporting.compare import paired_of

    with _errors():
        if check:
            problems = check_all(results)
            for line in problems or ["every result may be published"]:
                typer.echo(line)
            raise typer.Exit(FAILED if problems else 0)
        found = run(results, metric=by)
        paired = paired_of(found)
        if format is CompareFormat.table and output is None:
            _stdout().print(leaderboard.render_terminal(found, paired, published=published))
            return
        if format is CompareFormat.csv:
            text = export.as_csv(found, published=published)
        elif format is CompareFormat.json:
            text = export.as_json(found, paired)
        elif format is CompareFormat.html:
            text = leaderboard.render_leaderboard(found)
        else:
            text = export.as_markdown(found, paired, published=published)
        if output is None:
            typer.echo(text, nl=False)
        else:
            export.write(text, output)
            typer.echo(output)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or folder with a config.json only.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: RemoteOption = False,
    format: FormatOption = Format.table,
) -> None:
    """Check in seconds that a model's routing can be recorded: hooks, counts, and an ablation of experts."""
    from dbes.doctor import examine
    from dbes.pipeline import EMBEDDED_MODEL
    from dbes.reporting.doctor import as_json, render

    with _errors():
        where = EMBEDDED_MODEL if model == "embedded" else model
        diagnosis = examine(where, revision=revision, trust_remote_code=trust_remote_code)
    if format is Format.json:
        typer.echo(as_json(diagnosis))
    else:
        _stdout().print(render(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(FAILED)


@tasks_app.callback(invoke_without_command=True)
def tasks(context: typer.Context) -> None:
    """List the tasks that ship with dbes."""
    if context.invoked_subcommand is not None:
        return
    from dbes.benchmark import list_tasks
    from dbes.reporting.tasks import render

    with _errors():
        found = list_tasks()
    _stdout().print(render(found))


@tasks_app.command()
def validate(file: Annotated[Path, typer.Argument(help="Task YAML.")]) -> None:
    """Check a task file and every document it names."""
    from dbes.pipeline import read_benchmark
    from dbes.reporting.tasks import render_documents

    with _errors():
        benchmark = read_benchmark(file)
    _stdout().print(render_documents(benchmark))


def main() -> None:
    app()


def _batch_size(text: str) -> Any:
    if text == "auto":
        return "auto"
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"expected auto or a positive number, got {text!r}", param_hint="--batch-size")


def _show(result: Result, format: Format, folder: Path | None) -> None:
    if format is Format.json:
        typer.echo(result.model_dump_json(indent=1))
        return
    from dbes.reporting.terminal import render, render_paths

    console = _stdout()
    console.print(render(result))
    if folder is not None:
        render_paths(folder, console)


def _stdout() -> Any:
    from rich.console import Console

    console = Console()
    # In a pipe or a log there is no terminal to measure: tables are given room instead of being folded at 80 columns.
    return console if console.is_terminal else Console(width=150)


@contextmanager
def _errors() -> Iterator[None]:
    """Turns dbes's own errors into one line on stderr and the exit code; anything else is a defect and keeps its traceback."""
    try:
        yield
    except TaskError as problem:
        typer.echo(f"dbes: {problem}", err=True)
        raise typer.Exit(USAGE) from None
    except DbesError as problem:
        typer.echo(f"dbes: {problem}", err=True)
        raise typer.Exit(FAILED) from None


@contextmanager
def _progress() -> Iterator[Progress]:
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


if __name__ == "__main__":
    main()
