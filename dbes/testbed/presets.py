"""What the grid trains: the arms of every experiment, at the sizes of each preset. Seeds are the rows of every comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dbes.errors import SettingError
from dbes.testbed.runs import GridRun
from dbes.testbed.settings import (
    MixSettings,
    ModelSettings,
    OptimizerSettings,
    RoutingSettings,
    Scope,
    TrainSettings,
)
from dbes.text import unknown

PRESETS = ("smoke", "standard")
SCOPES: tuple[Scope, ...] = ("sequence", "micro_batch", "global_batch")
AUX = 0.1
"""Coefficient of the auxiliary loss of every arm that has one, per layer."""

SCALE_STEPS = 50
"""Steps of the arms that compare sizes."""

BIAS_RATE = 0.002
"""Step of the loss-free bias of every arm that has one."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A grid: which mix, how many seeds, and the arms of each experiment (an arm may serve several).

    Attributes:
        mix: name of the mix, see ``prepare_mix``.
        arms: by name.
        experiments: names of the arms of each experiment.
    """

    name: str
    mix: str
    seeds: int
    vocabulary: int
    arms: dict[str, GridRun] = field(default_factory=dict)
    experiments: dict[str, list[str]] = field(default_factory=dict)

    def runs(self) -> Iterator[tuple[str, int, GridRun]]:
        """Every (arm, seed, run); all arms of a seed see the same data in the same order."""
        for seed in range(self.seeds):
            for arm, run in self.arms.items():
                settings = run.settings.model_copy(update={"seed": seed, "data_seed": seed})
                yield arm, seed, run.model_copy(update={"settings": settings})


def preset(name: str) -> Preset:
    """The grid of a name: ``smoke`` is a try-out of a minute, ``standard`` runs every experiment."""
    if name not in PRESETS:
        raise SettingError(unknown("preset", name, PRESETS))
    return _smoke() if name == "smoke" else _standard()


def _smoke() -> Preset:
    grid = Preset(name="smoke", mix="embedded", seeds=2, vocabulary=1024)
    base = _base(steps=80, tokens=2048)
    # Half the layers and half the vocabulary halve the time, which twice the steps use better.
    base = base.model_copy(update={"model": base.model.model_copy(update={"layers": 2, "vocabulary": 1024})})
    small = {"documents": 24, "permutations": 100}
    for name in ("reference", "aux_loss/global_batch", "frozen", "aux_loss/sequence"):
        _add(grid, "scope", name, base, _routing(name), **small)
    grid.experiments["metrics"] = list(grid.experiments["scope"])
    return grid


def _standard() -> Preset:
    grid = Preset(name="standard", mix="packages", seeds=3, vocabulary=2048)
    base = _base(steps=75, tokens=4096)
    _scope(grid, base)
    _soft(grid, base)
    for name in ("aux_loss/global_batch", "no balancing", "frozen", "rerandomised", "hash"):
        _add(grid, "frozen", name, base, _routing(name))
    _levels(grid, base)
    _scale(grid)
    _upstream(grid, base)
    truth = ("reference", "aux_loss/global_batch", "frozen", "aux_loss/sequence")
    grid.experiments["metrics"] = list(truth)
    return grid


def _scope(grid: Preset, base: TrainSettings) -> None:
    for name in ("reference", "no balancing", "frozen"):
        _add(grid, "scope", name, base, _routing(name))
    for method in ("aux_loss", "loss_free", "sinkhorn", "assignment"):
        for scope in SCOPES:
            _add(
                grid,
                "scope",
                f"{method}/{scope}",
                base,
                _routing(f"{method}/{scope}"),
                probe=(method, scope) == ("aux_loss", "global_batch"),
            )
    for scope in SCOPES:
        name = f"aux_loss/{scope}/dropping"
        _add(grid, "scope", name, base, _routing(name))
    # Micro-batches of many domains: what counts as scope is how many domains it spans, not its name.
    alternating = base.model_copy(update={"mix": base.mix.model_copy(update={"order": "mixed"})})
    _add(grid, "scope", "aux_loss/micro_batch/mixed order", alternating, _routing("aux_loss/micro_batch"))
    wide = base.model_copy(update={"model": base.model.model_copy(update={"router_std": "1/sqrt(hidden)"})})
    _add(grid, "scope", "aux_loss/global_batch/wide init", wide, _routing("aux_loss/global_batch"))


def _soft(grid: Preset, base: TrainSettings) -> None:
    """The contrast of scope on documents of which a third comes from other domains: separable domains are the method's known limit."""
    mixed = base.model_copy(update={"mix": base.mix.model_copy(update={"overlap": 0.33})})
    for name in ("reference", "aux_loss/global_batch", "frozen", "aux_loss/sequence"):
        _add(grid, "soft", f"{name}/a third of other domains", mixed, _routing(name))


def _levels(grid: Preset, base: TrainSettings) -> None:
    """Token against sequence level, with fewer experts and with more active ones."""
    for experts, top_k in ((32, 2), (16, 2), (32, 4)):
        size = "" if (experts, top_k) == (32, 2) else f"/{experts} experts, top-{top_k}"
        model = base.model.model_copy(update={"experts": experts, "top_k": top_k})
        settings = base.model_copy(update={"model": model})
        for level in ("aux_loss/global_batch", "sequence level"):
            _add(grid, "levels", level + size, settings, _routing(level))


def _scale(grid: Preset) -> None:
    """The contrast of scope at three sizes, on equally many tokens; shorter, because the largest is expensive."""
    for size in ("1m", "4m", "12m"):
        base = _base(steps=SCALE_STEPS, tokens=4096, size=size)
        for name in ("aux_loss/global_batch", "frozen", "aux_loss/sequence"):
            _add(grid, "scale", f"{name}/{size}, {SCALE_STEPS} steps", base, _routing(name))


def _upstream(grid: Preset, base: TrainSettings) -> None:
    """Experts from domain models against experts from scratch: one expert per domain, gate weights that sum to 1."""
    model = base.model.model_copy(update={"experts": 8, "normalise": True})
    settings = base.model_copy(update={"model": model})
    _add(grid, "upstream", "8 experts from scratch", settings, _routing("aux_loss/global_batch"), probe=True)
    _add(grid, "upstream", "8 experts from domain models", settings, _routing("aux_loss/global_batch"), probe=True, method="upcycle")
    grid.experiments["upstream"].append("aux_loss/global_batch")


def _base(*, steps: int, tokens: int, size: Literal["1m", "4m", "12m"] = "1m") -> TrainSettings:
    return TrainSettings(
        mix=MixSettings(tokens_per_step=tokens, lengths=(128,), order="one_domain"),
        model=ModelSettings(size=size, vocabulary=2048, experts=32, top_k=2),
        optimizer=OptimizerSettings(steps=steps, warmup=10),
    )


def _routing(name: str) -> RoutingSettings:
    """Routing settings by an arm's name: ``method/scope`` with ``/dropping``, or the name of a router."""
    named: dict[str, dict[str, Any]] = {
        "reference": {"router": "reference", "balancing": "aux_loss", "coefficient": AUX},
        "no balancing": {"balancing": "none"},
        "frozen": {"router": "frozen", "balancing": "none"},
        "rerandomised": {"router": "rerandomised", "balancing": "none"},
        "hash": {"router": "hash", "balancing": "none"},
        "sequence level": {"router": "sequence", "balancing": "aux_loss", "coefficient": AUX},
    }
    if name in named:
        return RoutingSettings(**{"coefficient": 0.0, **named[name]})
    method, scope, *rest = name.split("/")
    coefficient = {"aux_loss": AUX, "loss_free": BIAS_RATE}.get(method, 0.0)
    capacity = 1.0 if rest == ["dropping"] else None
    return RoutingSettings.model_validate(
        {"balancing": method, "scope": scope, "coefficient": coefficient, "capacity": capacity, "micro_batch": 4}
    )


def _add(grid: Preset, experiment: str, arm: str, settings: TrainSettings, routing: RoutingSettings, **extra: Any) -> None:
    grid.experiments.setdefault(experiment, [])
    if arm not in grid.experiments[experiment]:
        grid.experiments[experiment].append(arm)
    if arm not in grid.arms:
        # Checked again as a whole: a copy with changed parts is not validated by itself.
        whole = TrainSettings.model_validate({**settings.model_dump(), "routing": routing.model_dump()})
        grid.arms[arm] = GridRun(arm=arm, settings=whole, **extra)
