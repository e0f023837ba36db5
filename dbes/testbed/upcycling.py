"""Branch-Train-MiX (arXiv 2403.07816) in small: domain models trained apart, their feed-forwards merged as the experts of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbes.errors import MixError
from dbes.testbed.mix import Mix
from dbes.testbed.models import build_model, shape_of
from dbes.testbed.settings import RoutingSettings, TrainSettings
from dbes.testbed.training import Trained, train


def train_upcycled(settings: TrainSettings, mix: Mix, *, folder: Path | None = None) -> Trained:
    """A model of one expert per domain, on as many tokens as training it from scratch by the same settings.

    A third of the steps trains one dense model on all domains; a third (its tokens shared out) trains a copy of it on each
    domain alone; then the feed-forwards become experts, everything else is averaged, routers are new, and the last third trains
    the whole on all domains. Every phase has its own warm-up and cosine.

    Raises:
        MixError: not one expert per domain; gate weights that do not sum to 1 (a merged model would shrink its feed-forwards).
    """
    domains = mix.only(settings.mix.domains).domains
    if settings.model.experts != len(domains) or not settings.model.normalise:
        raise MixError(
            f"upcycling makes one expert of each of {len(domains)} domains and needs gate weights that sum to 1: "
            f"set experts to {len(domains)} and normalise to true, got {settings.model.experts} and {settings.model.normalise}"
        )
    steps = settings.optimizer.steps
    third = max(1, steps // 3)
    dense = _with(
        settings,
        steps=third,
        model={"experts": 1, "top_k": 1, "intermediate": shape_of(settings.model)[2]},
        routing=RoutingSettings(balancing="none"),
    )
    seedling = train(dense, mix, folder=folder and folder / "seedling")
    share = settings.mix.tokens_per_step // len(domains)
    branches = []
    for name in domains:
        branch = _with(dense, steps=third, mix={"domains": (name,), "tokens_per_step": share})
        branches.append(train(branch, mix, folder=folder and folder / f"branch-{name}", initial=dict(seedling.model.named_parameters())))
    merged = merge_experts([branch.model for branch in branches], settings)
    last = _with(settings, steps=max(1, steps - 2 * third))
    trained = train(last, mix, folder=folder, initial=merged)
    spent = seedling.cpu_seconds + sum(branch.cpu_seconds for branch in branches) + trained.cpu_seconds
    return replace(trained, cpu_seconds=spent)


def merge_experts(models: Sequence[PreTrainedModel], settings: TrainSettings) -> dict[str, Tensor]:
    """Weights of a model whose expert i is the feed-forward of model i; the rest is the mean, the routers are freshly drawn."""
    sources: list[Mapping[str, Tensor]] = [dict(model.named_parameters()) for model in models]
    weights = {}
    for name, fresh in build_model(settings.model, seed=settings.seed).named_parameters():
        if name.endswith("mlp.gate.weight"):
            weights[name] = fresh.detach()
        elif ".mlp.experts." in name:
            weights[name] = torch.cat([source[name].detach() for source in sources])
        else:
            weights[name] = torch.stack([source[name].detach() for source in sources]).mean(0)
    return weights


def _with(
    settings: TrainSettings,
    *,
    steps: int,
    model: Mapping[str, object] | None = None,
    mix: Mapping[str, object] | None = None,
    routing: RoutingSettings | None = None,
) -> TrainSettings:
    return settings.model_copy(
        update={
            "optimizer": settings.optimizer.model_copy(update={"steps": steps}),
            "model": settings.model.model_copy(update=dict(model or {})),
            "mix": settings.mix.model_copy(update=dict(mix or {})),
            "routing": routing or settings.routing,
        }
    )
