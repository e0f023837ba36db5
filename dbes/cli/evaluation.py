"""`dbes evaluate`, `dbes score` and `dbes doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dbes.cli.common import (
    FAILED,
    FormatOption,
    MetricOption,
    PermutationsOption,
    RemoteOption,
    SeedOption,
    StrataOption,
    names,
    one_of,
    progress_bar,
    say_json,
    stdout,
    tell,
)

if TYPE_CHECKING:
    from dbes.results import Result


ENGINES = ("auto", "memory", "streaming", "vllm", "openai")
ROUTERS = ("recorded", "reference", "uniform", "collapsed", "hash")
PHASES = ("all", "prompt", "generated")
MATCHES = ("none", "length")
SURROGATES = ("token", "bigram")

DropLoopsOption = Annotated[
    bool, typer.Option("--drop-loops", help="Leave the generated text of answers that repeat themselves out of the scores.")
]


DtypeOption = Annotated[
    str, typer.Option(help="auto (float32 on a CPU, the checkpoint's own on an accelerator), float32, bfloat16, float16, float64.")
]
EngineOption = Annotated[
    str, one_of("engine", ENGINES, "memory loads all weights; streaming reads layer by layer; auto: what fits; vllm, openai: served.")
]
GenerateOption = Annotated[
    int | None, typer.Option(help="Let the model answer each document with so many tokens at most, and record these too.")
]
ApplyChatTemplateOption = Annotated[
    bool, typer.Option("--apply-chat-template", help="Give each document as the user's message of the model's chat template.")
]
EmbeddedFallbackOption = Annotated[
    bool, typer.Option("--embedded-fallback", help="When the hub cannot be reached, use the embedded sample and say so.")
]
AccuracyOption = Annotated[
    bool, typer.Option("--accuracy", help="How often the right choice of the task's multiple-choice items is the likeliest.")
]
LmEvalOption = Annotated[bool, typer.Option("--lm-eval", help="The same accuracy, by lm-evaluation-harness; needs dbes[lm-eval].")]
AblateOption = Annotated[
    bool, typer.Option("--ablate", help="Mask each domain's specialists, and other cells of the same load: what is lost?")
]


def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or folder; `embedded` is the small checkpoint that ships with dbes.")] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    tasks: Annotated[str, typer.Option(help="Task name, YAML file (or a group's), prepared folder; several with commas.")] = "embedded",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per domain at most.")] = None,
    output_path: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    dtype: DtypeOption = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, for example auto or cpu.")] = None,
    batch_size: Annotated[str, typer.Option(help="Windows per batch, or auto.")] = "auto",
    engine: EngineOption = "auto",
    max_memory: Annotated[str | None, typer.Option(help="What streaming may use, for example 4GiB; by default what is free.")] = None,
    name: Annotated[str | None, typer.Option(help="What result and page call the model.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of the server, with --engine openai.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable of the environment that holds the server's key.")] = None,
    engine_args: Annotated[str | None, typer.Option(help="Of vLLM: name=value,name=value.")] = None,
    generate: GenerateOption = None,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that together have this probability.")] = 1.0,
    generation_seed: Annotated[int, typer.Option(help="Of sampling; the same tokens whatever shares a batch.")] = 0,
    apply_chat_template: ApplyChatTemplateOption = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat template.")] = None,
    drop_loops: DropLoopsOption = False,
    seed: SeedOption = 0,
    permutations: PermutationsOption = 1000,
    trust_remote_code: RemoteOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Evaluate again although there is a result.")] = False,
    save_trace: Annotated[bool, typer.Option(help="Keep the recorded routes beside the result.")] = True,
    embedded_fallback: EmbeddedFallbackOption = False,
    loss: Annotated[bool, typer.Option("--loss", help="Bits per byte of every domain too, in the same pass.")] = False,
    accuracy: AccuracyOption = False,
    lm_eval: LmEvalOption = False,
    ablate: AblateOption = False,
    metric: MetricOption = None,
    strata: StrataOption = "",
    format: FormatOption = "table",
    quiet: Annotated[bool, typer.Option("--quiet", help="Without progress; errors are told.")] = False,
) -> None:
    """Record a model's routing over a task and score it against chance and the ideal router.

    With several tasks one that fails does not keep the others from being run.
    """
    from dbes.evaluation.pipeline import evaluate as run
    from dbes.recording.crew import Crew
    from dbes.reporting.report import keep_page
    from dbes.scoring.own import metric_from

    wanted, silent = names(tasks), not Crew.here().first
    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    with nullcontext() if silent or quiet else progress_bar() as progress:
        found = run(
            model, tasks=wanted, output_path=output_path, revision=revision, limit=limit, dtype=dtype, device_map=device_map,
            batch_size=_batch_size(batch_size), engine=cast("Any", engine), max_memory=max_memory, seed=seed,
            permutations=permutations, trust_remote_code=trust_remote_code,
            overwrite=overwrite, save_trace=save_trace, embedded_fallback=embedded_fallback, loss=loss,
            accuracy="lm-eval" if lm_eval else accuracy, ablate=ablate, metrics=[metric_from(each) for each in metric or ()],
            strata=names(strata), progress=progress, name=name, base_url=base_url, api_key_env=api_key_env, engine_args=engine_args,
            generate=generate, temperature=temperature, top_p=top_p, generation_seed=generation_seed,
            apply_chat_template=apply_chat_template, system=system, drop_loops=drop_loops,
        )  # fmt: skip
    done = [result for result in found if result.status == "ok"]
    for result in found if not silent else ():
        if result.status != "ok":
            tell(str(result.error))
            continue
        assert result.folder is not None
        keep_page(result.folder)
        if format == "table":
            _show(result)
    if format == "json" and done and not silent:
        say_json(_json(done, several=len(found) > 1))
    if len(done) < len(found):
        raise typer.Exit(FAILED)


def score(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace, or of counts.")],
    router: Annotated[str, one_of("router", ROUTERS, "Score the documents as another router would route them.")] = "recorded",
    phase: Annotated[str, one_of("phase", PHASES, "Which tokens to score.")] = "all",
    match: Annotated[
        str, one_of("match", MATCHES, "length cuts texts so that all domains have the same lengths and positions, as a check.")
    ] = "none",
    surrogate: Annotated[
        str, one_of("surrogate", SURROGATES, "What lexical and contextual values tell apart: the token alone, or with the one before it.")
    ] = "token",
    drop_loops: DropLoopsOption = False,
    seed: SeedOption = 0,
    permutations: PermutationsOption = 1000,
    metric: MetricOption = None,
    strata: StrataOption = "",
    output_path: Annotated[Path | None, typer.Option(help="Folder to write result and tables to.")] = None,
    format: FormatOption = "table",
) -> None:
    """Score a recorded trace again; needs no model."""
    from dbes.scoring.own import metric_from
    from dbes.scoring.score import score as run

    result = run(
        trace, router=router, phase=phase, match=match, surrogate=surrogate, drop_loops=drop_loops, seed=seed, permutations=permutations,
        metrics=[metric_from(each) for each in metric or ()], strata=names(strata), output_path=output_path,
    )  # fmt: skip
    if format == "json":
        say_json(_json([result], several=False))
    else:
        _show(result)


def doctor(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or folder with a config.json only.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: RemoteOption = False,
    format: FormatOption = "table",
) -> None:
    """Check in seconds that a model's routing can be recorded: hooks, counts, and an ablation of experts."""
    from dbes.models.doctor import examine
    from dbes.reporting.doctor import as_json, render

    diagnosis = examine(model, revision=revision, trust_remote_code=trust_remote_code)
    if format == "json":
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


def _json(results: Sequence[Result], *, several: bool) -> str:
    """One document: a result, or a list of them."""
    documents = [result.model_dump_json(indent=1) for result in results]
    return "[" + ",\n".join(documents) + "]" if several else documents[0]


def _show(result: Result) -> None:
    from dbes.reporting.terminal import render, render_paths

    console = stdout()
    console.print(render(result))
    if result.folder is not None:
        render_paths(result.folder, console, specialists=result.companions.get("specialists", {}).get("by_domain"))
