"""The resumable state of a run on disk: leaves, moments of the optimizer, and the step they belong to; and the log beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.files import refused_by_system, write_bytes

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

    Raises:
        FileError: it cannot be written.
    """
    tensors = {name: value.cpu().contiguous() for name, value in _tensors(leaves, optimizer, kept).items()}
    metadata = {"identity": identity, "step": str(step), "seconds": str(round(seconds, 1)), "notes": notes}
    write_bytes(folder / STATE, save(tensors, metadata | {"sha256": _digest(metadata, tensors)}))


def load_state(
    folder: Path,
    identity: str,
    leaves: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: dict[str, Tensor],
    *,
    steps: int,
) -> tuple[int, float, str]:
    """(step to resume at, seconds spent so far, notes); (0, 0, "") when there is no state. Nothing is changed when it is refused.

    Args:
        steps: of the whole run, at most.

    Raises:
        FinetuneError: the folder holds the state of another run, or one that is damaged or cut short.
    """
    path = folder / STATE
    if not path.exists():
        return 0, 0.0, ""
    if not path.is_file():
        raise _damaged(path, "no regular file")
    try:
        with safe_open(path, "pt") as state:
            metadata = state.metadata() or {}
            if metadata.get("identity") != identity:
                raise FinetuneError(
                    f"{folder}: holds the state of another run (model, path, data or settings differ); choose another folder"
                )
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        checksum = metadata.pop("sha256", None)
        step, seconds, notes = int(metadata["step"]), float(metadata["seconds"]), metadata["notes"]
    except (SafetensorError, OSError, ValueError, KeyError) as problem:
        raise _damaged(path, f"it cannot be read: {problem}") from None
    wanted = _tensors(leaves, optimizer, kept)
    if checksum != _digest(metadata, tensors):
        raise _damaged(path, "its checksum does not fit its content")
    if tensors.keys() != wanted.keys():
        raise _damaged(path, "its tensors are not those of this run")
    if not 0 <= step <= steps or not 0 <= seconds < math.inf:
        raise _damaged(path, f"step {step} of {steps} after {seconds} s")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape or value.dtype != wanted[name].dtype:
            raise _damaged(path, f"{name} has shape {tuple(value.shape)} and {value.dtype}, expected {tuple(wanted[name].shape)}")
        if not bool(value.isfinite().all()):
            raise _damaged(path, f"{name} has values that are not finite")
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    return step, seconds, notes


def append_log(folder: Path, record: dict[str, Any]) -> None:
    """Add a record; numbers that are none become null, so that the log stays strict JSON.

    Raises:
        FileError: it cannot be written.
    """
    clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
    with refused_by_system(folder / LOG), (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(clean, allow_nan=False) + "\n")


def _tensors(leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything a state holds, by name; the run's own tensors, so that copying into them resumes it."""
    found: dict[str, Tensor] = {f"kept {name}": value for name, value in kept.items()}
    found |= {f"leaf {name}": leaf.detach() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        found |= {f"{moment} {name}": torch.as_tensor(optimizer.state[leaf][moment]) for moment in _MOMENTS}
    return found


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> FinetuneError:
    return FinetuneError(
        f"{path}: this training state is damaged ({why}); delete it to train from the start, or choose another --out folder"
    )
