"""Ways to even out the load of experts, each over a scope: every sequence, every micro-batch, or the whole global batch.

A scope is a number of equal consecutive groups of the tokens of a batch. ``Reduce`` averages over the processes of a
distributed run (the identity for one process), so that the global scope spans all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dbes.errors import MixError
from dbes.testbed.settings import RoutingSettings

Reduce = Callable[[Tensor], Tensor]


def groups_of(settings: RoutingSettings, sequences: int) -> int:
    """Number of groups that the sequences of a batch fall into.

    Raises:
        MixError: the batch is not a whole number of micro-batches.
    """
    if settings.scope == "sequence":
        return sequences
    if settings.scope == "global_batch":
        return 1
    if settings.micro_batch > sequences or sequences % settings.micro_batch:
        raise MixError(f"a batch of {sequences} sequences is not a whole number of micro-batches of {settings.micro_batch}")
    return sequences // settings.micro_batch


def expert_shares(ids: Tensor, experts: int, groups: int = 1) -> Tensor:
    """Share of the slots of each group that each expert took, float [groups, experts]; rows sum to 1."""
    slots = ids.reshape(groups, -1)
    offset = torch.arange(groups, device=ids.device)[:, None] * experts
    counts = torch.bincount((slots + offset).reshape(-1), minlength=groups * experts)
    return counts.reshape(groups, experts).float() / slots.shape[1]


def balancing_loss(scores: Tensor, ids: Tensor, *, groups: int, reduce: Reduce | None = None, normalised: bool = False) -> Tensor:
    r"""The auxiliary loss of **one** layer, mean over the groups of its scope.

    .. math:: L = E \sum_e f_e P_e

    f is the share of slots that chose expert e, P its mean score (each token's scores normalised to 1). 1 for a uniform router
    and, because layers are never pooled, up to E/k for a router that collapsed, whatever the other layers do. Only P carries
    a gradient. ``reduce`` averages f over processes when the group spans them; ``normalised``: scores sum to 1 already.
    """
    experts = scores.shape[-1]
    shares = expert_shares(ids, experts, groups)
    if reduce is not None and groups == 1:
        shares = reduce(shares)
    if not normalised:
        scores = scores / scores.sum(-1, keepdim=True)
    means = scores.reshape(groups, -1, experts).mean(1)
    return experts * (shares * means).sum(-1).mean()


@dataclass(frozen=True)
class Processes:
    """The processes of a distributed run, as far as balancing needs them.

    Attributes:
        mean: average of a tensor over processes, the same on each of them.
        gather: rows of all processes one after the other.
        index, count: which process this is, of how many.
    """

    mean: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    index: int
    count: int

    def own(self, rows: Tensor) -> Tensor:
        """This process's part of gathered rows."""
        return rows.chunk(self.count)[self.index]


def sinkhorn_scores(logits: Tensor, *, groups: int, iterations: int = 12, sharpness: float = 8.0) -> Tensor:
    """Logits minus a price per expert and group such that choices by them are nearly balanced in each group.

    Sinkhorn's algorithm on exp(sharpness * logits / std): rows are scaled to equal token mass, columns to equal expert mass.
    Only the columns' factors matter for a token's choice, so the top-k of what is returned is the top-k of the plan. Choices
    are balanced to the degree that the plan is sharp; ``assigned_experts`` balances exactly.
    """
    values = logits.detach().float().reshape(groups, -1, logits.shape[-1])
    scale = sharpness / values.std(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    centred = (values - values.amax(-1, keepdim=True)) * scale
    # Far below the row's best, an entry is never chosen: the floor only keeps the factors finite.
    plan = centred.clamp_min(-60.0).exp()
    columns = torch.ones(groups, 1, plan.shape[-1], device=plan.device)
    for _ in range(iterations):
        rows = 1.0 / torch.bmm(plan, columns.transpose(1, 2))
        # Rows from the left: the product with the plan as it lies in memory, four times faster than with its transpose.
        columns = 1.0 / torch.bmm(rows.transpose(1, 2), plan).clamp_min(1e-30)
        columns = columns / columns.mean(2, keepdim=True)
    return (values + columns.clamp_min(1e-30).log() / scale).reshape(logits.shape)


def assigned_experts(scores: Tensor, top_k: int, *, groups: int) -> Tensor:
    """Experts for every token such that each takes the same number of slots in every group, int64 [tokens, slots].

    A balanced assignment in the manner of BASE layers, near the largest total score: Sinkhorn's prices first; an expert that is
    still asked by more tokens than its share keeps those that would lose most by going elsewhere; the few that it sends away go
    to the experts with room by an exact linear assignment. Shares are rounded up where slots do not divide evenly. A token that
    could only be sent to an expert it already has takes its next best instead, and that expert is one over its share.
    """
    experts = scores.shape[-1]
    values = sinkhorn_scores(scores, groups=groups, iterations=30, sharpness=24.0).reshape(groups, -1, experts)
    share = -(-values.shape[1] * top_k // experts)
    best = values.topk(min(top_k + 1, experts), dim=-1)
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(2, best.indices[..., :top_k], True)
    loss = (values - best.values[..., -1:]).masked_fill(~chosen, float("-inf"))
    strongest = loss.topk(min(share, values.shape[1]), dim=1).indices
    kept = chosen & torch.zeros_like(chosen).scatter_(1, strongest, True)
    held, worth = kept.cpu().numpy(), values.cpu().numpy()
    for group in range(groups):
        _place_rest(held[group], worth[group], top_k, share)
    return torch.from_numpy(np.nonzero(held)[2].reshape(-1, top_k)).to(scores.device)


EXACT_TOKENS = 128
"""Tokens up to which what is left is assigned exactly: the time for that grows with the cube of their number."""


def _place_rest(held: np.ndarray, worth: np.ndarray, top_k: int, share: int) -> None:
    """Give every token that holds fewer than ``top_k`` experts what it lacks, in place; ``held`` is bool [tokens, experts]."""
    _place_many(held, worth, top_k, share)
    for _ in range(top_k):
        lacking = np.flatnonzero(held.sum(1) < top_k)
        if not len(lacking):
            return
        room = np.repeat(np.arange(held.shape[1]), np.maximum(share - held.sum(0), 0))
        forbidden = held[lacking][:, room]
        # Far below any real difference of worth, so a held expert is given only when nothing else is left.
        cost = np.where(forbidden, worth.min() - 1e6, worth[lacking][:, room])
        rows, columns = linear_sum_assignment(cost, maximize=True)
        given = ~forbidden[rows, columns]
        held[lacking[rows[given]], room[columns[given]]] = True
        for token in lacking[rows[~given]]:
            held[token, np.where(held[token], -np.inf, worth[token]).argmax()] = True


def _place_many(held: np.ndarray, worth: np.ndarray, top_k: int, share: int) -> None:
    """Place lacking tokens until ``EXACT_TOKENS`` are left, in place: each asks for its best expert with room, which takes those that
    would lose most by their second choice. Every round fills an expert or places all tokens, so there are at most ``experts`` rounds."""
    for _ in range(held.shape[1] * top_k):
        room = np.maximum(share - held.sum(0), 0)
        lacking = np.flatnonzero(held.sum(1) < top_k)
        options = np.where(held[lacking] | (room == 0), -np.inf, worth[lacking])
        open_tokens = np.isfinite(options).any(1)
        lacking, options = lacking[open_tokens], options[open_tokens]
        if len(lacking) <= EXACT_TOKENS:
            return
        wanted = options.argmax(1)
        two = np.partition(options, -2, axis=1)[:, -2:]
        # A token with a single expert left comes first.
        loss = np.where(np.isfinite(two[:, 0]), two[:, 1] - two[:, 0], np.inf)
        order = np.lexsort((-loss, wanted))
        starts = np.searchsorted(wanted[order], np.arange(held.shape[1]))
        taken = order[np.arange(len(order)) - starts[wanted[order]] < room[wanted[order]]]
        held[lacking[taken], wanted[taken]] = True


def biased_experts(scores: Tensor, bias: Tensor, top_k: int, *, groups: int, rate: float, mean: Reduce | None = None) -> Tensor:
    """Top-k of scores plus bias, the bias moved towards even load after every group (loss-free balancing); int64 [tokens, slots].

    ``bias`` [experts] is changed in place: plus ``rate`` for experts below their even share, minus for those above. Groups take
    turns, so a narrow scope follows the load of a few sequences and a wide one that of the whole batch.
    """
    experts = scores.shape[-1]
    made = []
    for part in scores.detach().reshape(groups, -1, experts):
        ids = (part + bias).topk(top_k, dim=-1).indices
        shares = expert_shares(ids, experts)
        if mean is not None and groups == 1:
            shares = mean(shares)
        bias += rate * torch.sign(1 / experts - shares[0])
        made.append(ids)
    return torch.cat(made)


def within_capacity(ids: Tensor, experts: int, *, groups: int, capacity: float) -> Tensor:
    """Which slots run, bool like ``ids``: in every group an expert takes the first ``ceil(capacity * even share)`` that come.

    First come, first served: what is dropped depends on earlier tokens only.
    """
    slots = ids.reshape(groups, -1)
    limit = math.ceil(capacity * slots.shape[1] / experts - 1e-9)
    taken = torch.nn.functional.one_hot(slots, experts).cumsum(1)
    place = taken.gather(2, slots[..., None])[..., 0]
    return (place <= limit).reshape(ids.shape)
