"""Simulated records of an experiment whose truth is planted: what every arm really gains and forgets at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dbes.intervention.settings import Arm, InterventionSettings

OTHERS = ("b", "c", "d")
STEPS = (5, 10, 20, 40)
BYTES = 300.0


def settings(*, seeds: int = 5, **more: Any) -> InterventionSettings:
    return InterventionSettings(domains=("a",), seeds=seeds, rules=("specialization", "target-load", "random-load-matched"), **more)


def experiment(
    truth: Mapping[str, tuple[float, float]],
    random: np.random.Generator,
    *,
    seeds: int = 5,
    documents: int = 24,
    other_documents: int = 12,
    of_document: float = 0.3,
    of_seed: float = 0.02,
    of_both: float = 0.01,
    masks: list[dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], list[tuple[Arm, dict[str, Any]]], list[dict[str, Any]]]:
    """What ``grid.read_experiment`` gives for arms whose (gain, forgetting) at the last step is ``truth``, in bits per byte.

    A share of the gain and of the forgetting is there at every step alike, so a trajectory is a straight line but for noise. A
    document's gain strays from the truth by ``of_document`` of it in every arm alike, a seed's by ``of_seed`` (its data order,
    shared by all arms), and every single figure by ``of_both`` (all in units of the largest true gain).
    """
    names = ("a", *OTHERS)
    counts = {name: documents if name == "a" else other_documents for name in names}
    size = max(abs(gain) for gain, _ in truth.values())
    base = {name: random.normal(2.0, 0.3, counts[name]) * BYTES * math.log(2) for name in names}
    bias = {name: random.normal(1.0, of_document, counts[name]) for name in names}
    by_seed = {(name, seed): random.normal(0.0, of_seed * size) for name in names for seed in range(seeds)}
    records, arms = [], []
    for name, (gain, forgetting) in truth.items():
        full = name.startswith("full")
        for seed in range(seeds):
            own = random.normal(0.0, of_both * size, (len(names), max(counts.values())))
            curve = []
            for step in STEPS:
                share, nats = (step / STEPS[-1]) ** 0.5, {}
                for row, domain in enumerate(names):
                    effect = gain if domain == "a" else -forgetting
                    saved = share * (effect * bias[domain] + by_seed[domain, seed] + own[row, : counts[domain]])
                    nats[domain] = (base[domain] - saved * BYTES * math.log(2)).tolist()
                curve.append({"step": step, "seconds": step * (0.2 if full else 0.1), "nats": nats})
            arm = Arm(name=name, target="a", seed=seed, kind="full" if full else "cells", budget=None if full else 0.15, coverage=0.3)
            arms.append(arm)
            run = {"target": "a", "kind": arm.kind, "rate": 0.002}
            facts = {"trainable_parameters": 10, "optimizer_bytes": 80, "peak_added_bytes": None, "steps_without_gradient": 0}
            records.append((arm, {"status": "ok", "run": run, "training_seconds": STEPS[-1] * 0.1, "curve": curve, **facts}))
    about = {
        "settings": settings(seeds=seeds).model_dump(mode="json"),
        "base": {name: values.tolist() for name, values in base.items()},
        "bytes": {name: [BYTES] * counts[name] for name in names},
        "data": {"domains": list(names)},
        "model": {"name": "m"},
        "texts": "t",
        "versions": {},
        "paths": {},
        "skipped": [],
    }
    return about, records, masks or []
