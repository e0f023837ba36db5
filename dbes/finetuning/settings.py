"""Settings of a run, from the command line and a file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dbes.errors import FinetuneError
from dbes.schema import read_named, told
from dbes.text import clipped

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
Positive = Annotated[int, Field(ge=1)]

PASSES = 4
"""Passes over the data of a run that is given neither steps nor epochs. Up to about four, repeated text is worth nearly as much as
new text; beyond, its worth decays fast (arXiv 2305.16264)."""

OPTIONS = ("steps", "lr", "protect")
"""Settings that `dbes finetune` has an option for; the others stand in the file of ``--config``."""


def _rate(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise ValueError("expected auto or a number above 0")


def _names(value: Any) -> Any:
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("expected a list of names")


class FinetuneSettings(BaseModel):
    """How to train.

    Attributes:
        steps, epochs: how long at most, one of them; a step is one update on ``batch_size`` sequences. Neither: ``PASSES`` epochs.
        lr: peak learning rate; linear warm-up over ``warmup`` of the steps, then a cosine down to a tenth. ``auto``: found by a
            range test (`dbes.finetuning.choice`).
        early_stopping: set part of the training texts apart, end when their loss has not fallen for ``patience`` checks, and keep
            the weights of the lowest one (`dbes.finetuning.validation`).
        micro_batch_size: sequences per forward; fewer save memory and change no result (gradients are accumulated).
        seq_len: tokens per sequence.
        packing: put plain texts one after the other; otherwise each is padded by itself.
        bf16: compute in bfloat16 where torch's autocast does; weights and optimizer stay as they are.
        lora_rank: train updates of this rank in place of the experts' matrices.
        protect: train updates that texts of other domains hardly feel, with this floor (`dbes.finetuning.protection`); None: do not.
        protect_domains: of which domains; empty: of all but the target.
        protect_tokens: of each of them.
        method: how chosen experts are told from the others (`dbes.finetuning.cells`).
        eval_every: measure the held-out texts every so many steps too; 0: before and after only. Nothing is chosen by them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    lr: Annotated[float | Literal["auto"], BeforeValidator(_rate)] = "auto"
    early_stopping: bool = True
    patience: Positive = 5
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
    protect_domains: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    protect_tokens: Positive = 16_384
    method: Literal["auto", "split_bank", "view_leaves"] = "auto"
    eval_every: Annotated[int, Field(ge=0)] = 0
    tracker: Tracker = "none"

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.protect is not None and (self.lora_rank is not None or self.method == "view_leaves" or self.train_router):
            raise ValueError("protect shapes whole experts in the split bank; it goes with no lora_rank, view_leaves or train_router")
        if self.protect_domains and self.protect is None:
            raise ValueError("protect_domains says what to protect; give protect too")
        return self

    def total_steps(self, samples: int) -> int:
        """Updates of the whole run over so many sequences, at most."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs if self.epochs is not None else PASSES) * samples / self.batch_size)

    def passes(self, steps: int, samples: int) -> float:
        """How often so many updates go through so many sequences."""
        return steps * self.batch_size / samples

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
        if not first["loc"]:
            raise FinetuneError(told(first)) from None
        field = str(first["loc"][0])
        name = f"--{field}" if field in OPTIONS else field
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = f"no such setting; there are {', '.join(FinetuneSettings.model_fields)}"
        raise FinetuneError(f"{clipped(name, 60)}: {what} (given: {clipped(repr(first['input']), 60)})") from None


def read_settings(path: str | Path | FinetuneSettings | None, **options: Any) -> FinetuneSettings:
    """Settings as they are or of a YAML file; an option that is not None stands above them.

    Raises:
        FinetuneError: the file cannot be read, is no mapping, or a setting is unknown or wrong.
    """
    missing = f"{path}: there is no such file of settings"
    content = path.model_dump(exclude_unset=True) if isinstance(path, FinetuneSettings) else {}
    if isinstance(path, str | Path):
        content = read_named(Path(path), error=FinetuneError, missing=missing)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return make_settings(**{name: _number(value) for name, value in content.items()} | given)
    except FinetuneError as problem:
        message = str(problem)
        if not isinstance(path, str | Path) or any(message.startswith(f"--{name}:") for name in given):
            raise
        raise FinetuneError(f"{path}: {message.removeprefix('--')}") from None


def _number(value: Any) -> Any:
    """The number in a text such as ``1e-3``, which YAML 1.1 takes for a word because it has no point."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}", value) else value
