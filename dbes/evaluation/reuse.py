"""Whether the finished result in a folder answers what is asked now: the same settings, model, texts and software, and all files there.

Whatever can change a number is compared. Results of earlier versions do not hold all of it: what they lack is named, not guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dbes.errors import DbesError, FileError, ResultError
from dbes.evaluation.measuring import lacking
from dbes.evaluation.options import GENERATION
from dbes.evaluation.request import Expected, Job, Request
from dbes.files import discard, locked, remove_abandoned, sha256_of
from dbes.recording.ledger import UNITS
from dbes.result_parts import OwnMetric
from dbes.results import METRICS_VERSION, RESULT_FILE, Result, load_result
from dbes.scoring.tables import COMPANIONS
from dbes.trace.store import TRACE_FOLDER, Trace

VERSIONS = ("dbes", "torch", "transformers")
"""Packages whose version is part of a recording's identity."""

notes = logging.getLogger("dbes")
"""Says what is not an error but should be known: that a result was reused, or that missing files are made again."""

Difference = tuple[str, Any, Any]
"""Name, what was recorded, what is asked now."""


def differences(found: Result, request: Request, expected: Expected) -> tuple[list[Difference], list[str]]:
    """What a finished result was made with otherwise than is asked now, and names of what it does not say."""
    other: list[Difference] = []
    unknown: list[str] = []

    def compare(name: str, then: Any, now: Any) -> None:
        if then is None:
            unknown.append(name)
        elif then != now:
            other.append((name, _short(then), _short(now)))

    settings, environment = found.settings, found.environment
    for name in ("permutations", "seed", "limit", "batch_size", "trust_remote_code"):
        if name not in settings:
            unknown.append(name)
        elif settings[name] != getattr(request, name):
            other.append((name, settings[name], getattr(request, name)))
    then_own, now_own = found.own_metrics, {metric.name: metric.facts for metric in request.metrics}
    if {name: each.identity for name, each in then_own.items()} != {name: each.identity for name, each in now_own.items()}:
        other.append(("metrics of your own", _named(then_own), _named(now_own)))
    if (then := list(settings.get("strata", ()))) != list(request.strata):
        other.append(("strata", ", ".join(then) or "none", ", ".join(request.strata) or "none"))
    for name in GENERATION:
        if (then := settings.get(name)) != (now := request.settings.get(name)):
            other.append((name, _short(then), _short(now)))
    asked = (request.dtype, request.device_map, expected.accelerator)
    made = (settings.get("dtype"), settings.get("device_map"), environment.get("accelerator"))
    if request.model is None or made != asked:
        # not asked in the same words on the same kind of machine: then it must come to the same
        compare("dtype", found.model.dtype, expected.dtype or request.dtype)
        if expected.device is not None:
            compare("device", environment.get("device"), expected.device)
    for name in ("attention", "experts_implementation", "tokenizer_sha256"):
        if (now := getattr(expected, name)) is not None:
            compare(name.removesuffix("_sha256"), environment.get(name), now)
    for name in VERSIONS:
        compare(f"version of {name}", environment.get(f"recorded_with_{name}"), version(name))
    compare("version of dbes that scored", environment.get("dbes"), version("dbes"))
    compare("metrics version", found.metrics_version, METRICS_VERSION)
    compare("task version", found.task.version, expected.task.get("version"))
    compare("task fingerprint", found.task.fingerprint, expected.task.get("fingerprint"))
    return other, unknown


def _named(own: Mapping[str, OwnMetric]) -> str:
    return ", ".join(f"{name} (version {each.version}, source {(each.sha256 or 'unknown')[:8]})" for name, each in own.items()) or "none"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def other_recording(about: Mapping[str, Any], expected: Expected, request: Request) -> list[str]:
    """Names of the facts in which a finished recording is another than would be made now."""
    task = dict(expected.task)
    task.pop("cautions", None)  # what is said of the texts, which are the same where the fingerprint is
    now = {
        **expected.about,
        "seed": request.seed,
        "batch_size": request.batch_size,
        "versions": {name: version(name) for name in VERSIONS},
    }
    # recordings of earlier versions do not say their batch size
    other = [name for name, value in now.items() if about.get(name) != value and not (name == "batch_size" and name not in about)]
    other += ["loss"] if request.loss and not about.get("loss") else []
    answers, chat = request.settings.get("generation"), about.get("chat_template") or {}
    other += ["generation"] * (about.get("generation") != answers)
    other += ["chat template"] * ((bool(chat), chat.get("system")) != (request.chat_template, request.system))
    recorded = about.get("task") or {}
    return other + ["task"] * any(recorded.get(name) != value for name, value in task.items())


def missing_files(folder: Path, found: Result) -> list[str]:
    """Companions of a finished result that are not there, or not as it was written; of old results only whether they are there."""
    if not found.files:
        return [name for name in COMPANIONS if not (folder / name).is_file()]
    return [name for name, digest in found.files.items() if not _is(folder / name, digest)]


def _is(path: Path, digest: str) -> bool:
    try:
        return path.is_file() and sha256_of(path) == digest
    except OSError:
        return False


def whole_trace(folder: Path) -> Trace | None:
    """The finished recording in a folder with all its shards, each as long as it says; None where there is none."""
    try:
        trace = Trace.load(folder)
        whole = all(_complete(part.path / entry.name) for part in (trace, *trace.controls) if part.path for entry in part.entries)
        return trace if whole else None
    except (DbesError, OSError):
        return None


def _complete(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says, which safetensors checks as it opens one."""
    try:
        with safe_open(path, "numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def same_result(job: Job) -> tuple[Result, list[str]] | None:
    """The finished result of this very job, if there is one, and what could not be compared because it does not say.

    Raises:
        ResultError: the folder holds a finished result of something else, or a file that is no result.
    """
    folder = job.folder
    if not (folder / RESULT_FILE).exists():
        return None
    try:
        found = load_result(folder)
    except DbesError as problem:
        raise ResultError(f"{problem}; use --overwrite or another --output-path") from None
    if found.status != "ok":
        return None
    other, unknown = differences(found, job.request, job.expected)
    if other:
        names = " and ".join(name for name, _, _ in other)
        details = "; ".join(f"{name}: recorded {then}, asked {now}" for name, then, now in other)
        raise ResultError(f"{folder}: holds a finished result with another {names}; use --overwrite or another --output-path ({details})")
    return found, unknown


def finished_result(job: Job) -> Result | None:
    """The finished result of this job when nothing of it is missing; otherwise None."""
    if (same := same_result(job)) is None:
        return None
    found, unknown = same
    folder = job.folder
    kept = (folder / TRACE_FOLDER).is_dir()
    whole = not (kept and job.save_trace) or whole_trace(folder / TRACE_FOLDER) is not None
    if lacking(job, found.measures) or missing_files(folder, found) or not whole:
        return None
    told = [f"{folder}: reused, recorded at {found.created}"]
    if unknown:
        told.append(f"it does not say, so these were not compared: {', '.join(unknown)}")
    if job.save_trace and not kept:
        told.append("its routes were not kept, --overwrite records them")
    try:
        with locked(folder):
            tidy(job)
    except FileError as problem:
        # on a read-only disk, or beside another run, the result is shown all the same
        if kept and not job.save_trace:
            told.append(f"its routes are still there: {problem}")
    notes.warning("; ".join(told))
    return found


def only_lacking(job: Job, found: Result) -> bool:
    """Whether a finished result and its routes are whole, so that only what it lacks is to be measured."""
    trace = whole_trace(job.folder / TRACE_FOLDER)
    if not lacking(job, found.measures) or trace is None:
        return False
    return not missing_files(job.folder, found) and not other_recording(trace.provenance, job.expected, job.request)


def tidy(job: Job) -> None:
    """Remove what a killed run of the same job left, and the routes where they are not to be kept."""
    trace = job.folder / TRACE_FOLDER
    for folder in (trace, *(path for path in trace.rglob("*") if path.is_dir())):
        remove_abandoned(folder)
    discard(trace / UNITS)
    if not job.save_trace and trace.is_dir():
        discard(trace)
