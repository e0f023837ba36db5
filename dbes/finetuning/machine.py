"""What the machine does not allow: models cut into shards, and more memory than there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbes.errors import FinetuneError, out_of_memory

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")
"""What accelerate calls ways to spread one model over processes."""


def refuse_sharding(accelerator: Any = None) -> None:
    """Raises FinetuneError under FSDP, DeepSpeed and the like: they cut the fused tensors whose rows are trained.

    Without an accelerator, by what `accelerate launch` put into the environment: making one would start the sharding already.
    """
    kind = next((name for name in SHARDING if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true")), None)
    if accelerator is not None and kind is None:
        given = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        kind = given if given in SHARDING else None
    if kind is not None:
        raise FinetuneError(
            f"{kind} cuts the fused tensors of the experts into shards, and single experts cannot be trained in shards; "
            "use accelerate's plain multi-process mode, in which every process holds the model"
        )


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turns running out of memory into a FinetuneError that names the remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if (reason := out_of_memory(problem)) is None:
            raise
        raise FinetuneError(
            f"out of memory ({reason.partition(': ')[2] or type(problem).__name__}). In this order, in the file of --config: "
            "micro_batch_size: 1, gradient_checkpointing: true, "
            "a shorter seq_len, bf16: true, a lora_rank; or a path with a smaller budget"
        ) from problem


def status_bytes(name: str) -> int | None:
    """A line of what Linux says of this process's memory (``VmRSS``: now, ``VmHWM``: at most); None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text("ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
