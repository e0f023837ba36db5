"""Whether a result may be published: does it load, is it complete, and can its numbers be true together?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from dbes.comparison.entries import read_replicates
from dbes.errors import DbesError
from dbes.results import CalibratedRecord, Result, load_result, result_files
from dbes.scoring.estimates import CALIBRATED
from dbes.scoring.score import EXCESS, REPLICATED
from dbes.scoring.tables import read_arrays, read_usage

CLOSE = 1e-6
MEANS = ("specialization", "domain_isolation", "stiffness")
"""Metrics whose model value is the mean over domains of their values."""


def check_folder(folder: str | Path) -> list[str]:
    """What is wrong with a result folder, one line each; empty when it may be published.

    The task's fingerprint is compared with the task that ships under that name, if there is one.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    try:
        result = load_result(folder)
    except DbesError as problem:
        return [str(problem)]
    if result.status != "ok":
        return [f"the evaluation failed: {result.error}"]
    problems = [*_identity(result), *_counts(result), *_records(result), *_specialists(result)]
    try:
        usage = read_usage(folder, result)
        read_arrays(folder, result)
        replicates = read_replicates(folder, result)
    except DbesError as problem:
        return [*problems, str(problem)]
    if replicates is None:
        problems.append("no replicates.safetensors: the result cannot be ranked; write it again with this dbes")
    elif len(replicates.documents) != result.settings.get("groups", sum(facts.sources for facts in result.task.domains.values())):
        problems.append("replicates: their documents are not those of the result")
    elif missing := {*REPLICATED, *result.own_metrics} - set(replicates.by_metric):
        problems.append(f"replicates: {', '.join(sorted(missing))} missing")
    else:
        problems += _replicates(result, replicates.by_metric)
    if usage is not None:
        hits, share = (np.asarray(usage[name], float) for name in ("hits", "share"))
        ran = hits > 0
        if (hits < 0).any() or (share[ran] > 1 + CLOSE).any():
            problems.append("expert usage: hits below 0 or shares above 1")
        sums = np.asarray(usage[ran].groupby(["domain", "layer"])["share"].sum(), float)
        if (np.abs(sums - 1) > 1e-4).any():
            problems.append("expert usage: shares of a layer do not add up to 1")
        counted = usage.groupby(["domain", "layer"])["hits"].transform("sum").to_numpy(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_hits = hits / counted
        if not np.allclose(of_hits[ran], share[ran], atol=CLOSE):
            problems.append("expert usage: shares do not follow from the hits")
        # A lift is measured on half of the documents, so the hits do not give it; it is a share over a mean of which it is one.
        low, lift, high = (np.asarray(usage[name], float) for name in ("lift_low", "lift", "lift_high"))
        if ((low > lift) | (lift > high) | (lift < 0) | (lift > len(result.task.domains) + CLOSE)).any():
            problems.append("expert usage: a lift outside its interval, below 0, or above the number of domains")
    return problems


def check_all(paths: Sequence[Path]) -> list[str]:
    """What is wrong with every result below the paths, with its file in front.

    Raises:
        ResultError: there is no result at all.
    """
    files = result_files(paths)
    return [problem if problem.startswith(str(file)) else f"{file}: {problem}" for file in files for problem in check_folder(file)]


def _replicates(result: Result, by_metric: dict[str, np.ndarray]) -> Iterator[str]:
    """Leaving one document out moves a score by little: replicates of another model or seed do not fit."""
    for metric, array in by_metric.items():
        record = result.record(metric.removesuffix(EXCESS))
        score, mean = record.excess if metric.endswith(EXCESS) else record.score, float(array[:, -1].mean(dtype=float))
        if not math.isnan(score) and not math.isnan(mean) and abs(score - mean) > 0.05:
            yield f"replicates: {metric} is about {mean:.3f} in them and {score:.3f} in the result"


def _identity(result: Result) -> Iterator[str]:
    from dbes.evaluation.request import read_benchmark
    from dbes.tasks.task import list_tasks

    if not result.task.fingerprint:
        yield "task: no fingerprint, so nobody can tell which documents were read"
    if not result.model.revision and not result.model.name.endswith(" router"):
        yield "model: no revision"
    if "dbes" not in result.environment:
        yield "environment: no version of dbes"
    try:
        datetime.fromisoformat(result.created)
    except ValueError:
        yield f"created: {result.created!r} is not a date"
    shipped = {task.name for task in list_tasks()}
    if result.task.name in shipped and result.settings.get("limit") is None:
        try:
            benchmark = read_benchmark(result.task.name)
        except DbesError:  # its data are not on this machine
            return
        version = benchmark.task.version
        if version == result.task.version and benchmark.facts["fingerprint"] != result.task.fingerprint:
            yield f"task {result.task.name}: fingerprint differs from that of the documents shipped as version {version}"


def _counts(result: Result) -> Iterator[str]:
    model, task, recording = result.model, result.task, result.recording
    if not len(model.layers) == len(model.experts) == len(model.top_k) or not model.layers:
        yield "model: layers, experts and top_k differ in length"
    if any(k < 1 or k > experts for experts, k in zip(model.experts, model.top_k, strict=False)):
        yield "model: top_k outside 1..experts"
    if recording is None:
        yield "recording: missing"
        return
    scored, whole = sum(facts.tokens for facts in task.domains.values()), not result.settings.get("drop_loops")
    if whole and result.settings.get("phase", "all") == "all" and scored != recording.tokens - (recording.template_tokens or 0):
        yield "tokens of the domains do not add up to the tokens recorded"
    if any(not 0 < facts.sources <= facts.documents <= facts.tokens for facts in task.domains.values()):
        yield "a domain has no documents, more sources than documents, or fewer tokens than documents"


def _records(result: Result) -> Iterator[str]:
    expected = len(result.model.layers) + 1
    seen: dict[str, list[CalibratedRecord]] = {}
    for record in result.calibrated:
        seen.setdefault(record.metric, []).append(record)
    for metric in (*REPLICATED, *result.own_metrics):
        if metric not in seen:
            yield f"{metric}: missing"
    for metric, records in seen.items():
        rows = {None, *result.task.domains} if result.by_domain(metric) else {None}
        cells = {(record.layer, record.domain) for record in records}
        if len(cells) != len(records) or cells != {(layer, row) for layer in (*result.model.layers, None) for row in rows}:
            yield f"{metric}: expected {expected} x {len(rows)} records, one for each layer and domain"
            continue
        bad = [problem for record in records if (problem := _impossible(record, len(result.task.domains)))]
        if bad:
            yield f"{metric}: {bad[0]}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
        at = {(record.layer, record.domain): record.value for record in records}
        if metric in MEANS:
            mean = sum(at[None, domain] for domain in result.task.domains) / len(result.task.domains)
            if not math.isnan(mean) and abs(mean - at[None, None]) > CLOSE:
                yield f"{metric}: the model's value {at[None, None]:.6f} is not the mean of its domains, {mean:.6f}"


def _impossible(record: CalibratedRecord, domains: int) -> str | None:
    where = f"layer {record.layer}, domain {record.domain}"
    if not math.isnan(record.p) and not 0 < record.p <= 1:
        return f"p = {record.p} ({where})"
    if record.metric in CALIBRATED and ((record.score > 1.05 and not record.score_low <= 1.0) or record.score < -5):
        return f"score {record.score} ({where})"
    if record.metric == "specialization" and not -CLOSE <= (0.0 if math.isnan(record.value) else record.value) <= math.log(domains) + CLOSE:
        return f"value {record.value} outside 0..ln {domains} ({where})"
    for value, low, high in ((record.score, record.score_low, record.score_high), (record.excess, record.excess_low, record.excess_high)):
        if not any(map(math.isnan, (value, low, high))) and not low - CLOSE <= value <= high + CLOSE:
            return f"{value} outside its own interval {low}..{high} ({where})"
    scaled = record.metric in ("specialization", "der", "domain_isolation") and record.reference > 1e-3
    if scaled and abs(record.corrected / record.reference - record.score) > 1e-3:  # never where either is NaN
        return f"score {record.score} is not corrected / reference ({where})"
    return None


def _specialists(result: Result) -> Iterator[str]:
    sizes = dict(zip(result.model.layers, result.model.experts, strict=False))
    for each in result.specialists:
        where = f"specialist layer {each.layer}, expert {each.expert}, {each.domain}"
        if each.domain not in result.task.domains or not 0 <= each.expert < sizes.get(each.layer, 0):
            yield f"{where}: no such expert or domain"
        elif not (
            each.hits > 0 and 0 < each.share <= 1 and each.lift_low <= each.lift <= each.lift_high and 0 <= each.q <= 0.05 and each.lift > 1
        ):
            yield f"{where}: hits, share, lift or q cannot be true"
        else:
            continue
        return
