"""Results side by side: what may stand in one table, ranks with intervals, and paired differences of two models.

Only results of one task, version, fingerprint, phase and set of documents share a table; the others are listed apart with the
reason. Where the prompt and the generated text of one recording were scored apart, both stand beside the model's entry.
Intervals and tests pair the documents: both models read the same texts, so what one text adds to both cancels. Each is the
delete-one-document jackknife, as everywhere in dbes (a percentile bootstrap over documents does not cover, see ``uncertainty``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbes.comparison.accuracy import Accuracies, read_accuracies
from dbes.comparison.entries import Apart, LeaderboardEntry, Replicates, read_entries
from dbes.comparison.excess import any_has_excess, excess_of
from dbes.comparison.own import of_one_source, shared_metrics
from dbes.comparison.ranks import Difference, Rank, corrected, ranks_of
from dbes.comparison.relation import Relation, relations
from dbes.errors import ResultError, SettingError
from dbes.results import RESULT_FILE, Result
from dbes.scoring.phases import model_score, paired
from dbes.scoring.score import REPLICATED
from dbes.scoring.texts import DATA
from dbes.text import labels, unknown

if TYPE_CHECKING:
    import pandas as pd

NAME_WIDTH = 64

OWN_ACCURACY = "the multiple-choice items of the task (mean over its domains that have some)"

UNKNOWN_DATA = "unknown:"
"""Beginning of what stands for the fingerprint of a result without one."""

Identity = tuple[str, int | None, str | None, int, str, str, str]

DEPTHS = (("all layers", 0.0, 1.0), ("first third", 0.0, 1 / 3), ("middle third", 1 / 3, 2 / 3), ("last third", 2 / 3, 1.0))
"""Relative depth of the MoE layers, 0 the first and 1 the last: models of different depth are compared by it."""


ORDERS = ("excess", "score")
"""What models can be ranked by beside the name of a metric: by specialization, over the random router or as it is."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results that may stand side by side, their ranks and pairwise differences by one metric, and what stands apart.

    ``by_excess``: order, ranks and pairs are of the excess over the random router; models without one stand below, unranked. Else of the
    score: no model has an excess, or so it was asked.
    ``accuracy_of``: the tasks or the file that accuracies come from, or the results' own; empty without accuracies.
    ``relations``: of specialization with loss and accuracy, where models have them. ``own``: title of each metric of the user's own that
    all models have, computed by the same source.
    """

    metric: str
    entries: tuple[LeaderboardEntry, ...]
    ranks: dict[str, Rank]
    pairs: tuple[Difference, ...]
    apart: tuple[Apart, ...]
    by_excess: bool = False
    accuracy_of: str = ""
    relations: tuple[Relation, ...] = ()
    own: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that is compared: those of dbes, and those of the user's own."""
        return (*REPLICATED, *self.own)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per entry: its name, its ranks, and the model's score by every metric; NaN where it has none."""
        import pandas as pd

        rows = []
        for entry in self.entries:
            rank = self.ranks.get(entry.label)
            scores = {metric: _or(model_score(entry.result, metric), math.nan) for metric in self.metrics}
            rows.append({"model": entry.label, "rank": rank and rank.place, "rank_last": rank and rank.last, **scores})
        return pd.DataFrame(rows)


def compare(
    results: str | Path | Result | Sequence[str | Path | Result],
    *,
    by: str = "specialization",
    accuracy: str | Path | Sequence[str | Path] = (),
) -> Comparison:
    """Results side by side: ranks with intervals, and paired differences on the same documents.

    Ordered and ranked by the excess over the random router, models without one below the others; by the score where none has one.

    Args:
        results: results that were written to a folder, their folders, or folders with results below them.
        by: metric the models are ranked by; ``excess`` and ``score``: by specialization, and which of both. Of metrics of your own results
            by another version or source stand apart.
        accuracy: files with the models' accuracies: CSV ``model,accuracy``, or results of lm-eval.

    Raises:
        SettingError: ``by`` is not one of the metrics that are ranked.
        ResultError: no result can be read, or accuracies do not fit the results.
    """
    metric = "specialization" if by in ORDERS else by
    known = read_accuracies([accuracy] if isinstance(accuracy, str | Path) else accuracy)
    given = [results] if isinstance(results, str | Path | Result) else results
    entries, apart = read_entries([_place(each) for each in given])
    known_metrics = dict.fromkeys((*REPLICATED, *(name for entry in entries for name in entry.result.own_metrics)))
    if metric not in known_metrics:
        raise SettingError(unknown("metric that models are ranked by", metric, (*known_metrics, *ORDERS)))
    entries, others = comparable(entries)
    entries, unlike = of_one_source(entries, metric)
    others += unlike
    entries = with_accuracies(labelled(entries), known, elsewhere={each.name for each in (*apart, *others)})
    by_excess = by != "score" and any_has_excess([entry for entry in entries if not entry.baseline], metric)
    if by == "excess" and not by_excess:
        raise SettingError("by: no model here has random routers beside it, so that none has an excess; rank by score")
    ranked = [each for each in entries if _rankable(each, metric) and not (by_excess and excess_of(each, metric) is None)]
    found = (difference(a, b, metric, *DEPTHS[0], excess=by_excess) for a, b in _pairs(entries))
    pairs = corrected([pair for pair in found if pair is not None])
    ranks = ranks_of([entry.label for entry in ranked], pairs)

    def order(entry: LeaderboardEntry) -> tuple[bool, bool, float, str]:
        excess = excess_of(entry, metric) if by_excess and not entry.baseline else None
        value = _or(model_score(entry.result, metric), -math.inf) if excess is None else excess.value
        return entry.baseline, by_excess and excess is None, -value, entry.label

    return Comparison(
        metric=metric,
        entries=tuple(sorted(entries, key=order)),
        ranks=ranks,
        pairs=tuple(pairs),
        apart=(*apart, *others),
        by_excess=by_excess,
        accuracy_of=known.source or (OWN_ACCURACY if any(entry.accuracy is not None for entry in entries) else ""),
        relations=relations(entries, [model_score(entry.result, "specialization") for entry in entries]),
        own=shared_metrics([entry.result for entry in entries if not entry.baseline]),
    )


def _place(result: str | Path | Result) -> str | Path:
    if not isinstance(result, Result):
        return result
    if result.folder is None:
        raise ResultError(f"the result of {result.model.name} was not written: what it is compared by lies beside it; give output_path")
    return result.folder


def paired_of(comparison: Comparison) -> list[Difference]:
    """The paired differences where exactly two models (or, without models, two routers) stand in the table; else nothing."""
    models = [entry for entry in comparison.entries if not entry.baseline]
    two = list(comparison.entries) if len(comparison.entries) == 2 else models
    return differences(two[0], two[1]) if len(two) == 2 else []


def comparable(entries: list[LeaderboardEntry]) -> tuple[list[LeaderboardEntry], list[Apart]]:
    """The largest set of results on one task, version, fingerprint and phase, and the rest with the reason.

    A result without a fingerprint stands alone: that its documents have the same ids as another's (most often mere numbers) says
    nothing about their texts.
    """
    groups = Counter(_identity(entry.result) for entry in entries)
    if not groups:
        return [], []
    # The most results; of equally many those of whole texts, then those that stand first: the order of the arguments decides, not chance.
    chosen = max(groups, key=lambda key: (groups[key], key[-1] == "all"))
    kept = [entry for entry in entries if _identity(entry.result) == chosen]
    kept = with_phases(kept, [entry for entry in entries if _identity(entry.result)[:-1] == chosen[:-1]])
    shown = {id(entry.result) for each in kept for entry in (each, *each.phases.values())}
    apart = []
    for entry in entries:
        if id(entry.result) not in shown:
            reason = _why_apart(_identity(entry.result), chosen)
            apart.append(Apart(path=str(entry.folder / RESULT_FILE), name=entry.result.model.name, reason=reason))
    common = Counter(_sampled(entry.replicates) for entry in kept if entry.replicates is not None)
    if len(common) > 1:
        sampled = common.most_common(1)[0][0]
        kept = [
            replace(entry, replicates=None, problem="it has tokens in other documents than the rest: no paired test can be made")
            if entry.replicates is not None and _sampled(entry.replicates) != sampled
            else entry
            for entry in kept
        ]
    return kept, apart


def with_phases(kept: Sequence[LeaderboardEntry], candidates: Sequence[LeaderboardEntry]) -> list[LeaderboardEntry]:
    """The entries with their model's prompt and generated text, where each was scored once; other entries as they are."""
    found: dict[tuple[str | None, ...], list[LeaderboardEntry]] = {}
    for entry in candidates:
        found.setdefault(_model_of(entry.result), []).append(entry)
    namesakes = Counter(_model_of(entry.result) for entry in kept)
    made = []
    for entry in kept:
        who = _model_of(entry.result)
        phases = {phase: [each for each in found.get(who, []) if _identity(each.result)[-1] == phase] for phase in ("prompt", "generated")}
        once = namesakes[who] == 1 and all(len(each) == 1 for each in phases.values())
        made.append(replace(entry, phases={phase: each[0] for phase, each in phases.items()}) if once else entry)
    return made


def _model_of(result: Result) -> tuple[str | None, ...]:
    return result.model.name, result.model.revision, result.model.dtype


def with_accuracies(entries: Sequence[LeaderboardEntry], known: Accuracies, *, elsewhere: set[str]) -> list[LeaderboardEntry]:
    """The entries with their accuracy, found by label or by name; without any given, that which the results hold.

    Args:
        elsewhere: names of results that stand apart: their accuracies are left out.

    Raises:
        ResultError: an accuracy belongs to none of the results, or its name to several of them.
    """
    made, used = [], set[str]()
    for entry in entries:
        name = entry.result.model.name
        alike = [other.label for other in entries if other.result.model.name == name]
        if name in known.by_model and name != entry.label and len(alike) > 1:
            raise ResultError(f"accuracy of {name!r}: several results have that name; use one of {', '.join(alike)}")
        key = entry.label if entry.label in known.by_model else name
        used.add(key)
        own = None if known.source or entry.result.measures is None else entry.result.measures.mean_accuracy
        made.append(replace(entry, accuracy=known.by_model.get(key, own)))
    if missing := sorted(known.by_model.keys() - used - elsewhere):
        there = ", ".join(entry.label for entry in entries)
        raise ResultError(f"accuracy of {', '.join(map(repr, missing))}: no such model among the results; there are {there}")
    return made


def _identity(result: Result) -> Identity:
    """What results of one table have in common; a result without a fingerprint has nothing in common with another."""
    own = result.task.fingerprint or f"{UNKNOWN_DATA}{result.model.name}{id(result)}"
    match, phase = str(result.settings.get("match", "none")), str(result.settings.get("phase", "all"))
    return result.task.name, result.task.version, own, result.metrics_version, match, _answers(result), phase


def _answers(result: Result) -> str:
    """How the model's answers were made, and which of them were scored."""
    about = result.settings.get("generation")
    if not about:
        return "none"
    more = [f"{name} {found!r}" for name in ("chat_template", "system", "drop_loops") if (found := result.settings.get(name))]
    return ", ".join([f"{about.get('tokens')} tokens", *(f"{name} {about[name]}" for name in sorted(about) if name != "tokens"), *more])


def _why_apart(found: Identity, chosen: Identity) -> str:
    """Why a result of one identity is not in the table of another."""
    data = str(found[2]), str(chosen[2])
    if any(each.startswith(UNKNOWN_DATA) for each in data):
        which = "it has" if data[0].startswith(UNKNOWN_DATA) else "the result in the table has"
        return (
            f"{which} no fingerprint of its data, so that nothing shows that both read the same texts; score the trace again with "
            "document ids or token ids, or name the data in provenance['task']['fingerprint']"
        )
    names = ("task", "task version", "task fingerprint", "metrics version", "match", "generation", "phase")
    words = [f"{name} {str(a)[:12]} instead of {str(b)[:12]}" for name, a, b in zip(names, found, chosen, strict=True) if a != b]
    made = all(each.startswith(DATA) for each in data) and data[0] != data[1]
    hint = " (made from document ids, domains and token ids; where both read the same texts give both the fingerprint of the task)"
    return f"another {', '.join(words)}{hint if made else ''}"


def _sampled(replicates: Replicates) -> tuple[tuple[str, ...], bytes]:
    """The documents and their domains: what two results must share to be paired."""
    return replicates.documents, np.asarray(replicates.document_domain, np.int64).tobytes()


def labelled(entries: list[LeaderboardEntry]) -> list[LeaderboardEntry]:
    """The entries with names that differ: revision, dtype and at last a number are added where they tell namesakes apart."""
    facts = [
        [(entry.result.model.revision or "").removeprefix("sha256:")[:8] for entry in entries],
        [entry.result.model.dtype or "" for entry in entries],
        [str(number) for number in range(1, len(entries) + 1)],
    ]
    names = [entry.label for entry in entries]
    for more in facts:
        alike = {name: {fact for other, fact in zip(names, more, strict=True) if other == name} for name in names}
        names = [f"{name} @{fact}" if len(alike[name]) > 1 and fact else name for name, fact in zip(names, more, strict=True)]
    shown = labels(names, NAME_WIDTH)
    return [replace(entry, label=shown[name]) for entry, name in zip(entries, names, strict=True)]


def _rankable(entry: LeaderboardEntry, metric: str) -> bool:
    return not entry.baseline and entry.replicates is not None and model_score(entry.result, metric) is not None


def _pairs(entries: list[LeaderboardEntry]) -> list[tuple[LeaderboardEntry, LeaderboardEntry]]:
    models = [entry for entry in entries if not entry.baseline]
    return [(a, b) for index, a in enumerate(models) for b in models[index + 1 :]]


# ---------------------------------------------------------------------------------------------------------------------
# Differences and ranks


@dataclass(frozen=True, kw_only=True)
class PhaseDifference:
    """A metric on a model's prompts and on its generated text; ``test``: generated minus prompt, where the documents are the same."""

    entry: LeaderboardEntry
    metric: str
    prompt: float
    generated: float
    test: Difference | None


def phase_differences(entry: LeaderboardEntry) -> list[PhaseDifference]:
    """Prompt and generated text side by side, for every metric that both have."""
    if not entry.phases:
        return []
    prompt, generated = entry.phases["prompt"], entry.phases["generated"]
    found = []
    for metric in (*REPLICATED, *shared_metrics([prompt.result, generated.result])):
        scores = model_score(prompt.result, metric), model_score(generated.result, metric)
        if scores[0] is None or scores[1] is None:
            continue
        test = difference(generated, prompt, metric, *DEPTHS[0])
        found.append(PhaseDifference(entry=entry, metric=metric, prompt=scores[0], generated=scores[1], test=test))
    return found


def differences(first: LeaderboardEntry, second: LeaderboardEntry) -> list[Difference]:
    """Paired differences of two models for every metric and layer depth, p-values corrected over all of them (Holm)."""
    metrics = (*REPLICATED, *shared_metrics([first.result, second.result]))
    return corrected([found for metric in metrics for depth in DEPTHS if (found := difference(first, second, metric, *depth)) is not None])


def difference(
    first: LeaderboardEntry, second: LeaderboardEntry, metric: str, depth: str, low: float, high: float, *, excess: bool = False
) -> Difference | None:
    """Paired difference of two models at the layers of a relative depth; None where either has no score there.

    Args:
        excess: of the excess over each model's own random router, at all layers; its draw belongs to the interval.
    """
    sides = [_excess(entry, metric) if excess else _at_depth(entry, metric, low, high) for entry in (first, second)]
    if sides[0] is None or sides[1] is None or first.replicates is None or second.replicates is None:
        return None
    if _sampled(first.replicates) != _sampled(second.replicates):
        return None
    (score_first, left_first, draw_first), (score_second, left_second, draw_second) = sides[0], sides[1]
    domain = first.replicates.document_domain
    value = score_first - score_second
    test = paired(value, left_first - left_second, domain, drawn=draw_first + draw_second)
    return Difference(
        first=first.label, second=second.label, metric=metric, depth=depth, score_first=score_first, score_second=score_second,
        difference=value, low=test.low, high=test.high, p=test.p, of="excess" if excess else "score",
    )  # fmt: skip


def _excess(entry: LeaderboardEntry, metric: str) -> tuple[float, np.ndarray, float] | None:
    found = excess_of(entry, metric)
    return None if found is None else (found.value, found.left_out, found.draw_variance)


def _at_depth(entry: LeaderboardEntry, metric: str, low: float, high: float) -> tuple[float, np.ndarray, float] | None:
    """Mean score over the layers of a relative depth, the same without each document [documents], and 0 for what is drawn."""
    if entry.replicates is None or metric not in entry.replicates.by_metric or model_score(entry.result, metric) is None:
        return None
    if (low, high) == (0.0, 1.0):
        return entry.result.record(metric).score, entry.replicates.by_metric[metric][:, -1].astype(np.float64), 0.0
    place = depth_of(len(entry.result.model.layers))
    inside = np.flatnonzero((place >= low - 1e-9) & ((place < high - 1e-9) | (high == 1.0)))
    if not len(inside):
        return None
    scores = {record.layer: record.score for record in entry.result.calibrated if record.metric == metric and record.domain is None}
    score = float(np.mean([scores[entry.result.model.layers[index]] for index in inside]))
    return score, entry.replicates.by_metric[metric][:, inside].astype(np.float64).mean(axis=1), 0.0


def depth_of(layers: int) -> np.ndarray:
    """Relative depth of each MoE layer, 0 the first, 1 the last."""
    return np.linspace(0, 1, layers) if layers > 1 else np.zeros(1)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
