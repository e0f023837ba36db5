"""Names of the arms of an experiment on expert paths: what they train, and what the reports tell apart."""

from __future__ import annotations

CONTROL, LOAD = "random-load-matched", "target-load"
FULL, ALL, LORA, ROUTER = "full", "all", "lora", "router"
USUAL_SLOWER = {"full-slow": 1 / 4, "full-slower": 1 / 16, "full-slowest": 1 / 64}
SLOWER = USUAL_SLOWER | {"full-8th": 1 / 8, "full-32nd": 1 / 32, "full-256th": 1 / 256}
"""Full finetuning at a share of its learning rate: what early stopping is compared with must also be known where little is forgotten."""

PROTECTED = "-protected"
"""Ending of the name of an arm whose updates are shaped by other domains' texts (`dbes.finetuning.protection`)."""

ALL_PROTECTED, FULL_PROTECTED = ALL + PROTECTED, FULL + PROTECTED
FULL_REPLAY = "full-replay"
REPLAY = {FULL_REPLAY: 1.0, "full-replay-slow": 1 / 4, "full-replay-slower": 1 / 16, "full-replay-slowest": 1 / 64}
"""Full finetuning on batches of which a part is text of other domains, at shares of its learning rate: the other use of such texts."""

DEFAULT_EXTRAS = (FULL, *USUAL_SLOWER, ALL, LORA, ROUTER)
EXTRA_ARMS = (*DEFAULT_EXTRAS, *sorted({*SLOWER} - {*USUAL_SLOWER}), ALL_PROTECTED, FULL_PROTECTED, *REPLAY)
"""Arms that are no expert path."""

EVERY_PARAMETER = (FULL, *SLOWER, FULL_PROTECTED, *REPLAY)
UNINFORMED = ("random", "bottom", CONTROL)
"""Rules that no one would choose a path by: controls, never named the best rule."""

GROUPS = ("expert path", "full finetuning", "target load", "random or bottom cells", "no path")


def rule_of(arm: str) -> str:
    """The arm's name without its protection."""
    return arm.removesuffix(PROTECTED)


def group_of(arm: str) -> str:
    """The group of ``GROUPS`` that the page shows an arm in."""
    rule = rule_of(arm)
    return GROUPS[1 if arm in EVERY_PARAMETER else 2 if rule == LOAD else 3 if rule in UNINFORMED else 4 if arm in EXTRA_ARMS else 0]


def named(arm: str, budget: float | None) -> str:
    """An arm as verdicts, tables and figures call it."""
    return arm if budget is None else f"{arm} at {100 * budget:.4g}%"
