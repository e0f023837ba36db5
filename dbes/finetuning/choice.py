"""What a run found on validation text: its learning rate, and the step whose weights it keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from dbes.finetuning.validation import best_step
from dbes.schema import Strict

Source = Literal["given", "range test", "fallback"]


class Trial(Strict):
    """One learning rate that was tried.

    Attributes:
        loss: on validation text after the trial, nats per token; None where it diverged.
    """

    lr: float
    loss: float | None


class Choice(Strict):
    """What was chosen, by which losses.

    Attributes:
        lr: peak learning rate of the run; source: given by the user, found by a range test, or the one for too little text.
        trials: of the range test, in their order, each of ``trial_steps`` updates; search_seconds: all of them, part of the run's.
        validation_sequences: set apart from the training text to choose by.
        check_every: updates between two checks; 0: the run did not stop early.
        losses: (updates, validation loss in nats per token).
        best_step: updates after which the loss was lowest; these weights were kept. The last step of a run without checks.
        stopped: because the loss did not fall any more, or because all steps were made.
    """

    lr: float
    source: Source
    trials: tuple[Trial, ...]
    trial_steps: int
    search_seconds: float
    validation_sequences: int
    check_every: int
    losses: tuple[tuple[int, float], ...]
    best_step: int
    stopped: Literal["stalled", "all steps made"]


class Found(BaseModel):
    """What a run has found so far; kept in its state on disk. Fields as in `Choice`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    lr: float | None = None
    source: Source = "given"
    trials: list[Trial] = []
    trial_steps: int = 0
    search_seconds: float = 0.0
    losses: list[tuple[int, float]] = []

    def choice(self, most: int, steps: int, *, check_every: int, sequences: int) -> Choice:
        """The choice of a run that made so many steps of at most so many."""
        assert self.lr is not None
        return Choice(
            lr=self.lr,
            source=self.source,
            trials=tuple(self.trials),
            trial_steps=self.trial_steps,
            search_seconds=round(self.search_seconds, 2),
            validation_sequences=sequences,
            check_every=check_every,
            losses=tuple(self.losses),
            best_step=best_step(self.losses) if check_every else steps,
            stopped="stalled" if steps < most else "all steps made",
        )
