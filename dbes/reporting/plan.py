"""What evaluating or finetuning a model would take, in the terminal or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbes.evaluation.plan import Plan
from dbes.finetuning.needs import PathNeeds
from dbes.text import printable
from dbes.wording import byte_count, counted, duration, share, span


def render(plan: Plan, path: PathNeeds | None = None) -> RenderableType:
    """Sizes, memory by dtype, engine and time; each line fits into 80 columns as far as names allow."""
    needs = plan.needs
    parts: list[RenderableType] = [Text.assemble((printable(plan.model), "bold"), f"  {needs.architecture}")]
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _facts(plan):
        facts.add_row(name, Text(text))
    memory = Table(title="Memory", title_justify="left", header_style="bold")
    for name in ("dtype", "weights", "in memory", "streaming"):
        memory.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype, each in plan.dtypes.items():
        memory.add_row(dtype, byte_count(needs.weights[dtype]), byte_count(each.memory), byte_count(each.streaming))
    parts += [facts, memory, Text(_verdict(plan))]
    if path is not None:
        parts.append(_path_table(path))
    return Group(*parts)


def as_json(plan: Plan, path: PathNeeds | None = None) -> str:
    """The plan as strict JSON; bytes, seconds, and operations a second."""
    content = asdict(plan)
    if path is not None:
        content["path"] = {**asdict(path), "training": path.training}
    return json.dumps(content, indent=1, allow_nan=False)


def _facts(plan: Plan) -> list[tuple[str, str]]:
    needs = plan.needs
    files = "unknown" if needs.files is None else byte_count(needs.files)
    kind = f" ({needs.quantization})" if needs.quantization else f" ({needs.dtype})"
    layers = counted(len(needs.layers), "MoE layer")
    return [
        ("parameters", f"{needs.parameters:,}, {needs.active:,} active ({share(needs.active / needs.parameters)})"),
        (
            "experts",
            f"{span([each.experts for each in needs.layers])} in each of {layers} of {needs.depth}, "
            f"{span([each.top_k for each in needs.layers])} per token",
        ),
        ("to read", files + kind),
        ("available", f"{byte_count(plan.available.bytes)}, by {plan.available.limit}"),
        ("speed", f"disk {byte_count(plan.disk)}/s, multiplications {plan.flops / 1e12:.3g} TFLOP/s ({plan.dtype})"),
    ]


def _verdict(plan: Plan) -> str:
    if plan.choice is None:
        return f"No engine fits: {plan.reason}."
    seconds = plan.seconds[plan.choice.engine]
    read = f"; the checkpoint is read {counted(plan.units, 'time')}" if plan.choice.engine == "streaming" else ""
    return (
        f"Engine: {plan.choice.engine}, {plan.dtype} ({plan.reason}).\n"
        f"Time for {plan.tokens:,} tokens: about {duration(seconds)} (an estimate){read}."
    )


def _path_table(path: PathNeeds) -> RenderableType:
    title = f"Training {counted(path.cells, 'expert')}: {path.parameters:,} parameters"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("what")
    table.add_column("memory", justify="right")
    for name, size in (
        ("trained copies (leaves)", path.leaves),
        ("gradients", path.gradients),
        ("moments of the optimizer", path.moments),
        ("together", path.training),
        ("best leaves so far, with early stopping", path.kept),
        ("matrices of protection, with protect", path.protection),
        ("copies of the experts, with protect", path.bases),
    ):
        table.add_row(name, byte_count(size))
    return table
