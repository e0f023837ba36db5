"""Whether a model fits in the memory that is left, asked before any of its weights is read."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dbes.errors import ModelError
from dbes.models.memory import Available, available_memory, device_memory
from dbes.models.needs import Needs
from dbes.wording import byte_count

notes = logging.getLogger("dbes")

SMALLEST_BATCH = 1_024
"""Tokens of the smallest batch that a recording must be able to run: one window."""

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps by which accelerate spreads a model over the accelerators, and over the host's memory where these do not suffice."""


class TooLargeError(ModelError):
    """A model does not fit in the memory that is left."""


def memory_at(device_map: Any, *, mapped: int = 0) -> Available | None:
    """What is left where a device map puts the weights; None where that cannot be told (a map of modules).

    Args:
        mapped: see `available_memory`.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            return None
        device_map = device_map[""]
    accelerated = torch.accelerator.is_available()
    if device_map is None:
        device_map = "auto" if accelerated else "cpu"
    if device_map in SPREAD:
        host = available_memory(mapped=mapped)
        parts = [device_memory(torch.device(place)) for place in range(torch.accelerator.device_count())] if accelerated else []
        if not parts or None in parts:
            return None if parts else host
        total = host.bytes + sum(part.bytes for part in parts if part is not None)
        return Available(total, f"the memory of {len(parts)} accelerators and of the host, with {host.limit}")
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError):
        return None  # told by the load
    return available_memory(mapped=mapped) if device.type == "cpu" else device_memory(device)


def choose_dtype(where: str, needs: Needs, *, asked: str, device_map: Any = None, layerwise: bool = False) -> tuple[str, tuple[str, ...]]:
    """The dtype to load a model in, and notes for the result.

    "auto" on a CPU is float32, or bfloat16 where only that fits; on an accelerator it stays "auto".

    Args:
        layerwise: layers are read one at a time; whether that fits is told by the engine, which knows its batches.

    Raises:
        TooLargeError: it does not fit; says what is needed, what is left and by which limit, and what to do.
    """
    available = memory_at(device_map, mapped=needs.files or 0)
    automatic = asked == "auto" and not torch.accelerator.is_available()
    wanted = ("float32", "bfloat16") if automatic else (needs.dtype if asked == "auto" else asked,)
    if available is None or wanted[0] not in needs.weights:
        return asked, ()
    needed = needs.streaming if layerwise else needs.memory
    for dtype in wanted:
        if needed(dtype, tokens=SMALLEST_BATCH) > available.bytes and not (layerwise and dtype == wanted[-1]):
            continue
        if dtype == wanted[0]:
            return asked, ()
        taken = (
            f"loaded in {dtype}: {wanted[0]} needs {byte_count(needed(wanted[0], tokens=SMALLEST_BATCH))} of memory, "
            f"and {left(available)}; the experts of 2-3 % of tokens may differ from {wanted[0]}"
        )
        notes.warning("%s: %s", where, taken)
        return dtype, (taken,)
    raise TooLargeError(refusal_of(where, needs, dtype=wanted[-1], available=available, device_map=device_map))


def refusal_of(where: str, needs: Needs, *, dtype: str, available: Available, device_map: Any = None) -> str:
    """Why a model is not loaded, in one line: what it needs, what is left by which limit, and what to do."""
    needed, advice = byte_count(needs.memory(dtype, tokens=SMALLEST_BATCH)), []
    if (streaming := needs.streaming(dtype, tokens=SMALLEST_BATCH)) <= available.bytes:
        advice.append(f"--engine streaming, which needs {byte_count(streaming)}")
    if (narrow := needs.memory("bfloat16", tokens=SMALLEST_BATCH)) <= available.bytes:
        advice.append(f"--dtype bfloat16, which needs {byte_count(narrow)}")
    if device_map is not None and device_map not in SPREAD and torch.accelerator.is_available():
        advice.append("--device-map auto, which takes the memory of the host too")
    return (
        f"{where}: does not fit in memory, so it was not loaded: {needed} are needed in {dtype} (weights "
        f"{byte_count(needs.weights[dtype])}), {left(available)}; use {' or '.join(advice) or 'a machine with more memory'}"
    )


def left(available: Available) -> str:
    """``23.1 GB are left by the memory of this machine``."""
    return f"{byte_count(available.bytes)} are left by {available.limit}"
