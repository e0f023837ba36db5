"""Metrics of the user's own in a comparison: only values that were computed by the same version and source stand side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dbes.comparison.entries import Apart, LeaderboardEntry
from dbes.results import RESULT_FILE, Result
from dbes.scoring.score import REPLICATED


def of_one_source(entries: Sequence[LeaderboardEntry], metric: str) -> tuple[list[LeaderboardEntry], list[Apart]]:
    """The entries whose metric of the user's own is computed alike, the most of them, and the models that have another or none."""
    identity = {id(entry): own.identity for entry in entries if (own := entry.result.own_metrics.get(metric)) is not None}
    if metric in REPLICATED or not identity:
        return list(entries), []
    chosen = Counter(identity.values()).most_common(1)[0][0]
    kept, apart = [], []
    for entry in entries:
        if identity.get(id(entry)) == chosen or (entry.baseline and id(entry) not in identity):
            kept.append(entry)
            continue
        why = "computed by another version or source than in the table" if id(entry) in identity else "not in this result"
        reason = f"metric {metric!r} is {why}; score its trace again with --metric"
        apart.append(Apart(path=str(entry.folder / RESULT_FILE), name=entry.result.model.name, reason=reason))
    return kept, apart


def shared_metrics(results: Sequence[Result]) -> dict[str, str]:
    """Title of each metric of the user's own that all results have, computed alike."""
    first = results[0].own_metrics if results else {}
    return {
        name: own.title
        for name, own in first.items()
        if all(name in each.own_metrics and each.own_metrics[name].identity == own.identity for each in results)
    }
