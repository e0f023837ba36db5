"""Specialization while a model trains: it is measured, and the training is bit for bit what it is without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import dbes
from dbes.evaluation.callback import random_numbers_kept
from dbes.models.load import load_model


class Words(torch.utils.data.Dataset):
    """Token ids that have nothing to do with any text."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 2000, (16,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": ids, "labels": ids.clone()}


def trained(where: Path, callback: Any = None, *, attach: bool = False) -> tuple[Trainer, Any]:
    loaded = load_model("embedded")
    torch.manual_seed(3)
    arguments = TrainingArguments(
        output_dir=str(where), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=True, seed=5,
    )  # fmt: skip
    found = Trainer(loaded.model, arguments, train_dataset=Words(), callbacks=[] if callback is None else [callback(loaded)])
    if attach:
        next(each for each in found.callback_handler.callbacks if isinstance(each, dbes.SpecializationCallback)).attach(found)
    found.train()
    return found, loaded


def test_a_training_goes_as_it_would_have_gone_without(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain")
    kept: list[dbes.SpecializationCallback] = []

    def watching(loaded: Any) -> dbes.SpecializationCallback:
        kept.append(dbes.SpecializationCallback(loaded.tokenizer, every=2, limit=4, permutations=19, output_path=tmp_path / "steps"))
        return kept[0]

    watched, _ = trained(tmp_path / "watched", watching, attach=True)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (plain, watched)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    for (name, one), (_, other) in zip(plain.model.named_parameters(), watched.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert watched.model.training == plain.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())
    logged = [entry for entry in watched.state.log_history if "specialization/score" in entry]
    assert [entry["step"] for entry in logged] == [2, 4] == list(kept[0].results)
    for entry, result in zip(logged, kept[0].results.values(), strict=True):
        record = result.record("specialization")
        assert entry["specialization/score"] == record.score and entry["specialization/excess"] == record.excess
        assert {f"specialization/{domain}" for domain in result.task.domains} <= entry.keys()
        assert result.model.name.startswith("step-") and (result.folder / "result.json").is_file()
    assert kept[0].results[2].model.revision != kept[0].results[4].model.revision
    assert dbes.report(tmp_path / "steps").read_text("utf-8").count("<tr><td>") == 2


def test_without_a_trainer_the_history_of_its_state_has_the_values(tmp_path: Path) -> None:
    options = {"every": 9, "limit": 4, "permutations": 19, "output_path": tmp_path / "steps"}
    watched, _ = trained(tmp_path, lambda loaded: dbes.SpecializationCallback(loaded.tokenizer, **options))
    assert [entry["step"] for entry in watched.state.log_history if "specialization/score" in entry] == [4]  # at the end


def test_random_numbers_go_on_as_if_nothing_had_been() -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002 (what a training draws from)

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(11)
    expected = drawn()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(11)
    with random_numbers_kept():
        drawn()
    assert drawn() == expected


def test_fewer_than_one_step() -> None:
    with pytest.raises(dbes.SettingError, match="at least 1 step"):
        dbes.SpecializationCallback(None, every=0)
