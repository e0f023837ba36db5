"""What evaluating a model would take on this machine or on another, before anything is loaded: memory, engine, and about how long."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedModel

from dbes.errors import ModelError, SettingError
from dbes.evaluation.request import ENGINES, read_benchmark
from dbes.models.fitting import SMALLEST_BATCH, left, memory_at
from dbes.models.folder import find_folder, weight_files
from dbes.models.headers import stored_tensors
from dbes.models.load import load_config, load_tokenizer
from dbes.models.memory import Available
from dbes.models.needs import Needs, measure, skeleton_of
from dbes.models.windows import token_ids
from dbes.recording.units import UNIT_TOKENS
from dbes.shipped import located
from dbes.text import unknown
from dbes.wording import byte_count

Engine = Literal["memory", "streaming"]

TOKENS = 1_000_000
EFFICIENCY = 0.5
"""Of the speed of bare multiplications, what a model reaches: a 260 M OLMoE recorded 748 of the 1,320 tokens a second that they allow."""

DISK_SECONDS, DISK_BYTES, BLOCK = 1.0, 2**30, 8 * 2**20
"""A measurement of the disk reads for so long, or so much; the first is written where no checkpoint is there to be read."""

WRITTEN = 128 * 2**20
FLOPS_SECONDS = 0.5


@dataclass(frozen=True)
class EngineNeed:
    """Bytes of memory that each engine needs at least."""

    memory: int
    streaming: int


@dataclass(frozen=True)
class Choice:
    """An engine, and why it was taken, in words."""

    engine: Engine
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What evaluating a model takes.

    Attributes:
        dtypes: bytes that each engine needs, by dtype.
        dtype, choice: the dtype and engine that `dbes evaluate` would take; ``choice`` is None where nothing fits, ``reason`` says why.
        tokens: of the texts; units: how often the streaming engine reads the checkpoint for them.
        disk: bytes read in a second; flops: floating-point operations in a second.
        seconds: about how long each engine takes.
    """

    model: str
    needs: Needs
    available: Available
    dtypes: Mapping[str, EngineNeed]
    dtype: str
    choice: Choice | None
    reason: str
    tokens: int
    units: int
    disk: float
    flops: float
    seconds: Mapping[Engine, float]


def choose_engine(need: EngineNeed, available: Available, asked: str = "auto") -> Choice:
    """The engine for a model: the one that was asked for, or memory where the model fits, else streaming.

    Raises:
        SettingError: there is no such engine.
        ModelError: what was asked for does not fit, or nothing does.
    """
    if asked not in ENGINES:
        raise SettingError(unknown("engine", asked, ENGINES))
    resident, streamed = need.memory <= available.bytes, need.streaming <= available.bytes
    if asked == "memory" and not resident:
        other = f"; use --engine streaming, which needs {byte_count(need.streaming)}" if streamed else ""
        raise ModelError(f"the model needs {byte_count(need.memory)} of memory, and {left(available)}{other}")
    if asked != "memory" and not streamed and (asked == "streaming" or not resident):
        raise ModelError(f"even layer by layer the model needs {byte_count(need.streaming)} of memory, and {left(available)}")
    if asked != "auto":
        return Choice("memory" if asked == "memory" else "streaming", "asked for")
    if resident:
        return Choice("memory", f"{byte_count(need.memory)} fit into the {byte_count(available.bytes)} that are left by {available.limit}")
    return Choice("streaming", f"{byte_count(need.memory)} do not fit: {left(available)}")


def read_needs(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Needs]:
    """The model of a folder or hub id without weights, and what it needs; of the hub only config and headers are downloaded.

    Raises:
        ModelError: they cannot be read; not a Mixture-of-Experts model; a model that cannot be built without memory.
    """
    where = located(model)[0]
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = skeleton_of(where, config, trust_remote_code=trust_remote_code)
    if skeleton is None:
        raise ModelError(f"{where}: its own code cannot build it without weights, so what it needs is not known before it is loaded")
    return skeleton, measure(skeleton, config, stored_tensors(where, revision=revision))


def count_tokens(model: str, tasks: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Tokens of a task's texts, by the model's tokenizer, without special tokens.

    Raises:
        TaskError, ModelError: the task or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(located(model)[0], revision=revision, trust_remote_code=trust_remote_code)
    documents = read_benchmark(tasks).documents
    return sum(map(len, token_ids(tokenizer, [each.text for each in documents], names=lambda place: f"document {documents[place].id!r}")))


def plan(
    needs: Needs,
    *,
    model: str,
    tokens: int = TOKENS,
    available: Available | None = None,
    disk: float | None = None,
    flops: float | None = None,
) -> Plan:
    """What evaluating so many tokens takes.

    Args:
        available: memory of another machine; disk, flops: its speeds. What is not given is that of this machine, measured in a second.
    """
    available = available or memory_at(None, mapped=needs.files or 0)
    if available is None:
        raise ModelError(f"{model}: torch does not say how much memory the accelerators here have; give --memory")
    dtypes = {
        dtype: EngineNeed(needs.memory(dtype, tokens=SMALLEST_BATCH), needs.streaming(dtype, tokens=SMALLEST_BATCH))
        for dtype in ("float32", "bfloat16")
    }
    dtype, choice, reason = _chosen(dtypes, available, own=needs.dtype)
    disk = disk or measure_disk(model)
    flops = flops or measure_flops(needs, dtype)
    return Plan(
        model=model,
        needs=needs,
        available=available,
        dtypes=dtypes,
        dtype=dtype,
        choice=choice,
        reason=reason,
        tokens=tokens,
        units=units_of(tokens),
        disk=disk,
        flops=flops,
        seconds=seconds_of(needs, dtype=dtype, tokens=tokens, disk=disk, flops=flops),
    )


def seconds_of(needs: Needs, *, dtype: str, tokens: int, disk: float, flops: float) -> dict[Engine, float]:
    """About how long each engine takes: reading the checkpoint at ``disk`` bytes a second, and computing at ``flops`` a second.

    Computing is two operations for each weight that a token passes in the decoder layers; neither embedding nor head is multiplied.
    """
    read = (needs.files or needs.weights[dtype]) / disk
    computed = tokens * 2.0 * (needs.active - needs.embedding) / (flops * EFFICIENCY)
    # a layer is read while the one before it computes, so the slower of the two counts
    return {"memory": read + computed, "streaming": max(units_of(tokens) * read, computed)}


def units_of(tokens: int) -> int:
    """How often the streaming engine reads the checkpoint."""
    return math.ceil(tokens / UNIT_TOKENS)


def _chosen(dtypes: Mapping[str, EngineNeed], available: Available, *, own: str) -> tuple[str, Choice | None, str]:
    """(dtype, engine, why): float32 in memory, else bfloat16 in memory, else streaming; on an accelerator the checkpoint's own dtype."""
    wanted = (own,) if torch.accelerator.is_available() and own in dtypes else tuple(dtypes)
    problem = ""
    for engine in ("memory", "streaming"):
        for dtype in wanted:
            try:
                choose_engine(dtypes[dtype], available, engine)
            except ModelError as refused:
                problem = str(refused)
                continue
            choice = choose_engine(dtypes[dtype], available)
            return dtype, choice, choice.reason
    return wanted[-1], None, problem


def measure_flops(needs: Needs, dtype: str) -> float:
    """Floating-point operations a second of multiplications as experts make them: a batch's rows of one expert, by its matrices."""
    layer = max(needs.layers, key=lambda each: each.experts)
    rows = max(8, SMALLEST_BATCH * layer.top_k // layer.experts)
    width = max(16, layer.expert_parameters // (3 * needs.hidden))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    place = {"dtype": getattr(torch, dtype), "device": device or "cpu"}
    inputs, weights = torch.ones(rows, needs.hidden, **place), [torch.ones(needs.hidden, width, **place) for _ in range(8)]
    done, best, began = 0, 0.0, time.perf_counter()
    while done < 3 or time.perf_counter() - began < FLOPS_SECONDS:
        started = time.perf_counter()
        for weight in weights:
            torch.mm(inputs, weight)
        if device is not None:
            torch.accelerator.synchronize()
        best = max(best, 2.0 * len(weights) * rows * needs.hidden * width / (time.perf_counter() - started))
        done += 1
    return best


def measure_disk(model: str) -> float:
    """Bytes a second that the disk of a checkpoint gives, from the disk and not from memory as far as the system allows."""
    folder = find_folder(located(model)[0])
    if folder is not None:
        return _read_speed(max(weight_files(folder), key=lambda path: path.stat().st_size))
    cache = Path(HF_HUB_CACHE)
    near = next(path for path in (cache, *cache.parents) if path.is_dir() and os.access(path, os.W_OK))
    with tempfile.NamedTemporaryFile(dir=near) as file:
        for _ in range(WRITTEN // BLOCK):
            file.write(os.urandom(BLOCK))
        file.flush()
        os.fsync(file.fileno())
        return _read_speed(Path(file.name))


def _read_speed(path: Path) -> float:
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        block, read, began = bytearray(BLOCK), 0, time.perf_counter()
        while read < DISK_BYTES and time.perf_counter() - began < DISK_SECONDS and (got := file.readinto(block)):
            read += got
        return max(1, read) / max(1e-9, time.perf_counter() - began)
