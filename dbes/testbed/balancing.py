"""Ways to even out the load of experts, each over a scope: every sequence, every micro-batch, or the whole global batch.

A scope is a number of equal consecutive groups of the tokens of a batch. ``Reduce`` averages over the processes of a
distributed run (the identity for one process), so that the global scope spans all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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
    counts = torch.zeros(groups, experts, dtype=torch.float32, device=ids.device)
    counts.scatter_add_(1, slots, torch.ones_like(slots, dtype=torch.float32))
    return counts / slots.shape[1]


def balancing_loss(scores: Tensor, ids: Tensor, *, groups: int, reduce: Reduce | None = None) -> Tensor:
    r"""The auxiliary loss of **one** layer, mean over the groups of its scope.

    .. math:: L = E \sum_e f_e P_e

    f is the share of slots that chose expert e, P its mean score (each token's scores normalised to 1). 1 for a uniform router
    and, because layers are never pooled, up to E/k for a router that collapsed, whatever the other layers do. Only P carries
    a gradient. ``reduce`` averages f over processes when the group spans them.
    """
    experts = scores.shape[-1]
    shares = expert_shares(ids, experts, groups)
    if reduce is not None and groups == 1:
        shares = reduce(shares)
    probabilities = scores / scores.sum(-1, keepdim=True)
    means = probabilities.reshape(groups, -1, experts).mean(1)
    return experts * (shares * means).sum(-1).mean()
