"""The two recordings of an agreement: their traces, names that tell them apart, and their scores paired by document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dbes.comparison.alignment import Common, Left
from dbes.comparison.compare import differences
from dbes.comparison.entries import LeaderboardEntry, Replicates, read_replicates
from dbes.comparison.ranks import Difference
from dbes.errors import DbesError, ResultError
from dbes.results import RESULT_FILE, Result, load_result, result_files
from dbes.scoring.score import score_tables
from dbes.text import label
from dbes.trace.store import MANIFEST, TRACE_FOLDER, Trace

NAME_WIDTH = 64

TELLING = ("dtype", "revision", "engine", "quantization", "device", "experts_implementation")
"""Facts that tell two recordings of one model apart, the first that differs is shown."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A recording, and its result where it was scored.

    Attributes:
        name: as it is shown, unlike the other's.
        folder: of the result.
    """

    trace: Trace
    name: str
    result: Result | None = None
    folder: Path | None = None


def opened(first: Trace | Result | str | Path, second: Trace | Result | str | Path) -> tuple[Recorded, Recorded]:
    """Both recordings, named so that they can be told apart.

    Raises:
        ResultError: there is no result, or it did not keep its routes.
        TraceError: a trace is incomplete or altered.
    """
    one, other = _open(first), _open(second)
    names = [str(each.trace.provenance.get("model") or "unnamed") for each in (one, other)]
    if names[0] == names[1]:
        facts = [_facts(each.trace.provenance) for each in (one, other)]
        telling = next((fact for fact in TELLING if facts[0][fact] != facts[1][fact]), None)
        marks = [facts[side][telling] for side in (0, 1)] if telling else ["first", "second"]
        names = [f"{name} ({mark})" for name, mark in zip(names, marks, strict=True)]
    return replace(one, name=label(names[0], NAME_WIDTH)), replace(other, name=label(names[1], NAME_WIDTH))


def _facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(provenance.get(name) or f"{name} unknown").removeprefix("sha256:")[:24] for name in TELLING}


def _open(given: Trace | Result | str | Path) -> Recorded:
    if isinstance(given, Trace):
        return Recorded(trace=given, name="")
    if isinstance(given, Result):
        if given.folder is None:
            raise ResultError(f"the result of {given.model.name} was not written, so that its routes are not known; give output_path")
        return _of_result(given, given.folder)
    path = Path(given)
    if (path / MANIFEST).is_file():
        return Recorded(trace=Trace.load(path), name="")
    files = result_files([path])
    if len(files) > 1:
        raise ResultError(f"{path}: holds {len(files)} results; name the folder of one of them")
    return _of_result(load_result(files[0]), files[0].parent)


def _of_result(result: Result, folder: Path) -> Recorded:
    if not (folder / TRACE_FOLDER / MANIFEST).is_file():
        raise ResultError(
            f"{folder / RESULT_FILE}: its routes were not kept ({TRACE_FOLDER}/ is missing); evaluate again with --save-trace"
        )
    return Recorded(trace=Trace.load(folder / TRACE_FOLDER), name="", result=result, folder=folder)


def score_differences(one: Recorded, other: Recorded, common: Common, left: Left) -> tuple[list[Difference], str | None]:
    """Paired differences of every metric and depth, or why there are none.

    Results are used where they were scored on the whole recording; else the recording is scored, without permutations, which neither
    scores nor their intervals need.
    """
    if common.only_first or common.only_second or left.first or left.second:
        return [], "the recordings do not hold the same documents and tokens"
    try:
        first, second = _entry(one), _entry(other)
    except DbesError as problem:
        return [], str(problem)
    for entry in (first, second):
        if entry.replicates is None:
            return [], entry.problem or f"{entry.label} has no scores by document"
    second = _in_order_of(first, second)
    found = differences(first, second)
    return found, None if found else "no metric has a value at every layer and domain of both"


def _entry(recorded: Recorded) -> LeaderboardEntry:
    """Scores of a recording with each document left out."""
    result, folder = recorded.result, recorded.folder or Path()
    if result is not None and _whole(result):
        return LeaderboardEntry(result=result, folder=folder, label=recorded.name, replicates=read_replicates(folder, result))
    scores = score_tables(recorded.trace, permutations=0)
    shape = scores.counts.shape
    kept = Replicates(documents=shape.document_ids, document_domain=shape.document_domain, by_metric=scores.replicates)
    return LeaderboardEntry(result=scores.result, folder=folder, label=recorded.name, replicates=kept)


def _whole(result: Result) -> bool:
    return result.status == "ok" and result.settings.get("phase", "all") == "all" and result.settings.get("match", "none") == "none"


def _in_order_of(first: LeaderboardEntry, second: LeaderboardEntry) -> LeaderboardEntry:
    """The second entry with its documents in the order of the first's, where they are the same."""
    assert first.replicates is not None and second.replicates is not None
    ours, theirs = (list(zip(each.documents, each.document_domain.tolist(), strict=True)) for each in (first.replicates, second.replicates))
    if ours == theirs or set(ours) != set(theirs):
        return second
    place = {document: index for index, document in enumerate(theirs)}
    rows = np.asarray([place[document] for document in ours])
    kept = second.replicates
    by_metric = {name: array[rows] for name, array in kept.by_metric.items()}
    return replace(second, replicates=Replicates(documents=first.replicates.documents, document_domain=kept.document_domain[rows],
                                                 by_metric=by_metric))  # fmt: skip
