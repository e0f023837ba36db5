"""Accuracies for a comparison, measured elsewhere: a table of models, or results of lm-eval.

A table is a CSV file with exactly the columns ``model,accuracy``, a model's name as in its result (or its label, where namesakes
stand in one table) and a share between 0 and 1.

A results file of lm-eval is JSON with ``results: {task: {"acc,none": share, ...}}`` and the model in ``model_name`` or as
``pretrained=`` in ``config.model_args``. It is one model; its accuracy is the mean over its tasks that have ``acc``, a group counting
as one task. Several such files must hold the same tasks: a mean over other tasks is another number.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbes.errors import ResultError
from dbes.files import read_bytes
from dbes.schema import parse_json
from dbes.text import clipped, legible

HEADER = ["model", "accuracy"]
ACCURACY_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Accuracy by model name, and what it is the accuracy of."""

    by_model: Mapping[str, float]
    source: str


def read_accuracies(paths: Sequence[str | Path]) -> Accuracies:
    """The accuracies of all files together.

    Raises:
        ResultError: a file is of neither form, a value is no share, a model occurs twice, or files hold different tasks.
    """
    by_model: dict[str, float] = {}
    found_in: dict[str, Path] = {}
    sources: dict[str, Path] = {}
    for path in map(Path, paths):
        expected = "expected a CSV `model,accuracy` or a results file of lm-eval"
        try:
            text = read_bytes(path, error=ResultError, most=ACCURACY_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ResultError(f"{path}: cannot be read (it is not UTF-8 text); {expected}") from None
        found = _harness(text, path) if text.lstrip().startswith("{") else _table(text, path)
        for model, accuracy in found.by_model.items():
            if model in by_model:
                raise ResultError(f"{path}: {_shown(model)} has an accuracy in {found_in[model]} already; give each model one")
            by_model[model], found_in[model] = accuracy, path
        sources.setdefault(found.source, path)
    if len(sources) > 1:
        listed = "; ".join(f"{path}: {source}" for source, path in sources.items())
        raise ResultError(f"accuracies of different tasks cannot share a column ({listed})")
    return Accuracies(by_model=by_model, source=next(iter(sources), ""))


def _table(text: str, path: Path) -> Accuracies:
    try:
        rows = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as problem:
        raise ResultError(f"{path}: cannot be read as CSV ({problem}); expected the columns model,accuracy") from None
    if not rows or [cell.strip() for cell in rows[0]] != HEADER:
        given = ",".join(rows[0]) if rows else "nothing"
        raise ResultError(f"{path}: the first line is {_shown(given)}, expected model,accuracy (or a results file of lm-eval in JSON)")
    found: dict[str, float] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(HEADER) or not row[0].strip():
            raise ResultError(f"{path}, line {line}: expected a model and its accuracy, found {len(row)} cells")
        model = row[0].strip()
        if model in found:
            raise ResultError(f"{path}, line {line}: {_shown(model)} occurs twice; give each model one accuracy")
        found[model] = _share(row[1].strip(), f"{path}, line {line}")
    if not found:
        raise ResultError(f"{path}: no model below the heading")
    return Accuracies(by_model=found, source=path.name)


def _harness(text: str, path: Path) -> Accuracies:
    content = parse_json(text, where=path, error=ResultError)
    results = content.get("results")
    if not isinstance(results, dict) or not all(isinstance(scores, dict) for scores in results.values()):
        raise ResultError(f"{path}: no `results` by task; expected a results file of lm-eval")
    groups = content.get("group_subtasks")
    lists = [tasks for tasks in groups.values() if isinstance(tasks, list)] if isinstance(groups, dict) else []
    inside = {task for tasks in lists for task in tasks if isinstance(task, str)}
    accuracies = {task: _acc(scores, f"{path}, task {_shown(task)}") for task, scores in results.items() if task not in inside}
    known = {task: accuracy for task, accuracy in accuracies.items() if accuracy is not None}
    if not known:
        raise ResultError(f"{path}: none of its tasks ({_shown(', '.join(accuracies) or 'none')}) has `acc`")
    tasks = ", ".join(legible(task, 40) for task in sorted(known))
    source = f"lm-eval {tasks}" + (" (mean)" if len(known) > 1 else "")
    return Accuracies(by_model={_model(content, path): math.fsum(known.values()) / len(known)}, source=source)


def _acc(scores: Mapping[str, Any], where: str) -> float | None:
    """A task's accuracy: ``acc`` without a filter, or of its only filter; None where the task has none."""
    named = {key: value for key, value in scores.items() if key == "acc" or key.startswith("acc,")}
    if not named:
        return None
    for key in ("acc,none", "acc"):
        if key in named:
            return _share(named[key], where)
    if len(named) > 1:
        raise ResultError(f"{where}: several accuracies ({', '.join(sorted(named))}) and none without a filter; write the one in a CSV")
    return _share(next(iter(named.values())), where)


def _model(content: Mapping[str, Any], path: Path) -> str:
    name = content.get("model_name")
    config = content.get("config")
    if not name and isinstance(config, dict):
        given = config.get("model_args")
        if isinstance(given, str):
            given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
        name = given.get("pretrained") if isinstance(given, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ResultError(f"{path}: neither `model_name` nor `pretrained=` in `config.model_args` names the model")
    return name.strip()


def _share(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ResultError(f"{where}: accuracy {_shown(clipped(value))} is not a number") from None
    if not 0 <= number <= 1:  # also refuses NaN
        raise ResultError(f"{where}: accuracy {number:g} is not between 0 and 1 (55 % is 0.55)")
    return number


def _shown(text: str) -> str:
    return repr(legible(text, 80))
