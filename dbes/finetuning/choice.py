r"""What a run chooses by validation text: its learning rate, and the step whose weights it keeps.

The learning rate is found by a range test: short runs from the same weights on the same batches, compared on validation text.

The right rate differs a thousandfold with the model, its width, the method (whole experts, low rank, protected updates) and the
data, so that no constant serves. From ``START`` the test walks up or down a ladder of rates, as long as the validation loss falls.
Taken is the smallest rate that gets ``ENOUGH`` of the largest fall: a short run favours rates that a whole one does not need, and
what they add in other domains is forgetting. The test is deterministic.

Where domains are protected, a rate whose trial does not keep them counts as one that diverges (`dbes.finetuning.guard`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dbes.errors import FinetuneError
from dbes.finetuning.validation import best_step
from dbes.schema import Strict, parse_json, validated

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
START = RATES.index(3e-4)
FALLBACK = 1e-4
"""Where there is too little text to test rates on: one that does little harm, and may do little."""

ENOUGH = 2 / 3
SHARE, FEWEST, MOST = 0.05, 4, 20

RETREAT = 1 / 3
"""By this the learning rate falls when a check refuses the state."""

Source = Literal["given", "range test", "fallback"]


class Rise(Strict):
    """What a protected domain lost since before training, in bits per byte (`dbes.finetuning.guard`).

    Attributes:
        change: after less before, None where it is not finite; allowed: the share of the target's fall, and noise.
    """

    domain: str
    change: float | None
    allowed: float

    @property
    def is_kept(self) -> bool:
        return self.change is not None and self.change <= self.allowed


def risen(rise: Rise) -> str:
    """The rise in words."""
    change = "without bound" if rise.change is None else f"{rise.change:+.4f}"
    return f"{rise.domain} {change} bits per byte, " + (f"allowed {rise.allowed:.4f}" if rise.is_kept else f"above {rise.allowed:.4f}")


class Trial(Strict):
    """One learning rate that was tried.

    Attributes:
        loss: on validation text after the trial, nats per token; None where it diverged.
        rise: of the worst protected domain; None where it diverged or nothing is guarded.
    """

    lr: float
    loss: float | None
    rise: Rise | None = None

    @property
    def keeps(self) -> bool:
        return self.rise is None or self.rise.is_kept


class Choice(Strict):
    """What was chosen, by which losses.

    Attributes:
        lr: peak learning rate of the run; source: given by the user, found by a range test, or the one for too little text.
        trials: of the range test, in their order, each of ``trial_steps`` updates; search_seconds: all of them, part of the run's.
        validation_sequences: set apart from the training text to choose by.
        check_every: updates between two checks; 0: the run did not stop early.
        losses: (updates, validation loss in nats per token).
        best_step: updates after which the loss was lowest and every protected domain kept; these weights were kept. The last step
            of a run without checks.
        stopped: because the loss did not fall any more, because protected domains rose too far, or because all steps were made.
        guard_texts: of protected domains, by which rates and steps were refused; 0: none were.
        rises: (updates, worst protected domain) of every check.
        none_keeps: no rate of the range test kept the protected domains, so the smallest was taken.
        retreats: how often a check refused the state, and training continued from the best one at a third of the rate (a rate that
            was found only). A trial is short: what it keeps, a whole run at that rate may not.
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
    stopped: Literal["stalled", "forgetting", "all steps made"]
    guard_texts: int = 0
    rises: tuple[tuple[int, Rise], ...] = ()
    none_keeps: bool = False
    retreats: int = 0

    @property
    def peak(self) -> float:
        """Learning rate that the schedule went up to in the end."""
        return self.lr * RETREAT**self.retreats


class Found(BaseModel):
    """What a run has found so far; kept in its state on disk. Fields as in `Choice`.

    Attributes:
        guarded: nats of the guarding texts before training, by domain.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    lr: float | None = None
    source: Source = "given"
    trials: list[Trial] = []
    trial_steps: int = 0
    search_seconds: float = 0.0
    losses: list[tuple[int, float]] = []
    guarded: dict[str, list[float]] = {}
    rises: list[tuple[int, Rise]] = []
    none_keeps: bool = False
    retreats: int = 0

    @property
    def peak(self) -> float:
        """Learning rate that the schedule goes up to from here on."""
        assert self.lr is not None
        return self.lr * RETREAT**self.retreats

    @property
    def exceeded(self) -> set[int]:
        """Updates after which a protected domain was not kept."""
        return {step for step, rise in self.rises if not rise.is_kept}

    def keeps(self, rate: float) -> bool:
        """Whether the trial of this rate kept the protected domains."""
        return all(trial.keeps for trial in self.trials if trial.lr == rate)

    def choice(self, most: int, steps: int, *, check_every: int, sequences: int, patience: int, guard_texts: int) -> Choice:
        """The choice of a run that made so many steps of at most so many."""
        last = [step for step, _ in self.losses[1:]][-patience:]
        stopped = "forgetting" if len(last) == patience and self.exceeded.issuperset(last) else "stalled"
        own: dict[str, Any] = {name: value for name, value in self if name in Choice.model_fields}
        own["search_seconds"] = round(self.search_seconds, 2)
        return Choice(
            **own,
            validation_sequences=sequences,
            check_every=check_every,
            best_step=best_step(self.losses, self.exceeded) if check_every else steps,
            stopped=stopped if steps < most else "all steps made",
            guard_texts=guard_texts,
        )


def read_found(notes: str, *, where: str) -> Found:
    """What the state on disk says that a run has found so far; nothing where there are no notes.

    Raises:
        FinetuneError: the notes are not such.
    """
    if not notes:
        return Found()
    return validated(Found, parse_json(notes, where=where, error=FinetuneError), where=where, error=FinetuneError)


def trial_steps(steps: int) -> int:
    """Updates of each trial, for a run of at most so many: a twentieth of it, from 4 to 20."""
    return min(MOST, max(FEWEST, math.ceil(SHARE * steps)))


def find_rate(
    attempt: Callable[[float], float],
    *,
    before: float,
    known: Mapping[float, float],
    keeps: Callable[[float], bool] = lambda _: True,
    enough: float = ENOUGH,
) -> float:
    """The smallest rate that gets a share of the largest fall of the loss; the one of the lowest loss where none falls.

    Args:
        attempt: validation loss after a trial at this rate; inf or NaN where it diverged.
        before: validation loss before any update.
        known: losses of trials that were made before an interruption.
        keeps: whether a rate that was tried may be taken; where none may, the lowest of the ladder is.
        enough: share of the largest fall, among rates that may be taken.

    Raises:
        FinetuneError: even the lowest rate diverges.
    """
    found = dict(known)

    def loss(place: int) -> float:
        rate = RATES[place]
        if rate not in found:
            found[rate] = attempt(rate)
        return found[rate] if math.isfinite(found[rate]) and keeps(rate) else math.inf

    place = START
    up = loss(place + 1) < loss(place)
    while up and place + 1 < len(RATES) and loss(place + 1) < loss(place):
        place += 1
    while not up and place > 0 and (loss(place - 1) < loss(place) or loss(place) == math.inf):
        place -= 1
    if loss(place) == math.inf and math.isfinite(found[RATES[place]]):
        return RATES[place]
    if loss(place) == math.inf:
        raise FinetuneError(f"training diverges at every learning rate down to {RATES[0]:g}; look at the data and the model")
    goal = before - enough * (before - loss(place))
    while place > 0 and loss(place) < before and loss(place - 1) <= goal:
        place -= 1
    return RATES[place]
