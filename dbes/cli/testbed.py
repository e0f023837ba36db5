"""`dbes testbed`: train small MoEs under known routers, and see what the metrics make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dbes.cli.common import names, one_of, say

app = typer.Typer(
    help="Train small MoEs under many routers and balancing methods; what the metrics should see is known.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

CacheOption = Annotated[Path, typer.Option(help="Where built mixes are kept.")]


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the grid. Finished runs in it are not trained again.")],
    preset: Annotated[str, one_of("preset", ("smoke", "standard"), "smoke: a try-out of two seeds; standard: every experiment.")] = "smoke",
    mix: Annotated[str | None, typer.Option(help="embedded, packages, or a folder of JSONL files; the preset's own by default.")] = None,
    only: Annotated[str, typer.Option(help="Experiments to run, separated by commas; all by default.")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Runs trained at a time, one thread each.")] = 2,
    cache: CacheOption = Path("build/testbed"),
) -> None:
    """Train and measure a grid of routers; the same command resumes an interrupted one."""
    from dbes.testbed.report import run_testbed

    say(run_testbed(preset, out, mix=mix, cache=cache, processes=processes, only=names(only), progress=_say))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a grid.")]) -> None:
    """Write tables, plots and the findings page of the runs that are finished."""
    from dbes.testbed.report import write_report

    say(write_report(folder))


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML with mix, model, routing and optimizer settings.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; the same command resumes a killed run.")],
    mix: Annotated[str, typer.Option(help="embedded, packages, or a folder of JSONL files.")] = "embedded",
    cache: CacheOption = Path("build/testbed"),
    prescribed: Annotated[
        bool,
        typer.Option(
            "--prescribed",
            help="Allow router: reference. Plain transformers and `dbes evaluate` route such a checkpoint by its own router, "
            "not by domain as it was trained; `dbes intervene --routing as-trained` routes it as it was trained.",
        ),
    ] = False,
) -> None:
    """Train one model to a checkpoint that plain transformers and `dbes evaluate` read."""
    from dbes.testbed.checkpoint import train_checkpoint

    def log(record: dict[str, Any]) -> None:
        _say(json.dumps({name: record[name] for name in ("step", "loss", "balancing_loss", "tokens_per_second") if name in record}))

    say(train_checkpoint(config, out, mix=mix, cache=cache, prescribed=prescribed, progress=log))


@app.command("mix")
def build_mix(
    mix: Annotated[str, typer.Argument(help="embedded, packages, or a folder of JSONL files.")] = "packages",
    vocabulary: Annotated[int, typer.Option(min=300, help="Tokens of the tokenizer that is trained on it.")] = 2048,
    cache: CacheOption = Path("build/testbed"),
) -> None:
    """Build a mix and its tokenizer, and keep them."""
    from dbes.testbed.mixes import prepare_mix

    prepared = prepare_mix(mix, vocabulary=vocabulary, max_positions=512, cache=cache)
    for index, domain in enumerate(prepared.mix.domains):
        say(f"{domain}: {len(prepared.mix.training[index].tokens):,} tokens, {len(prepared.mix.heldout[index])} held-out documents")
    say(prepared.folder)


def _say(message: str) -> None:
    say(message, err=True)
