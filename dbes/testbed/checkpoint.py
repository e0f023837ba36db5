"""One model by a settings file, as a plain Hugging Face checkpoint: ``dbes testbed train --config FILE``.

With ``prescribed`` also a model of the reference router, whose checkpoint is not plain: its weights are those of a stock
architecture, but which experts a token may use follows from the domain of its text, which plain transformers does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dbes.errors import MixError
from dbes.files import check_writable, discard, locked, refused_by_system, sha256_of, write_json, write_text
from dbes.schema import read_json
from dbes.testbed.heldout import measure
from dbes.testbed.mixes import Prepared, prepare_mix
from dbes.testbed.settings import TrainSettings, read_settings
from dbes.testbed.training import TrainingError, train

PLAIN_ROUTERS = ("learned", "frozen", "rerandomised")
"""Routers that are nothing but weights, so that a checkpoint holds them."""

PRESCRIBED_ROUTERS = ("reference",)
"""Routers that need the domain of a text besides the weights; a checkpoint of one is written when it is asked for."""

TRAINING = "training.json"
WRITTEN = ("config.json", "generation_config.json", "*.safetensors*", "tokenizer*", "special_tokens_map.json", "training_log.jsonl")
"""What is written of a checkpoint, besides ``training.json``."""


def train_checkpoint(
    config: Path,
    out: Path,
    *,
    mix: str = "embedded",
    cache: Path = Path("build/testbed"),
    prescribed: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train by the settings of a YAML file and write a checkpoint that plain transformers (and ``dbes evaluate``) reads.

    Beside it: ``training.json`` (settings, data hash, held-out losses, sha256 of the other files; written last) and the log. The
    state below ``state/`` lets a killed run resume and is removed at the end. A finished checkpoint is not trained again.

    Args:
        prescribed: allow the reference router. Plain transformers (and ``dbes evaluate``) route such a checkpoint by its own
            router over all experts, not as it was trained; ``dbes.testbed.prescribed`` routes it as it was trained, from what
            ``training.json`` then holds under ``prescribed``: the router and the domains in the order of their expert blocks.

    Raises:
        MixError: the settings are wrong, or their router would not be part of a plain checkpoint.
        TrainingError: the loss is not a number, and the log is kept; or the folder holds another checkpoint.
        FileError: the folder cannot be written to, or another run is writing there.
    """
    settings = read_settings(config)
    refuse_lost_routing(settings, where=str(config), prescribed=prescribed)
    if not (out / TRAINING).is_file():
        check_writable(out / TRAINING)
    prepared = prepare_mix(mix, vocabulary=settings.model.vocabulary, max_positions=settings.model.max_positions, cache=cache)
    identity = settings.identity(prepared.mix.digest)
    if is_finished(out, identity):
        return out
    accelerator = accelerator_of_launch()
    if accelerator is not None and not accelerator.is_main_process:
        return _train(settings, prepared, out, mix=mix, accelerator=accelerator, progress=progress)
    with locked(out):
        return _train(settings, prepared, out, mix=mix, accelerator=accelerator, progress=progress)


def is_finished(out: Path, identity: str) -> bool:
    """Whether a folder holds the checkpoint of this identity, with all its files as they were written.

    Raises:
        TrainingError: it holds another one.
    """
    if not (out / TRAINING).is_file():
        return False
    about = read_json(out / TRAINING, error=TrainingError)
    if not isinstance(about, dict) or about.get("identity") != identity:
        raise TrainingError(f"{out}: holds a checkpoint of other settings or another mix; choose another folder")
    files = about.get("files")
    if not isinstance(files, dict):
        return False
    return all((out / str(name)).is_file() and sha256_of(out / str(name)) == digest for name, digest in files.items())


def _train(
    settings: TrainSettings, prepared: Prepared, out: Path, *, mix: str, accelerator: Any, progress: Callable[[dict[str, Any]], None] | None
) -> Path:
    trained = train(settings, prepared.mix, folder=out / "state", accelerator=accelerator, progress=progress)
    if accelerator is not None:
        trained.model.cpu()
        if not accelerator.is_main_process:
            return out
    chosen = prepared.mix.only(settings.mix.domains)
    heldout = measure(trained.model, chosen, routing=settings.routing, seed=settings.seed, step=settings.optimizer.steps)
    nn.Module.bfloat16(trained.model)  # in place
    discard(out / TRAINING)
    with refused_by_system(out):
        trained.model.save_pretrained(out)
        prepared.tokenizer.save_pretrained(out)
    write_text(out / "training_log.jsonl", (out / "state" / "log.jsonl").read_text("utf-8"))
    facts: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "identity": settings.identity(prepared.mix.digest),
        "mix": mix,
        "mix_digest": prepared.mix.digest,
        "cpu_seconds": round(trained.cpu_seconds),
        "heldout_bits_per_byte": dict(zip(chosen.domains, np.round(heldout.bits_per_byte, 4).tolist(), strict=True)),
    }
    if settings.routing.router in PRESCRIBED_ROUTERS:
        # settings without named domains mean all of the mix: their order must not depend on a mix that may change
        facts["prescribed"] = {"router": settings.routing.router, "domains": list(chosen.domains)}
    facts["files"] = {path.name: sha256_of(path) for pattern in WRITTEN for path in sorted(out.glob(pattern)) if path.is_file()}
    write_json(out / TRAINING, facts)
    discard(out / "state")
    return out


def accelerator_of_launch() -> Any:
    """An accelerator where this process was started by ``accelerate launch`` or has a GPU; None for one process on a CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available():
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def refuse_lost_routing(settings: TrainSettings, *, where: str, prescribed: bool = False) -> None:
    """Refuse, before any training, what a plain checkpoint would silently lose.

    Args:
        prescribed: the user knows that a reference router is lost, and asked for its weights nevertheless.

    Raises:
        MixError: a router that is no weights (of these ``prescribed`` allows the reference router only), ``prescribed`` for a
            router that is weights, or a loss-free bias on an architecture that has no place for it.
    """
    router = settings.routing.router
    if prescribed and router not in PRESCRIBED_ROUTERS:
        raise MixError(
            f"{where}: routing.router: --prescribed is for the {' or '.join(PRESCRIBED_ROUTERS)} router, whose experts are prescribed by "
            f"domain, got {router}; train without it, or compare the router in `dbes testbed run`"
        )
    if router not in PLAIN_ROUTERS and not prescribed:
        hint = " or, to be routed by domain only, train it with --prescribed" if router in PRESCRIBED_ROUTERS else ""
        raise MixError(
            f"{where}: routing.router: a {router} router is not part of a plain checkpoint, which would be evaluated "
            f"without it; expected one of {', '.join(PLAIN_ROUTERS)}, or compare it in `dbes testbed run`{hint}"
        )
    if settings.routing.balancing == "loss_free" and settings.model.architecture == "olmoe":
        raise MixError(
            f"{where}: routing.balancing: OLMoE has no place for the loss-free bias, a checkpoint would lose it; "
            "set model.architecture to deepseek_v3"
        )
