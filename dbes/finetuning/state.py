"""What the state of a run on disk holds: leaves, moments of the optimizer, the best leaves so far, and the step they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.models.training import copy_state, damaged, read_state

STATE, LOG = "training.safetensors", "train.jsonl"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def state_tensors(leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The run's own tensors by name, so that copying into them resumes it.

    Args:
        kept: the leaves of the lowest validation loss so far, or none.
    """
    found = {f"kept {name}": value for name, value in kept.items()}
    found |= {f"leaf {name}": leaf.detach() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        found |= {f"{moment} {name}": torch.as_tensor(optimizer.state[leaf][moment]) for moment in _MOMENTS}
    return found


def load_state(folder: Path, identity: str, tensors: Mapping[str, Tensor], *, steps: int) -> tuple[int, float, str]:
    """(step to resume at, seconds spent so far, notes); (0, 0, "") when there is no state. Nothing is changed when it is refused.

    Args:
        tensors: what is copied into, see `state_tensors`.
        steps: of the whole run, at most.

    Raises:
        FinetuneError: the folder holds the state of another run, or one that is damaged or cut short.
    """
    path = folder / STATE
    read = read_state(path, identity=identity, error=FinetuneError)
    if read is None:
        return 0, 0.0, ""
    facts, found = read
    try:
        step, seconds, notes = int(facts["step"]), float(facts["seconds"]), facts["notes"]
    except (ValueError, KeyError) as problem:
        raise damaged(path, f"it cannot be read: {problem}", FinetuneError) from None
    if not 0 <= step <= steps or not 0 <= seconds < math.inf:
        raise damaged(path, f"step {step} of {steps} after {seconds} s", FinetuneError)
    if odd := [name for name, value in found.items() if not bool(value.isfinite().all())]:
        raise damaged(path, f"{odd[0]} has values that are not finite", FinetuneError)
    copy_state(path, found, tensors, FinetuneError)
    return step, seconds, notes
