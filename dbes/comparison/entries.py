"""The results of a comparison as they are read: each once, with its delete-one-document scores, or with why it stands apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dbes.errors import DbesError, ResultError
from dbes.results import Result, load_result, result_files
from dbes.schema import parse_json
from dbes.scoring.score import score_tables
from dbes.scoring.tables import REPLICATES, read_safetensors
from dbes.text import clipped
from dbes.trace.store import MANIFEST, Trace


@dataclass(frozen=True, kw_only=True)
class Replicates:
    """Scores with each document left out: by metric [documents, layers + 1], the mean over layers last."""

    documents: tuple[str, ...]
    document_domain: np.ndarray
    by_metric: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class LeaderboardEntry:
    """One result of a comparison. ``label`` is unique in its table; ``problem`` says why it cannot be ranked.

    ``phases`` holds the entries "prompt" and "generated" of the same model where both were scored, and is empty otherwise.
    """

    result: Result
    folder: Path
    label: str
    replicates: Replicates | None = None
    problem: str | None = None
    phases: Mapping[str, LeaderboardEntry] = field(default_factory=dict)
    accuracy: float | None = None

    @property
    def loss(self) -> float | None:
        """Mean of its domains' bits per byte; None where it was not measured."""
        return None if self.result.measures is None else self.result.measures.mean_loss

    @property
    def baseline(self) -> bool:
        """A router without a model (reference, uniform, collapsed, hash)."""
        return self.result.model.name.endswith(" router")


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A result that is not in the table, and why."""

    path: str
    name: str
    reason: str


def read_entries(paths: Sequence[str | Path]) -> tuple[list[LeaderboardEntry], list[Apart]]:
    """The results that can be read, and the files that cannot.

    Raises:
        ResultError: there is no result at all, or none can be read.
    """
    entries, apart, readable = [], [], False
    for file in result_files([Path(path) for path in paths]):
        try:
            result = load_result(file)
        except ResultError as problem:
            apart.append(Apart(path=str(file), name=file.parent.name, reason=str(problem)))
            continue
        readable = True
        if result.status != "ok":
            apart.append(Apart(path=str(file), name=result.model.name, reason=f"the evaluation failed: {result.error}"))
            continue
        try:
            entry = LeaderboardEntry(
                result=result, folder=file.parent, label=result.model.name, replicates=read_replicates(file.parent, result)
            )
        except DbesError as problem:
            entry = LeaderboardEntry(result=result, folder=file.parent, label=result.model.name, problem=str(problem))
        if entry.replicates is None and entry.problem is None:
            entry = replace(entry, problem="neither replicates nor a trace beside the result: no test can be made")
        entries.append(entry)
    if not readable:
        raise ResultError(told_apart(apart))
    return entries, apart


def told_apart(apart: Sequence[Apart]) -> str:
    """Why nothing is left to compare, in one line."""
    return "; ".join(each.reason if each.reason.startswith(each.path) else f"{each.path}: {each.reason}" for each in apart)


def read_replicates(folder: Path, result: Result) -> Replicates | None:
    """Delete-one-document scores of a result: those beside it, or from its trace; None where there is neither.

    Raises:
        DbesError: they cannot be read, or belong to another result.
    """
    if not result.documents_known:
        raise ResultError("only counts of whole domains were scored: no test can be made")
    path = folder / REPLICATES
    if path.exists():
        found = _stored(path)
    elif (folder / "trace" / MANIFEST).is_file():
        settings = result.settings
        permutations = settings.get("permutations", 1000)
        scores = score_tables(Trace.load(folder / "trace"), permutations=int(permutations), seed=int(settings.get("seed", 0)))
        left_out = scores.left_out
        found = Replicates(documents=left_out.document_ids, document_domain=left_out.document_domain, by_metric=scores.replicates)
    else:
        return None
    expected = (len(found.documents), len(result.model.layers) + 1)
    if len(found.document_domain) != expected[0] or any(array.shape != expected for array in found.by_metric.values()):
        raise ResultError(f"{path}: arrays do not have the shape {expected} of this result; write it again with `dbes score`")
    return found


def _stored(path: Path) -> Replicates:
    hint = "write it again with `dbes score`"
    about, arrays = read_safetensors(path, error=ResultError, hint=hint)
    documents = parse_json(about.get("documents", "null"), where=f"{path}: documents", error=ResultError)
    domain = arrays.pop("document_domain", None)
    if not isinstance(documents, list) or not all(isinstance(each, str) for each in documents):
        raise ResultError(f"{path}: documents: expected a list of ids; {hint}")
    if domain is None or domain.shape != (len(documents),) or domain.dtype.kind not in "iu":
        raise ResultError(f"{path}: document_domain: expected one whole number for each of {len(documents)} documents; {hint}")
    # A text may stand in several domains, once in each.
    if len(set(zip(documents, domain.tolist(), strict=True))) != len(documents):
        raise ResultError(f"{path}: documents: expected distinct ids within a domain; {hint}")
    if wrong := [name for name, array in arrays.items() if array.dtype.kind != "f"]:
        raise ResultError(f"{path}: {clipped(wrong[0])}: expected floats; {hint}")
    return Replicates(documents=tuple(documents), document_domain=domain, by_metric=arrays)
