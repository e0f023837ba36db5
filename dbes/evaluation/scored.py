"""The scores of a recorded trace, with what was asked and recorded, and what was measured beside."""

from __future__ import annotations

from dataclasses import replace

from dbes.evaluation.answers import save_answered
from dbes.evaluation.request import Job, accelerator_here
from dbes.evaluation.reuse import tidy
from dbes.measures import Measures
from dbes.results import RecordingFacts, Result
from dbes.scoring.score import Scores, score_tables
from dbes.scoring.tables import save_scores
from dbes.trace.store import Trace


def scored(job: Job, trace: Trace, facts: RecordingFacts, measures: Measures | None) -> Result:
    """Score the trace of a job and write the result; ``result.json`` last."""
    request = job.request
    if request.generation is not None:
        result = save_answered(
            trace, job.folder, facts, drop=request.drop_loops, score=lambda part, phase: _scores(job, part, facts, phase)
        )
    else:
        scores = _scores(job, trace, facts, measures=measures)
        result = save_scores(scores, job.folder, scores.result)
    tidy(job)
    return result


def _scores(job: Job, trace: Trace, facts: RecordingFacts, phase: int | None = None, *, measures: Measures | None = None) -> Scores:
    """The scores of a phase (None: of all text), and in their result what was asked and recorded."""
    request = job.request
    asked = {"permutations": request.permutations, "seed": request.seed, "metrics": request.metrics, "strata": request.strata}
    scores = score_tables(trace, phase=phase, **asked)
    about = {"accelerator": accelerator_here()}
    if tokenizer := trace.provenance.get("tokenizer_sha256"):
        about["tokenizer_sha256"] = str(tokenizer)
    result = scores.result.model_copy(
        update={
            "recording": facts,
            "measures": measures,
            "environment": {**scores.result.environment, **about},
            "settings": {**scores.result.settings, **request.settings},
        }
    )
    return replace(scores, result=result)
