"""One run of the grid: train one arm with one seed, measure it on held-out documents, and keep what was found as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dbes.files import discard, remove_abandoned, write_json
from dbes.results import Result
from dbes.schema import Strict
from dbes.scoring.score import score
from dbes.testbed.analysis import domain_probe, forking_tokens, token_classes, topic_and_syntax
from dbes.testbed.heldout import measure, training_routes
from dbes.testbed.mix import Mix
from dbes.testbed.mixes import Prepared, read_prepared
from dbes.testbed.records import RUN_SCHEMA, read_run
from dbes.testbed.settings import TrainSettings
from dbes.testbed.training import STATE, StateError, Trained, TrainingError, train
from dbes.testbed.upcycling import train_upcycled

RUN_FILE = "cell.json"

METRICS = (
    "specialization_normalized",
    "specialization",
    "der",
    "domain_isolation",
    "stiffness",
    "ngram_expertise_2",
    "ngram_expertise_5",
    "ngram_expertise_10",
)
"""Calibrated metrics kept for every run."""

COMPANIONS = ("utilization", "max_violation", "load_entropy", "dead_experts", "within_domain_similarity", "scaled_margin")


class GridRun(Strict):
    """One arm of the grid with one seed.

    Attributes:
        arm: name of the arm; runs of one arm differ in their seed only.
        method: ``train``: from scratch; ``upcycle``: domain models trained apart, merged as experts, then trained on.
        probe: also ask how well the domain can be read from the routers' input.
    """

    arm: str
    settings: TrainSettings
    method: Literal["train", "upcycle"] = "train"
    probe: bool = False
    documents: int = 48
    permutations: int = 200

    def identity(self, mix_digest: str) -> str:
        """Equal for runs that would give the same result; the arm's name is not part of it."""
        probe = "-probe" if self.probe else ""
        return f"{self.settings.identity(mix_digest)}-{self.method}{probe}-{self.documents}-{self.permutations}"


def execute(run: GridRun, mix_folder: Path, folder: Path) -> dict[str, Any]:
    """The record of a run; a finished one is read back, an interrupted one is resumed, a diverged one is recorded as failed."""
    path = folder / RUN_FILE
    if path.exists():
        return read_run(path)
    prepared = read_prepared(mix_folder)
    record: dict[str, Any] = {
        "schema_version": RUN_SCHEMA,
        "status": "ok",
        "error": None,
        "identity": run.identity(prepared.mix.digest),
        "cell": run.model_dump(mode="json"),
    }
    try:
        trained = (train_upcycled if run.method == "upcycle" else train)(run.settings, prepared.mix, folder=folder)
    except StateError:
        raise
    except TrainingError as problem:
        record |= {"status": "failed", "error": str(problem)}
    else:
        record |= _measured(run, trained, prepared)
    write_json(path, _plain(record))
    remove_state(folder)
    return read_run(path)


def remove_state(folder: Path) -> None:
    """Remove what only an unfinished run needs: the training state, and temporary files of a killed run."""
    for path in (folder, *(inner for inner in folder.iterdir() if inner.is_dir())):
        discard(path / STATE)
        remove_abandoned(path)


def _measured(run: GridRun, trained: Trained, prepared: Prepared) -> dict[str, Any]:
    settings = run.settings
    mix = prepared.mix.only(settings.mix.domains)
    heldout = measure(
        trained.model,
        mix,
        routing=settings.routing,
        bias=trained.bias,
        seed=settings.seed,
        step=settings.optimizer.steps,
        length=max(settings.mix.lengths),
        documents=run.documents,
        overlap=settings.mix,
        keep_inputs=run.probe,
    )
    result = score(heldout.trace, permutations=run.permutations, seed=0)
    dropped = [entry["dropped"] for entry in trained.log if entry.get("dropped") is not None]
    return {
        "parameters": trained.model.num_parameters(),
        "tokens": settings.optimizer.steps * settings.mix.tokens_per_step,
        "cpu_seconds": trained.cpu_seconds,
        "training_loss": trained.log[-1]["loss"],
        "dropped": float(np.mean(dropped)) if dropped else 0.0,
        "bits_per_byte": dict(zip(mix.domains, heldout.bits_per_byte.tolist(), strict=True)),
        "nats_per_token": dict(zip(mix.domains, heldout.nats_per_token.tolist(), strict=True)),
        "calibrated": _calibrated(result),
        "published": _published(result),
        "as_trained": _as_trained(run, trained, mix),
        "companions": {name: result.companions["model"].get(name) for name in COMPANIONS},
        "information": topic_and_syntax(heldout, token_classes(prepared.tokenizer)),
        "forking": forking_tokens(heldout),
        "probe": domain_probe(heldout) if run.probe else None,
    }


def _as_trained(run: GridRun, trained: Trained, mix: Mix) -> dict[str, Any] | None:
    """Specialization and utilization with the assignment that training makes; None where that is no other than the checkpoint's."""
    routing = run.settings.routing
    if routing.balancing in ("none", "aux_loss") and routing.capacity is None:
        return None
    result = score(training_routes(trained.model, mix, run.settings, bias=trained.bias), permutations=run.permutations, seed=0)
    specialization = result.record("specialization_normalized")
    return {
        "specialization_normalized": {"corrected": specialization.corrected, "score": specialization.score},
        "utilization": result.companions["model"]["utilization"],
        "max_violation": result.companions["model"]["max_violation"],
    }


def _calibrated(result: Result) -> dict[str, Any]:
    """The model's value of every metric, and specialization by layer."""
    kept: dict[str, Any] = {}
    for record in result.calibrated:
        if record.domain is None and record.layer is None and record.metric in METRICS:
            fields = ("value", "null", "corrected", "ci_low", "ci_high", "p", "reference", "score")
            kept[record.metric] = {name: getattr(record, name) for name in fields}
    layers = [r for r in result.calibrated if r.metric == "specialization_normalized" and r.domain is None and r.layer is not None]
    kept["by_layer"] = {str(record.layer): record.corrected for record in layers}
    return kept


def _published(result: Result) -> dict[str, float]:
    values = {}
    for name, metric in result.published.items():
        if isinstance(metric, dict):
            values |= {f"{name}_{size}": found.model for size, found in metric.items()}
        else:
            values[name] = metric.model
    return values


def _plain(value: Any) -> Any:
    """JSON values: numpy numbers as Python's, NaN and infinities as null, floats with as many digits as they are good for."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
