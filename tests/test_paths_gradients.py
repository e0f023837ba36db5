"""Gradients and masking of cells against a copy of the model whose experts are separate modules, run one after the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import exact
from torch import Tensor, nn

from dbes.errors import PathError
from dbes.evaluation.pipeline import record
from dbes.models import load_model
from dbes.models.masking import masked
from dbes.paths.evidence import gather
from dbes.paths.gradients import expert_parameters, gradient_norms, masking_effects, mean_loss
from dbes.paths.model_evidence import with_model
from dbes.paths.search import find_path

EPS = torch.finfo(torch.float32).eps
"""Logits are rounded to float32 before the loss, also those of a model in float64."""

WINDOWS = [np.random.default_rng(0).integers(1, 250, size) for size in (17, 30, 5, 30, 2, 1)]


class ExpertLoop(nn.Module):
    """The experts of an OLMoE layer as separate weights; ``silent`` ones add nothing."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts = fused.num_experts
        self.inner = nn.ParameterList([nn.Parameter(part.detach().clone()) for part in fused.gate_up_proj])
        self.outer = nn.ParameterList([nn.Parameter(part.detach().clone()) for part in fused.down_proj])
        self.silent: set[int] = set()

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for expert in set(range(len(self.inner))) - self.silent:
            for slot in range(top_k_index.shape[1]):
                rows = torch.where(top_k_index[:, slot] == expert)[0]
                gate, up = (hidden[rows] @ self.inner[expert].T).chunk(2, dim=-1)
                out = (nn.functional.silu(gate) * up) @ self.outer[expert].T
                result = result.index_add(0, rows, out * top_k_weights[rows, slot, None])
        return result


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return load_model(tiny_checkpoint).model


@pytest.fixture(scope="module")
def loops(model: Any) -> Any:
    apart = copy.deepcopy(model)
    for layer in apart.model.layers:
        layer.mlp.experts = ExpertLoop(layer.mlp.experts)
    return apart


def loss_of(model: Any) -> Tensor:
    """Mean loss over all predicted tokens, window by window."""
    total, count = torch.zeros(()), 0
    for window in WINDOWS:
        ids = torch.from_numpy(window)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += len(window) - 1
    return total / count


def test_gradient_norms_against_separate_experts(model: Any, loops: Any) -> None:
    model, loops = exact(model), copy.deepcopy(loops).double()
    loss_of(loops).backward()
    expected = np.array(
        [
            [
                sum(0.0 if part.grad is None else float(part.grad.double().pow(2).sum()) for part in parts)
                for parts in zip(layer.mlp.experts.inner, layer.mlp.experts.outer, strict=True)
            ]
            for layer in loops.model.layers
        ]
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switches = [parameter.requires_grad for parameter in model.parameters()]
    for batch_tokens in (16, 4096):
        np.testing.assert_allclose(gradient_norms(model, WINDOWS, batch_tokens=batch_tokens), expected, rtol=16 * EPS)
    assert expected.max() > 2 * expected.min() and (expected >= 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == switches


def test_an_expert_without_a_token_has_no_gradient(model: Any) -> None:
    two = [np.array([5, 5])]
    norms = gradient_norms(model, two)
    # the loss has one predicting token, which uses 2 of 8 experts in the last layer
    assert (norms[-1] > 0).sum() <= 2 * 2 and (norms == 0).any()


def test_masked_cells_add_nothing_and_come_back_bit_for_bit(model: Any, loops: Any) -> None:
    cells = [(0, 3), (2, 1), (2, 6)]
    with torch.no_grad():
        base = float(loss_of(loops))
        for layer, expert in cells:
            loops.model.layers[layer].mlp.experts.silent.add(expert)
        expected = float(loss_of(loops))
        for layer, _ in cells:
            loops.model.layers[layer].mlp.experts.silent.clear()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert mean_loss(model, WINDOWS) == pytest.approx(base, rel=1e-5)
    with masked(model, cells):
        assert mean_loss(model, WINDOWS) == pytest.approx(expected, rel=1e-5)
        assert abs(expected - base) > 1e-6
    with pytest.raises(RuntimeError, match="inside"), masked(model, cells):
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(PathError, match=r"MoE layers are \[0, 1, 2\]"), masked(model, [(0, 1), (3, 0)]):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masking_effects_are_those_of_one_cell_at_a_time(model: Any) -> None:
    domains = [WINDOWS[:2], WINDOWS[2:]]
    effects, base = masking_effects(model, domains), [mean_loss(model, windows) for windows in domains]
    assert effects.shape == (2, 3, 8)
    with masked(model, [(1, 4)]):
        np.testing.assert_allclose(effects[:, 1, 4], [mean_loss(model, own) - before for own, before in zip(domains, base, strict=True)])


def test_text_without_a_token_to_predict_is_refused(model: Any) -> None:
    with pytest.raises(PathError, match="at least two tokens"):
        gradient_norms(model, [np.array([3])])


def test_a_parameter_count_is_that_of_one_expert(model: Any) -> None:
    assert expert_parameters(model).tolist() == [3 * 16 * 32] * 3


def test_gradient_path_of_a_recorded_model(tiny_checkpoint: Path, tiny_task: Path) -> None:
    trace = record(tiny_checkpoint, tasks=tiny_task)
    evidence = gather(trace, permutations=40)
    full = with_model(evidence, tiny_checkpoint, tasks=tiny_task, gradients=True, effects=True)
    assert full.gradients is not None and full.gradients.shape == full.hits.shape == full.effects.shape  # pyright: ignore
    path = find_path(full, domain="law", rule="gradient", budget=0.2, resamples=0)
    ranked = np.sort(full.gradients[0].ravel())[::-1]
    assert sum(full.gradients[0][layer, expert] for layer, expert in path.cells) == pytest.approx(ranked[: len(path.cells)].sum())
    other = load_model(tiny_checkpoint)
    with torch.no_grad():
        other.model.lm_head.weight.add_(1)
    stranger = load_model(other.model, tokenizer=other.tokenizer)
    with pytest.raises(PathError, match="not the model of this result"):
        with_model(evidence, stranger, tasks=tiny_task)
    with pytest.raises(PathError, match="has domains"):
        with_model(evidence, tiny_checkpoint, tasks="embedded")
