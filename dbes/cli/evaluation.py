"""`dbes evaluate`, `dbes score` and `dbes doctor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbes.cli.common import (
    FAILED,
    USAGE,
    Format,
    FormatOption,
    PermutationsOption,
    RemoteOption,
    SeedOption,
    errors,
    names,
    progress_bar,
    say_json,
    stdout,
    tell,
)
from dbes.errors import FileError, ResultError, TraceError
from dbes.files import locked

if TYPE_CHECKING:
    from dbes.results import Result


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


def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or folder; `embedded` is the small checkpoint that ships with dbes.")] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    tasks: Annotated[str, typer.Option(help="Task name or YAML file; several separated by commas.")] = "embedded",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per domain at most.")] = None,
    output_path: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on a CPU, the checkpoint's own on an accelerator), float32, bfloat16, float16, float64.")
    ] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, for example auto or cpu.")] = None,
    batch_size: Annotated[str, typer.Option(help="Windows per batch, or auto.")] = "auto",
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
    """Record a model's routing over a task and score it against chance and the ideal router.

    With several tasks one that fails does not keep the others from being run.
    """
    from dbes.evaluation.pipeline import evaluate as run
    from dbes.evaluation.pipeline import existing_folder, read_benchmark
    from dbes.reporting.page import page_stands, write_page
    from dbes.results import PAGE_FILE

    size = _batch_size(batch_size)
    wanted = names(tasks)
    if not wanted:
        raise typer.BadParameter("expected the name of a task, or several separated by commas", param_hint="--tasks")
    if len(wanted) > 1:
        with errors():
            for task in wanted:
                read_benchmark(task, limit=limit, embedded_fallback=embedded_fallback)
    done: list[Result] = []
    code = 0
    for task in wanted:
        try:
            with errors(), progress_bar() as progress:
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
                if not page_stands(folder / PAGE_FILE):
                    _write_page(folder, write_page)
        except typer.Exit as failed:
            if failed.exit_code == USAGE or len(wanted) == 1:
                raise
            code = failed.exit_code
            continue
        done.append(result)
        if format is Format.table:
            _show(result, folder)
    if format is Format.json:
        _print_json(done, several=len(wanted) > 1)
    if code:
        raise typer.Exit(code)


def _write_page(folder: Path, write_page: Callable[[Path], Path]) -> None:
    """The page of a result; where it cannot be written (a read-only disk) the result is shown all the same."""
    try:
        write_page(folder)
    except FileError as problem:
        if os.access(folder, os.W_OK):
            raise
        tell(str(problem))


def score(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace, or of counts.")],
    router: Annotated[RouterName, typer.Option(help="Score the documents as another router would route them.")] = RouterName.recorded,
    phase: Annotated[Phase, typer.Option(help="Which tokens to score.")] = Phase.all,
    seed: SeedOption = 0,
    permutations: PermutationsOption = 1000,
    output_path: Annotated[Path | None, typer.Option(help="Folder to write result and tables to.")] = None,
    format: FormatOption = Format.table,
) -> None:
    """Score a recorded trace again; needs no model."""
    with errors(), nullcontext() if output_path is None else locked(output_path):
        result = _scored(trace, router, phase, seed=seed, permutations=permutations, output_path=output_path)
    if format is Format.json:
        _print_json([result], several=False)
    else:
        _show(result, output_path)


def _scored(trace: Path, router: RouterName, phase: Phase, *, seed: int, permutations: int, output_path: Path | None) -> Result:
    from dbes.evaluation.pipeline import TRACE_FOLDER
    from dbes.scoring.counts import PHASES, Counts
    from dbes.scoring.score import score_tables
    from dbes.scoring.stored import COUNTS
    from dbes.scoring.tables import save_scores
    from dbes.trace.baselines import imitate
    from dbes.trace.store import Trace

    routes = Counts.load(trace) if (trace / COUNTS).is_file() else Trace.load(trace)
    if output_path is not None and (output_path / TRACE_FOLDER).is_dir():
        raise ResultError(f"{output_path}: holds an evaluation with its recorded routes; choose another --output-path")
    if router is not RouterName.recorded:
        if isinstance(routes, Counts):
            raise TraceError(f"{trace}: these are counts; --router {router.value} needs the trace, whose documents it routes")
        routes = imitate(routes, router.value, seed=seed)
    number = {name: code for code, name in PHASES.items()}[phase.value]
    scores = score_tables(routes, permutations=permutations, seed=seed, phase=number)
    result = scores.result.model_copy(update={"settings": {**scores.result.settings, "trace": str(trace)}})
    return result if output_path is None else save_scores(scores, output_path, result)


def doctor(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or folder with a config.json only.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: RemoteOption = False,
    format: FormatOption = Format.table,
) -> None:
    """Check in seconds that a model's routing can be recorded: hooks, counts, and an ablation of experts."""
    from dbes.models.doctor import examine
    from dbes.reporting.doctor import as_json, render
    from dbes.shipped import EMBEDDED_MODEL

    with errors():
        where = EMBEDDED_MODEL if model == "embedded" else model
        diagnosis = examine(where, revision=revision, trust_remote_code=trust_remote_code)
    if format is Format.json:
        say_json(as_json(diagnosis))
    else:
        stdout().print(render(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(FAILED)


def _batch_size(text: str) -> Any:
    if text == "auto":
        return "auto"
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"expected auto or a positive number, got {text!r}", param_hint="--batch-size")


def _print_json(results: Sequence[Result], *, several: bool) -> None:
    """One document: a result, or a list of them."""
    documents = [result.model_dump_json(indent=1) for result in results]
    say_json("[" + ",\n".join(documents) + "]" if several else documents[0])


def _show(result: Result, folder: Path | None) -> None:
    from dbes.reporting.terminal import render, render_paths

    console = stdout()
    console.print(render(result))
    if folder is not None:
        render_paths(folder, console, domains=tuple(result.task.domains))
