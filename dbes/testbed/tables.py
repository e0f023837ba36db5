"""The tables of a grid's report: one row per arm (or layer, or metric), means over seeds with intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from dbes.testbed.contrasts import (
    AS_TRAINED,
    LOSS,
    NATS,
    SHARE,
    SPECIALIZATION,
    TRAINED_UTILIZATION,
    UTILIZATION,
    Grid,
    Interval,
    Value,
    interval,
    number,
)
from dbes.testbed.presets import SCOPES

METHODS = ("aux_loss", "loss_free", "sinkhorn", "assignment")
GLOBAL, SEQUENCE = "aux_loss/global_batch", "aux_loss/sequence"

TRUTH = {"reference": 3, GLOBAL: 2, "frozen": 1, SEQUENCE: 0}
"""How much the routers of some arms specialize, by construction and by TESTBED's design: what metrics are validated against."""


def arm_table(grid: Grid, experiment: str) -> pd.DataFrame:
    """One row per arm: means over seeds with intervals of what the experiment is about."""
    measures: dict[str, Value] = {
        "specialization": SPECIALIZATION,
        "score": SHARE,
        "as_trained": AS_TRAINED,
        "utilization": UTILIZATION,
        "trained_utilization": TRAINED_UTILIZATION,
        "max_violation": lambda record: record["companions"]["max_violation"],
        "dead_experts": lambda record: record["companions"]["dead_experts"],
        "dropped": lambda record: record["dropped"],
        "bits_per_byte": LOSS,
        "nats_per_token": NATS,
    }
    rows = []
    for arm in grid.arms(experiment):
        row: dict[str, Any] = {"arm": arm, "seeds": len(grid.seeds(arm))}
        for name, value in measures.items():
            row |= _with_ends(name, grid.mean(arm, value))
        baseline = frozen_baseline(grid, arm)
        row |= _with_ends("above_frozen", grid.contrast(arm, baseline, SPECIALIZATION) if baseline else interval([]))
        first = grid.cells[arm, grid.seeds(arm)[0]]
        row |= {"tokens": first["tokens"], "parameters": first["parameters"]}
        row["tokens_per_cpu_second"] = grid.mean(arm, lambda record: record["tokens"] / record["cpu_seconds"]).mean
        for domain in first["bits_per_byte"]:
            row[f"bits_per_byte/{domain}"] = grid.mean(arm, lambda record, domain=domain: record["bits_per_byte"][domain]).mean
        rows.append(row)
    return pd.DataFrame(rows)


def _with_ends(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def frozen_baseline(grid: Grid, arm: str) -> str | None:
    """The arm with a frozen random router on the same data, model and optimizer; None where the grid has none.

    The order within a batch is left out: a frozen router has nothing that would be balanced over micro-batches.
    """

    def setting(name: str) -> Any:
        settings = grid.cells[name, grid.seeds(name)[0]]["cell"]["settings"]
        return [{key: value for key, value in settings[part].items() if key != "order"} for part in ("mix", "model", "optimizer")]

    arms = dict.fromkeys(name for name, _ in grid.cells)
    frozen = [name for name in arms if name.split("/")[0] == "frozen"]
    return next((name for name in frozen if setting(name) == setting(arm)), None)


def explained_by(grid: Grid, value: Value) -> dict[str, float] | None:
    """Shares of the variance between the method x scope cells that scope, method and their interplay explain; None if cells miss."""
    table = np.full((len(METHODS), len(SCOPES)), np.nan)
    for (row, method), (column, scope) in itertools.product(enumerate(METHODS), enumerate(SCOPES)):
        table[row, column] = grid.mean(f"{method}/{scope}", value).mean
    if np.isnan(table).any():
        return None
    centred = table - table.mean()
    total = float((centred**2).sum())
    method, scope = centred.mean(1), centred.mean(0)
    by_method, by_scope = float(len(SCOPES) * (method**2).sum()) / total, float(len(METHODS) * (scope**2).sum()) / total
    return {"scope": by_scope, "method": by_method, "interplay": 1 - by_scope - by_method}


def information(level: str) -> Value:
    """Mean over layers of ``topic`` or ``syntax``, in nats above chance."""
    return lambda record: float(np.mean(record["information"][level]))


def level_table(grid: Grid) -> pd.DataFrame:
    """Topic and syntax information of token-level and sequence-level routing."""
    rows = []
    for arm in grid.arms("levels"):
        row: dict[str, Any] = {"arm": arm, "seeds": len(grid.seeds(arm))}
        for name, value in (("topic", information("topic")), ("syntax", information("syntax")), ("bits_per_byte", LOSS)):
            row |= _with_ends(name, grid.mean(arm, value))
        rows.append(row)
    return pd.DataFrame(rows)


def probe_table(grid: Grid) -> pd.DataFrame:
    """Accuracy of telling a token's domain, by layer: from the router's input, from the chosen experts, by chance."""
    rows = []
    for arm in grid.arms("upstream"):
        probes = [grid.cells[arm, seed]["probe"] for seed in grid.seeds(arm)]
        for layer in range(len(probes[0]["input"]) if probes and probes[0] else 0):
            row: dict[str, Any] = {"arm": arm, "layer": layer}
            for name in ("input", "experts", "chance"):
                row |= _with_ends(name, interval([probe[name][layer] for probe in probes]))
            rows.append(row)
    return pd.DataFrame(rows)


def forking_table(grid: Grid) -> pd.DataFrame:
    """Normalised specialization on the 20 % of tokens after which the next one is least certain, and on as many others."""
    rows = []
    for arm in dict.fromkeys((*grid.arms("upstream"), *(arm for arm in TRUTH if grid.seeds(arm)))):
        forking = grid.mean(arm, lambda record: record["forking"]["forking"])
        others = grid.mean(arm, lambda record: record["forking"]["others"])
        gap = interval([forking_gap(grid.cells[arm, seed]) for seed in grid.seeds(arm)])
        rows.append({"arm": arm, "forking": forking.mean, "others": others.mean, **_with_ends("gap", gap)})
    return pd.DataFrame(rows)


def forking_gap(record: Mapping[str, Any]) -> float:
    return number(record["forking"]["forking"]) - number(record["forking"]["others"])


def metric_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Every metric of a cell by name: published as they are, calibrated by their score."""
    values = {f"published {name}": number(value) for name, value in record["published"].items()}
    for name, found in record["calibrated"].items():
        if name not in ("by_layer", "specialization"):
            values[f"calibrated {name}"] = number(found["score"])
    return values


def metric_table(grid: Grid, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How each metric orders the cells of known truth: Kendall's tau-b, its interval over resampled seeds, and whether it fails.

    Seeds are resampled within each arm, so that every draw holds all arms. A metric fails when its interval reaches 0.
    """
    generator = np.random.default_rng(seed)
    arms = [arm for arm in TRUTH if grid.seeds(arm)]
    by_arm = {arm: [metric_values(grid.cells[arm, one]) for one in grid.seeds(arm)] for arm in arms}
    if len(arms) < 2:
        return pd.DataFrame()
    truth = np.repeat([TRUTH[arm] for arm in arms], [len(by_arm[arm]) for arm in arms])
    first = np.cumsum([0, *(len(by_arm[arm]) for arm in arms)])
    resampled = np.concatenate(
        [start + generator.integers(len(by_arm[arm]), size=(draws, len(by_arm[arm]))) for arm, start in zip(arms, first, strict=False)],
        axis=1,
    )
    rows = []
    for metric in by_arm[arms[0]][0]:
        values = np.asarray([cell[metric] for arm in arms for cell in by_arm[arm]])
        drawn = kendall_tau(truth, values[resampled])
        known = drawn[np.isfinite(drawn)]
        low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (math.nan, math.nan)
        tau = float(kendall_tau(truth, values[None])[0])
        row: dict[str, Any] = {"metric": metric, "tau": tau, "tau_low": float(low), "tau_high": float(high)}
        row |= {arm: float(values[start:end].mean()) for arm, start, end in zip(arms, first, first[1:], strict=False)}
        row["fails"] = not low > 0
        rows.append(row)
    return pd.DataFrame(rows).sort_values("tau", ascending=False, ignore_index=True)


def kendall_tau(truth: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row of ``values`` [draws, cells] with the truth [cells]; NaN for a row without order or with NaN."""
    left, right = np.triu_indices(len(truth), 1)
    known, found = np.sign(truth[left] - truth[right]), np.sign(values[:, left] - values[:, right])
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (known * found).sum(1) / np.sqrt((known != 0).sum() * (found != 0).sum(1))
    return np.where(np.isfinite(values).all(1), tau, np.nan)
