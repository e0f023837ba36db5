"""Specialization while a model trains: a callback for transformers' Trainer that leaves the training as it would have been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import unwrap_model

from dbes.errors import SettingError
from dbes.evaluation.pipeline import evaluate
from dbes.results import Result
from dbes.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpecializationCallback(TrainerCallback):
    """Evaluates the model every so many steps, and at the end.

    The result of step N lies in ``<output_path>/step-N/``. Score, its interval, the excess over the random routers and the score of every
    domain are logged under ``specialization/``: by ``trainer.log``, and so to its trackers, after ``attach(trainer)``, else to the
    ``log_history`` of the trainer's state. Random numbers, modes, gradients and weights are left as they were, so that the training takes
    the steps that it would have taken.

    Args:
        tokenizer: of the model.
        tasks: a small task: the training waits for it.
        every: steps.
        output_path: folder of the results.
        options: further arguments of `dbes.evaluate` (``limit``, ``permutations``, ...).

    Raises:
        SettingError: fewer than one step.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, tasks: str | Path | Task = "smoke", every: int = 100,
        output_path: str | Path = "specialization", **options: Any,
    ) -> None:  # fmt: skip
        if every < 1:
            raise SettingError(f"every: expected at least 1 step, got {every}")
        self.tokenizer, self.tasks, self.every, self.output_path, self.options = tokenizer, tasks, every, Path(output_path), options
        self.results: dict[int, Result] = {}
        self._trainer: Trainer | None = None
        self._untold: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> None:
        """Log through this trainer."""
        self._trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._tell(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:  # noqa: ARG002
        if state.global_step % self.every == 0:
            self._measure(state, given["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:  # noqa: ARG002
        self._measure(state, given["model"])
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        """Log what was measured at the end of the last step, once the trainer has logged its own, which a log in between would replace."""
        values, self._untold = self._untold, {}
        if values and self._trainer is not None:
            self._trainer.log(values)
        elif values:
            state.log_history.append({**values, "step": state.global_step})

    def _measure(self, state: TrainerState, model: Any) -> None:
        step = state.global_step
        if step in self.results or not state.is_world_process_zero:
            return
        with random_numbers_kept():
            found = evaluate(
                cast("Any", unwrap_model(model)), tokenizer=self.tokenizer, tasks=self.tasks, output_path=self.output_path,
                name=f"step-{step}", overwrite=True, **self.options,
            )  # fmt: skip
        assert isinstance(found, Result)
        self.results[step] = found
        self._untold = values_of(found)


def values_of(result: Result) -> dict[str, float]:
    """What is logged of a result; without what is unknown."""
    record = result.record("specialization")
    values = {"score": record.score, "score_low": record.score_low, "score_high": record.score_high, "excess": record.excess}
    values |= {domain: result.record("specialization", domain=domain).score for domain in result.task.domains}
    return {f"specialization/{name}": float(value) for name, value in values.items() if not np.isnan(value)}


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Python, numpy and torch go on after the block with the numbers that they would have drawn without it."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 (what the training draws from)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
