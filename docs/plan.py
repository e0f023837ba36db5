"""Writes ``plan.md``: what `dbes plan` says of well-known checkpoints, from the configs in ``models.yaml``; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedModel

from dbes.evaluation.plan import EFFICIENCY, UNIT_TOKENS, EngineNeed, choose_engine, seconds_of
from dbes.finetuning.needs import needs_of_share
from dbes.models.fitting import SMALLEST_BATCH
from dbes.models.memory import Available
from dbes.models.needs import Needs, measure, skeleton_of
from dbes.wording import byte_count, duration

PAGE, MODELS = Path(__file__).with_name("plan.md"), Path(__file__).with_name("models.yaml")
TOKENS = 1_000_000
SHARE = 0.15

STORED_BITS = {"mxfp4": 4.25, "fp8": 8.002}
"""Of each weight of the routed experts (mxfp4: blocks of 32 with a scale of 8 bits) or of the decoder layers (fp8: blocks of 128 x 128 with
a scale of 32 bits)."""


@dataclass(frozen=True)
class Machine:
    """Memory that the weights may take (a GPU's, where there is one), bytes a second from the disk, operations a second."""

    name: str
    memory: float
    disk: float
    flops: float


MACHINES = (
    Machine("64 GB of memory, 32 CPU cores", 64e9, 3e9, 2e12),
    Machine("the same with one GPU of 80 GB", 80e9, 3e9, 8e14),
)

HEAD = f"""# What well-known checkpoints take

Written by `make docs` from the configs in [models.yaml](models.yaml), with the arithmetic of `dbes plan`. **All of it is estimated**;
nothing here was run on these checkpoints. `dbes plan --model PATH|ID` says the same of any checkpoint, with the memory and the measured
speeds of the machine it runs on, or with those given by `--memory`, `--disk-speed` and `--flops`.

Assumptions: bfloat16; {TOKENS:,} tokens; an NVMe disk that reads 3 GB/s; multiplications at 2 TFLOP/s on the CPU and 800 TFLOP/s on the
GPU, of which a model reaches {EFFICIENCY:.0%}; fp8 and mxfp4 are read as stored and computed in bfloat16. The streaming engine reads the
checkpoint once for every {UNIT_TOKENS:,} tokens, and a layer while the one before it computes. Attention over long windows, the work of
the host and the transfer to the GPU are not counted. Active parameters include embeddings and head.
"""


def page() -> str:
    """The text of the page."""
    found = {name: _model(config) for name, config in yaml.safe_load(MODELS.read_text("utf-8")).items()}
    parts = [HEAD, "\n## Sizes\n\n"]
    parts += _table(
        ("checkpoint", "parameters", "active", "MoE layers x experts", "to read", "in memory", "streaming"),
        [(name, *_sizes(needs)) for name, (_, needs) in found.items()],
    )
    parts.append(f"\n## Recording {TOKENS:,} tokens\n\n")
    columns = [f"{each.name}: {what}" for each in MACHINES for what in ("engine", "time")]
    parts += _table(("checkpoint", *columns), [(name, *_times(needs)) for name, (_, needs) in found.items()])
    parts.append(f"\n## Finetuning {SHARE:.0%} of the routed experts\n\n")
    parts.append(f"`dbes plan --paths {SHARE}`: what training needs beside the model in memory.\n\n")
    columns = ("trained parameters", "leaves, gradients, moments", "best leaves (early stopping)", "protection")
    parts += _table(("checkpoint", *columns), [(name, *_training(skeleton)) for name, (skeleton, _) in found.items()])
    return "".join(parts)


def _model(values: dict[str, Any]) -> tuple[PreTrainedModel, Needs]:
    config = AutoConfig.for_model(**values)
    skeleton = skeleton_of(values["model_type"], config, trust_remote_code=False)
    assert skeleton is not None
    needs = measure(skeleton, config)
    if needs.quantization == "fp8":
        # dequantized on a CPU; on a GPU that multiplies fp8 it would take half
        files = int((needs.parameters - needs.embedding) * STORED_BITS["fp8"] / 8) + 2 * needs.embedding
    elif needs.quantization == "mxfp4":
        files = int(needs.routed * STORED_BITS["mxfp4"] / 8) + 2 * (needs.parameters - needs.routed)
    else:
        files = 2 * needs.parameters
    return skeleton, replace(needs, files=files)


def _need(needs: Needs) -> EngineNeed:
    return EngineNeed(needs.memory("bfloat16", tokens=SMALLEST_BATCH), needs.streaming("bfloat16", tokens=SMALLEST_BATCH))


def _sizes(needs: Needs) -> tuple[str, ...]:
    need, experts = _need(needs), needs.layers[0].experts
    billions = [f"{number / 1e9:.1f} B" for number in (needs.parameters, needs.active)]
    sizes = [byte_count(number) for number in (needs.files or 0, need.memory, need.streaming)]
    return *billions, f"{len(needs.layers)} x {experts}", *sizes


def _times(needs: Needs) -> tuple[str, ...]:
    told: list[str] = []
    for machine in MACHINES:
        choice = choose_engine(_need(needs), Available(int(machine.memory), machine.name))
        seconds = seconds_of(needs, dtype="bfloat16", tokens=TOKENS, disk=machine.disk, flops=machine.flops)
        told += [choice.engine, duration(seconds[choice.engine])]
    return tuple(told)


def _training(skeleton: PreTrainedModel) -> tuple[str, ...]:
    path = needs_of_share(skeleton, SHARE, dtype="bfloat16")
    return f"{path.parameters / 1e9:.1f} B", *(byte_count(size) for size in (path.training, path.kept, path.protection + path.bases))


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [heads, tuple("---" if not place else "---:" for place in range(len(heads))), *rows]
    return [f"| {' | '.join(cells)} |\n" for cells in lines]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
