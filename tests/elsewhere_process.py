"""Run what feeds a model on the CPU and on another device, and print as JSON what differs: see `elsewhere` and test_execution.

A process of its own, because torch can have a further device for the rest of a process only.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from elsewhere import elsewhere, moved
from families import character_tokenizer, tiny_model
from mock_remote_moe import MockMoeConfig, MockMoeForCausalLM
from testbed_mix import tiny_mix

from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.checks import check_reach
from dbes.finetuning.evaluation import measure as bits_per_byte
from dbes.intervention.data import ExperimentData, Part
from dbes.intervention.runs import document_nats, execute
from dbes.intervention.settings import ArmRun, InterventionSettings
from dbes.models import load_model
from dbes.models.doctor import examine
from dbes.models.encoding import Sample, collate
from dbes.models.losses import next_token_loss, token_nats
from dbes.paths.gradients import gradient_norms, masking_effects
from dbes.paths.types import Cell
from dbes.recording.record import record_documents
from dbes.tasks.entries import Entry, Item
from dbes.testbed.heldout import measure, training_routes
from dbes.testbed.models import build_model
from dbes.testbed.settings import MixSettings, ModelSettings, OptimizerSettings, RoutingSettings, TrainSettings

LENGTH = 16
DOMAINS = ("a", "b")
TRAINING = TrainSettings(
    mix=MixSettings(tokens_per_step=256, lengths=(32,)),
    model=ModelSettings(vocabulary=300, hidden=32, layers=2, experts=8, intermediate=8, max_positions=64),
    routing=RoutingSettings(balancing="loss_free", coefficient=0.01),
    optimizer=OptimizerSettings(steps=2, warmup=0, learning_rate=1e-2),
)
CELLS = (Cell(0, 0), Cell(0, 1), Cell(1, 3), Cell(2, 2), Cell(2, 5))


@dataclass(frozen=True)
class Document:
    id: str
    domain: str
    text: str


def texts(count: int = 6) -> list[str]:
    random = np.random.default_rng(0)
    return ["".join(chr(code) for code in random.integers(40, 120, random.integers(8, 30))) for _ in range(count)]


def windows(seed: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng([seed, length]).integers(5, 120, length).astype(np.int32) for length in (9, 14, 5)]


def olmoe() -> Any:
    model = tiny_model("olmoe")
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def remote() -> Any:
    torch.manual_seed(0)
    return MockMoeForCausalLM(MockMoeConfig(block="mixtral")).eval()


def recorded(model: Any) -> Any:
    documents = [Document(str(place), "ab"[place % 2], text) for place, text in enumerate(texts())]
    loaded = load_model(model, tokenizer=character_tokenizer())
    recording = record_documents(loaded, documents, domains=DOMAINS, window=20)
    return [array for shard in (*recording.trace, *recording.trace.control) for array in shard.arrays().values()]


def examined(model: Any) -> Any:
    return [int(examine(model).ok)]


def finetuning_measured(model: Any) -> Any:
    item = Item("why", (" so", " not", " never"), 1)
    entries = [Entry(id=str(place), source=str(place), segments=((text, True),)) for place, text in enumerate(texts())]
    entries.append(Entry(id="i", source="i", segments=(("ab", True),), item=item))
    score = bits_per_byte(model, character_tokenizer(), {"a": entries}, length=LENGTH)["a"]
    return [score.bits_per_byte, score.accuracy]


def reached(model: Any) -> Any:
    samples = [Sample(ids=row, counted=np.ones(len(row), bool), text_bytes=len(row)) for row in windows()]
    with TrainableCells(model, CELLS) as cells:
        check_reach(model, cells, samples, padding=0, size=2)
        token_nats(model, **vars(collate(samples, padding=0))).sum().backward()
        return [leaf.grad for leaf in cells.parameters()]


def gradients(model: Any) -> Any:
    return [gradient_norms(model, windows())]


def masking(model: Any) -> Any:
    return [masking_effects(model, [windows(0), windows(1)])]


def part(seed: int) -> Part:
    rows = windows(seed)
    return Part(
        tokens=np.concatenate(rows),
        starts=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        bytes=np.asarray([len(row) for row in rows], np.int64),
    )


def run_of(**changes: Any) -> Callable[[Any], Any]:
    def executed(model: Any) -> Any:
        settings = InterventionSettings(
            domains=DOMAINS, budgets=(0.2,), rules=("target-load",), extras=(), ideas=(), protected=(), idea_rule="target-load", seeds=1,
            rates=(1e-2,), steps=2, warmup=0, sequences=2, length=8, points=(1, 2), full_points=(1, 2), documents=3, other_documents=2,
            tuning_documents=2, evidence_tokens=100, permutations=10, masks=2,
        )  # fmt: skip
        names = ("train", "tuning", "heldout", "protected")
        parts = {(domain, kind): part(10 * place + of) for place, domain in enumerate(DOMAINS) for of, kind in enumerate(names)}
        data = ExperimentData(domains=DOMAINS, parts=parts, boundary=1, digest="x", items={})
        run = ArmRun(**{"target": "a", "cells": (), "rank": None, "only": None, "rate": 1e-2, "seed": 0, "tuning": False, **changes})
        record = execute(model, run, data, settings)
        assert record["status"] == "ok", record
        return [record["losses"], *[list(values) for point in record["curve"] for values in point["nats"].values()]]

    return executed


def testbed() -> Any:
    model = build_model(TRAINING.model, seed=0).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def heldout(model: Any) -> Any:
    found = measure(model, tiny_mix(), routing=TRAINING.routing, length=16, documents=3, keep_inputs=True)
    arrays = [array for shard in found.trace for array in shard.arrays().values()]
    return [found.nats, found.entropy, found.inputs, *arrays]


def routed_as_trained(model: Any) -> Any:
    bias = torch.zeros(2, 8)
    return [shard.ids for shard in training_routes(model, tiny_mix(), TRAINING, bias=bias, batches=2)]


def trained(model: Any) -> Any:
    loss, nats = next_token_loss(model, torch.arange(40).reshape(2, 20).to(next(model.parameters()).device))
    loss.backward()
    return [nats, *[parameter.grad for parameter in model.parameters()]]


CHECKS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "recording": (olmoe, recorded),
    "recording of experts that are modules": (remote, recorded),
    "doctor": (olmoe, examined),
    "doctor of experts that are modules": (remote, examined),
    "finetuning: held-out texts": (olmoe, finetuning_measured),
    "finetuning: reach and losses": (olmoe, reached),
    "paths: gradients": (olmoe, gradients),
    "paths: masking": (olmoe, masking),
    "intervention: held-out documents": (olmoe, lambda model: [document_nats(model, windows())]),
    "intervention: cells": (olmoe, run_of(kind="cells", cells=CELLS)),
    "intervention: protected cells": (olmoe, run_of(kind="cells", cells=CELLS, protect=0.05)),
    "intervention: low rank": (olmoe, run_of(kind="cells", cells=CELLS, rank=2)),
    "intervention: routers": (olmoe, run_of(kind="router")),
    "intervention: full": (olmoe, run_of(kind="full")),
    "testbed: held-out documents": (testbed, heldout),
    "testbed: routes as in training": (testbed, routed_as_trained),
    "testbed: loss": (testbed, trained),
}


def values(found: Any) -> list[np.ndarray]:
    return [
        (value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)).astype(np.float64)
        for value in found
        if value is not None
    ]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.inference_mode = torch.no_grad  # torch: tensors made by subclasses have no place in inference mode
    told = {}
    for name in sys.argv[1:] or CHECKS:
        make, work = CHECKS[name]
        try:
            here = values(work(make()))
            with elsewhere():
                there = values(work(moved(make())))
            told[name] = "ok" if len(here) == len(there) else f"{len(there)} values, not {len(here)}"
            for one, other in zip(here, there, strict=False):
                np.testing.assert_allclose(other, one, rtol=2e-2, atol=2e-3)
        except Exception as problem:
            told[name] = f"{type(problem).__name__}: {str(problem)[:300]} {traceback.format_exc(limit=-4)}"
    print(json.dumps(told))


if __name__ == "__main__":
    main()
