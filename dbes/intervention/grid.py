"""Runs an experiment: paths, search for learning rates, every arm with every seed, masks; never a finished run again."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dbes.errors import FileError, InterventionError, SettingError
from dbes.files import locked, write_json
from dbes.finetuning.output import refuse_untrainable
from dbes.intervention.analysis import analyse
from dbes.intervention.arms import SEARCH_SEED, Plan, evidence_of, plan_arms
from dbes.intervention.data import ExperimentData, Texts, load_data, read_sources, save_data, tokenize
from dbes.intervention.masking import MaskJob, execute_masks, plan_masks
from dbes.intervention.records import EXPERIMENT_SCHEMA, check_curve, check_documents, read_about, read_mask_record, read_run_record
from dbes.intervention.routing import prescription_of, routable, routed
from dbes.intervention.runs import execute, measure, measure_items
from dbes.intervention.settings import Arm, ArmRun, InterventionSettings, run_key, run_of
from dbes.models import load_model, load_weights
from dbes.models.windows import embedding_rows
from dbes.reporting.outcome import EXPERIMENT_FILE, OUTCOME_FILE, OUTCOME_SCHEMA, Outcome
from dbes.schema import read_record
from dbes.shipped import EMBEDDED_MODEL, EMBEDDED_NAME
from dbes.testbed.prescribed import Prescription
from dbes.testbed.runner import run_jobs
from dbes.text import unknown

RUNS, MASKS, DATA = "runs", "masks", "data.safetensors"

Progress = Callable[[str], None]


def intervene(
    model: str | Path,
    out: str | Path,
    settings: InterventionSettings,
    *,
    texts: str | Path = "task:embedded",
    targets: Sequence[str] | None = None,
    cache: Path = Path("build/testbed"),
    processes: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Does training a domain's expert path pay? Train every kind of path, and what it must beat, and compare on held-out texts.

    What ``out`` does not hold yet is run, so the same call resumes an interrupted experiment. `report` makes a page of the folder.

    Args:
        model: folder, hub id, or ``"embedded"``.
        out: folder of the experiment.
        settings: targets, rules, budgets, seeds, steps, ...
        texts: ``task:NAME``, ``mix:NAME`` (of the testbed), or a folder of JSONL files.
        targets: a domain of the texts, ``NAME=FILE`` or ``NAME=TRAINING,HELDOUT`` for each of the settings' domains; by default these.
        cache: where built mixes are kept.
        processes: runs at a time, one thread each; 1 runs them in this process.
        progress: called with what is done now, in words.

    Returns:
        The outcome, as in ``intervention.json``: arms, contrasts and verdicts of every target, and ``verdict`` over all.

    Raises:
        InterventionError: the texts or settings cannot be used; the folder holds another experiment.
        FileError: the folder cannot be written to, or another run is writing there.
        DbesError: the model or the texts cannot be read.
    """
    model, out, texts, given = str(model), Path(out), str(texts), list(targets or settings.domains)
    if (out / OUTCOME_FILE).is_file() and not os.access(out, os.W_OK):
        return _outcome_on_read_only_disk(out, [model, texts, given, settings.model_dump(mode="json")])
    say = progress or (lambda _: None)
    torch.set_num_threads(1)
    where = str(EMBEDDED_MODEL) if model == "embedded" else model
    with locked(out):
        plan, masks, key = _planned(model, where, out, settings, texts=texts, given=given, cache=cache, say=say)
        rates = search_rates(out, plan, settings, key, where=where, processes=processes, say=say)
        final = [run_of(arm, rate=_rate(arm, rates)) for arm in plan.arms if arm.seed != SEARCH_SEED]
        _run_all(out, final, masks, key, where=where, processes=processes, say=say)
        outcome = analyse(*read_experiment(out))
        write_json(out / OUTCOME_FILE, outcome)
    return outcome


def _outcome_on_read_only_disk(out: Path, asked: list[Any]) -> dict[str, Any]:
    """The finished outcome of an experiment that was asked for in the same words; nothing can be added to it.

    Args:
        asked: model, texts, targets and settings, as they were given.

    Raises:
        FileError: it was asked for otherwise.
    """
    about, outcome = read_about(out), read_record(out / OUTCOME_FILE, Outcome, error=InterventionError, versions=(OUTCOME_SCHEMA,))
    if [about["model"].get("where"), about.get("texts"), about.get("given"), outcome.get("settings")] != asked:
        raise FileError(f"{out}: cannot be written, and holds an experiment with other settings; choose another --out")
    return outcome


def _planned(
    model: str, where: str, out: Path, settings: InterventionSettings, *, texts: str, given: list[str], cache: Path, say: Progress
) -> tuple[Plan, list[MaskJob], str]:
    """The arms and masks of an experiment and its key, after what it is and its data were written to the folder."""
    prescription = prescription_of(where, settings)
    refuse_untrainable(where)
    loaded = load_model(where, name=EMBEDDED_NAME if model == "embedded" else None)
    sources = _sources(texts, given, settings, prescription, cache=cache, say=say)
    data = tokenize(sources, loaded.tokenizer, targets=settings.domains, settings=settings, known=embedding_rows(loaded.model))
    for name in settings.domains:
        if not [other for other in data.domains if other not in (name, *settings.new)]:
            raise InterventionError(f"domain {name!r}: no other domain is left to measure forgetting on")
    facts = None if prescription is None else prescription.model_dump(mode="json")
    data, key = _checked_folder(out, data, partial(run_key, settings, model=loaded.revision, prescribed=facts), say=say)
    say(f"finding paths in {len(data.domains)} domains")
    with routed(loaded.model, prescription) as prescribed:
        evidence = evidence_of(loaded, sources, targets=settings.domains, settings=settings, prescribed=prescribed)
        base = measure(loaded.model, {domain: data.parts[domain, "heldout"] for domain in data.domains}, prescribed)
    plan = plan_arms(evidence, loaded.model, settings)
    masks = plan_masks(evidence, plan, settings)
    for skipped in plan.skipped:
        say(f"{skipped['target']}: no arm {skipped['arm']} at {skipped['budget']:.0%}: {skipped['reason']}")
    for (target, rule, budget), path in plan.paths.items():
        path.save(out / "paths" / f"{target}-{rule}-{budget:g}.json")
    save_data(data, out / DATA)
    about = {
        "schema_version": EXPERIMENT_SCHEMA,
        "key": key,
        "model": {"name": loaded.name, "revision": loaded.revision, "parameters": loaded.parameters, "where": model},
        "texts": texts,
        "given": given,
        **_measured_on(data),
        "base": base,
        "settings": settings.model_dump(mode="json"),
        "arms": [arm.model_dump(mode="json") for arm in plan.arms],
        "paths": {f"{t}/{r}/{b:g}": _path_facts(path) for (t, r, b), path in plan.paths.items()},
        "masks": [job.model_dump(mode="json") for job in masks],
        "skipped": list(plan.skipped),
        "versions": {
            "dbes": version("dbes"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if facts is not None:
        about["prescribed"] = facts
    if data.items:
        choices = {domain: items.choices.tolist() for domain, items in data.items.items()}
        with routed(loaded.model, prescription) as prescribed:
            asked = measure_items(loaded.model, data.items, padding=data.boundary, prescribed=prescribed)
        about["accuracy"] = {"choices": choices, **asked}
    write_json(out / EXPERIMENT_FILE, about)
    return plan, masks, key


def _sources(
    texts: str, targets: Sequence[str], settings: InterventionSettings, prescription: Prescription | None, *, cache: Path, say: Progress
) -> Texts:
    """The texts of all domains that the model can be routed by."""
    sources, names = read_sources(texts, targets, cache=cache)
    if names != settings.domains:
        raise InterventionError(f"targets {list(names)} are not the settings' domains {list(settings.domains)}")
    for strange in sorted(set(settings.new) - set(sources.domains)):
        raise SettingError(unknown("domain of the texts", strange, sources.domains))
    sources, left_out = routable(sources, prescription)
    if left_out:
        say(f"left out, as the model has no block of experts for them: {', '.join(left_out)}")
    return sources


def _checked_folder(out: Path, data: ExperimentData, key_of: Callable[..., str], *, say: Progress) -> tuple[ExperimentData, str]:
    """The data and key of the experiment: with items, unless the folder's was begun without them.

    More rules, budgets or seeds of the same experiment are welcome.

    Raises:
        InterventionError: the folder holds another experiment.
    """
    key = key_of(data=data.digest)
    earlier = read_about(out)["key"] if (out / EXPERIMENT_FILE).is_file() else key
    plain = data.without_items()
    if data.items and earlier == key_of(data=plain.digest):
        # begun before items were measured: its finished runs know no accuracy
        say("this experiment was begun without accuracy and resumes without; choose another --out to measure it")
        return plain, earlier
    if earlier != key:
        raise InterventionError(
            f"{out}: holds an experiment with another model, other texts, targets, training or routing; choose another --out"
        )
    return data, key


def _measured_on(data: ExperimentData) -> dict[str, Any]:
    heldout = {domain: data.parts[domain, "heldout"] for domain in data.domains}
    return {
        "data": {"digest": data.digest, "domains": list(data.domains), "boundary": data.boundary},
        "bytes": {domain: part.bytes.tolist() for domain, part in heldout.items()},
        "tokens": {domain: np.diff(part.starts).tolist() for domain, part in heldout.items()},
    }


def search_rates(
    out: Path, plan: Plan, settings: InterventionSettings, key: str, *, where: str, processes: int, say: Progress
) -> dict[tuple[str, str, float | None], float]:
    """The learning rate of every (target, arm, budget): the one that leaves the lowest loss on the tuning part, with one seed."""
    searched = [arm for arm in plan.arms if arm.seed == SEARCH_SEED and arm.rate_of is None]
    wanted = {(arm.target, arm.name, arm.budget): [run_of(arm, rate=r, tuning=True) for r in settings.rates] for arm in searched}
    _run_all(out, [run for runs in wanted.values() for run in runs], (), key, where=where, processes=processes, say=say)
    return {arm: best_rate([read_run(out, run, key) for run in runs]) for arm, runs in wanted.items()}


def best_rate(records: Sequence[dict[str, Any]]) -> float:
    """Rate of the run with the lowest final loss on the tuning documents.

    Raises:
        InterventionError: every run failed.
    """
    finished = [record for record in records if record["status"] == "ok"]
    if not finished:
        raise InterventionError(f"every learning rate tried ended without a number: {records[0]['error']}; give lower --rates")
    best = min(finished, key=lambda record: sum(record["curve"][-1]["nats"][record["run"]["target"]]))
    return float(best["run"]["rate"])


def _rate(arm: Arm, rates: dict[tuple[str, str, float | None], float]) -> float:
    return rates[arm.target, arm.rate_of or arm.name, arm.budget] * arm.rate_factor


def _run_all(out: Path, runs: Iterable[ArmRun], masks: Iterable[MaskJob], key: str, *, where: str, processes: int, say: Progress) -> None:
    distinct = {run.identity(key): run for run in runs}
    pending: list[tuple[str, ArmRun | MaskJob]] = [
        (name, run) for name, run in distinct.items() if not (out / RUNS / f"{name}.json").is_file()
    ]
    # expensive runs first, so that no process is left alone with a long one at the end
    pending.sort(key=lambda job: job[1].kind != "full" if isinstance(job[1], ArmRun) else 0)
    jobs = {job.identity(key): job for job in masks}
    pending += [(name, job) for name, job in jobs.items() if not (out / MASKS / f"{name}.json").is_file()]
    say(f"{len(distinct) + len(jobs) - len(pending)} of {len(distinct) + len(jobs)} runs are finished; {len(pending)} to do")
    if not pending:
        return
    began = time.monotonic()

    def tell(done: int, _: int, told: str) -> None:
        if done % 20 == 0 or done == len(pending):
            say(f"{done}/{len(pending)} ({time.monotonic() - began:.0f} s), last: {told}")

    if processes > 1:
        run_jobs(_do, pending, processes=processes, tell=tell, error=InterventionError, begin=_load, given=(where, out))
        return
    _load(where, out)
    for done, job in enumerate(pending, 1):
        tell(done, done - 1, _do(*job))
    _STATE.clear()


_STATE: dict[str, Any] = {}
"""What a process keeps between its runs: the model, how it is routed, the data, the settings."""


def _load(where: str, out: Path) -> None:
    torch.set_num_threads(1)
    about = read_about(out)
    facts = about["data"]
    data = load_data(out / DATA, domains=facts["domains"], boundary=facts["boundary"], digest=facts["digest"])
    _STATE.update(model=load_weights(where), data=data, settings=InterventionSettings.model_validate(about["settings"]), out=out)
    prescribed = about.get("prescribed")
    _STATE.update(prescription=prescribed and Prescription.model_validate(prescribed))


def _do(name: str, job: ArmRun | MaskJob) -> str:
    model, data, settings, out = (_STATE[part] for part in ("model", "data", "settings", "out"))
    with routed(model, _STATE["prescription"]) as prescribed:
        if isinstance(job, MaskJob):
            write_json(out / MASKS / f"{name}.json", execute_masks(model, job, data, prescribed=prescribed))
            return f"{job.target}, masks of {job.rule}"
        record = execute(model, job, data, settings, prescribed=prescribed)
    write_json(out / RUNS / f"{name}.json", record)
    return f"{job.target}, {job.kind} {len(job.cells)} cells, rate {job.rate:g}: {record['error'] or record['losses'][-1]}"


def read_run(out: Path, run: ArmRun, key: str) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        InterventionError: missing, or not a record of this version.
    """
    return read_run_record(out / RUNS / f"{run.identity(key)}.json", run.model_dump(mode="json", exclude_none=True))


def read_experiment(out: Path) -> tuple[dict[str, Any], list[tuple[Arm, dict[str, Any]]], list[dict[str, Any]]]:
    """What an experiment is, its finished arms with their records, and its finished masks.

    Raises:
        InterventionError: no experiment there, or a file that cannot be read.
    """
    about = read_about(out)
    key, settings = about["key"], InterventionSettings.model_validate(about["settings"])
    arms = [Arm.model_validate(arm) for arm in about["arms"]]
    rates: dict[tuple[str, str, float | None], float] = {}
    for arm in arms:
        if arm.seed == SEARCH_SEED and arm.rate_of is None:
            tried = [run_of(arm, rate=rate, tuning=True) for rate in settings.rates]
            if all((out / RUNS / f"{run.identity(key)}.json").exists() for run in tried):
                rates[arm.target, arm.name, arm.budget] = best_rate([read_run(out, run, key) for run in tried])
    records = []
    for arm in arms:
        if arm.seed == SEARCH_SEED or (arm.target, arm.rate_of or arm.name, arm.budget) not in rates:
            continue
        run = run_of(arm, rate=_rate(arm, rates))
        file = out / RUNS / f"{run.identity(key)}.json"
        if file.exists():
            record = read_run(out, run, key)
            if record["status"] == "ok":
                told = [name for name in about["data"]["domains"] if name == arm.target or name not in settings.new]
                check_curve(file, record, about, domains=told, steps=settings.full_points if run.kind == "full" else settings.points)
            records.append((arm, record))
    masks = []
    for job in map(MaskJob.model_validate, about["masks"]):
        file = out / MASKS / f"{job.identity(key)}.json"
        if file.exists():
            mask = read_mask_record(file, job.model_dump(mode="json"))
            for nats in (mask["nats"], *mask["controls"]):
                check_documents(file, nats, about["bytes"], about["data"]["domains"])
            masks.append(mask)
    return about, records, masks


def _path_facts(path: Any) -> dict[str, Any]:
    return {
        "cells": len(path.cells),
        "share": path.share,
        "coverage": path.coverage,
        "stability": path.stability,
        "coverage_elsewhere": float(np.mean([overlap.coverage for overlap in path.overlap.values()])) if path.overlap else None,
    }
