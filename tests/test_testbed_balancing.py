"""Balancing methods against naive implementations and exact assignment."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dbes.errors import MixError
from dbes.testbed import balancing
from dbes.testbed.balancing import (
    Processes,
    assigned_experts,
    balancing_loss,
    biased_experts,
    expert_shares,
    groups_of,
    sinkhorn_scores,
    within_capacity,
)
from dbes.testbed.settings import RoutingSettings


def naive_loss(scores: np.ndarray, ids: np.ndarray, groups: int) -> float:
    """Token by token, as the formula reads."""
    tokens, experts = scores.shape
    size, total = tokens // groups, 0.0
    for group in range(groups):
        rows = range(group * size, (group + 1) * size)
        for expert in range(experts):
            share = sum(int(expert in ids[row]) for row in rows) / (size * ids.shape[1])
            mean = sum(scores[row, expert] for row in rows) / size
            total += experts * share * mean
    return total / groups


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_loss_equals_the_formula_read_token_by_token(groups):
    scores = torch.randn(24, 5, generator=torch.Generator().manual_seed(groups)).softmax(-1)
    ids = scores.topk(2, dim=-1).indices
    assert float(balancing_loss(scores, ids, groups=groups)) == pytest.approx(naive_loss(scores.numpy(), ids.numpy(), groups), rel=1e-5)


def test_loss_is_one_when_even_and_experts_over_k_when_collapsed():
    even = torch.full((16, 4), 0.25)
    ids = torch.arange(32).reshape(16, 2) % 4
    assert float(balancing_loss(even, ids, groups=1)) == pytest.approx(1.0)
    collapsed = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(16, 1)
    assert float(balancing_loss(collapsed, torch.tensor([[0, 1]]).repeat(16, 1), groups=4)) == pytest.approx(2.0)


def test_pooling_over_layers_hides_collapse_and_the_loss_per_layer_shows_it():
    """Each of 4 layers collapsed on its own pair of 8 experts: pooled, the load is even; by layer it is E/k = 4."""
    layers, experts, tokens = 4, 8, 64
    scores, ids = [], []
    for layer in range(layers):
        pair = torch.tensor([2 * layer, 2 * layer + 1])
        scores.append(torch.zeros(tokens, experts).index_fill_(1, pair, 0.5))
        ids.append(pair.repeat(tokens, 1))
    pooled = balancing_loss(torch.cat(scores), torch.cat(ids), groups=1)
    by_layer = [balancing_loss(score, chosen, groups=1) for score, chosen in zip(scores, ids, strict=True)]
    assert float(pooled) == pytest.approx(1.0)
    assert [float(loss) for loss in by_layer] == pytest.approx([experts / 2] * layers)


def test_only_probabilities_carry_the_gradient_and_it_pushes_load_down():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]]).repeat(8, 1).requires_grad_()
    scores = logits.softmax(-1)
    balancing_loss(scores, torch.zeros(8, 1, dtype=torch.long), groups=1).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_a_global_batch_in_processes_equals_one_big_batch():
    """Two halves whose frequencies are averaged give, averaged, the loss and the gradient of the whole."""
    logits = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    ids = logits.topk(2, dim=-1).indices
    whole = logits.clone().requires_grad_()
    balancing_loss(whole.softmax(-1), ids, groups=1).backward()
    shares = expert_shares(ids, 6)
    halves = logits.clone().requires_grad_()
    losses = [
        balancing_loss(part.softmax(-1), chosen, groups=1, reduce=lambda _: shares)
        for part, chosen in zip(halves.chunk(2), ids.chunk(2), strict=True)
    ]
    (sum(losses) / 2).backward()
    assert whole.grad is not None and halves.grad is not None
    assert torch.allclose(whole.grad, halves.grad, atol=1e-7)


@pytest.mark.parametrize(("scope", "groups"), [("sequence", 8), ("micro_batch", 2), ("global_batch", 1)])
def test_scope_says_how_many_groups(scope, groups):
    assert groups_of(RoutingSettings(scope=scope, micro_batch=4), 8) == groups


def test_a_micro_batch_wider_than_the_batch_is_refused():
    with pytest.raises(MixError, match="whole number of micro-batches"):
        groups_of(RoutingSettings(scope="micro_batch", micro_batch=16), 8)


def optimum(values: np.ndarray, share: int) -> float:
    """Largest total of a one-expert assignment with ``share`` tokens for each expert, exactly."""
    rows, columns = linear_sum_assignment(np.repeat(values, share, axis=1), maximize=True)
    return float(np.repeat(values, share, axis=1)[rows, columns].sum())


@pytest.mark.parametrize("seed", range(6))
def test_assignment_is_exactly_even_and_near_the_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    # One expert is liked by all, so that greedy choice would be far from even.
    scores = torch.randn(64, 8, generator=generator) + torch.tensor([2.0, 1.0, 0, 0, 0, 0, 0, -1.0])
    ids = assigned_experts(scores, 1, groups=1)
    assert torch.bincount(ids.reshape(-1), minlength=8).tolist() == [8] * 8
    best, greedy = optimum(scores.numpy(), 8), float(scores.amax(-1).sum())
    total = float(scores.gather(1, ids).sum())
    assert best - 1e-4 <= greedy
    assert total <= best + 1e-4
    assert total >= best - 0.03 * (greedy - float(scores.mean(-1).sum()))


@pytest.mark.parametrize("seed", range(3))
def test_placing_in_rounds_is_nearly_as_good_as_one_exact_assignment(seed, monkeypatch):
    """Tokens that want the same experts: too many are sent away to be placed by an exact assignment in reasonable time."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 8, generator=generator) * 4 + torch.randn(1024, 8, generator=generator) * 0.3
    totals = {}
    for limit in (4, 1024):
        monkeypatch.setattr(balancing, "EXACT_TOKENS", limit)
        ids = assigned_experts(scores, 1, groups=1)
        assert torch.bincount(ids.reshape(-1), minlength=8).tolist() == [128] * 8
        totals[limit] = float(scores.gather(1, ids).sum())
    blind = float(scores.mean()) * 1024
    assert totals[4] - blind >= 0.97 * (totals[1024] - blind)
    # What is lost to the optimum is the price of experts that nobody likes, which single precision cannot tell from nothing.
    assert totals[4] - blind >= 0.8 * (optimum(scores.numpy(), 128) - blind)


@pytest.mark.parametrize(("groups", "top_k"), [(1, 2), (4, 2), (4, 3)])
def test_assignment_is_even_in_every_group_with_distinct_experts(groups, top_k):
    scores = torch.randn(96, 8, generator=torch.Generator().manual_seed(1)) * 3 + torch.arange(8.0)
    ids = assigned_experts(scores, top_k, groups=groups)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    shares = expert_shares(ids, 8, groups)
    assert torch.allclose(shares, torch.full_like(shares, 1 / 8), atol=1 / (96 // groups * top_k) + 1e-6)


def test_assignment_of_an_even_choice_changes_nothing():
    scores = torch.eye(8).repeat(8, 1) * 5
    assert torch.equal(assigned_experts(scores, 1, groups=1)[:, 0], torch.arange(8).repeat(8))


@pytest.mark.parametrize("seed", range(4))
def test_sharp_sinkhorn_finds_the_exact_assignment(seed):
    """With one token for each expert and a sharp plan, Sinkhorn's choice is the assignment that scipy finds."""
    values = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    rows, columns = linear_sum_assignment(values.numpy(), maximize=True)
    chosen = sinkhorn_scores(values, groups=1, iterations=3000, sharpness=16.0).argmax(-1)
    assert float(values[torch.arange(6), chosen].sum()) == pytest.approx(float(values.numpy()[rows, columns].sum()), abs=0.02)


def test_sinkhorn_evens_out_each_group_by_itself():
    scores = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 8)
    before = expert_shares(scores.topk(2, dim=-1).indices, 8, 4)
    after = expert_shares(sinkhorn_scores(scores, groups=4).topk(2, dim=-1).indices, 8, 4)
    assert before.amax() > 0.35
    assert after.amax() < 0.19
    together = sinkhorn_scores(scores, groups=4)
    apart = torch.cat([sinkhorn_scores(part, groups=1) for part in scores.chunk(4)])
    rounding = 16 * 12 * torch.finfo(scores.dtype).eps * float(scores.abs().max())  # of twelve iterations
    assert torch.allclose(together, apart, rtol=0, atol=rounding)


def test_sinkhorn_does_not_depend_on_the_scale_of_logits():
    scores = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    small, large = (sinkhorn_scores(scores * scale, groups=1).topk(2, dim=-1).indices.sort(-1).values for scale in (0.01, 10.0))
    assert (small == large).float().mean() > 0.99


def test_bias_moves_towards_even_load_once_per_group():
    scores = torch.tensor([[0.9, 0.1]]).repeat(8, 1)
    bias = torch.zeros(2)
    ids = biased_experts(scores, bias, 1, groups=1, rate=0.1)
    assert ids.reshape(-1).tolist() == [0] * 8
    assert bias.tolist() == pytest.approx([-0.1, 0.1])
    biased_experts(scores, bias, 1, groups=4, rate=0.1)
    # Three more groups of the same choice; then the second expert leads and the bias turns back.
    assert bias.tolist() == pytest.approx([-0.3, 0.3], abs=1e-6)


def test_capacity_keeps_the_first_slots_of_every_group():
    ids = torch.tensor([[0], [0], [0], [1], [0], [1], [1], [1]])
    kept = within_capacity(ids, 2, groups=2, capacity=1.0)
    assert kept[:, 0].tolist() == [True, True, False, True, True, True, True, False]
    assert within_capacity(ids, 2, groups=1, capacity=1.0).all()
    assert within_capacity(ids, 2, groups=2, capacity=1.5).all()


def test_processes_take_their_own_rows():
    processes = Processes(mean=lambda values: values, gather=lambda rows: rows, index=1, count=2)
    assert processes.own(torch.arange(6)).tolist() == [3, 4, 5]


def test_a_learned_choice_by_capacity_is_causal():
    """Changing a later token changes no earlier slot's fate."""
    ids = torch.randint(0, 4, (40, 1), generator=torch.Generator().manual_seed(0))
    later = ids.clone()
    later[30:] = (later[30:] + 1) % 4
    first, second = (within_capacity(chosen, 4, groups=1, capacity=1.0) for chosen in (ids, later))
    assert torch.equal(first[:30], second[:30])
    assert math.isclose(float(first[:30].float().mean()), float(second[:30].float().mean()))
