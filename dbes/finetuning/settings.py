"""Settings of a run, and the learning rate they give at every step."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dbes.errors import FinetuneError

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
Positive = Annotated[int, Field(ge=1)]


class FinetuneSettings(BaseModel):
    """How to train.

    Attributes:
        steps, epochs: one of them; a step is one update on ``batch_size`` sequences.
        lr: peak learning rate; linear warm-up over ``warmup`` of the steps, then a cosine down to a tenth.
        micro_batch_size: sequences per forward; fewer save memory and change no result (gradients are accumulated).
        seq_len: tokens per sequence.
        packing: put plain texts one after the other; otherwise each is padded by itself.
        bf16: compute in bfloat16 where torch's autocast does; weights and optimizer stay as they are.
        lora_rank: train updates of this rank in place of the experts' matrices.
        protect: train updates that texts of other domains hardly feel, with this floor (`dbes.finetuning.protection`); None: do not.
        protect_domains: of which domains; empty: of all but the target.
        protect_tokens: of each of them.
        method: how chosen experts are told from the others (`dbes.finetuning.cells`).
        eval_every: measure the held-out texts every so many steps too; 0: before and after only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = 8
    micro_batch_size: Positive | None = None
    seq_len: Annotated[int, Field(ge=2)] = 512
    packing: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora_rank: Positive | None = None
    train_router: bool = False
    protect: Annotated[float, Field(gt=0)] | None = None
    protect_domains: tuple[str, ...] = ()
    protect_tokens: Positive = 16_384
    method: Literal["auto", "split_bank", "view_leaves"] = "auto"
    eval_every: Annotated[int, Field(ge=0)] = 0
    tracker: Tracker = "none"

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of them")
        if self.protect is not None and (self.lora_rank is not None or self.method == "view_leaves" or self.train_router):
            raise ValueError("--protect shapes whole experts in the split bank; it goes with no --lora-rank, view_leaves or --train-router")
        if self.protect_domains and self.protect is None:
            raise ValueError("--protect-domains says what to protect; give --protect too")
        return self

    def total_steps(self, samples: int) -> int:
        """Updates of the whole run over so many sequences."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 0) * samples / self.batch_size)

    def identity(self, *facts: object) -> str:
        """A hash equal only for equal settings and facts; left out is what changes weights by no more than the order of sums."""
        content = self.model_dump(mode="json", exclude={"tracker", "eval_every", "micro_batch_size", "gradient_checkpointing"})
        return hashlib.sha256(json.dumps([content, facts], sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_settings(**values: Any) -> FinetuneSettings:
    """Settings from plain values; raises FinetuneError naming the first one that is wrong."""
    try:
        return FinetuneSettings(**values)
    except ValidationError as problem:
        first = problem.errors()[0]
        field = ".".join(map(str, first["loc"])).replace("_", "-")
        given = f" (given: {first['input']!r})" if field else ""
        raise FinetuneError(f"{'--' + field + ': ' if field else ''}{first['msg'].removeprefix('Value error, ')}{given}") from None


def learning_rate(settings: FinetuneSettings, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0, of a run of so many."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
