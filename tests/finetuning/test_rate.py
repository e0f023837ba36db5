"""The range test as a walk over a table of losses."""

import math

import pytest

from dbes.errors import FinetuneError
from dbes.finetuning.choice import FEWEST, MOST, RATES, find_rate, trial_steps


def walk(losses, before=4.0, known=None):
    """(rate, rates that were tried) where the ladder's rates have these losses."""
    table, tried = dict(zip(RATES, losses, strict=True)), []

    def attempt(rate):
        tried.append(rate)
        return table[rate]

    return find_rate(attempt, before=before, known=known or {}), tried


INF, NAN = math.inf, math.nan
#        1e-6  3e-6  1e-5  3e-5  1e-4  3e-4  1e-3  3e-3  1e-2  3e-2  0.1  0.3


@pytest.mark.parametrize(
    ("losses", "rate", "tried"),
    [
        pytest.param([4.0, 4.0, 4.0, 3.99, 3.97, 3.9, 3.7, 3.2, 3.0, 3.5, 9, INF], 3e-3, [1e-3, 3e-4, 3e-3, 1e-2, 3e-2], id="up"),
        pytest.param([3.9, 3.8, 3.0, 3.2, 4.1, 5, 9, INF, INF, INF, INF, INF], 1e-5, [1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6], id="down"),
        pytest.param([3.9, 3.8, 3.7, 3.2, INF, NAN, NAN, INF, INF, INF, INF, INF], 3e-5, [1e-3, 3e-4, 1e-4, 3e-5, 1e-5], id="diverging"),
        pytest.param([4.0, 4.0, 4.0, 3.5, 3.3, 3.1, 3.0, 3.4, 9, 9, 9, 9], 1e-4, [1e-3, 3e-4, 3e-3, 1e-4, 3e-5], id="enough for less"),
        pytest.param([5.0, 5.0, 5.0, 5.0, 4.6, 4.5, 4.7, 5.0, 9, 9, 9, 9], 3e-4, [1e-3, 3e-4, 1e-4], id="nothing helps"),
        pytest.param([4, 4, 4, 4, 3.99, 3.98, 3.9, 3.8, 3.7, 3.65, 3.6, 3.0], 0.3, [1e-3, 3e-4, 3e-3, 1e-2, 3e-2, 0.1, 0.3], id="top"),
    ],
)
def test_the_walk_by_hand(losses, rate, tried):
    assert walk(losses) == (rate, tried)


def test_trials_of_before_an_interruption_are_not_made_again():
    losses = [4.0, 4.0, 4.0, 3.99, 3.97, 3.9, 3.7, 3.2, 3.0, 3.5, 9, INF]
    assert walk(losses, known={1e-3: 3.7, 3e-4: 3.9, 3e-3: 3.2}) == (3e-3, [1e-2, 3e-2])


def test_divergence_everywhere_is_an_error():
    with pytest.raises(FinetuneError, match="diverges at every learning rate down to 1e-06"):
        walk([INF] * len(RATES))


@pytest.mark.parametrize(("steps", "trial"), [(1, FEWEST), (80, 4), (200, 10), (100_000, MOST)])
def test_trials_are_a_twentieth_of_the_run_within_bounds(steps, trial):
    assert trial_steps(steps) == trial
