"""Everything that identifies a training run, as strict pydantic models: two runs with equal settings and mix are the same run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from dbes.errors import MixError
from dbes.schema import Strict, read_named, validated

Scope = Literal["sequence", "micro_batch", "global_batch"]
RouterKind = Literal["learned", "frozen", "rerandomised", "hash", "reference", "sequence"]
BalancingKind = Literal["none", "aux_loss", "loss_free", "sinkhorn", "assignment"]


class MixSettings(Strict):
    """Which domains, how much of each, and how sequences are cut and ordered.

    Attributes:
        domains: domains of the mix to use; empty means all of them.
        weights: share of each domain in training, equal when empty.
        tokens_per_step: tokens of one global batch.
        lengths: tokens of a sequence; step s uses ``lengths[s % len(lengths)]``.
        order: ``one_domain``: consecutive sequences of a batch are of one domain, so a micro-batch sees few domains;
            ``mixed``: domains alternate. Both orders hold the same sequences in every global batch.
        stratified: every global batch holds each domain in proportion to its weight; otherwise domains are drawn at random.
        overlap: share of spans of a sequence that come from another domain (the label stays): 0 is perfectly separable.
        span: tokens of such a span.
    """

    domains: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    tokens_per_step: int = Field(default=4096, ge=2)
    lengths: tuple[int, ...] = (128,)
    order: Literal["one_domain", "mixed"] = "one_domain"
    stratified: bool = True
    overlap: float = Field(default=0.0, ge=0.0, lt=1.0)
    span: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _whole_sequences(self) -> Self:
        if not self.lengths or any(length < 2 for length in self.lengths):
            raise ValueError("lengths: at least one sequence length, each at least 2")
        for length in self.lengths:
            if self.tokens_per_step % length:
                raise ValueError(f"tokens_per_step {self.tokens_per_step} is not a multiple of the sequence length {length}")
        if self.weights and (len(self.weights) != len(self.domains) or min(self.weights) <= 0):
            raise ValueError("weights: one positive number per named domain")
        return self


class ModelSettings(Strict):
    """A stock architecture of transformers at one of the testbed's sizes.

    Attributes:
        router_std: standard deviation of the router's initial weights, or ``1/sqrt(hidden)``.
        normalise: gate weights of the chosen experts sum to 1 (``norm_topk_prob``); OLMoE's own default is not to.
        hidden, layers, intermediate: override the size's numbers when given.
    """

    architecture: Literal["olmoe", "deepseek_v3"] = "olmoe"
    size: Literal["1m", "4m", "12m"] = "1m"
    vocabulary: int = Field(default=2048, ge=300)
    experts: int = Field(default=16, ge=1)
    top_k: int = Field(default=2, ge=1)
    router_std: float | Literal["1/sqrt(hidden)"] = 0.02
    max_positions: int = Field(default=512, ge=2)
    normalise: bool = False
    hidden: int | None = None
    layers: int | None = None
    intermediate: int | None = None

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is larger than the number of experts {self.experts}")
        return self


class RoutingSettings(Strict):
    """Who decides, and what evens the load out.

    Attributes:
        scope: the set of tokens over which load is evened out.
        micro_batch: sequences of a micro-batch.
        coefficient: of the auxiliary loss, per layer; step of the bias for ``loss_free``; unused otherwise.
        capacity: slots an expert takes within a scope, as a multiple of its even share; what exceeds it is dropped. None: no limit.
    """

    router: RouterKind = "learned"
    balancing: BalancingKind = "aux_loss"
    scope: Scope = "global_batch"
    micro_batch: int = Field(default=4, ge=1)
    coefficient: float = Field(default=0.05, ge=0.0)
    capacity: float | None = Field(default=None, gt=0.0)


class OptimizerSettings(Strict):
    """AdamW with linear warm-up and a cosine to ``final_share`` of the learning rate."""

    steps: int = Field(default=350, ge=1)
    learning_rate: float = Field(default=4e-3, gt=0)
    warmup: int = Field(default=20, ge=0)
    final_share: float = Field(default=0.05, ge=0, le=1)
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip: float = Field(default=1.0, gt=0)


class TrainSettings(Strict):
    """One training run. ``seed`` seeds the initial weights, ``data_seed`` the order of the data (equal for all arms compared)."""

    mix: MixSettings = MixSettings()
    model: ModelSettings = ModelSettings()
    routing: RoutingSettings = RoutingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    seed: int = 0
    data_seed: int = 0
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _scopes_fit(self) -> Self:
        if self.routing.scope == "micro_batch":
            for length in self.mix.lengths:
                sequences = self.mix.tokens_per_step // length
                if self.routing.micro_batch > sequences:
                    raise ValueError(f"micro_batch of {self.routing.micro_batch} sequences is wider than the batch of {sequences}")
                if sequences % self.routing.micro_batch:
                    raise ValueError(
                        f"the batch of {sequences} sequences is not a whole number of micro-batches of {self.routing.micro_batch}"
                    )
        if max(self.mix.lengths) > self.model.max_positions:
            raise ValueError(f"sequences of {max(self.mix.lengths)} tokens, but the model has {self.model.max_positions} positions")
        router, balancing = self.routing.router, self.routing.balancing
        if router in ("hash", "rerandomised", "frozen") and balancing != "none":
            raise ValueError(f"a {router} router has nothing that could learn to balance: balancing must be none, got {balancing}")
        if balancing in ("loss_free", "sinkhorn", "assignment") and router != "learned":
            raise ValueError(f"{balancing} replaces the choice of a learned router; the {router} router makes its own")
        return self

    def identity(self, mix_digest: str) -> str:
        """A hash equal for equal settings on equal data; threads are left out, they are not meant to change results."""
        content = self.model_dump(mode="json", exclude={"threads"})
        return hashlib.sha256(json.dumps([content, mix_digest], sort_keys=True).encode()).hexdigest()[:16]


def read_settings(path: Path) -> TrainSettings:
    """The settings of a YAML file.

    Raises:
        MixError: no such file, not YAML, unknown or impossible settings; the message names file and field.
    """
    return parse_settings(read_named(path, error=MixError), where=str(path))


def parse_settings(content: object, *, where: str) -> TrainSettings:
    """Settings from plain values; raises MixError naming the first field that is wrong."""
    if not isinstance(content, dict):
        raise MixError(f"{where}: expected settings by name, found {type(content).__name__}")
    return validated(TrainSettings, content, where=where, error=MixError)
