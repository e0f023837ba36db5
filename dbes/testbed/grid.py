"""Runs a preset: every cell of the grid once, several at a time, and never again when it is finished."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers

from dbes.errors import MixError
from dbes.files import write_json
from dbes.testbed.cells import CELL_FILE, Cell, read_cell, run_cell
from dbes.testbed.mixes import prepare_mix
from dbes.testbed.presets import PresetName, preset
from dbes.testbed.routers import domain_experts

GRID_SCHEMA = 1
GRID_FILE = "grid.json"
CELLS = "cells"

Progress = Callable[[str], None]


def run_grid(
    name: PresetName,
    out: Path,
    *,
    mix: str | None = None,
    cache: Path = Path("build/testbed"),
    processes: int = 2,
    only: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and measure every cell of a preset that ``out`` does not hold yet, and return what ``grid.json`` says.

    Args:
        mix: another mix than the preset's: ``embedded``, ``packages`` or a folder of JSONL files.
        processes: cells at a time, one thread each; two of them beat one process of two threads.
        only: experiments to run; all of them when empty.

    Raises:
        MixError: the mix cannot be built, has an empty domain or too few experts for a reference router (checked before any
            training); the folder holds another grid.
    """
    say = progress or (lambda _: None)
    grid = preset(name)
    unknown = sorted(set(only) - set(grid.experiments))
    if unknown:
        raise MixError(f"experiments {unknown}: preset {name} has {sorted(grid.experiments)}")
    wanted = {arm for experiment, arms in grid.experiments.items() if not only or experiment in only for arm in arms}
    prepared = prepare_mix(mix or grid.mix, vocabulary=grid.vocabulary, max_positions=512, cache=cache)
    cells = [(arm, seed, cell) for arm, seed, cell in grid.cells() if arm in wanted]
    for _, _, cell in cells:
        if cell.settings.routing.router == "reference":
            domains = len(cell.settings.mix.domains or prepared.mix.domains)
            domain_experts(domains, cell.settings.model.experts, cell.settings.model.top_k)
    about = {
        "schema_version": GRID_SCHEMA,
        "preset": name,
        "mix": mix or grid.mix,
        "mix_digest": prepared.mix.digest,
        "domains": list(prepared.mix.domains),
        "experiments": grid.experiments,
        "cells": [{"arm": arm, "seed": seed, "identity": cell.identity(prepared.mix.digest)} for arm, seed, cell in grid.cells()],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    _claim(out, about)
    pending = [(arm, seed, cell, out / CELLS / cell.identity(prepared.mix.digest)) for arm, seed, cell in cells]
    pending = [job for job in pending if not (job[3] / CELL_FILE).is_file()]
    say(f"{len(cells) - len(pending)} of {len(cells)} cells are finished; {len(pending)} to train")
    # Dear cells first, so that no process is left alone with a long one at the end.
    pending.sort(key=lambda job: -_cost(job[2]))
    began, done = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=processes, mp_context=context, initializer=end_with_parent) as pool:
        running = {pool.submit(run_cell, cell, prepared.folder, folder): (arm, seed) for arm, seed, cell, folder in pending}
        for finished in as_completed(running):
            arm, seed = running[finished]
            done += 1
            try:
                record = finished.result()
            except BrokenProcessPool:
                raise MixError("a training process was killed (out of memory?); run the same command again to go on") from None
            told = record["error"] or f"loss {record['training_loss']:.3f}"
            say(f"{done}/{len(pending)} {arm}, seed {seed}: {told} ({time.monotonic() - began:.0f} s)")
    return about


def end_with_parent() -> None:
    """End this worker when the process that started it is killed: it would go on writing beside the run that takes over."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_grid(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a folder's grid is, and the records of its finished cells with their arm and seed.

    Raises:
        MixError: no grid there, of another version, or a cell that cannot be read.
    """
    path = out / GRID_FILE
    try:
        about = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MixError(f"{out}: no testbed run here; start one with `dbes testbed run --out {out}`") from None
    except (OSError, ValueError) as problem:
        raise MixError(f"{path}: cannot be read as JSON ({problem})") from None
    if about.get("schema_version") != GRID_SCHEMA:
        raise MixError(f"{path}: grid schema {about.get('schema_version')!r}, this dbes reads {GRID_SCHEMA}")
    records = []
    for entry in about["cells"]:
        cell = out / CELLS / entry["identity"] / CELL_FILE
        if cell.is_file():
            records.append({**read_cell(cell), "arm": entry["arm"], "seed": entry["seed"]})
    return about, records


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Write grid.json, unless the folder holds another grid. Cells of an earlier version of the preset stay, unused."""
    path = out / GRID_FILE
    if path.is_file():
        earlier = json.loads(path.read_text("utf-8"))
        if (earlier.get("preset"), earlier.get("mix_digest")) != (about["preset"], about["mix_digest"]):
            raise MixError(f"{out}: holds a run of preset {earlier.get('preset')!r} on another mix or preset; choose another folder")
    write_json(path, about)


def _cost(cell: Cell) -> float:
    weight = {"1m": 1.0, "4m": 2.5, "12m": 5.0}[cell.settings.model.size]
    return weight * cell.settings.optimizer.steps * cell.settings.mix.tokens_per_step
