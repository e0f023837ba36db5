"""`dbes finetune` and `dbes merge`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbes.cli.common import Format, FormatOption, RemoteOption, errors, names, stdout

if TYPE_CHECKING:
    from dbes.finetuning.report import FinetuneReport


class Save(StrEnum):
    model = "model"
    delta = "delta"


class TrackerName(StrEnum):
    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


class MethodName(StrEnum):
    auto = "auto"
    split_bank = "split_bank"
    view_leaves = "view_leaves"


RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]


def finetune(
    paths: Annotated[Path, typer.Option(help="Expert path of `dbes paths`, or an ESFT expert config.")],
    data: Annotated[str, typer.Option(help="File (.jsonl, .json, .txt, .parquet), or task:DOMAIN. A fifth is held out.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; the same command goes on with a killed run.")],
    model: Annotated[str, typer.Option(help="Hub id or folder; `embedded` is the small checkpoint that ships with dbes.")] = "embedded",
    revision: RevisionOption = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; or give --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; or give --steps.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW; touches the chosen experts only.")] = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per update, over all processes.")] = 8,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences per forward; fewer save memory.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    packing: Annotated[bool, typer.Option(help="Put plain texts one after the other instead of padding each.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the data.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (mixed precision).")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Compute twice, keep less.")] = False,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Train updates of this rank; they are merged on save.")] = None,
    train_router: Annotated[bool, typer.Option("--train-router", help="Train the routers of the chosen layers too.")] = False,
    protect: Annotated[
        float | None, typer.Option(help="Train updates that other domains hardly feel: 0.03; smaller protects more.")
    ] = None,
    protect_domains: Annotated[str, typer.Option(help="Which domains, by comma; all others of the task by default.")] = "",
    method: Annotated[MethodName, typer.Option(help="auto: split_bank where the model allows it.")] = MethodName.auto,
    tasks: Annotated[str, typer.Option(help="Task whose domains are measured before and after.")] = "embedded",
    limit: Annotated[int, typer.Option(min=1, help="Held-out texts per domain at most.")] = 64,
    eval_every: Annotated[int, typer.Option(min=0, help="Measure every so many steps too.")] = 0,
    save: Annotated[Save, typer.Option(help="A whole checkpoint, or only the trained slices.")] = Save.model,
    tracker: Annotated[TrackerName, typer.Option(help="Where losses are sent to as well.")] = TrackerName.none,
    trust_remote_code: RemoteOption = False,
    format: FormatOption = Format.table,
) -> None:
    """Train only the experts of a path; all other weights stay bit for bit as they are."""
    from dbes.finetuning.run import finetune as run
    from dbes.finetuning.settings import make_settings

    def progress(record: dict[str, Any]) -> None:
        _say(f"step {record['step']}: loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s")

    with errors():
        settings = make_settings(
            steps=steps, epochs=epochs, lr=lr, weight_decay=weight_decay, batch_size=batch_size, micro_batch_size=micro_batch_size,
            seq_len=seq_len, packing=packing, seed=seed, bf16=bf16, gradient_checkpointing=gradient_checkpointing, lora_rank=lora_rank,
            train_router=train_router, protect=protect, protect_domains=names(protect_domains), method=method.value,
            eval_every=eval_every, tracker=tracker.value,
        )  # fmt: skip
        report = run(
            model, paths, data, out, settings, tasks=tasks, limit=limit, save=save.value, revision=revision,
            trust_remote_code=trust_remote_code, say=_say, progress=progress,
        )  # fmt: skip
    if format is Format.json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        stdout().print(_table(report))
        typer.echo(out)


def merge(
    base: Annotated[str, typer.Argument(help="The model the delta was trained from: folder, hub id, or `embedded`.")],
    delta: Annotated[Path, typer.Argument(help="Folder that `dbes finetune --save delta` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Put the trained slices of a delta into their base, and write a plain checkpoint."""
    from dbes.finetuning.output import merge_delta
    from dbes.pipeline import EMBEDDED_MODEL

    with errors():
        where = str(EMBEDDED_MODEL) if base == "embedded" else base
        typer.echo(merge_delta(where, delta, out, revision=revision, trust_remote_code=trust_remote_code))


def _table(report: FinetuneReport) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text(
        f"{report.model}: {len(report.cells)} experts of path {report.path_domain} ({report.path_rule}), {report.parameters:,} parameters, "
        f"optimizer {report.optimizer_bytes / 1e6:.1f} MB, {report.steps} steps in {report.seconds:.0f} s"
    )
    table = Table()
    for name in ("domain", "texts", "bits/byte before", "after", "change", "accuracy before", "after"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for name, before in report.before.items():
        after = report.after[name]
        accuracies = ["" if score.accuracy is None else f"{score.accuracy:.3f}" for score in (before, after)]
        change = f"{after.bits_per_byte - before.bits_per_byte:+.4f}"
        shown = f"{name} (target)" if name == report.target else name
        table.add_row(shown, str(before.entries), f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}", change, *accuracies)
    told = [f"{report.target}: {report.gain:+.4f} bits per byte gained"]
    if report.forgetting_mean is not None:
        told.append(f"other domains forget {report.forgetting_mean:.4f} on average, {report.forgetting_worst:.4f} at worst")
    can = report.method == "split_bank" and report.settings.lora_rank is None and not report.settings.train_router
    if can and report.settings.protect is None and (report.forgetting_mean or 0) > 0:
        told.append("--protect 0.03 keeps them better")
    return Group(title, table, Text("; ".join(told) + "."))


def _say(message: str) -> None:
    """To stderr, once: under `accelerate launch` the other processes are silent."""
    import os

    if os.environ.get("RANK", "0") == "0":
        typer.echo(message, err=True)
