"""Who decides which experts a token uses: hooks on the router modules of a stock model, gone when the block ends.

with Routing(model, settings, domains=8, seed=0) as routing:
    routing.begin(tokens, domain, step=3)
    model(input_ids=tokens)
    routing.decisions[layer].ids
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dbes.errors import MixError
from dbes.testbed import balancing
from dbes.testbed.models import routers_of
from dbes.testbed.settings import RoutingSettings
from dbes.trace.baselines import expert_blocks


@dataclass(frozen=True, kw_only=True)
class LayerRoutes:
    """What one layer decided for the tokens of a batch.

    Attributes:
        inputs: float [tokens, hidden], what the router saw.
        logits: float [tokens, experts].
        scores: float [tokens, experts], softmax or sigmoid of the logits: what gate weights are taken from.
        selection: float [tokens, experts], what the top-k was taken on; -inf for experts that could not be chosen. None when
            nothing was weighed (hash) and while training.
        weights: float [tokens, slots], gate weights as used; 0 where the slot was dropped.
        ids: int64 [tokens, slots], chosen experts.
        dropped: share of the slots that were dropped for capacity.
    """

    inputs: Tensor
    logits: Tensor
    scores: Tensor
    selection: Tensor | None
    weights: Tensor
    ids: Tensor
    dropped: float = 0.0


def domain_experts(domains: int, experts: int, top_k: int) -> Tensor:
    """The experts each domain may use under the reference router, bool [domains, experts]: the blocks of the scoring reference.

    Raises:
        MixError: a block of k experts or fewer leaves a token of its domain no choice.
    """
    if experts // domains <= top_k:
        raise MixError(
            f"{experts} experts over {domains} domains are blocks of {experts // domains}: the reference router needs more than "
            f"top_k = {top_k} experts for each domain, so that choice remains; "
            f"use at least {domains * (top_k + 1)} experts or fewer domains"
        )
    allowed = torch.zeros(domains, experts, dtype=torch.bool)
    for domain, block in enumerate(expert_blocks(domains, experts, top_k)):
        allowed[domain, torch.from_numpy(block)] = True
    return allowed


def prefix_mean(logits: Tensor, sequences: int) -> Tensor:
    """The mean of a sequence's logits up to and including each token: routing by sequence that never looks ahead."""
    by_sequence = logits.reshape(sequences, -1, logits.shape[-1])
    counts = torch.arange(1, by_sequence.shape[1] + 1, device=logits.device, dtype=logits.dtype)
    return (by_sequence.cumsum(1) / counts[:, None]).reshape(logits.shape)


class Routing:
    """Replaces or just watches the decisions of every router of a model while the block lasts.

    Attributes:
        decisions: one LayerRoutes per layer since the last ``begin``.
        bias: float [layers, experts], the loss-free bias where the architecture has no place for it.
        training: while False, nothing is balanced: routers choose their top-k, as a plain checkpoint would.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RoutingSettings,
        *,
        domains: int,
        seed: int,
        training: bool = True,
        processes: balancing.Processes | None = None,
    ) -> None:
        self.settings = settings
        self.training = training
        self.decisions: list[LayerRoutes] = []
        self.seed = seed
        self._routers = routers_of(model)
        if not self._routers:
            raise MixError(f"{type(model).__name__} has no router that the testbed knows (OLMoE, DeepSeek-V3)")
        self._processes = processes
        self._handles: list[Any] = []
        self._tokens = torch.zeros(0, 0, dtype=torch.long)
        self._domain: Tensor | None = None
        experts, top_k = int(self._routers[0].num_experts), int(self._routers[0].top_k)
        self.experts = experts
        device = self._routers[0].weight.device
        if settings.router == "reference":
            self._allowed = domain_experts(domains, experts, top_k).to(device)
        if settings.router in ("frozen", "rerandomised"):
            for router in self._routers:
                router.weight.requires_grad_(False)
        if settings.router == "rerandomised":
            self._std = float(self._routers[0].weight.detach().std())
        self._table: Tensor | None = None
        self._vocabulary = int(cast(Any, model).config.vocab_size)
        self.bias = torch.zeros(len(self._routers), experts, device=device)

    def __enter__(self) -> Self:
        for layer, router in enumerate(self._routers):
            self._handles.append(router.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, tokens: Tensor, domain: Tensor | None, *, step: int) -> None:
        """Say what the next forward pass is about: token ids [sequences, length] and the domain of each sequence."""
        self._tokens, self._domain = tokens, domain
        self.decisions = []
        if self.settings.router == "rerandomised":
            generator = torch.Generator().manual_seed(_seed(self.seed, "rerandomised", step))
            with torch.no_grad():
                for router in self._routers:
                    # Drawn on the CPU, so that every device sees the same router.
                    router.weight.copy_(torch.empty(router.weight.shape).normal_(0.0, self._std, generator=generator))

    def balancing_loss(self) -> Tensor:
        """The auxiliary loss, summed over layers (each layer by itself); 0 where the method has none."""
        if self.settings.balancing != "aux_loss":
            return torch.zeros(())
        groups = balancing.groups_of(self.settings, len(self._tokens))
        mean = self._processes.mean if self._processes else None
        softmax = not hasattr(self._routers[0], "e_score_correction_bias")
        losses = [
            balancing.balancing_loss(made.scores, made.ids, groups=groups, reduce=mean, normalised=softmax) for made in self.decisions
        ]
        return torch.stack(losses).sum()

    def _hook(self, layer: int) -> Any:
        def decide(router: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, ids = output
            scores = _scores(router, logits)
            if self.settings.router != "learned" or self.settings.balancing not in ("none", "aux_loss"):
                logits, scores, weights, ids = self._decide(layer, router, logits, scores)
            dropped = 0.0
            if self.training and self.settings.capacity is not None:
                kept = self._kept(ids)
                weights = weights * kept
                dropped = 1.0 - float(kept.float().mean())
            made = LayerRoutes(
                inputs=arguments[0].reshape(len(logits), -1),
                logits=logits,
                scores=scores,
                selection=self._selection(layer, logits, scores),
                weights=weights,
                ids=ids,
                dropped=dropped,
            )
            self.decisions.append(made)
            return logits, weights, ids

        return decide

    def _decide(self, layer: int, router: Any, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind, top_k = self.settings.router, int(router.top_k)
        if kind == "hash":
            if self._table is None:
                self._table = _hash_table(self.seed, len(self._routers), self._vocabulary, self.experts, top_k).to(logits.device)
            ids = self._table[layer][self._tokens.reshape(-1)]
            # Nothing was weighed, so every slot weighs the same.
            return logits.detach(), scores.detach(), torch.full(ids.shape, 1 / top_k, dtype=logits.dtype, device=logits.device), ids
        if kind == "sequence":
            logits = prefix_mean(logits, len(self._tokens))
            scores = _scores(router, logits)
        elif kind == "reference":
            if self._domain is None:
                raise MixError("the reference router needs the domain of every sequence")
            allowed = self._allowed[self._domain].repeat_interleave(self._tokens.shape[1], dim=0)
            logits = logits.masked_fill(~allowed, float("-inf"))
            scores = _scores(router, logits)
        ids = self._select(layer, router, logits, scores, top_k)
        return logits, scores, _weights(router, scores, ids), ids

    def _select(self, layer: int, router: Any, logits: Tensor, scores: Tensor, top_k: int) -> Tensor:
        """Experts by the balancing method while training; by plain top-k (with the loss-free bias) otherwise."""
        method = self.settings.balancing
        own_bias = getattr(router, "e_score_correction_bias", None)
        bias = self.bias[layer] if own_bias is None else own_bias
        if not self.training or method in ("none", "aux_loss"):
            return (scores.detach() + bias).topk(top_k, dim=-1).indices
        groups = balancing.groups_of(self.settings, len(self._tokens))
        everywhere = self._processes if groups == 1 else None
        if method == "loss_free":
            rate, mean = self.settings.coefficient, everywhere.mean if everywhere else None
            return balancing.biased_experts(scores, bias, top_k, groups=groups, rate=rate, mean=mean)
        values = everywhere.gather(logits.detach()) if everywhere else logits.detach()
        if method == "sinkhorn":
            ids = balancing.sinkhorn_scores(values, groups=groups).topk(top_k, dim=-1).indices
        else:
            ids = balancing.assigned_experts(values, top_k, groups=groups)
        return everywhere.own(ids) if everywhere else ids

    def _selection(self, layer: int, logits: Tensor, scores: Tensor) -> Tensor | None:
        if self.settings.router == "hash" or self.training:
            return None
        own = getattr(self._routers[layer], "e_score_correction_bias", None)
        biased = scores.detach() + (self.bias[layer] if own is None else own)
        return biased.masked_fill(logits.isneginf(), float("-inf")) if self.settings.router == "reference" else biased

    def _kept(self, ids: Tensor) -> Tensor:
        assert self.settings.capacity is not None
        groups = balancing.groups_of(self.settings, len(self._tokens))
        everywhere = self._processes if groups == 1 else None
        slots = everywhere.gather(ids) if everywhere else ids
        kept = balancing.within_capacity(slots, self.experts, groups=groups, capacity=self.settings.capacity)
        return everywhere.own(kept) if everywhere else kept


def _scores(router: Any, logits: Tensor) -> Tensor:
    """What the router's own architecture makes of its logits."""
    return logits.float().sigmoid() if hasattr(router, "e_score_correction_bias") else logits.float().softmax(-1)


def _weights(router: Any, scores: Tensor, ids: Tensor) -> Tensor:
    """Gate weights of chosen experts, as the router's own architecture computes them."""
    weights = scores.gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * float(getattr(router, "routed_scaling_factor", 1.0))


def _hash_table(seed: int, layers: int, vocabulary: int, experts: int, top_k: int) -> Tensor:
    """Distinct random experts for every token id, another table in every layer: int64 [layers, vocabulary, slots]."""
    generator = torch.Generator().manual_seed(_seed(seed, "hash", 0))
    return torch.rand(layers, vocabulary, experts, generator=generator).argsort(-1)[..., :top_k]


def _seed(seed: int, purpose: str, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()[:7])
