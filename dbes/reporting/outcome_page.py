"""The page of an experiment on expert paths: verdicts, gain and forgetting, contrasts, masks; one HTML file without network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dbes.files import check_writable, write_text
from dbes.reporting import charts
from dbes.reporting.arms import CONTROL, EVERY_PARAMETER, FULL_REPLAY, GROUPS, LOAD, PROTECTED, named, rule_of
from dbes.reporting.commands import program
from dbes.reporting.html import render
from dbes.reporting.outcome import (
    SAME_CELLS,
    TEXT_WIDTH,
    WIDTH,
    ArmAccuracy,
    Contrast,
    EqualCompute,
    Mask,
    Outcome,
    ReportedArm,
    ReportedValue,
    Target,
    accuracy_facts,
    command,
    facts,
    limits,
    load_outcome,
)
from dbes.reporting.page import slug
from dbes.results import PAGE_FILE
from dbes.text import labels, legible

MASK_SERIES = ("chosen cells, inside", "chosen cells, outside", "random cells, inside", "random cells, outside")
Row = dict[str, Any]


def write_outcome_page(path: str | Path, *, output: str | Path | None = None) -> Path:
    """Write ``report.html`` beside an outcome and return its path.

    Raises:
        ResultError: the outcome cannot be read.
        FileError: the page cannot be written.
    """
    path = Path(path)
    written = Path(output) if output is not None else (path if path.is_dir() else path.parent) / PAGE_FILE
    check_writable(written)
    write_text(written, render_outcome(load_outcome(path)))
    return written


def render_outcome(outcome: Outcome) -> str:
    """The HTML of an outcome's page."""
    skipped = [(skip.target, named(skip.arm, skip.budget), skip.reason) for skip in outcome.skipped]
    failed = [
        (name, f"{named(fail.arm, fail.budget)}, seed {fail.seed}", fail.error or "failed")
        for name, target in outcome.targets.items()
        for fail in target.failed
    ]
    return render(
        "intervention.html",
        scripts=("page.js", "intervention.js"),
        payload=outcome_payload(outcome),
        title=legible(outcome.model.name, WIDTH),
        outcome=outcome,
        text_width=TEXT_WIDTH,
        accuracy_facts=accuracy_facts,
        left_out=[[legible(part, 400) for part in row] for row in (*skipped, *failed)],
        facts=facts(outcome),
        command=command(outcome, start=program(shared=True)),
        limits=limits(outcome),
    )


def outcome_payload(outcome: Outcome) -> dict[str, Any]:
    """Everything the page's script draws from: the numbers of the outcome, flat, and the specifications of the figures."""
    series = list(dict.fromkeys(_series(row) for target in outcome.targets.values() for row in target.pairs))
    with charts.unchecked():
        specs = {
            "plane": charts.plane_spec(GROUPS),
            "contrasts": charts.interval_spec("gain at matched forgetting, arm minus control, bits per byte", series),
            "masks": charts.interval_spec("loss added by masking, bits per byte", MASK_SERIES),
        }
    named = labels([*outcome.targets, *(mask.target for mask in outcome.masks)], WIDTH)
    return {
        "name": slug(f"intervention-{outcome.model.name}"),
        "targets": [_target(named[name], target) for name, target in outcome.targets.items()],
        "masks": [_mask_row(mask) | {"target": named[mask.target]} for mask in outcome.masks],
        "mask_series": [row | {"target": named[mask.target]} for mask in outcome.masks for row in _mask_series(mask)],
        "specs": specs,
    }


def _target(name: str, target: Target) -> Row:
    short = len({arm.budget for arm in target.arms if arm.budget is not None}) <= 1
    front = sorted((arm for arm in target.arms if arm.pareto), key=lambda arm: (arm.forgetting.value or 0.0, arm.gain.value or 0.0))
    return {
        "target": name,
        "has_items": bool(target.accuracy),
        "arms": [arm_row(arm) | {"label": legible(arm.arm if short else _short(arm), 40)} for arm in target.arms],
        "front": [legible(arm.name, WIDTH) for arm in front],
        "trajectories": [
            {"arm": legible(arm.name, WIDTH), "step": point.step, "gain": point.gain, "forgetting": point.forgetting}
            for arm in target.arms
            if arm.arm in EVERY_PARAMETER
            for point in arm.curve
        ],
        "contrasts": [_contrast_row(row, target, short=short) for row in target.pairs],
    }


def _series(row: Contrast) -> str:
    """What a pair is compared with, protected or not: like is compared with like."""
    if row.arm == row.control + PROTECTED:
        return "against the same without protection"
    if row.control == FULL_REPLAY:
        return "against full finetuning with replay"
    return f"against {legible(rule_of(row.control), WIDTH)}"


def _short(arm: ReportedArm | Contrast) -> str:
    return arm.arm if arm.budget is None else f"{arm.arm} {100 * arm.budget:.4g}%"


def spread(name: str, figure: ReportedValue | None) -> Row:
    """A figure as flat columns."""
    parts = (("", "value"), ("_low", "low"), ("_high", "high"), ("_p", "p"))
    return {f"{name}{end}": None if figure is None else getattr(figure, part) for end, part in parts}


def arm_row(arm: ReportedArm) -> Row:
    """All figures of an arm, flat; what an arm does not have is None."""
    matched, equal = arm.matched, arm.equal_compute
    return {
        "arm": legible(arm.name, WIDTH),
        "group": arm.group,
        "pareto": arm.pareto,
        "budget": arm.budget,
        "cells": arm.cells,
        "coverage": arm.coverage,
        **spread("gain", arm.gain),
        **spread("forgetting", arm.forgetting),
        **spread("worst_forgetting", arm.worst_forgetting),
        "matched_forgetting": None if matched is None else matched.forgetting,
        **spread("matched_gain", None if matched is None else matched.gain),
        **spread("matched_full", None if matched is None else matched.full),
        **spread("matched_difference", None if matched is None else matched.difference),
        **spread("matched_ratio", None if matched is None else matched.ratio),
        **{f"equal_compute_{part}": None if equal is None else getattr(equal, part) for part in EqualCompute.model_fields},
        "trainable_parameters": arm.trainable_parameters,
        "optimizer_bytes": arm.optimizer_bytes,
        "training_seconds": arm.training_seconds,
        "peak_added_bytes": arm.peak_added_bytes,
        "rate": arm.rate,
        "steps_without_gradient": arm.steps_without_gradient,
        **({} if arm.accuracy is None else _accuracy_columns(arm.accuracy)),
    }


def _accuracy_columns(found: ArmAccuracy) -> Row:
    parts = {part: getattr(found, part) for part in ("gain", "elsewhere", "gain_per_byte", "elsewhere_per_byte")}
    columns = {name: value for part, figure in parts.items() for name, value in spread(f"accuracy_{part}", figure).items()}
    return columns | {"accuracy_items": found.items, "accuracy_items_elsewhere": found.items_elsewhere}


def _contrast_row(row: Contrast, target: Target, *, short: bool) -> Row:
    same = row.no_contrast
    better = {LOAD: target.verdict.beats_target_load, CONTROL: target.verdict.beats_random_load_matched}
    return {
        "arm": legible(named(row.arm, row.budget), WIDTH),
        "label": legible(row.arm if short else _short(row), 40),
        "control": legible(row.control, WIDTH),
        "series": _series(row),
        "forgetting": row.forgetting,
        "gained": row.gained,
        "control_gain": row.control_gain,
        **spread("matched", None if same else row.matched),
        "matched_holm": None if same else row.matched_holm,
        **spread("gain", None if same else row.gain),
        "gain_holm": None if same else row.gain_holm,
        "overlap": 1.0 if same else row.overlap,
        "note": SAME_CELLS if same else None,
        "better": named(row.arm, row.budget) in better.get(rule_of(row.control), ()),
    }


def _mask_row(mask: Mask) -> Row:
    parts = ("inside", "outside", "control_inside", "control_outside", "selectivity", "control_selectivity", "difference")
    return {
        "rule": legible(named(mask.rule, mask.budget), WIDTH),
        "cells": mask.cells,
        "control_cells": mask.control_cells,
        **{name: value for part in parts for name, value in spread(part, getattr(mask, part)).items()},
    }


def _mask_series(mask: Mask) -> list[Row]:
    figures = (mask.inside, mask.outside, mask.control_inside, mask.control_outside)
    where = {"label": legible(named(mask.rule, mask.budget), WIDTH)}
    return [
        {**where, "series": series, "value": figure.value, "low": figure.low, "high": figure.high}
        for series, figure in zip(MASK_SERIES, figures, strict=True)
    ]
