"""An experiment on expert paths as Markdown: verdicts first, then every arm, contrast and mask."""

from __future__ import annotations

from dbes.reporting.arms import named
from dbes.reporting.commands import program
from dbes.reporting.export import markdown_cell, markdown_table
from dbes.reporting.outcome import (
    SAME_CELLS,
    TEXT_WIDTH,
    Contrast,
    Outcome,
    ReportedArm,
    ReportedValue,
    Target,
    accuracy_facts,
    command,
    limits,
)
from dbes.wording import p_cell, share, whole

ARM_COLUMNS = (
    "Arm", "Cells", "Gain", "Forgetting", "Worst domain", "Times full (matched)", "Matched gain", "of full", "Full, same seconds",
    "Trainable", "Seconds", "Rate", "Pareto",
)  # fmt: skip
ACCURACY_COLUMNS = ("Accuracy", "Accuracy elsewhere", "Accuracy per byte", "elsewhere, per byte")
CONTRAST_COLUMNS = ("Arm", "Against", "Common cells", "Matched difference", "p (Holm)", "Plain difference", "p (Holm), plain")
MASK_COLUMNS = ("Target", "Cells of", "Inside", "Outside", "Random, inside", "Random, outside", "Difference of selectivity", "p")


def outcome_card(outcome: Outcome) -> str:
    """Markdown for a terminal or a file of findings."""
    lines = [f"## Experiment on expert paths: {markdown_cell(outcome.model.name)}", "", f"**{_text(outcome.verdict)}**", ""]
    lines += [f"* {_text(target.verdict.text)}{' (new to the model)' if target.is_new else ''}" for target in outcome.targets.values()]
    lines += ["", "Bits per byte of held-out text; 95 % intervals over seeds and documents in brackets."]
    for name, target in outcome.targets.items():
        lines += ["", f"### {markdown_cell(name)}", "", *_target(target)]
    if outcome.masks:
        body = [
            [mask.target, named(mask.rule, mask.budget), _told(mask.inside), _told(mask.outside), _told(mask.control_inside),
             _told(mask.control_outside), _told(mask.difference), p_cell(mask.difference.p)]
            for mask in outcome.masks
        ]  # fmt: skip
        lines += ["", "### Loss added by masking", "", *markdown_table(MASK_COLUMNS, body)]
    left = [f"{skip.target}, {named(skip.arm, skip.budget)}: {skip.reason}" for skip in outcome.skipped]
    left += [
        f"{name}, {named(fail.arm, fail.budget)}, seed {fail.seed}: {fail.error or 'failed'}"
        for name, target in outcome.targets.items()
        for fail in target.failed
    ]
    if left:
        lines += ["", "### Left out", "", *(f"* {markdown_cell(reason, 400)}" for reason in left)]
    lines += ["", "### Limits", "", *(f"* {markdown_cell(limit, 1000)}" for limit in limits(outcome))]
    lines += ["", "```", command(outcome, start=program(shared=True)).replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def _target(target: Target) -> list[str]:
    if not target.arms:
        return ["No arm has run with every seed yet."]
    lines: list[str] = []
    arms: list[list[str | None]] = []
    ordered = sorted(target.arms, key=lambda arm: -(arm.gain.value or 0.0))
    for arm in ordered:
        matched, equal = arm.matched, arm.equal_compute
        arms.append(
            [
                arm.name, whole(arm.cells), _told(arm.gain), _told(arm.forgetting), _told(arm.worst_forgetting),
                None if matched is None else "not defined" if matched.ratio is None else _told(matched.ratio, 2),
                None if matched is None else _told(matched.gain), None if matched is None else _told(matched.full),
                None if equal is None else f"{_number(equal.gain)}, forgets {_number(equal.forgetting)}",
                whole(arm.trainable_parameters),
                None if arm.training_seconds is None else f"{arm.training_seconds:,.1f}",
                f"{arm.rate:g}", "yes" if arm.pareto else "",
            ]
        )  # fmt: skip
    if target.accuracy:
        arms = [[*row, *told] for row, told in zip(arms, map(_accuracy, ordered), strict=True)]
        lines = [f"* Accuracy before training, {markdown_cell(name)}: {told}" for name, told in accuracy_facts(target)]
        lines += ["", "Accuracy: its change, as shares of held-out items.", ""]
    lines += markdown_table((*ARM_COLUMNS, *(ACCURACY_COLUMNS if target.accuracy else ())), arms)
    if target.pairs:
        body = [
            [named(row.arm, row.budget), row.control, share(1.0 if row.no_contrast else row.overlap, 0), *_compared(row)]
            for row in target.pairs
        ]
        lines += ["", *markdown_table(CONTRAST_COLUMNS, body)]
    return lines


def _compared(row: Contrast) -> list[str]:
    if row.no_contrast:
        return [SAME_CELLS, "–", SAME_CELLS, "–"]
    return [_told(row.matched), p_cell(row.matched_holm), _told(row.gain), p_cell(row.gain_holm)]


def _accuracy(arm: ReportedArm) -> list[str | None]:
    found = arm.accuracy
    parts = (None,) * 4 if found is None else (found.gain, found.elsewhere, found.gain_per_byte, found.elsewhere_per_byte)
    return [None if part is None else _told(part, 3) for part in parts]


def _text(text: str) -> str:
    return markdown_cell(text, TEXT_WIDTH)


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    shown = f"{value:.{digits}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown


def _told(figure: ReportedValue, digits: int = 4) -> str:
    value = _number(figure.value, digits)
    ends = [_number(end, digits) for end in (figure.low, figure.high) if end is not None]
    return f"{value} ({ends[0]} to {ends[1]})" if len(ends) == 2 else value
