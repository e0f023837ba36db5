"""One model by a settings file, as a plain Hugging Face checkpoint: ``dbes testbed train --config FILE``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dbes.errors import MixError
from dbes.files import write_json, write_text
from dbes.testbed.heldout import measure
from dbes.testbed.mixes import prepare_mix
from dbes.testbed.settings import TrainSettings, read_settings
from dbes.testbed.training import train

PLAIN_ROUTERS = ("learned", "frozen", "rerandomised")
"""Routers that are nothing but weights, so that a checkpoint holds them."""


def train_checkpoint(
    config: Path,
    out: Path,
    *,
    mix: str = "embedded",
    cache: Path = Path("build/testbed"),
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train by the settings of a YAML file and write a checkpoint that plain transformers (and ``dbes evaluate``) reads.

    Beside it: ``training.json`` (settings, data hash, held-out losses) and the log. The state below ``state/`` lets a killed run
    go on; it can be removed afterwards.

    Raises:
        MixError: the settings are wrong, or their router would not be part of a plain checkpoint.
        TrainingError: the loss is no number; the log is kept.
    """
    settings = read_settings(config)
    refuse_lost_routing(settings, where=str(config))
    prepared = prepare_mix(mix, vocabulary=settings.model.vocabulary, max_positions=settings.model.max_positions, cache=cache)
    accelerator = accelerator_of_launch()
    trained = train(settings, prepared.mix, folder=out / "state", accelerator=accelerator, progress=progress)
    if accelerator is not None:
        trained.model.cpu()
        if not accelerator.is_main_process:
            return out
    chosen = prepared.mix.only(settings.mix.domains)
    heldout = measure(trained.model, chosen, routing=settings.routing, seed=settings.seed, step=settings.optimizer.steps)
    nn.Module.bfloat16(trained.model)  # in place
    trained.model.save_pretrained(out)
    prepared.tokenizer.save_pretrained(out)
    write_text(out / "training_log.jsonl", (out / "state" / "log.jsonl").read_text("utf-8"))
    write_json(
        out / "training.json",
        {
            "settings": settings.model_dump(mode="json"),
            "identity": settings.identity(prepared.mix.digest),
            "mix": mix,
            "mix_digest": prepared.mix.digest,
            "cpu_seconds": round(trained.cpu_seconds),
            "heldout_bits_per_byte": dict(zip(chosen.domains, np.round(heldout.bits_per_byte, 4).tolist(), strict=True)),
        },
    )
    return out


def accelerator_of_launch() -> Any:
    """An accelerator where this process was started by ``accelerate launch`` or has a GPU; None for one process on a CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available():
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def refuse_lost_routing(settings: TrainSettings, *, where: str) -> None:
    """Refuse, before any training, what a plain checkpoint would silently lose.

    Raises:
        MixError: a prescribed router, or a loss-free bias on an architecture that has no place for it.
    """
    if settings.routing.router not in PLAIN_ROUTERS:
        raise MixError(
            f"{where}: routing.router: a {settings.routing.router} router is not part of a plain checkpoint, which would be evaluated "
            f"without it; expected one of {', '.join(PLAIN_ROUTERS)}, or compare it in `dbes testbed run`"
        )
    if settings.routing.balancing == "loss_free" and settings.model.architecture == "olmoe":
        raise MixError(
            f"{where}: routing.balancing: OLMoE has no place for the loss-free bias, a checkpoint would lose it; "
            "set model.architecture to deepseek_v3"
        )
