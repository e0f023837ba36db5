"""What a run reports: what was trained, at which cost, and what it changed in the target and in every other domain."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.stats import t as student

from dbes.errors import FinetuneError
from dbes.files import sha256_of, write_json
from dbes.finetuning.choice import Choice
from dbes.finetuning.evaluation import DomainScore, Measured, ratio_of_sums
from dbes.finetuning.machine import status_bytes
from dbes.finetuning.settings import FinetuneSettings
from dbes.paths.types import Cell
from dbes.schema import Strict, read_versioned

REPORT = "finetune.json"
ERROR = 0.05


class Change(Strict):
    """What training changed in a domain's held-out texts, in bits per byte after less before: above 0 is worse.

    Attributes:
        low, high: 95 % interval over source texts; of the other domains all together (Bonferroni). None with one source text.
    """

    change: float
    low: float | None
    high: float | None


class FinetuneReport(Strict):
    """One run.

    Attributes:
        identity: equal for runs with equal model, path, data and settings.
        share: of the routed-expert parameters, the path's.
        target: domain of the data; ``before`` and ``after`` hold it and all other domains of the task, held-out texts only.
        gain: bits per byte that the target fell by; forgetting: mean and worst rise over the other domains (negative: it fell).
        changes: of every domain, with intervals; empty in reports of schema 1.
        sequences: trained on; validation_unit: what was set apart beside them to choose by (`dbes.finetuning.validation`).
        choice: learning rate, early stopping, and what they were chosen by; None in reports of schema 1.
        passes: how often the weights that are kept have seen the sequences.
        warnings: what the user should know about the run.
        train_loss: nats per token of the first and last step.
        parameters: numbers trained; chosen_bytes: of them; optimizer_bytes: AdamW's two moments, without scalar step counters;
            protection_bytes: of the matrices that shape protected updates.
        peak_memory_bytes: of the accelerator, or on a CPU of the whole process, loading included.
        seconds: of training alone, over all interruptions.
        files: what was written, (bytes, sha256) by name in the folder; empty in reports of versions that did not keep it.
    """

    schema_version: Literal[1, 2] = 2
    identity: str
    model: str
    revision: str
    path_domain: str
    path_rule: str
    cells: tuple[Cell, ...]
    share: float
    data: str
    data_sha256: str
    sequences: int
    target: str
    settings: FinetuneSettings
    method: str
    steps: int
    train_loss: tuple[float, float]
    before: dict[str, DomainScore]
    after: dict[str, DomainScore]
    gain: float
    forgetting_mean: float | None
    forgetting_worst: float | None
    changes: dict[str, Change] = Field(default_factory=dict)
    validation_unit: Literal["texts", "sequences", "nothing"] = "nothing"
    choice: Choice | None = None
    passes: float | None = None
    warnings: tuple[str, ...] = ()
    parameters: int
    chosen_bytes: int
    optimizer_bytes: int
    protection_bytes: int = 0
    peak_memory_bytes: int | None
    seconds: float
    device: str
    processes: int
    dtype: str
    saved: Literal["model", "delta"]
    versions: dict[str, str]
    files: dict[str, tuple[int, str]] = Field(default_factory=dict)

    @property
    def can_protect(self) -> bool:
        """Whether a run like this can have updates that other domains hardly feel."""
        return self.method == "split_bank" and self.settings.lora_rank is None and not self.settings.train_router

    @model_validator(mode="before")
    @classmethod
    def _of_schema_1(cls, content: Any) -> Any:
        """Runs of schema 1 did not stop early; their settings do not say so."""
        if isinstance(content, dict) and content.get("schema_version") == 1 and isinstance(content.get("settings"), dict):
            return content | {"settings": {"early_stopping": False} | content["settings"]}
        return content


def changes(before: Mapping[str, Measured], after: Mapping[str, Measured], target: str) -> dict[str, Any]:
    """Gain in the target and forgetting elsewhere, in bits per byte, and the change of every domain with its interval."""
    others = [name for name in before if name != target]
    found = {
        name: change_of(score, after[name], error=ERROR / (1 if name == target else max(1, len(others)))) for name, score in before.items()
    }
    risen = [found[name].change for name in others]
    return {
        "gain": -found[target].change,
        "forgetting_mean": sum(risen) / len(risen) if risen else None,
        "forgetting_worst": max(risen) if risen else None,
        "changes": found,
    }


def change_of(before: Measured, after: Measured, *, error: float) -> Change:
    """The change, the bits that source texts need more by their bytes, with an interval of Student's t with n - 1 degrees of freedom.

    Args:
        error: probability that the interval misses.
    """
    _, group = np.unique(np.asarray(before.sources), return_inverse=True)
    more, text_bytes = np.bincount(group, after.bits - before.bits), np.bincount(group, before.text_bytes)
    count = len(text_bytes)
    change = after.score.bits_per_byte - before.score.bits_per_byte
    if count < 2:
        return Change(change=change, low=None, high=None)
    half = float(student.ppf(1 - error / 2, count - 1)) * ratio_of_sums(more, text_bytes)[1]
    return Change(change=change, low=change - half, high=change + half)


def write_report(report: FinetuneReport, folder: Path) -> Path:
    write_json(folder / REPORT, report.model_dump(mode="json"))
    return folder / REPORT


def read_report(folder: Path) -> FinetuneReport | None:
    """The report of a finished run, or None.

    Raises:
        FinetuneError: there is one that cannot be read.
    """
    path = folder / REPORT
    return read_versioned(path, FinetuneReport, error=FinetuneError, versions=(1, 2)) if path.exists() else None


def refuse_damaged(report: FinetuneReport, folder: Path) -> None:
    """Raises FinetuneError when a file that the run wrote is missing or is not what it was."""
    for name in report.files or {"config.json" if report.saved == "model" else "delta.safetensors": None}:
        path, known = folder / name, report.files.get(name)
        if path.is_file() and (known is None or (path.stat().st_size, sha256_of(path)) == known):
            continue
        what = "was altered or cut short since" if path.is_file() else "is missing, though"
        raise FinetuneError(f"{path}: {what} the run finished; put it back, or delete the folder {folder} and run the same command again")


def peak_memory() -> int | None:
    """Bytes: the most an accelerator's tensors took, or the most memory this process had; None where it cannot be told."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if (most := status_bytes("VmHWM")) is not None:
        return most
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def versions() -> dict[str, Any]:
    """Of the libraries that decide what comes out."""
    from importlib.metadata import version

    return {name: version(name) for name in ("dbes", "torch", "transformers", "accelerate")}
