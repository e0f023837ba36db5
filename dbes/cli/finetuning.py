"""`dbes finetune` and `dbes merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbes.cli.common import FormatOption, RemoteOption, one_of, say, say_json, stdout
from dbes.cli.hints import command, option
from dbes.text import printable

if TYPE_CHECKING:
    from dbes.finetuning.report import FinetuneReport


LIMIT = 64
PROTECT = 0.03
"""The floor of protection to try first; the experiments of reports/FINDINGS.md used it."""

RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]


def finetune(
    paths: Annotated[Path, typer.Option(help="Expert path of `dbes paths`, or an ESFT expert config.")],
    data: Annotated[str, typer.Option(help="File (.jsonl, .json, .csv, .txt, .parquet), or task:DOMAIN. A fifth is held out.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; the same command resumes a killed run.")],
    model: Annotated[str, typer.Option(help="Hub id or folder; `embedded` is the small checkpoint that ships with dbes.")] = "embedded",
    revision: RevisionOption = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates at most; four passes over the data by default.")] = None,
    lr: Annotated[str | None, typer.Option(help="Peak learning rate; auto, the default: found by short runs on text set apart.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences per update; 8 by default.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per sequence; 512 by default.")] = None,
    protect: Annotated[
        float | None, typer.Option(help=f"Train updates that other domains hardly feel: {PROTECT}; smaller protects more.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Task whose domains are measured before and after.")] = "embedded",
    limit: Annotated[int, typer.Option(min=1, help="Held-out texts per domain at most.")] = LIMIT,
    save: Annotated[str, one_of("way to save", ("model", "delta"), "A whole checkpoint, or only the trained slices.")] = "model",
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of further settings, such as lora_rank, epochs, seed, early_stopping (all: see README)."),
    ] = None,
    trust_remote_code: RemoteOption = False,
    format: FormatOption = "table",
) -> None:
    """Train only the experts of a path; all other weights stay bit for bit as they are.

    The learning rate is found, and training ends, by the loss on a tenth of the training texts, set apart; what is reported is
    measured on other texts.
    """
    from dbes.finetuning.run import finetune as run
    from dbes.finetuning.summary import protects_next

    def progress(record: dict[str, Any]) -> None:
        checked = f", validation loss {record['validation_loss']:.4f}" if "validation_loss" in record else ""
        _say(f"step {record['step'] + 1}: loss {record['loss']:.4f}{checked}, {record['tokens_per_second']:,.0f} tokens/s")

    report = run(
        model, paths, data, out, config, steps=steps, lr=_rate(lr), protect=protect, batch_size=batch_size, seq_len=seq_len, tasks=tasks,
        limit=limit, save=save, revision=revision, trust_remote_code=trust_remote_code, say=_say, progress=progress,
    )  # fmt: skip
    if format == "json":
        say_json(report.model_dump_json(indent=1))
        return
    stdout().print(_table(report))
    say(out)
    trained = out if save == "model" else Path(f"{out}-merged")
    steps_next = [] if save == "model" else [["merge", model, str(out), *option("out", trained), *option("revision", revision)]]
    steps_next += [["evaluate", *option("model", each), *option("tasks", tasks, default="embedded")] for each in (model, trained)]
    lines = "\n".join(f"  {command(words)}" for words in [*steps_next, ["compare", "results"]])
    _say(f"Next, what training did to the routing, beside the base:\n{lines}")
    if protects_next(report):
        words = ["finetune", *option("model", model), *option("revision", revision), *option("paths", paths), *option("data", data)]
        words += [*option("out", f"{out}-protected"), *option("steps", steps), *option("lr", lr), *option("protect", PROTECT)]
        words += [*option("batch-size", batch_size), *option("seq-len", seq_len)]
        words += [*option("tasks", tasks, default="embedded"), *option("limit", limit, default=LIMIT), *option("config", config)]
        words += [*option("save", save, default="model"), *option("trust-remote-code", trust_remote_code)]
        _say(f"Less may be forgotten with protection:\n  {command(words)}")


def merge(
    base: Annotated[str, typer.Argument(help="The model the delta was trained from: folder, hub id, or `embedded`.")],
    delta: Annotated[Path, typer.Argument(help="Folder that `dbes finetune --save delta` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Put the trained slices of a delta into their base, and write a plain checkpoint."""
    from dbes.finetuning.output import merge as run

    say(run(base, delta, out, revision=revision, trust_remote_code=trust_remote_code))


def _table(report: FinetuneReport) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from dbes.finetuning.summary import advice, findings, interval_of

    title = Text(
        f"{printable(report.model)}: {len(report.cells)} experts of path {printable(report.path_domain)} ({report.path_rule}), "
        f"{report.parameters:,} parameters, "
        f"optimizer {report.optimizer_bytes / 1e6:.1f} MB, {report.steps} steps in {report.seconds:.0f} s"
    )
    table = Table()
    for name in ("domain", "texts", "bits/byte before", "after", "change", "95 % interval", "accuracy before", "after"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for name, before in report.before.items():
        after = report.after[name]
        accuracies = ["" if score.accuracy is None else f"{score.accuracy:.3f}" for score in (before, after)]
        change = f"{after.bits_per_byte - before.bits_per_byte:+.4f}"
        shown = f"{name} (target)" if name == report.target else name
        values = (str(before.entries), f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}", change, interval_of(report, name))
        table.add_row(Text(printable(shown)), *values, *accuracies)
    told = [*findings(report), *(f"warning: {line}" for line in report.warnings), *advice(report)]
    return Group(title, table, *(Text(printable(line)) for line in told))


def _rate(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _say(message: str) -> None:
    """To stderr, once: under `accelerate launch` the other processes are silent."""
    import os

    if os.environ.get("RANK", "0") == "0":
        say(message, err=True)
