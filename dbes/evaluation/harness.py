"""The multiple-choice items of a task through lm-evaluation-harness: task definitions, and what came out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbes.errors import SettingError
from dbes.tasks.entries import Item

if TYPE_CHECKING:
    from dbes.models import LoadedModel

HARNESS = "lm-eval"


def require_harness() -> None:
    """Refuse where the package is not there.

    Raises:
        SettingError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise SettingError("accuracy 'lm-eval' needs the package lm-eval: pip install 'dbes[lm-eval]', or use --accuracy without it")


def definition(name: str, path: Path) -> dict[str, Any]:
    """A task of the harness, as its YAML would say it, of items in a file of `write_items`."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def write_items(items: Sequence[Item], path: Path) -> None:
    """One item a line: question, choices, and the index of the right one."""
    rows = [
        {"question": item.question.rstrip(), "choices": [choice.strip() for choice in item.choices], "right": item.right} for item in items
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def harness_accuracy(loaded: LoadedModel, items: Mapping[str, Sequence[Item]], *, task: str) -> dict[str, tuple[float, float]]:
    """``acc`` and ``acc_bytes`` of every domain, by the harness.

    Raises:
        SettingError: the package is not installed.
    """
    require_harness()
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory(prefix="dbes-items-") as folder:
        names: dict[str, str] = {}
        tasks: list[Any] = []
        for number, (domain, own) in enumerate(items.items()):
            path = Path(folder) / f"{number}.jsonl"
            write_items(own, path)
            names[domain] = f"dbes_{task}_{number}"
            tasks.append(ConfigurableTask(config=definition(names[domain], path)))
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
        results = simple_evaluate(model=model, tasks=tasks, num_fewshot=0, bootstrap_iters=0, log_samples=False)["results"]
    return {domain: (float(results[name]["acc,none"]), float(results[name]["acc_bytes,none"])) for domain, name in names.items()}
