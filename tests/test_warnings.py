"""Warnings where a result should not be trusted as it stands."""

from __future__ import annotations

import numpy as np
import pytest

import dbes
from dbes.trace.baselines import baseline_trace
from dbes.trace.types import RoutingShape


def warned(tokens: np.ndarray, experts: int = 8) -> str:
    domain = np.arange(len(tokens)) % 2
    shape = RoutingShape(
        layers=(0,), experts=(experts,), top_k=(2,), domains=("a", "b"), document_domain=domain,
        document_ids=tuple(map(str, range(len(tokens)))),
    )  # fmt: skip
    return "\n".join(dbes.score(baseline_trace(shape, tokens, router="uniform", seed=0), permutations=20).warnings)


@pytest.mark.parametrize(
    ("tokens", "experts", "expected"),
    [
        pytest.param(np.full(8, 100), 8, "2 domains have fewer than 8 source texts (4): in simulations of 4 texts", id="few texts"),
        pytest.param(np.array([5000, *[50] * 39]), 8, "one source text holds 84%", id="one dominates"),
        pytest.param(np.tile([40, 400], 8), 8, "two domains of 8 source texts, on average 10 times longer in one", id="unlike lengths"),
        pytest.param(np.full(24, 5), 200, "chance alone gives", id="more experts than tokens tell"),
    ],
)
def test_small_samples_are_named(tokens: np.ndarray, experts: int, expected: str) -> None:
    assert expected in warned(tokens, experts)


def test_ordinary_samples_are_not() -> None:
    assert "simulations" not in warned(np.full(40, 100))
