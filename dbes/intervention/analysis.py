"""From the records of an experiment to its outcome: figures of every arm, paired tests, Pareto front, masks, verdicts. Plain JSON."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbes.intervention.outcomes import (
    Curves,
    Figure,
    Measured,
    accuracy_changes,
    accuracy_figure,
    curves_of,
    figure,
    log_ratio,
    matched,
    pareto,
    strata_of,
)
from dbes.intervention.settings import Arm, InterventionSettings, run_of
from dbes.intervention.verdicts import overall_verdict, target_verdict
from dbes.reporting.arms import CONTROL, EXTRA_ARMS, FULL, FULL_REPLAY, LOAD, PROTECTED, REPLAY, SLOWER, rule_of
from dbes.reporting.outcome import KIND, OUTCOME_SCHEMA
from dbes.scoring.resampling import holm

Records = Sequence[tuple[Arm, dict[str, Any]]]
Key = tuple[str, float | None]
"""An arm's name and budget."""

NO_FIGURE = Figure(value=math.nan, low=None, high=None, p=None)
"""Stands for what was not compared; its value is null in JSON."""


def analyse(about: Mapping[str, Any], records: Records, masks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outcome of an experiment, as far as it is finished.

    Args:
        about, records, masks: as ``grid.read_experiment`` gives them.
    """
    settings = InterventionSettings.model_validate(about["settings"])
    base = {name: np.asarray(nats) for name, nats in about["base"].items()}
    sizes = {name: np.asarray(count, np.float64) for name, count in about["bytes"].items()}
    targets = {}
    for target in settings.domains:
        others = [name for name in about["data"]["domains"] if name not in (target, *settings.new)]
        own = [(arm, record) for arm, record in records if arm.target == target]
        targets[target] = _target(target, others, own, settings, base=base, sizes=sizes, is_new=target in settings.new)
        if "accuracy" in about:
            _add_accuracy(targets[target], target, others, own, about["accuracy"])
    return {
        "schema_version": OUTCOME_SCHEMA,
        "kind": KIND,
        "model": about["model"],
        "texts": about["texts"],
        "domains": about["data"]["domains"],
        "given": about.get("given", []),
        "settings": about["settings"],
        "versions": about["versions"],
        "units": "bits per byte",
        "targets": targets,
        "masks": [_masked(mask, settings, about["data"]["domains"], base=base, sizes=sizes) for mask in masks],
        "paths": about["paths"],
        "skipped": about["skipped"],
        "verdict": overall_verdict(targets),
    }


def _target(
    target: str,
    others: Sequence[str],
    records: Records,
    settings: InterventionSettings,
    *,
    base: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray],
    is_new: bool,
) -> dict[str, Any]:
    by_arm: dict[Key, dict[int, tuple[Arm, dict[str, Any]]]] = defaultdict(dict)
    failed = []
    for arm, record in records:
        if record["status"] == "ok":
            by_arm[arm.name, arm.budget][arm.seed] = (arm, record)
        else:
            failed.append({"arm": arm.name, "budget": arm.budget, "seed": arm.seed, "error": record["error"]})
    # figures are paired by seed: an arm that misses one is left out until it has run
    whole = {key: runs for key, runs in by_arm.items() if len(runs) == settings.seeds}
    strata = strata_of(settings.seeds, *(len(sizes[name]) for name in (target, *others)))
    curves = {key: curves_of(_measured(runs), target, others, base=base, sizes=sizes) for key, runs in whole.items()}
    arms = [_arm(key, runs, curves, strata, whole) for key, runs in whole.items()]
    for arm, kept in zip(arms, pareto([(arm["gain"]["value"], arm["forgetting"]["value"]) for arm in arms]), strict=True):
        arm["pareto"] = kept
    trained = {key: [runs[seed][0] for seed in sorted(runs)] for key, runs in whole.items()}
    contrasts = [row for control in (CONTROL, LOAD) for row in _contrasts(control, curves, strata, trained)]
    return {
        "is_new": is_new,
        "others": list(others),
        "base": float(base[target].sum() / np.log(2) / sizes[target].sum()),
        "arms": arms,
        "contrasts": contrasts,
        "protection": _twins(curves, strata),
        "replay": _against_replay(curves, strata),
        "failed": failed,
        "verdict": target_verdict(target, arms, contrasts),
    }


def _add_accuracy(found: dict[str, Any], target: str, others: Sequence[str], records: Records, asked: Mapping[str, Any]) -> None:
    """Add to a target's outcome, in place, the accuracy before training and how every arm changed it; nothing without items.

    Args:
        asked: of the experiment: number of choices of every item, and which were answered rightly before training.
    """
    names = [name for name in (target, *others) if name in asked["choices"]]
    if not names:
        return
    found["accuracy"] = {
        name: {
            "items": len(asked["choices"][name]),
            "chance": float(np.mean(1 / np.asarray(asked["choices"][name]))),
            "base": float(np.mean(asked["right"][name])),
            "base_per_byte": float(np.mean(asked["right_per_byte"][name])),
        }
        for name in names
    }
    for row in found["arms"]:
        own = {arm.seed: record for arm, record in records if (arm.name, arm.budget) == (row["arm"], row["budget"])}
        row["accuracy"] = _accuracy_of([own[seed] for seed in sorted(own)], names, target, others, asked)


def _accuracy_of(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], target: str, others: Sequence[str], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """How an arm changed accuracy: at its end with intervals, and at every point."""
    row: dict[str, Any] = {
        "items": len(asked["choices"].get(target, ())),
        "items_elsewhere": sum(len(asked["choices"][name]) for name in names if name != target),
    }
    points: dict[str, np.ndarray | None] = {}
    for kind, end in (("right", ""), ("right_per_byte", "_per_byte")):
        right = {name: np.asarray([[point[kind][name] for point in record["curve"]] for record in records]) for name in names}
        base = {name: np.asarray(asked[kind][name]) for name in names}
        gain, elsewhere, strata = accuracy_changes(right, base, target, others)
        for name, changes in ((f"gain{end}", gain), (f"elsewhere{end}", elsewhere)):
            row[name] = None if changes is None else accuracy_figure(changes[:, -1], strata).as_json()
            points[name] = None if changes is None else changes[0]
    row["curve"] = [
        {"step": point["step"], **{name: None if one is None else round(float(one[place]), 5) for name, one in points.items()}}
        for place, point in enumerate(records[0]["curve"])
    ]
    return row


def _measured(runs: Mapping[int, tuple[Arm, dict[str, Any]]]) -> Measured:
    records = [runs[seed][1] for seed in sorted(runs)]
    # runs of another version may have measured domains more than needed
    names = [name for name in records[0]["curve"][0]["nats"] if all(name in record["curve"][0]["nats"] for record in records)]
    nats = {name: np.asarray([[entry["nats"][name] for entry in record["curve"]] for record in records]) for name in names}
    seconds = np.asarray([[entry["seconds"] for entry in record["curve"]] for record in records])
    return Measured(nats=nats, seconds=seconds)


def _arm(
    key: Key,
    runs: Mapping[int, tuple[Arm, dict[str, Any]]],
    curves: Mapping[Key, Curves],
    strata: np.ndarray,
    every: Mapping[Key, Mapping[int, tuple[Arm, dict[str, Any]]]],
) -> dict[str, Any]:
    """The figures of one arm."""
    name, budget = key
    own = curves[key]
    arms, records = [runs[seed][0] for seed in sorted(runs)], [runs[seed][1] for seed in sorted(runs)]
    full = [curves[key] for key in ((FULL, None), *((name, None) for name in SLOWER)) if key in curves]
    found: dict[str, Any] = {
        "arm": name,
        "budget": budget,
        "kind": arms[0].kind,
        "rate": records[0]["run"]["rate"],
        "cells": float(np.mean([len(arm.cells) for arm in arms])),
        "coverage": _mean([arm.coverage for arm in arms]),
        "gain": figure(own.gain[:, -1], strata).as_json(),
        "forgetting": figure(own.forgetting[:, -1], strata).as_json(),
        "worst_forgetting": figure(own.worst[:, -1], strata).as_json(),
        "trainable_parameters": _mean([record["trainable_parameters"] for record in records]),
        "optimizer_bytes": _mean([record["optimizer_bytes"] for record in records]),
        "peak_added_bytes": _mean([record["peak_added_bytes"] for record in records]),
        "training_seconds": _mean([record["training_seconds"] for record in records]),
        "steps_without_gradient": _mean([record["steps_without_gradient"] for record in records]),
        "curve": [
            {"step": step, "gain": round(float(gain), 5), "forgetting": round(float(lost), 5)}
            for step, gain, lost in zip([0, *(entry["step"] for entry in records[0]["curve"])], own.gain[0], own.forgetting[0], strict=True)
        ],
    }
    if full and name not in (FULL, *SLOWER):
        gained, by_full, level = matched(own, *full)
        ratio = log_ratio(gained, by_full, strata)
        found["matched"] = {
            "forgetting": float(level[0]),
            "gain": figure(gained, strata).as_json(),
            "full": figure(by_full, strata).as_json(),
            "difference": figure(gained - by_full, strata).as_json(),
            "ratio": None if ratio is None else ratio.as_json(),
        }
        if (FULL, None) in every:
            found["equal_compute"] = _at_equal_compute(curves[FULL, None], _measured(every[FULL, None]), found["training_seconds"])
    return found


def _at_equal_compute(full: Curves, measured: Measured, seconds: float | None) -> dict[str, float] | None:
    """Full finetuning stopped after as many seconds of training as the arm took (mean over seeds; read off its trajectory)."""
    if seconds is None:
        return None
    times = np.concatenate([[0.0], measured.seconds.mean(axis=0)])
    return {
        "seconds": seconds,
        "gain": float(np.interp(seconds, times, full.gain[0])),
        "forgetting": float(np.interp(seconds, times, full.forgetting[0])),
    }


def _contrasts(
    control: str, curves: Mapping[Key, Curves], strata: np.ndarray, trained: Mapping[Key, Sequence[Arm]]
) -> list[dict[str, Any]]:
    """Every arm of a budget against the control of the same budget: gain at matched forgetting, and plain gain. Holm over the arms.

    Like is compared with like: a protected arm with the protected control. An arm that trains the control's own cells in the same
    way is the control: such a row says so, has no figures and no place among the tests.

    Args:
        trained: the arms seed by seed.
    """
    pairs: list[tuple[Key, str, Sequence[Curves]]] = []
    for name, budget in curves:
        rule = rule_of(name)
        against = control if rule == name else control + PROTECTED
        if budget is not None and rule not in (control, CONTROL) and name not in EXTRA_ARMS and (against, budget) in curves:
            pairs.append(((name, budget), against, [curves[against, budget]]))
    sides = [(trained[key], trained[against, key[1]]) for key, against, _ in pairs]
    rows = _compared(pairs, curves, strata, same=[_one_arm(*both) for both in sides])
    return [{**row, "overlap": overlap(*both)} for row, both in zip(rows, sides, strict=True)]


def _one_arm(one: Sequence[Arm], other: Sequence[Arm]) -> bool:
    """Whether two arms need the same runs with every seed: the same cells, trained in the same way."""
    return all(a.cells and run_of(a, rate=0.0) == run_of(b, rate=0.0) for a, b in zip(one, other, strict=True))


def overlap(one: Sequence[Arm], other: Sequence[Arm]) -> float | None:
    """Cells of both arms over cells of either, mean over seeds; None for arms without cells."""
    shares = [len({*a.cells} & {*b.cells}) / len({*a.cells} | {*b.cells}) for a, b in zip(one, other, strict=True) if a.cells or b.cells]
    return round(float(np.mean(shares)), 5) if shares else None


def _twins(curves: Mapping[Key, Curves], strata: np.ndarray) -> list[dict[str, Any]]:
    """Every protected arm against the same parameters without protection."""
    twins = {key: (rule_of(key[0]), key[1]) for key in curves if key[0].endswith(PROTECTED)}
    return _compared([(key, twin[0], [curves[twin]]) for key, twin in twins.items() if twin in curves], curves, strata)


def _against_replay(curves: Mapping[Key, Curves], strata: np.ndarray) -> list[dict[str, Any]]:
    """Every path against the best of full finetuning with replay at its rates."""
    family = [curves[name, None] for name in REPLAY if (name, None) in curves]
    return _compared([(key, FULL_REPLAY, family) for key in curves if family and key[0] not in EXTRA_ARMS], curves, strata)


def _compared(
    pairs: Sequence[tuple[Key, str, Sequence[Curves]]], curves: Mapping[Key, Curves], strata: np.ndarray, *, same: Sequence[bool] = ()
) -> list[dict[str, Any]]:
    """A row for each (arm, name of what it is compared with, its trajectories; gain at the end is that of the first).

    Args:
        same: for each pair, whether both sides are one and the same; nothing is compared and tested then.
    """
    rows = []
    for index, ((name, budget), control, references) in enumerate(pairs):
        own, reference = curves[name, budget], references[0]
        gained, by_control, level = matched(own, *references)
        alike = bool(same) and same[index]
        rows.append(
            {
                "arm": name,
                "budget": budget,
                "control": control,
                "forgetting": float(level[0]),
                "gained": float(gained[0]),
                "control_gain": float(reference.gain[0, -1]),
                "matched": NO_FIGURE if alike else figure(gained - by_control, strata),
                "gain": NO_FIGURE if alike else figure(own.gain[:, -1] - reference.gain[:, -1], strata),
                "same_cells": alike,
            }
        )
    for outcome in ("matched", "gain"):
        tested = [row for row in rows if row[outcome].p is not None]
        for row, adjusted in zip(tested, holm([row[outcome].p for row in tested]).tolist(), strict=True):
            row[f"{outcome}_holm"] = adjusted
    return [{**row, "matched": row["matched"].as_json(), "gain": row["gain"].as_json()} for row in rows]


def _masked(
    mask: Mapping[str, Any],
    settings: InterventionSettings,
    domains: Sequence[str],
    *,
    base: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Loss added by masking the chosen cells and the controls, inside and outside the domain; replicates leave out control sets too."""
    target = mask["job"]["target"]
    others = [name for name in domains if name not in (target, *settings.new)]
    names = (target, *others)

    def added(nats: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
        return {name: (np.asarray(nats[name]) - base[name]) / np.log(2) for name in names}

    own, controls = added(mask["nats"]), [added(nats) for nats in mask["controls"]]
    random = {name: np.stack([one[name] for one in controls]) for name in names}  # [sets, documents]
    rows = [_inside_outside(own, {name: random[name].mean(axis=0) for name in names}, target, others, sizes)]
    for left in range(len(controls)):
        rows.append(_inside_outside(own, {n: np.delete(random[n], left, axis=0).mean(axis=0) for n in names}, target, others, sizes))
    mean = {name: random[name].mean(axis=0) for name in names}
    for name in names:
        for document in range(len(sizes[name])):
            fewer = {**sizes, name: np.delete(sizes[name], document)}
            rows.append(
                _inside_outside(
                    {**own, name: np.delete(own[name], document)},
                    {**mean, name: np.delete(mean[name], document)},
                    target,
                    others,
                    fewer,
                )
            )
    table = np.asarray(rows)
    strata = strata_of(len(controls), *(len(sizes[name]) for name in names))
    titles = ("inside", "outside", "control_inside", "control_outside")
    found = {title: figure(table[:, column], strata).as_json() for column, title in enumerate(titles)}
    selectivity, by_control = table[:, 0] - table[:, 1], table[:, 2] - table[:, 3]
    job = mask["job"]
    return {
        "target": target,
        "rule": job["rule"],
        "budget": job["budget"],
        "cells": len(job["cells"]),
        "control_cells": float(np.mean([len(cells) for cells in job["controls"]])),
        **found,
        "selectivity": figure(selectivity, strata).as_json(),
        "control_selectivity": figure(by_control, strata).as_json(),
        "difference": figure(selectivity - by_control, strata).as_json(),
    }


def _inside_outside(
    own: Mapping[str, np.ndarray], control: Mapping[str, np.ndarray], target: str, others: Sequence[str], sizes: Mapping[str, np.ndarray]
) -> list[float]:
    """Bits per byte added inside and outside the domain, by the cells and by the controls."""
    found = []
    for added in (own, control):
        per_byte = {name: added[name].sum() / sizes[name].sum() for name in (target, *others)}
        found += [float(per_byte[target]), float(np.mean([per_byte[name] for name in others]))]
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is known, with five decimals: counts keep every digit."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 5) if known else None
