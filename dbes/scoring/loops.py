"""Answers that go round in circles: their repeated tokens repeat their routing, which looks like n-gram expertise and is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbes.errors import TraceError
from dbes.scoring.sums import of_phase
from dbes.trace.matching import cut
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, document_starts
from dbes.wording import counted

LOOP_NGRAM = 8
"""Tokens of a run that is looked for earlier in the same answer."""

LOOP_SHARE = 0.25
"""An answer loops where at least this share of its tokens lies in such repeats."""

DROPPED = "loops_dropped"
"""Key of the provenance: how many answers were left out because they loop."""


@dataclass(frozen=True, kw_only=True)
class Loops:
    """What of the answers of a trace repeats itself.

    Attributes:
        repeated: float [documents], share of the tokens of each answer that lie in a run of LOOP_NGRAM tokens which began earlier in the
            same answer too; NaN for a document without an answer.
        begins: int64 [documents], position of the first token of the answer; of a document without one beyond its end.
    """

    repeated: np.ndarray
    begins: np.ndarray

    @property
    def looping(self) -> np.ndarray:
        """bool [documents]."""
        return np.nan_to_num(self.repeated) >= LOOP_SHARE


def repeated_tokens(token_ids: np.ndarray, *, size: int = LOOP_NGRAM) -> np.ndarray:
    """bool [tokens]: lies in a run of ``size`` tokens that began earlier too; a repeat may overlap what it repeats."""
    inside = np.zeros(len(token_ids), bool)
    if len(token_ids) <= size:
        return inside
    runs = np.lib.stride_tricks.sliding_window_view(token_ids, size)
    _, first, same = np.unique(runs, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[same.reshape(-1)] < np.arange(len(runs)))
    inside[(again[:, None] + np.arange(size)).reshape(-1)] = True
    return inside


def find_loops(trace: Trace) -> Loops:
    """The repeats in the answers of a trace.

    Raises:
        TraceError: it has no token ids; a shard is missing, altered or inconsistent.
    """
    documents = len(trace.shape.document_domain)
    repeated, begins = np.full(documents, np.nan), np.full(documents, np.iinfo(np.int32).max, np.int64)
    for routes in trace.with_columns("token_ids", "phase"):
        if routes.token_ids is None:
            raise TraceError("the trace has no token ids: whether an answer repeats itself cannot be told")
        answers = routes.take(np.flatnonzero(of_phase(routes, GENERATED)))
        starts = document_starts(answers.document)
        assert answers.token_ids is not None
        for start, end in zip(starts, [*starts[1:], len(answers)], strict=True):
            document = answers.document[start]
            repeated[document] = repeated_tokens(answers.token_ids[start:end]).mean()
            begins[document] = answers.positions[start]
    return Loops(repeated=repeated, begins=begins)


def without_loops(trace: Trace, loops: Loops) -> Trace:
    """The trace without the answers that loop; their prompts stay."""
    kept = np.where(loops.looping, loops.begins, np.iinfo(np.int32).max)
    return cut(trace, kept, {DROPPED: int(loops.looping.sum())})


def loop_facts(trace: Trace, loops: Loops, *, dropped: bool) -> dict[str, Any]:
    """What a result says of them: answers and those that loop, of each domain, and the ids of these."""
    shape, answered = trace.shape, ~np.isnan(loops.repeated)

    def by_domain(chosen: np.ndarray) -> dict[str, int]:
        return {name: int((chosen & (shape.document_domain == index)).sum()) for index, name in enumerate(shape.domains)}

    return {
        "ngram": LOOP_NGRAM,
        "share": LOOP_SHARE,
        "dropped": dropped,
        "answers": by_domain(answered),
        "by_domain": by_domain(loops.looping),
        "documents": [shape.document_ids[index] for index in np.flatnonzero(loops.looping)],
    }


def loop_note(facts: Mapping[str, Any]) -> str | None:
    """What is to be said of answers that loop."""
    looping, answers = sum(facts["by_domain"].values()), sum(facts["answers"].values())
    if not looping:
        return None
    told = "their generated tokens were left out" if facts["dropped"] else "they inflate n-gram expertise; --drop-loops leaves them out"
    return (
        f"{counted(looping, 'answer')} of {answers:,} repeat themselves ({facts['share']:.0%} or more of the tokens lie in runs of "
        f"{facts['ngram']} tokens seen earlier in the same answer): {told}"
    )
