"""Settings: strict, checked before any training, and part of a run's identity."""

from pathlib import Path

import pytest
import torch

from dbes.errors import MixError
from dbes.testbed.models import build_model
from dbes.testbed.presets import preset
from dbes.testbed.settings import TrainSettings, parse_settings, read_settings


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param({"routing": {"router": "learnt"}}, "routing.router", id="unknown router"),
        pytest.param({"optimiser": {}}, "optimiser: Extra inputs", id="unknown key"),
        pytest.param({"mix": {"tokens_per_step": 100}}, "not a multiple of the sequence length", id="broken batch"),
        pytest.param({"mix": {"lengths": []}}, "at least one sequence length", id="no length"),
        pytest.param({"mix": {"domains": ["a"], "weights": [1.0, 2.0]}}, "one positive number per named domain", id="weights"),
        pytest.param({"model": {"experts": 2, "top_k": 4}}, "top_k 4 is larger", id="too few experts"),
        pytest.param({"routing": {"scope": "micro_batch", "micro_batch": 64}}, "wider than the batch of 32", id="scope wider than batch"),
        pytest.param(
            {"routing": {"scope": "micro_batch", "micro_batch": 5}}, "not a whole number of micro-batches", id="broken micro-batch"
        ),
        pytest.param({"mix": {"lengths": [1024]}}, "the model has 512 positions", id="too long"),
        pytest.param({"routing": {"router": "hash"}}, "nothing that could learn to balance", id="hash with balancing"),
        pytest.param(
            {"routing": {"router": "sequence", "balancing": "sinkhorn"}}, "replaces the choice of a learned router", id="two choices"
        ),
        pytest.param([1], "settings", id="not a mapping"),
    ],
)
def test_impossible_settings_are_named_before_training(content, told):
    with pytest.raises(MixError, match="given") as problem:
        parse_settings(content, where="given")
    assert told in str(problem.value)


def test_a_yaml_file_is_read_strictly(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("model: {size: 4m, vocabulary: 4096}\nrouting: {balancing: sinkhorn}\nseed: 3\n", "utf-8")
    settings = read_settings(path)
    assert (settings.model.size, settings.routing.balancing, settings.seed) == ("4m", "sinkhorn", 3)
    path.write_text("model: {size: 4m", "utf-8")
    with pytest.raises(MixError, match="not readable as YAML"):
        read_settings(path)
    with pytest.raises(MixError, match="no such file"):
        read_settings(tmp_path / "none.yaml")


def test_identity_holds_everything_that_can_change_a_result():
    base = TrainSettings()
    changed = [
        {"seed": 1},
        {"data_seed": 1},
        {"model": {"router_std": "1/sqrt(hidden)"}},
        {"model": {"top_k": 1}},
        {"routing": {"coefficient": 0.1}},
        {"optimizer": {"steps": 10}},
        {"mix": {"overlap": 0.1}},
    ]
    identities = {TrainSettings.model_validate(one).identity("mix") for one in changed} | {base.identity("mix"), base.identity("other")}
    assert len(identities) == len(changed) + 2
    assert base.model_copy(update={"threads": 2}).identity("mix") == base.identity("mix")


@pytest.mark.parametrize("name", ["smoke", "standard"])
def test_presets_are_whole(name):
    grid = preset(name)
    runs = list(grid.runs())
    assert len(runs) == grid.seeds * len(grid.arms)
    assert len({run.identity("mix") for _, _, run in runs}) == len(runs), "no two runs are the same"
    assert all(arm in grid.arms for arms in grid.experiments.values() for arm in arms)
    for experiment in grid.experiments.values():
        if name == "smoke":
            continue
        by_size = {}
        for arm in experiment:
            settings = grid.arms[arm].settings
            tokens = settings.optimizer.steps * settings.mix.tokens_per_step
            by_size.setdefault(settings.model.size, set()).add(tokens)
        assert len({frozenset(tokens) for tokens in by_size.values()}) == 1, "arms of an experiment see equally many tokens"


def test_standard_has_every_experiment_with_three_seeds():
    grid = preset("standard")
    assert grid.seeds >= 3
    assert set(grid.experiments) == {"scope", "soft", "frozen", "levels", "scale", "upstream", "metrics"}
    assert len([arm for arm in grid.experiments["scope"] if arm.count("/") == 1 and "wide" not in arm]) == 12


def test_the_plan_for_a_billion_parameters_is_a_configuration_of_that_size():
    """The counts that reports/testbed/SCALE_1B.md computes with."""
    found = read_settings(Path(__file__).parents[1] / "reports" / "testbed" / "scale_1b.yaml").model
    with torch.device("meta"):
        model = build_model(found, seed=0)
    experts = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    assert model.num_parameters() == 1_058_079_744
    assert model.num_parameters() - experts * (found.experts - found.top_k) // found.experts == 161_547_264
