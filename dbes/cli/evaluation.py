"""`dbes evaluate`, `dbes score` and `dbes doctor`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbes.cli.common import FAILED, Format, FormatOption, PermutationsOption, RemoteOption, SeedOption, errors, progress_bar, stdout

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
            write_page(folder)
        _show(result, format, folder)


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

    with errors():
        routes = Trace.load(trace)
        if router is not RouterName.recorded:
            routes = imitate(routes, router.value, seed=seed)
        number = {name: code for code, name in PHASES.items()}[phase.value]
        scores = score_tables(routes, permutations=permutations, seed=seed, phase=number)
        if output_path is not None:
            write_tables(scores, output_path)
            scores.result.save(output_path)
    _show(scores.result, format, output_path)


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

    with errors():
        where = EMBEDDED_MODEL if model == "embedded" else model
        diagnosis = examine(where, revision=revision, trust_remote_code=trust_remote_code)
    if format is Format.json:
        typer.echo(as_json(diagnosis))
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


def _show(result: Result, format: Format, folder: Path | None) -> None:
    if format is Format.json:
        typer.echo(result.model_dump_json(indent=1))
        return
    from dbes.reporting.terminal import render, render_paths

    console = stdout()
    console.print(render(result))
    if folder is not None:
        render_paths(folder, console)
