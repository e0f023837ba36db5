"""Memory and speed of training 8 of 512 experts, as ratios to full finetuning, on a random 214 M-parameter OLMoE.

Every arm runs in a process of its own: added peak memory is the most resident memory during the steps less that before them,
model included. Arms take turns and the fastest step of each counts. Usage: ``python benchmarks/finetuning.py [results.json]
[--steps N] [--rounds N] [--large]``; ``--large`` is the same for 1 B parameters with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.settings import FinetuneSettings
from dbes.finetuning.training import make_optimizer
from dbes.models.encoding import Sample, collate
from dbes.models.losses import token_nats

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "split_bank": {"method": "split_bank"},
    "view_leaves": {"method": "view_leaves"},
    "split_bank_rank_8": {"method": "split_bank", "rank": 8},
}
SETTINGS = FinetuneSettings(steps=1, weight_decay=0.1)
VOCABULARY, LAYERS, EXPERTS, CHOSEN = 4096, 8, 64, 8


def random_model(*, hidden: int, intermediate: int) -> OlmoeForCausalLM:
    """8 layers of 64 experts, top-8."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
    )
    return OlmoeForCausalLM(config)


def memory(field: str) -> float:
    """MB of a line of /proc/self/status: VmHWM (peak since it was last reset) or VmRSS (now)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def warm_up(arm: str) -> None:
    """One step of a tiny model: the pages of library code that a first step loads are not memory of the arm."""
    model = random_model(hidden=32, intermediate=16).train()
    with ExitStack() as stack:
        training = stack.enter_context(TrainableCells(model, [(0, 0), (0, 1)], **ARMS[arm])) if arm != "full" else None
        optimizer = make_optimizer(training.parameters() if training is not None else list(model.parameters()), SETTINGS)
        counted = np.arange(64) > 0
        token_nats(model, **vars(collate([Sample(np.arange(64), counted, 64)], padding=0))).mean().backward()
        optimizer.step()


def measure(arm: str, steps: int, *, sequences: int, length: int, large: bool, hidden: int | None = None) -> dict[str, Any]:
    """Run one arm here and now: added peak memory, seconds of every step, bytes of optimizer and of what is trained.

    Args:
        hidden: width of a smaller model, to try the arms out.
    """
    torch.set_num_threads(1)
    warm_up(arm)
    # 214 M parameters, or 1.1 B
    hidden = hidden or (1152 if large else 512)
    model = random_model(hidden=hidden, intermediate=hidden // 2).train()
    if large:
        model.activation_checkpointing_enable()
    random = np.random.default_rng(0)
    counted = np.ones(length, bool)
    counted[0] = False
    # one expert of every layer, so that the backward pass goes as deep as it can
    cells = [(layer, int(random.integers(EXPERTS))) for layer in range(LAYERS)][:CHOSEN]
    with ExitStack() as stack:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
        before = memory("VmRSS")
        training = stack.enter_context(TrainableCells(model, cells, **ARMS[arm])) if arm != "full" else None
        trained = training.parameters() if training is not None else list(model.parameters())
        optimizer = make_optimizer(trained, SETTINGS)
        seconds, processor = [], []
        for _ in range(steps):
            batch = collate([Sample(random.integers(0, VOCABULARY, length), counted, length) for _ in range(sequences)], padding=0)
            start, busy = time.perf_counter(), time.process_time()
            token_nats(model, batch.inputs, batch.counted).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - busy)
        moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "added_peak_mb": memory("VmHWM") - before,
            "seconds": seconds,
            "processor_seconds": processor,
            "optimizer_bytes": sum(value.numel() * value.element_size() for value in moments),
            "chosen_bytes": sum(leaf.numel() * leaf.element_size() for leaf in trained),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--hidden", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.arm:
        sizes = {"sequences": chosen.sequences, "length": chosen.length, "large": chosen.large, "hidden": chosen.hidden}
        print(json.dumps(measure(chosen.arm, chosen.steps, **sizes)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.arms.split(",")}
    for turn in range(chosen.rounds):
        for name in found:
            command = [
                sys.executable,
                __file__,
                "--arm",
                name,
                *(f"--{key}={getattr(chosen, key)}" for key in ("steps", "sequences", "length")),
            ]
            command += ["--large"] if chosen.large else []
            command += [f"--hidden={chosen.hidden}"] if chosen.hidden else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # what goes wrong there is shown
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{turn + 1}/{chosen.rounds} {name}: {found[name][-1]}", file=sys.stderr)
    rows = {name: summary(runs) for name, runs in found.items()}
    full = rows.get("full")
    result = {
        "parameters": next(iter(found.values()))[0]["parameters"],
        "tokens_per_step": chosen.sequences * chosen.length,
        "gradient_checkpointing": chosen.large,
        "load_average": os.getloadavg()[0],
        "arms": rows,
        "share_of_full": {
            name: {
                field: round(row[field] / full[field], 4) for field in ("added_peak_mb", "processor_seconds_per_step", "seconds_per_step")
            }
            for name, row in rows.items()
            if full and name != "full"
        },
    }
    print(json.dumps(result, indent=1))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The first step of a process is left out: it allocates."""
    seconds = [value for run in runs for value in run["seconds"][1:]]
    processor = [value for run in runs for value in run["processor_seconds"][1:]]
    return {
        "added_peak_mb": round(max(run["added_peak_mb"] for run in runs), 1),
        "seconds_per_step": round(min(seconds), 4),
        "seconds_per_step_median": round(statistics.median(seconds), 4),
        "processor_seconds_per_step": round(statistics.median(processor), 4),
        "optimizer_bytes": runs[0]["optimizer_bytes"],
        "optimizer_bytes_of_chosen": runs[0]["optimizer_bytes"] / runs[0]["chosen_bytes"],
    }


if __name__ == "__main__":
    main()
