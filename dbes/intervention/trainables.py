"""What a run trains: chosen experts (plain, protected or of low rank), everything, or the routers; and texts of other domains it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from dbes.errors import InterventionError
from dbes.finetuning.cells import TrainableCells
from dbes.intervention.data import ExperimentData, joined_rows
from dbes.intervention.settings import ArmRun
from dbes.models.execution import frozen
from dbes.models.sites import expert_slices, find_sites
from dbes.paths.types import Cell


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What a run trains.

    Attributes:
        groups: (parameters, factor of the learning rate) each.
        first: what the run's ``router_steps`` train instead.
        cells: the block of chosen experts, if any.
    """

    groups: tuple[tuple[list[nn.Parameter], float], ...]
    first: list[nn.Parameter] = field(default_factory=list)
    cells: TrainableCells | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group, _ in self.groups for parameter in group]


@contextmanager
def trainable(model: Any, run: ArmRun, data: ExperimentData, *, length: int) -> Iterator[Trainable]:
    """The parameters of a run; the model is as before when the block ends.

    Args:
        length: tokens of a sequence of protected text.

    Raises:
        InterventionError: nothing of the model matches what is to be trained.
    """
    if run.kind == "cells":
        with TrainableCells(model, run.cells, rank=run.rank, seed=run.seed) as cells:
            if run.protect is not None:
                cells.protect(protected_texts(data, run.target, length=length), floor=run.protect)
            chosen = [leaf for name, leaf in cells.named_parameters() if run.only is None or run.only in name]
            if not chosen:
                raise InterventionError(f"no parameter of the chosen experts has {run.only!r} in its name")
            groups = [(chosen, 1.0)]
            if run.layer_rates is not None:
                by_layer = cells.by_layer()
                groups = [(by_layer[layer], factor) for layer, factor in run.layer_rates]
            routers = _router_parameters(model) if run.router_steps is not None else []
            # TrainableCells takes care of the experts alone: routers that move are put back here
            with _put_back(routers):
                for parameter in routers:
                    parameter.requires_grad_(True)
                yield Trainable(groups=tuple(groups), first=routers, cells=cells)
        return
    if run.kind == "full" and run.protect is not None:
        sites = find_sites(model)
        inside = {id(parameter) for site in sites for parameter, _ in expert_slices(site, 0)}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        every = [Cell(site.layer, expert) for site in sites for expert in range(site.num_experts)]
        with TrainableCells(model, every, seed=run.seed) as cells:
            cells.protect(protected_texts(data, run.target, length=length), floor=run.protect)
            with _switched_on(model, rest):
                yield Trainable(groups=(([*cells.parameters(), *rest], 1.0),), cells=cells)
        return
    chosen = list(model.parameters()) if run.kind == "full" else _router_parameters(model)
    with _switched_on(model, chosen):
        yield Trainable(groups=((chosen, 1.0),))


def _router_parameters(model: Any) -> list[nn.Parameter]:
    routers = [site.router for site in find_sites(model)]
    if any(router is None for router in routers):
        raise InterventionError("router: not every MoE layer of this model has a router that is recognised")
    return [parameter for router in routers if router is not None for parameter in router.parameters()]


def with_replay(batches: Sequence[np.ndarray], texts: Mapping[str, Sequence[Tensor]], *, share: float, seed: int) -> list[np.ndarray]:
    """The batches with a share of their sequences, at least one, replaced by sequences of other domains, drawn from all domains alike."""
    random = np.random.default_rng([seed, 23])
    rows = [np.concatenate([batch.numpy() for batch in own]) for own in texts.values()]
    mixed = []
    for batch in batches:
        batch = batch.copy()
        for place in range(max(1, round(share * len(batch)))):
            own = rows[random.integers(len(rows))]
            batch[place] = own[random.integers(len(own))]
        mixed.append(batch)
    return mixed


def protected_texts(data: ExperimentData, target: str, *, length: int) -> dict[str, list[Tensor]]:
    """Protected texts of all domains but the target: token ids, int64 [sequences, length] each."""
    return {
        domain: joined_rows(part, length=length, boundary=data.boundary)
        for (domain, kind), part in data.parts.items()
        if kind == "protected" and domain != target
    }


@contextmanager
def _switched_on(model: Any, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block only these of the model's own parameters can be trained; they are as before when it ends."""
    with frozen(model), _put_back(chosen):
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield


@contextmanager
def _put_back(chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters have their values of before, and no gradient, when the block ends."""
    kept = [parameter.detach().clone() for parameter in chosen]
    try:
        yield
    finally:
        for parameter, before in zip(chosen, kept, strict=True):
            parameter.data.copy_(before)
            parameter.grad = None
