"""Evidence that needs the model and the benchmark's text: gradients, masking effects, sizes of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import PathError
from dbes.evaluation.request import Benchmark, read_benchmark
from dbes.models import LoadedModel, load_model
from dbes.models.sites import find_sites, max_positions
from dbes.models.windows import embedding_rows, refuse_unknown, special_tokens, token_ids
from dbes.paths.evidence import Evidence
from dbes.paths.gradients import expert_parameters, gradient_norms, masking_effects
from dbes.tasks.task import Task

GRADIENT_TOKENS = 16_384
"""Tokens of each domain for the gradient."""

MASKING_TOKENS = 2_048
"""Tokens of each domain for the masking effects, which need a forward over all of them for every cell."""


def with_model(
    evidence: Evidence, model: str | Path | LoadedModel, *, tasks: str | Path | Task, gradients: bool = False, effects: bool = False
) -> Evidence:
    """The same evidence with sizes of experts and, where asked for, gradients and masking effects on the benchmark's documents.

    Raises:
        PathError: the model is not the one that was recorded, or the task has other domains.
        TaskError, ModelError: the task or the model cannot be used.
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    check_model(evidence, loaded)
    benchmark = recorded_benchmark(evidence, tasks)
    texts: list[list[str]] = [[] for _ in benchmark.domains]
    for document in benchmark.documents:
        texts[benchmark.domains.index(document.domain)].append(document.text)
    found = replace(evidence, sizes=expert_parameters(loaded.model))
    if gradients:
        windows = [cut_windows(loaded, own, window=benchmark.task.window, tokens=GRADIENT_TOKENS) for own in texts]
        found = replace(found, gradients=np.stack([gradient_norms(loaded.model, own) for own in windows]))
    if effects:
        windows = [cut_windows(loaded, own, window=benchmark.task.window, tokens=MASKING_TOKENS) for own in texts]
        found = replace(found, effects=masking_effects(loaded.model, windows))
    return found


def recorded_benchmark(evidence: Evidence, tasks: str | Path | Task) -> Benchmark:
    """The texts of the task whose routing was recorded.

    Raises:
        PathError: the task has other domains than the recording.
        TaskError: it cannot be used.
    """
    benchmark = read_benchmark(tasks)
    if benchmark.domains != evidence.shape.domains:
        domains, recorded = list(benchmark.domains), list(evidence.shape.domains)
        raise PathError(f"task {benchmark.task.name} has domains {domains}, the result {recorded}; give its own task")
    return benchmark


def check_model(evidence: Evidence, loaded: LoadedModel) -> None:
    """Refuse a model that is not the one whose routing was recorded.

    Raises:
        PathError: another revision, or other layers or experts.
    """
    recorded = evidence.provenance.get("revision")
    sites = find_sites(loaded.model)
    layers, experts = tuple(site.layer for site in sites), tuple(site.num_experts for site in sites)
    if (recorded is not None and recorded != loaded.revision) or (layers, experts) != (evidence.shape.layers, evidence.shape.experts):
        raise PathError(
            f"{loaded.name} is not the model of this result: revision {loaded.revision} with layers {list(layers)}, recorded was "
            f"{evidence.provenance.get('model')} at {recorded} with layers {list(evidence.shape.layers)}"
        )


def cut_windows(loaded: Any, texts: Sequence[str], *, window: int, tokens: int) -> list[np.ndarray]:
    """Token windows of some texts, with the special tokens before a text; whole texts in order until ``tokens`` are reached."""
    before, _ = special_tokens(loaded.tokenizer, texts)
    limit = max_positions(loaded.model)
    length = (window if limit is None else min(window, limit)) - len(before)
    known = embedding_rows(loaded.model)
    windows, total = [], 0
    for place, text in enumerate(texts):
        if total >= tokens:
            break
        found = token_ids(loaded.tokenizer, [text], names=lambda _, place=place: f"text {place}", error=PathError)[0]
        refuse_unknown(found, known, loaded.tokenizer, name=f"text {place}", error=PathError)
        ids = found.astype(np.int64)[: tokens - total]
        for start in range(0, len(ids), length):
            windows.append(np.concatenate([np.asarray(before, np.int64), ids[start : start + length]]))
        total += len(ids)
    return windows
