r"""The learning rate, found by a range test: short runs from the same weights on the same batches, compared on validation text.

The right rate differs a thousandfold with the model, its width, the method (whole experts, low rank, protected updates) and the
data, so that no constant serves. From ``START`` the test walks up or down a ladder of rates, as long as the validation loss falls.
Taken is the smallest rate that gets ``ENOUGH`` of the largest fall: a short run favours rates that a whole one does not need, and
what they add in other domains is forgetting. The test is deterministic.

Where domains are protected, a rate whose trial does not keep them counts as one that diverges (`dbes.finetuning.guard`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dbes.errors import FinetuneError

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
START = RATES.index(3e-4)
FALLBACK = 1e-4
"""Where there is too little text to test rates on: one that does little harm, and may do little."""

ENOUGH = 2 / 3
SHARE, FEWEST, MOST = 0.05, 4, 20


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
