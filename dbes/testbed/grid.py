"""Runs a preset: every run of the grid once, several at a time, and never again when it is finished."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dbes.errors import MixError, SettingError
from dbes.files import check_writable, locked, write_json
from dbes.testbed.mixes import prepare_mix
from dbes.testbed.presets import preset
from dbes.testbed.records import GRID_SCHEMA, read_grid_file, read_run, same_fields
from dbes.testbed.routers import domain_experts
from dbes.testbed.runner import run_jobs
from dbes.testbed.runs import RUN_FILE, GridRun, execute, remove_state
from dbes.testbed.training import TrainingError
from dbes.text import unknown

GRID_FILE = "grid.json"
RUNS = "cells"

Progress = Callable[[str], None]


def run_grid(
    name: str,
    out: Path,
    *,
    mix: str | None = None,
    cache: Path = Path("build/testbed"),
    processes: int = 2,
    only: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and measure every run of a preset that ``out`` does not hold yet, and return what ``grid.json`` says.

    Arguments and errors as of ``report.run_testbed``.
    """
    say = progress or (lambda _: None)
    grid = preset(name)
    for strange in sorted(set(only) - set(grid.experiments)):
        raise SettingError(unknown(f"experiment of preset {name}", strange, sorted(grid.experiments)))
    wanted = {arm for experiment, arms in grid.experiments.items() if not only or experiment in only for arm in arms}
    if not (out / GRID_FILE).is_file():
        check_writable(out / GRID_FILE)
    prepared = prepare_mix(mix or grid.mix, vocabulary=grid.vocabulary, max_positions=512, cache=cache)
    runs = [(arm, seed, run) for arm, seed, run in grid.runs() if arm in wanted]
    for _, _, run in runs:
        if run.settings.routing.router == "reference":
            domains = len(run.settings.mix.domains or prepared.mix.domains)
            domain_experts(domains, run.settings.model.experts, run.settings.model.top_k)
    about = {
        "schema_version": GRID_SCHEMA,
        "preset": name,
        "mix": mix or grid.mix,
        "mix_digest": prepared.mix.digest,
        "domains": list(prepared.mix.domains),
        "experiments": grid.experiments,
        "cells": [{"arm": arm, "seed": seed, "identity": run.identity(prepared.mix.digest)} for arm, seed, run in grid.runs()],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    folders = [(arm, seed, run, out / RUNS / run.identity(prepared.mix.digest)) for arm, seed, run in runs]
    done = sum((folder / RUN_FILE).is_file() for *_, folder in folders)
    _check_claim(out, about)
    if done == len(runs) and not os.access(out, os.W_OK):  # a finished grid on a read-only disk can still be read
        say(f"{done} of {len(runs)} runs are finished; 0 to train")
        return about
    with locked(out):
        write_json(out / GRID_FILE, about)
        for *_, folder in folders:
            if (folder / RUN_FILE).is_file():
                remove_state(folder)  # of a run that was killed between the two
        pending = [job for job in folders if not (job[3] / RUN_FILE).is_file()]
        say(f"{len(runs) - len(pending)} of {len(runs)} runs are finished; {len(pending)} to train")
        # expensive runs first, so that no process is left alone with a long one at the end
        pending.sort(key=lambda job: -_cost(job[2]))
        _train(pending, prepared.folder, processes=processes, say=say)
    return about


def _train(pending: Sequence[tuple[str, int, GridRun, Path]], mix: Path, *, processes: int, say: Progress) -> None:
    began = time.monotonic()

    def tell(done: int, place: int, record: dict[str, Any]) -> None:
        arm, seed, *_ = pending[place]
        told = record["error"] or f"loss {record['training_loss']:.3f}"
        say(f"{done}/{len(pending)} {arm}, seed {seed}: {told} ({time.monotonic() - began:.0f} s)")

    run_jobs(execute, [(run, mix, folder) for *_, run, folder in pending], processes=processes, tell=tell, error=TrainingError)


def read_grid(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a folder's grid is, and the records of its finished runs with their arm and seed.

    Raises:
        MixError: no grid there, of another version, or a run that cannot be read.
    """
    about = read_grid_file(out / GRID_FILE)
    records, files = [], []
    for entry in about["cells"]:
        run = out / RUNS / entry["identity"] / RUN_FILE
        if run.exists():
            records.append({**read_run(run, identity=entry["identity"]), "arm": entry["arm"], "seed": entry["seed"]})
            files.append(run)
    done = {str(file): record for file, record in zip(files, records, strict=True) if record["status"] == "ok"}
    same_fields(done, "published", "calibrated")
    return about, records


def _check_claim(out: Path, about: dict[str, Any]) -> None:
    """Refuse a folder that holds another grid. Runs of an earlier version of the preset stay, unused."""
    path = out / GRID_FILE
    if path.exists():
        earlier = read_grid_file(path)
        if (earlier.get("preset"), earlier.get("mix_digest")) != (about["preset"], about["mix_digest"]):
            raise MixError(f"{out}: holds a run of preset {earlier.get('preset')!r} on another mix or preset; choose another folder")


def _cost(run: GridRun) -> float:
    weight = {"1m": 1.0, "4m": 2.5, "12m": 5.0}[run.settings.model.size]
    return weight * run.settings.optimizer.steps * run.settings.mix.tokens_per_step
