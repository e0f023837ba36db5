"""The resumable state of a run on disk: leaves, moments of the optimizer, and the step they belong to; and the log beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.files import write_bytes

STATE, LOG = "training.safetensors", "train.jsonl"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    identity: str,
    step: int,
    seconds: float,
    leaves: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: dict[str, Tensor],
    notes: str,
) -> None:
    """Write the state with which step number ``step`` begins.

    Args:
        kept: the leaves of the lowest validation loss so far, or none.
        notes: what the run has found so far.
    """
    tensors = {f"kept {name}": value for name, value in kept.items()} | {f"leaf {name}": leaf.detach() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        tensors |= {f"{moment} {name}": torch.as_tensor(optimizer.state[leaf][moment]) for moment in _MOMENTS}
    metadata = {"identity": identity, "step": str(step), "seconds": str(round(seconds, 1)), "notes": notes}
    write_bytes(folder / STATE, save({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata))


def load_state(
    folder: Path, identity: str, leaves: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, kept: dict[str, Tensor]
) -> tuple[int, float, str]:
    """(step to resume at, seconds spent so far, notes); (0, 0, "") when there is no state.

    Raises:
        FinetuneError: the folder holds the state of another run.
    """
    path = folder / STATE
    if not path.is_file():
        return 0, 0.0, ""
    with safe_open(path, "pt") as state:
        metadata = state.metadata() or {}
        if metadata.get("identity") != identity:
            raise FinetuneError(f"{folder}: holds the state of another run (model, path, data or settings differ); choose another folder")
        with torch.no_grad():
            for name, value in kept.items():
                value.copy_(state.get_tensor(f"kept {name}"))
            for name, leaf in leaves.items():
                leaf.copy_(state.get_tensor(f"leaf {name}"))
                for moment in _MOMENTS:
                    optimizer.state[leaf][moment].copy_(state.get_tensor(f"{moment} {name}"))
        return int(metadata["step"]), float(metadata["seconds"]), metadata["notes"]


def append_log(folder: Path, record: dict[str, Any]) -> None:
    """Add a record; numbers that are none become null, so that the log stays strict JSON."""
    clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(clean, allow_nan=False) + "\n")
