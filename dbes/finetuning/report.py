"""What a run reports: what was trained, at which cost, and what it changed in the target and in every other domain."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from dbes.errors import FinetuneError
from dbes.files import write_json
from dbes.finetuning.evaluation import DomainScore
from dbes.finetuning.settings import FinetuneSettings
from dbes.paths.types import Cell

REPORT = "finetune.json"


class FinetuneReport(BaseModel):
    """One run.

    Attributes:
        identity: equal for runs with equal model, path, data and settings.
        share: of the routed-expert parameters, the path's.
        target: domain of the data; ``before`` and ``after`` hold it and all other domains of the task, held-out texts only.
        gain: bits per byte that the target fell by; forgetting: mean and worst rise over the other domains (negative: it fell).
        train_loss: nats per token of the first and last step.
        parameters: numbers trained; chosen_bytes: of them; optimizer_bytes: AdamW's two moments, without scalar step counters;
            protection_bytes: of the matrices that shape protected updates.
        peak_memory_bytes: of the accelerator, or on a CPU of the whole process, loading included.
        seconds: of training alone, over all interruptions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
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


def changes(before: dict[str, DomainScore], after: dict[str, DomainScore], target: str) -> dict[str, Any]:
    """Gain in the target and forgetting elsewhere, in bits per byte."""
    risen = {name: after[name].bits_per_byte - score.bits_per_byte for name, score in before.items()}
    others = [value for name, value in risen.items() if name != target]
    return {
        "gain": -risen[target],
        "forgetting_mean": sum(others) / len(others) if others else None,
        "forgetting_worst": max(others) if others else None,
    }


def write_report(report: FinetuneReport, folder: Path) -> Path:
    write_json(folder / REPORT, report.model_dump(mode="json"))
    return folder / REPORT


def read_report(folder: Path) -> FinetuneReport | None:
    """The report of a finished run, or None.

    Raises:
        FinetuneError: there is one that cannot be read.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        # JSON has neither tuples nor the difference of 1 and 1.0, so strict settings are read as JSON
        return FinetuneReport.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as problem:
        raise FinetuneError(f"{path}: not a report of this version ({str(problem).splitlines()[0]})") from None


def peak_memory() -> int | None:
    """Bytes: the most an accelerator's tensors took, or the most memory this process had; None where it cannot be told."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
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
