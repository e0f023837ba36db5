"""One training run: from the base model, some parameters, one domain; held-out documents measured along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dbes.finetuning.machine import status_bytes
from dbes.intervention.data import ExperimentData, Items, Part, training_batches
from dbes.intervention.routing import under
from dbes.intervention.settings import ArmRun, InterventionSettings
from dbes.intervention.trainables import protected_texts, trainable, with_replay
from dbes.models.choices import choice_likelihoods, right_choices
from dbes.models.losses import in_batches, padded_nats, token_nats
from dbes.testbed.prescribed import Prescribed

RUN_SCHEMA = 1
GRADIENT_CLIP = 1.0
BETAS = (0.9, 0.95)
EVALUATION_TOKENS = 4096


@torch.no_grad()
def document_nats(model: Any, documents: Sequence[np.ndarray], *, batch_tokens: int = EVALUATION_TOKENS) -> np.ndarray:
    """Nats summed over the predicted tokens (all but the first) of each document, float64 [documents]."""
    nats = np.zeros(len(documents))
    for members in in_batches(list(map(len, documents)), batch_tokens):
        losses, real = padded_nats(model, [documents[index] for index in members], masked=False)
        nats[members] = np.where(real.cpu().numpy(), losses.double().cpu().numpy(), 0.0).sum(axis=1)
    return nats


def _passes(names: Iterable[str], prescribed: Prescribed | None) -> Iterator[list[str]]:
    """The domains that run together: all of them, or one after the other where routing is prescribed, each under its own."""
    if prescribed is None:
        yield list(names)
        return
    for name in names:
        with prescribed.domain(name):
            yield [name]


def measure(model: Any, parts: Mapping[str, Part], prescribed: Prescribed | None = None) -> dict[str, list[float]]:
    """Nats of every document of some parts, by domain; one pass over all of them, or one per domain where routing is prescribed."""
    found = {}
    for names in _passes(parts, prescribed):
        nats = iter(document_nats(model, [parts[name].document(index) for name in names for index in range(len(parts[name]))]).tolist())
        found |= {name: [round(next(nats), 5) for _ in range(len(parts[name]))] for name in names}
    return found


def measure_items(
    model: Any, items: Mapping[str, Items], *, padding: int, prescribed: Prescribed | None = None
) -> dict[str, dict[str, list[int]]]:
    """Whether the right choice of every item is the most likely (``right``), and the most likely per byte (``right_per_byte``).

    Each by domain, 1 or 0 for every item; one pass over all of them, or one per domain where routing is prescribed.

    Args:
        padding: a token id that fills up shorter rows.
    """
    found: dict[str, dict[str, list[int]]] = {"right": {}, "right_per_byte": {}}
    for names in _passes(items, prescribed):
        likelihood = choice_likelihoods(model, [sample for name in names for sample in items[name].samples()], padding=padding)
        for name in names:
            asked, (own, likelihood) = items[name], np.split(likelihood, [len(items[name].bytes)])
            right = right_choices(own, text_bytes=asked.bytes.tolist(), choices=asked.choices.tolist(), right=asked.right.tolist())
            for kind, row in zip(found, right.astype(int).tolist(), strict=True):
                found[kind][name] = row
    return found


def execute(
    model: Any, run: ArmRun, data: ExperimentData, settings: InterventionSettings, *, prescribed: Prescribed | None = None
) -> dict[str, Any]:
    """The record of one run; the model is as before afterwards.

    ``curve`` holds, for every point, the nats of each held-out document by domain (of each tuning document in a run of the
    search), what ``measure_items`` gives where there are held-out items, and the processor seconds of training until then, which
    do not depend on what else the machine does. A loss that is not a number ends the run with status ``failed``.
    """
    began, peak = time.perf_counter(), PeakMemory()
    batches = training_batches(data.parts[run.target, "train"], settings, boundary=data.boundary, seed=run.seed)
    if run.replay is not None:
        batches = with_replay(batches, protected_texts(data, run.target, length=settings.length), share=run.replay, seed=run.seed)
    # of a domain that is new to the model and not the target nothing can be said: it is neither gained nor forgotten
    told = (run.target, *(name for name in data.domains if name not in (run.target, *settings.new)))
    parts = {run.target: data.parts[run.target, "tuning"]} if run.tuning else {name: data.parts[name, "heldout"] for name in told}
    points = {settings.steps} if run.tuning else {*(settings.full_points if run.kind == "full" else settings.points)}
    record: dict[str, Any] = {"schema_version": RUN_SCHEMA, "status": "ok", "error": None, "run": run.model_dump(mode="json")}
    curve, losses, idle, training = [], [], 0, 0.0
    with trainable(model, run, data, length=settings.length) as chosen:
        cells, phases = chosen.cells, [(chosen.groups, settings.steps)]
        if chosen.first:
            phases.insert(0, (((chosen.first, 1.0),), run.router_steps or 0))
        optimizer, parameters, before, last = None, [], 0, 0
        for step, batch in enumerate(batches, 1):
            started = time.process_time()
            if optimizer is None or step > last:
                groups, last = phases.pop(0)
                optimizer, parameters, before = _optimizer(groups, settings), [one for group, _ in groups for one in group], step - 1
            for group in optimizer.param_groups:
                group["lr"] = run.rate * group["factor"] * min(1.0, (step - before) / (settings.warmup + 1))
            with under(prescribed, run.target):
                loss = token_nats(model, {"input_ids": torch.from_numpy(batch)}, reduction="mean")
            value = float(loss.detach())
            if not math.isfinite(value):
                record |= {"status": "failed", "error": f"the loss is not a number at step {step}"}
                break
            losses.append(round(value, 4))
            # A set of random cells may hold no expert that any token of this batch chose: then nothing can be learned from it.
            if loss.requires_grad:
                loss.backward()
                left = cells.drop_empty_gradients() if cells is not None else 1
                idle += left == 0
                nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
                optimizer.step()
                for parameter in (*chosen.first, *chosen.parameters):
                    parameter.grad = None
            else:
                idle += 1
            training += time.process_time() - started
            if step in points:
                point = {"step": step, "seconds": round(training, 3), "nats": measure(model, parts, prescribed)}
                if data.items and not run.tuning:
                    point |= measure_items(model, data.items, padding=data.boundary, prescribed=prescribed)
                curve.append(point)
        states = optimizer.state.values() if optimizer is not None else ()
        state = [value for moments in states for key, value in moments.items() if key != "step"]
        record |= {
            "trainable_parameters": sum(parameter.numel() for parameter in chosen.parameters),
            "optimizer_bytes": sum(value.numel() * value.element_size() for value in state),
        }
    return record | {
        "losses": losses,
        "steps_without_gradient": idle,
        "training_seconds": round(training, 3),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_added_bytes": peak.added(),
        "curve": curve,
    }


def _optimizer(groups: Sequence[tuple[list[nn.Parameter], float]], settings: InterventionSettings) -> torch.optim.AdamW:
    """AdamW whose groups remember the factor of their learning rate."""
    made = [{"params": parameters, "factor": factor} for parameters, factor in groups]
    return torch.optim.AdamW(made, lr=0.0, betas=BETAS, weight_decay=settings.weight_decay)


class PeakMemory:
    """Resident memory added since this was made, at its highest; where the system lets a process reset its own mark (Linux)."""

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = status_bytes("VmRSS")
        except OSError:
            pass

    def added(self) -> int | None:
        highest = status_bytes("VmHWM") if self._before is not None else None
        return None if highest is None or self._before is None else max(0, highest - self._before)
