"""What every training loop shares: the learning rate of a step, the log, and the state by which a killed run resumes."""

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
from torch import Tensor

from dbes.errors import DbesError
from dbes.files import is_sealed, read_bytes, refused_by_system, write_bytes


def learning_rate(step: int, *, peak: float, warmup: int, last: int, floor: float) -> float:
    """Learning rate of a step, counted from 0: linear up to the peak, then a cosine down to ``floor`` times the peak at step ``last``."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, last - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def finite(value: Any) -> Any:
    """JSON values whose numbers that are NaN or infinite are null, so that what is written stays strict JSON."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_log(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a log of JSON lines.

    Raises:
        FileError: it cannot be written.
    """
    with refused_by_system(path), path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(finite(record), allow_nan=False) + "\n")


def save_state(path: Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Write tensors and facts, with a checksum over both.

    Raises:
        FileError: it cannot be written.
    """
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(kept, facts | {"sha256": _digest(facts, kept)}))


def read_state(path: Path, *, identity: str, error: type[DbesError]) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """The facts and tensors of this very run; None where there is no file.

    Raises:
        error: the state of another run, or one that is damaged or cut short.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise damaged(path, "not a regular file", error)
    try:
        with safe_open(path, "pt") as state:
            facts = state.metadata() or {}
            checksum = facts.pop("sha256", None)
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as problem:
        raise damaged(path, f"it cannot be read: {problem}", error) from None
    # earlier versions of the testbed sealed the file's bytes
    if checksum != _digest(facts, tensors) and not is_sealed(read_bytes(path, error=error)):
        raise damaged(path, "its checksum does not fit its content", error)
    if facts.get("identity") != identity:
        raise error(f"{path.parent}: holds the state of another run (model, settings or data differ); choose another folder")
    return facts, tensors


def copy_state(path: Path, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], error: type[DbesError]) -> None:
    """Copy every tensor of a state into the run's own of the same name; nothing is changed when it is refused.

    Raises:
        error: other names, shapes or dtypes.
    """
    if tensors.keys() != into.keys():
        raise damaged(path, "its tensors are not those of this run", error)
    for name, value in tensors.items():
        if value.shape != into[name].shape or value.dtype != into[name].dtype:
            raise damaged(path, f"{name} has shape {tuple(value.shape)} and {value.dtype}, expected {tuple(into[name].shape)}", error)
    with torch.no_grad():
        for name, value in tensors.items():
            into[name].copy_(value)


def damaged(path: Path, why: str, error: type[DbesError]) -> DbesError:
    return error(f"{path}: this training state is damaged ({why}); delete it to train from the start, or choose another folder")


def _digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
