"""What balancing and recording cost in training: tokens per CPU-second of the testbed's loop against the plain step of transformers.

    python benchmarks/training.py [--out FILE] [--rounds 5] [--sizes 1m 4m 12m]

The plain step is what a user would write: forward of the stock model with labels, backward, clipping, the same optimizer.
Both run in this one process, in turns, on the same batches; their ratio is what counts, since the speed of the machine cancels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from dbes.files import write_json
from dbes.testbed.mix import DomainBatch
from dbes.testbed.models import build_model
from dbes.testbed.routers import Routing
from dbes.testbed.settings import MixSettings, ModelSettings, OptimizerSettings, RoutingSettings, TrainSettings
from dbes.testbed.training import keep_freed_memory, optimizer_of, train_step

VOCABULARY = {"1m": 2048, "4m": 4096, "12m": 4096}
ROUTINGS = {
    "aux_loss/global_batch": RoutingSettings(),
    "aux_loss/sequence": RoutingSettings(scope="sequence"),
    "loss_free/global_batch": RoutingSettings(balancing="loss_free", coefficient=0.02),
    "sinkhorn/global_batch": RoutingSettings(balancing="sinkhorn"),
    "assignment/global_batch": RoutingSettings(balancing="assignment"),
    "sequence level": RoutingSettings(router="sequence"),
}


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: DomainBatch) -> None:
    tokens = torch.from_numpy(batch.tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds(step, rounds: int) -> list[float]:
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        step()
        spent.append(time.process_time() - began)
    return spent


def compare(size: str, rounds: int) -> dict[str, float]:
    """Tokens per CPU-second of the plain step and of every routing, medians of rounds that alternate."""
    settings = TrainSettings(
        mix=MixSettings(tokens_per_step=4096, lengths=(128,)),
        model=ModelSettings(size=size, vocabulary=VOCABULARY[size], experts=32),
        optimizer=OptimizerSettings(steps=100),
    )
    generator = np.random.default_rng(0)
    batch = DomainBatch(tokens=generator.integers(2, VOCABULARY[size], (32, 128)), domain=np.repeat(np.arange(8), 4))
    steps = {}
    model = build_model(settings.model, seed=0).train()
    optimizer = optimizer_of(model, settings.optimizer)
    steps["plain"] = lambda: plain_step(model, optimizer, batch)
    entered = []
    for name, routing_settings in ROUTINGS.items():
        own = build_model(settings.model, seed=0).train()
        routing = Routing(own, routing_settings, domains=8, seed=0).__enter__()
        entered.append(routing)
        arguments = {
            "step": 30,
            "settings": settings.model_copy(update={"routing": routing_settings}),
        }
        own_optimizer = optimizer_of(own, settings.optimizer)
        steps[name] = lambda own=own, o=own_optimizer, r=routing, a=arguments: train_step(own, o, r, batch, **a)
    spent = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            measured = seconds(step, 1)
            spent[name] += measured if turn else []
    for routing in entered:
        routing.__exit__()
    return {name: 4096 / statistics.median(times) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(VOCABULARY), choices=list(VOCABULARY))
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = {}
    for size in given.sizes:
        speeds = compare(size, given.rounds)
        found[size] = {
            "tokens_per_cpu_second": {name: round(speed) for name, speed in speeds.items()},
            "against_plain": {name: round(speed / speeds["plain"], 3) for name, speed in speeds.items()},
        }
        print(size, json.dumps(found[size]))
    if given.out:
        write_json(given.out, found)


if __name__ == "__main__":
    main()
