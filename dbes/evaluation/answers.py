"""Results of a recording with answers: of all text, and of prompts and generated text apart, in folders beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dbes.files import discard, sha256_of
from dbes.results import RESULT_FILE, RecordingFacts, Result
from dbes.scoring.loops import find_loops, loop_facts, loop_note, without_loops
from dbes.scoring.phases import phase_facts
from dbes.scoring.score import Scores
from dbes.scoring.tables import save_scores
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, PHASES, PROMPT
from dbes.wording import counted

PHASE_FOLDERS = (PHASES[PROMPT], PHASES[GENERATED])
"""Folders beside a result with the results of its phases."""


def save_answered(
    trace: Trace, folder: Path, facts: RecordingFacts, *, drop: bool, score: Callable[[Trace, int | None], Scores]
) -> Result:
    """Score all text and each phase, and write them; the result of all text comes last and holds what the phases differ in.

    Args:
        drop: leave the generated text of answers that loop out of the scores.
        score: the scores of a phase.

    Raises:
        TraceError: the trace cannot be read.
        FileError: something cannot be written.
    """
    loops = find_loops(trace)
    looping = loop_facts(trace, loops, dropped=drop)
    if drop and loops.looping.any():
        trace = without_loops(trace, loops)
    discard(folder / RESULT_FILE)
    files: dict[str, str] = {}
    phases: dict[str, Scores] = {}
    left = (~np.isnan(loops.repeated) & ~(loops.looping & drop)).any()
    for code in (PROMPT, GENERATED):
        name = PHASES[code]
        discard(folder / name)
        if code == GENERATED and not left:
            continue
        phases[name] = scores = score(trace, code)
        saved = save_scores(scores, folder / name, scores.result)
        files |= {f"{name}/{file}": digest for file, digest in saved.files.items()}
        files[f"{name}/{RESULT_FILE}"] = sha256_of(folder / name / RESULT_FILE)
    scores = score(trace, None)
    companions = {**scores.result.companions, "loops": looping}
    if len(phases) == len(PHASE_FOLDERS):
        companions["phases"] = phase_facts(phases[PHASES[PROMPT]], phases[PHASES[GENERATED]])
    notes = [*_notes(trace, facts, bool(left)), *filter(None, [loop_note(looping)])]
    update = {"companions": companions, "files": files, "warnings": (*notes, *scores.result.warnings)}
    result = scores.result.model_copy(update=update)
    return save_scores(replace(scores, result=result), folder, result)


def _notes(trace: Trace, facts: RecordingFacts, generated: bool) -> Iterator[str]:
    if cut := trace.provenance.get("documents_cut"):
        yield f"{counted(cut, 'document')} of {facts.documents:,} were cut at the end, to the window and to leave room for an answer"
    if not generated:
        yield (
            "no generated token is left to score: the last token of an answer is never fed to the model and has no routing, so answers of "
            "one token, and empty ones, show nothing"
        )
