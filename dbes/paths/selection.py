"""From scores to a set of cells within a budget, and random sets to compare it with."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dbes.errors import PathError
from dbes.paths.types import Cell
from dbes.trace.types import RoutingShape


def check_budget(budget: float) -> float:
    """The budget, if it is a share of the routed-expert parameters.

    Raises:
        PathError: not above 0 and at most 1.
    """
    if not 0 < budget <= 1:
        raise PathError(f"budget {budget}: expected a share of the routed-expert parameters, above 0 and at most 1 (0.15 is 15 %)")
    return budget


def choose(score: np.ndarray, usage: np.ndarray, *, sizes: np.ndarray, experts: np.ndarray, budget: float | None) -> np.ndarray:
    """Cells by descending score while they fit in the budget (at least one), bool [layers, experts].

    Equal scores: the cell that the domain uses more, then the lower layer and expert. The first cell that does not fit ends the
    choice, so the budget is never exceeded but by a single cell that is larger than all of it.

    Args:
        score: [layers, experts]; minus infinity: never chosen.
        usage: [layers, experts], breaks ties.
        sizes: [layers], parameters of one expert; experts: [layers].
        budget: share of all routed-expert parameters; None takes every cell that has a score.

    Raises:
        PathError: a budget that is no share; no cell has a score.
    """
    eligible = np.isfinite(score)
    if not eligible.any():
        raise PathError("no cell can be chosen: the rule gives none a score")
    chosen = np.zeros(score.shape, bool)
    if budget is None:
        return eligible
    limit = check_budget(budget) * float((sizes * experts).sum()) * (1 + 1e-9)
    flat = np.flatnonzero(eligible)
    order = flat[np.lexsort((flat, -np.nan_to_num(usage).ravel()[flat], -score.ravel()[flat]))]
    spent = np.cumsum(np.repeat(sizes, score.shape[1])[order])
    count = max(1, int(np.searchsorted(spent, limit, side="right")))
    chosen.ravel()[order[:count]] = True
    return chosen


def random_load_matched(chosen: np.ndarray, load: np.ndarray, exists: np.ndarray, *, seed: int) -> np.ndarray:
    """Random cells outside a set that together carry as much of the target's load, bool [layers, experts].

    Cells outside ``chosen`` are drawn in random order until their load reaches that of the set; the last one drawn is the one
    still outside that brings the sum closest. So the **load** is equal and the **number** of cells is not: where the set holds
    the domain's busiest cells, more random ones are needed, which gives the control more parameters to train.

    Args:
        chosen: bool [layers, experts]; load: [layers, experts], share of the target's slots; exists: bool [layers, experts].

    Raises:
        PathError: the other cells together carry less load than the set.
    """
    wanted, outside = float(load[chosen].sum()), np.flatnonzero((exists & ~chosen).ravel())
    loads = load.ravel()
    if loads[outside].sum() < wanted:
        raise PathError(
            f"random-load-matched: the chosen cells carry {wanted:.0%} of the target's slots, all others only "
            f"{loads[outside].sum():.0%}: no random set outside them can match; use a smaller budget"
        )
    order = np.random.default_rng([seed, 7]).permutation(outside)
    reached = np.cumsum(loads[order])
    count = int(np.searchsorted(reached, wanted, side="left"))
    drawn = order[:count]
    rest = order[count:]
    missing = wanted - float(loads[drawn].sum())
    best = rest[np.argmin(np.abs(loads[rest] - missing))] if len(rest) else None
    result = np.zeros(chosen.shape, bool)
    result.ravel()[drawn] = True
    if best is not None and (not count or abs(loads[best] - missing) < abs(missing)):
        result.ravel()[best] = True
    return result


def cells_of(chosen: np.ndarray, shape: RoutingShape) -> tuple[Cell, ...]:
    """The cells of a bool [layers, experts], with the model's layer numbers, in order."""
    return tuple(Cell(shape.layers[layer], int(expert)) for layer, expert in np.argwhere(chosen))


def mask_of(cells: Iterable[tuple[int, int]], shape: RoutingShape) -> np.ndarray:
    """Bool [layers, experts] of some cells.

    Raises:
        PathError: a cell that the model does not have.
    """
    mask = np.zeros((len(shape.layers), shape.width), bool)
    for layer, expert in cells:
        if layer not in shape.layers or not 0 <= expert < shape.experts[shape.layers.index(layer)]:
            raise PathError(f"cell (layer {layer}, expert {expert}) does not exist in a model with MoE layers {list(shape.layers)}")
        mask[shape.layers.index(layer), expert] = True
    return mask


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Cells in both sets over cells in either; NaN for two empty sets."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else math.nan
