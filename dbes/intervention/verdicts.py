"""What an experiment shows, in words; "no advantage" unless a corrected test says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbes.intervention.outcomes import holm
from dbes.intervention.settings import CONTROL, EXTRA_ARMS, LOAD, PROTECTED

SIGNIFICANT = 0.05
PRIZE_RATIO = 1.3
MATERIAL = 0.5
"""An arm must gain at least this share of the control's gain to be called better: one that hardly trains also hardly forgets, and
where nothing is forgotten any gain at all would win."""

UNINFORMED = ("random", "bottom", CONTROL)
"""Rules that no one would choose a path by: controls, never named the best rule."""

Rows = Sequence[Mapping[str, Any]]


def target_verdict(target: str, arms: Rows, contrasts: Rows) -> dict[str, Any]:
    """The verdict of one target: which arms beat target load, load-matched random cells, and early-stopped full finetuning.

    ``beats_full``: at matched forgetting the interval of the ratio excludes 1 from above; as many arms are looked at, the p of
    the ratio must also pass Holm's correction over the arms.
    """
    against_load, against_random = (_better(contrasts, control) for control in (LOAD, CONTROL))
    candidates = [arm for arm in arms if "matched" in arm and not _uninformed(arm) and arm["arm"] not in EXTRA_ARMS]
    tested = [arm for arm in candidates if arm["matched"]["ratio"] is not None and arm["matched"]["ratio"]["p"] is not None]
    beats_full, large = [], []
    for arm, passed in zip(tested, _holm_passed([arm["matched"]["ratio"]["p"] for arm in tested]), strict=True):
        ratio = arm["matched"]["ratio"]
        if passed and ratio["low"] is not None and ratio["low"] > 1:
            beats_full.append(_name(arm))
            if ratio["value"] >= PRIZE_RATIO:
                large.append(_name(arm))
    sentences = []
    tests_load = any(_rule(row["control"]) == LOAD for row in contrasts)
    if tests_load:
        sentences.append(f"better than target load: {', '.join(against_load)}" if against_load else "no advantage over target load")
    if any(_rule(row["control"]) == CONTROL for row in contrasts):
        sentences.append(
            f"better than random cells of the same load: {', '.join(against_random)}"
            if against_random
            else "no advantage over random cells of the same load"
        )
    if candidates:
        told = "at matched forgetting no path gains more than full finetuning stopped early"
        if beats_full:
            told = f"at matched forgetting more gain than full finetuning stopped early: {', '.join(beats_full)}"
        sentences.append(told)
    return {
        "text": f"{target}: {'; '.join(sentences)}." if sentences else f"{target}: too little is finished to say.",
        "beats_target_load": against_load,
        "beats_random_load_matched": against_random,
        "beats_full": beats_full,
        "prize": large,
    }


def overall_verdict(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence over all targets."""
    total = len(targets)
    load = [name for name, found in targets.items() if found["verdict"]["beats_target_load"]]
    full = [name for name, found in targets.items() if found["verdict"]["prize"]]
    plain = [name for name in full if not all(arm.partition(" ")[0].endswith(PROTECTED) for arm in targets[name]["verdict"]["prize"])]
    told = f"a rule beats target load on {len(load)} of {total} targets" if load else "no advantage over target load"
    kept = f", {len(plain)} of them without protection; protected paths keep the domains whose text they had"
    return (
        f"{told[0].upper()}{told[1:]}; at matched forgetting a path gains at least {PRIZE_RATIO} times what full finetuning stopped "
        f"early gains on {len(full)} of {total} targets{kept if len(plain) < len(full) else ''}."
    )


def _better(contrasts: Rows, control: str) -> list[str]:
    rows = [row for row in contrasts if _rule(row["control"]) == control and not _uninformed(row)]
    tested = [row for row in rows if row.get("matched_holm") is not None and row["gained"] >= MATERIAL * row["control_gain"]]
    return [_name(row) for row in tested if row["matched_holm"] <= SIGNIFICANT and row["matched"]["value"] > 0]


def _rule(name: str) -> str:
    return name.removesuffix(PROTECTED)


def _uninformed(row: Mapping[str, Any]) -> bool:
    return _rule(row["arm"]) in UNINFORMED


def _holm_passed(p: Sequence[float]) -> list[bool]:
    return [adjusted <= SIGNIFICANT for adjusted in holm(p)]


def _name(row: Mapping[str, Any]) -> str:
    return row["arm"] if row["budget"] is None else f"{row['arm']} at {row['budget']:.0%}"
