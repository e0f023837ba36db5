"""What an experiment shows, in words; "no advantage" unless a corrected test says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbes.reporting.arms import CONTROL, EXTRA_ARMS, LOAD, PROTECTED, UNINFORMED, named, rule_of
from dbes.scoring.resampling import holm
from dbes.wording import counted, share

SIGNIFICANT = 0.05
CLEAR_RATIO = 1.3
ALIKE = 0.5
"""Share of common cells from which the verdict says how much the arms of a contrast have in common."""

MATERIAL = 0.5
"""An arm must gain at least this share of the control's gain to be called better: one that hardly trains also hardly forgets, and
where nothing is forgotten any gain at all would win."""

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
    for arm, adjusted in zip(tested, holm([arm["matched"]["ratio"]["p"] for arm in tested]), strict=True):
        ratio = arm["matched"]["ratio"]
        if adjusted <= SIGNIFICANT and ratio["low"] is not None and ratio["low"] > 1:
            beats_full.append(_name(arm))
            if ratio["value"] >= CLEAR_RATIO:
                large.append(_name(arm))
    sentences = [
        told
        for control, words, better in ((LOAD, "target load", against_load), (CONTROL, "random cells of the same load", against_random))
        if (told := _contrast_words(contrasts, control, words, better))
    ]
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
        "beats_full_clearly": large,
    }


def overall_verdict(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence over all targets; target load is spoken of as far as arms were compared with it."""
    total = len(targets)
    load = [name for name, found in targets.items() if found["verdict"]["beats_target_load"]]
    full = [name for name, found in targets.items() if found["verdict"]["beats_full_clearly"]]
    arms = {name: targets[name]["verdict"]["beats_full_clearly"] for name in full}
    plain = [name for name in full if not all(arm.partition(" ")[0].endswith(PROTECTED) for arm in arms[name])]
    rows = [row for found in targets.values() for row in found["contrasts"] if rule_of(row["control"]) == LOAD and not _uninformed(row)]
    told = f"a rule beats target load on {len(load)} of {counted(total, 'target')}" if load else "no advantage over target load"
    if not rows:
        told = "nothing was compared with target load"
    elif all(same_cells(row) for row in rows):
        told = "no rule chose other cells than target load: no contrast"
    kept = f", {len(plain)} of them without protection; protected paths keep the domains whose text they had"
    return (
        f"{told[0].upper()}{told[1:]}; at matched forgetting a path gains at least {CLEAR_RATIO} times what full finetuning stopped "
        f"early gains on {len(full)} of {counted(total, 'target')}{kept if len(plain) < len(full) else ''}."
    )


def same_cells(row: Mapping[str, Any]) -> bool:
    """Whether both arms of a contrast trained the same cells in the same way, so that there is nothing to compare."""
    return bool(row.get("same_cells"))


def _contrast_words(contrasts: Rows, control: str, words: str, better: Sequence[str]) -> str:
    """What the contrasts with a control show; arms that are the control under another name show nothing."""
    rows = [row for row in contrasts if rule_of(row["control"]) == control]
    informed = [row for row in rows if not _uninformed(row)] or rows
    same = [_name(row) for row in informed if same_cells(row)]
    if not rows:
        return ""
    if len(same) == len(informed):
        return f"same cells as {words}, no contrast: {', '.join(same)}"
    shared = [row["overlap"] for row in informed if row.get("overlap") is not None and not same_cells(row)]
    told = f"better than {words}: {', '.join(better)}" if better else f"no advantage over {words}"
    notes = [f"arms share {_span(shared)} of their cells with it"] if shared and max(shared) >= ALIKE else []
    notes += [f"same cells, no contrast: {', '.join(same)}"] if same else []
    return told + (f" ({'; '.join(notes)})" if notes else "")


def _span(shares: Sequence[float]) -> str:
    low, high = share(min(shares), 0), share(max(shares), 0)
    return low if low == high else f"{low} to {high}"


def _better(contrasts: Rows, control: str) -> list[str]:
    rows = [row for row in contrasts if rule_of(row["control"]) == control and not _uninformed(row) and not same_cells(row)]
    tested = [row for row in rows if row.get("matched_holm") is not None and row["gained"] >= MATERIAL * row["control_gain"]]
    return [_name(row) for row in tested if row["matched_holm"] <= SIGNIFICANT and row["matched"]["value"] > 0]


def _uninformed(row: Mapping[str, Any]) -> bool:
    return rule_of(row["arm"]) in UNINFORMED


def _name(row: Mapping[str, Any]) -> str:
    return named(row["arm"], row["budget"])
