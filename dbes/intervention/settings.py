"""Settings of an experiment, its arms, and the runs they need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dbes.errors import InterventionError, SettingError
from dbes.paths.rules import RULES
from dbes.paths.selection import check_budget
from dbes.paths.types import Cell
from dbes.reporting.arms import ALL, ALL_PROTECTED, DEFAULT_EXTRAS, EXTRA_ARMS, FULL, FULL_PROTECTED, FULL_REPLAY, REPLAY, SLOWER
from dbes.schema import Finite, read_named, validated
from dbes.text import unknown

Kind = Literal["cells", "full", "router"]
"""``cells``: chosen experts (whole, or low-rank updates of them); ``full``: every parameter; ``router``: the routers' weights."""

DOWN, PATH_LORA, LAYERED, ROUTER_FIRST, LAYER_RATES = "down", "lora-path", "per-layer", "router-first", "layer-rates"
PLAIN, AS_TRAINED = "plain", "as-trained"
IDEAS = (DOWN, PATH_LORA, LAYERED, ROUTER_FIRST, LAYER_RATES)

DEFAULT_RULES = tuple(rule for rule in RULES if rule != ALL)


class InterventionSettings(Finite):
    """What an experiment does; part of the identity of its results.

    Attributes:
        domains: targets, each trained by itself.
        new: domains that the model was not trained on; never counted as forgotten.
        budgets: shares of the routed-expert parameters.
        rules: of the expert paths.
        extras: arms that are no expert path: ``full``, ``full-slow`` and ``full-slower`` (a quarter and a sixteenth of full's
            learning rate, so that full finetuning's trajectory is also known where it forgets little; ``full-slowest``: a 64th;
            ``full-8th``, ``full-32nd``, ``full-256th`` for a finer grid), ``all`` (experts),
            ``lora`` (low-rank updates of all experts, with as many trainable parameters as the budget), ``router``;
            ``all-protected`` and ``full-protected`` (every expert's updates shaped; in the latter all else is trained as in ``full``);
            ``full-replay``, ``-slow``, ``-slower``, ``-slowest`` (full finetuning in which ``replay`` of every batch is text of the
            protected domains).
        ideas: ``down`` (only the down-projections, of three times the cells), ``lora-path`` (low-rank updates of the path's
            cells), ``per-layer`` (the same number of cells in every layer), ``router-first`` (a third of the steps train the routers,
            the others the path, as CEFT does, arXiv 2508.19594), ``layer-rates`` (every layer's learning rate in proportion to the
            mean score of its chosen cells); each of rule ``idea_rule``.
        protected: rules whose paths are trained a second time with updates that other domains hardly feel.
        protect: the floor of that protection; protect_tokens: of every other domain's training text that it measures.
        protect_domains: whose texts these are; all domains that count as forgotten by default. With fewer, and these among ``new``,
            forgetting is that of domains whose text nothing has seen.
        replay: share of a batch's sequences that arms with replay take from these texts.
        rates: learning rates tried for every arm; the one with the lowest loss on the tuning part of the target is used.
        seeds, first_seed: number of seeds and the first of them; a confirmation takes others than the exploration did.
        steps, sequences, length: optimizer steps, sequences of each and tokens of each sequence.
        points: steps after which held-out documents are measured; the trajectory that early stopping is read from.
        full_points: the same for full finetuning, denser at the beginning.
        documents: held-out documents of the target; other_documents: of every other domain; evidence_tokens: of every
            domain's training text, for finding paths.
        masks: load-matched random sets of the causal check.
        routing: ``plain``: by the model's own router; ``as-trained``: by the one that ``dbes testbed train --prescribed`` wrote down
            beside the checkpoint, every forward by the domain of its text. Domains that such a model was not trained on cannot
            be routed: as targets and in ``new`` they are refused, other domains of the texts are left out.
    """

    domains: tuple[str, ...]
    new: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (0.15,)
    rules: tuple[str, ...] = DEFAULT_RULES
    extras: tuple[str, ...] = DEFAULT_EXTRAS
    ideas: tuple[str, ...] = ()
    idea_rule: str = "specialization"
    protected: tuple[str, ...] = ()
    protect: float = Field(default=0.03, gt=0)
    protect_tokens: int = Field(default=6_000, ge=1)
    protect_domains: tuple[str, ...] = ()
    replay: float = Field(default=0.5, gt=0, lt=1)
    seeds: int = Field(default=5, ge=1)
    first_seed: int = Field(default=0, ge=0, lt=1000)
    rates: tuple[float, ...] = (5e-4, 2e-3, 8e-3)
    steps: int = Field(default=40, ge=1)
    warmup: int = Field(default=4, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    sequences: int = Field(default=8, ge=1)
    length: int = Field(default=128, ge=2)
    points: tuple[int, ...] = (5, 10, 20, 40)
    full_points: tuple[int, ...] = (1, 2, 4, 6, 10, 16, 26, 40)
    documents: int = Field(default=24, ge=2)
    other_documents: int = Field(default=12, ge=2)
    tuning_documents: int = Field(default=16, ge=1)
    evidence_tokens: int = Field(default=12_000, ge=1)
    permutations: int = Field(default=400, ge=1)
    masks: int = Field(default=8, ge=2)
    lora_rank: int = Field(default=4, ge=1)
    routing: Literal["plain", "as-trained"] = PLAIN

    @model_validator(mode="after")
    def _consistent(self) -> InterventionSettings:
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains {list(self.domains)}: expected at least one, each once")
        if not set(self.protected) <= set(self.rules):
            raise ValueError(f"protected {list(self.protected)}: expected some of the rules {list(self.rules)}, to be compared with")
        for name, given, known in (("rules", self.rules, RULES), ("extras", self.extras, EXTRA_ARMS), ("ideas", self.ideas, IDEAS)):
            if strange := sorted(set(given) - set(known)):
                raise ValueError(f"{name} {strange}: expected some of {list(known)}")
        if not self.rates or any(rate <= 0 for rate in self.rates):
            raise ValueError(f"rates {list(self.rates)}: expected learning rates above 0")
        for name, points in (("points", self.points), ("full_points", self.full_points)):
            if not points or list(points) != sorted(set(points)) or points[0] < 1 or points[-1] != self.steps:
                raise ValueError(f"{name} {list(points)}: expected ascending steps from 1 on, the last of them {self.steps}")
        return self

    @model_validator(mode="after")
    def _rates_to_take(self) -> InterventionSettings:
        for leader, followers in ((FULL, SLOWER), (FULL_REPLAY, REPLAY)):
            if {*followers} & {*self.extras} and leader not in self.extras:
                raise ValueError(f"extras {sorted({*followers} & {*self.extras})} take their learning rates from {leader}; add {leader}")
        return self

    @model_validator(mode="after")
    def _plain_where_others_text_is_used(self) -> InterventionSettings:
        if self.routing == AS_TRAINED and self.protects:
            raise ValueError(
                "as-trained routing: other domains' text uses no expert of the target's block, so that protection and replay "
                f"mean nothing here; leave out protected and {sorted({ALL_PROTECTED, FULL_PROTECTED, *REPLAY} & {*self.extras})}"
            )
        return self

    @property
    def protects(self) -> bool:
        """Whether any arm needs texts of other domains to train."""
        return bool(self.protected) or bool({ALL_PROTECTED, FULL_PROTECTED, *REPLAY} & set(self.extras))


class Arm(Finite):
    """One way of training, for one target and seed.

    Attributes:
        name: as in reports; arms of one name differ in target and seed only.
        budget: None where no budget is set (full finetuning, router, all experts).
        cells: chosen experts; empty for ``full`` and ``router``.
        rank: low-rank updates in place of the experts' matrices.
        only: train only the expert parameters whose name holds this.
        protect: floor of the protection; None: none.
        replay: share of every batch that is text of other domains; None: none.
        router_steps: first steps, which train the routers alone; None: none.
        layer_rates: (decoder layer, factor of its learning rate), of every layer with cells; None: 1 everywhere.
        rate_factor: times the learning rate that was chosen.
        rate_of: arm whose learning rate is used; its own search otherwise.
        coverage: share of the target's slots that the cells take.
    """

    name: str
    target: str
    seed: int
    kind: Kind
    budget: float | None = None
    cells: tuple[Cell, ...] = ()
    rank: int | None = None
    only: str | None = None
    protect: float | None = None
    replay: float | None = None
    router_steps: int | None = None
    layer_rates: tuple[tuple[int, float], ...] | None = None
    rate_factor: float = 1.0
    rate_of: str | None = None
    coverage: float | None = None


class ArmRun(Finite):
    """One training run. Arms that choose the same cells share it: the identity leaves names of arms and rules out.

    Attributes:
        tuning: a run of the search, measured on the tuning part of the target only.
    """

    target: str
    kind: Kind
    cells: tuple[Cell, ...]
    rank: int | None
    only: str | None
    rate: float
    seed: int
    tuning: bool
    protect: float | None = None
    replay: float | None = None
    router_steps: int | None = None
    layer_rates: tuple[tuple[int, float], ...] | None = None

    def identity(self, experiment: str) -> str:
        """Equal for runs that give the same result in experiments of the same model, data and settings."""
        # what a run does not use is no part of its identity, so that a new field leaves finished runs their names
        left_out = {name for name in ("protect", "replay", "router_steps", "layer_rates") if getattr(self, name) is None}
        content = json.dumps([experiment, self.model_dump(mode="json", exclude=left_out)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:20]


def run_of(arm: Arm, *, rate: float, tuning: bool = False) -> ArmRun:
    """The run that an arm needs at a learning rate."""
    return ArmRun(
        target=arm.target, kind=arm.kind, cells=arm.cells, rank=arm.rank, only=arm.only, rate=rate, seed=arm.seed, tuning=tuning,
        protect=arm.protect, replay=arm.replay, router_steps=arm.router_steps, layer_rates=arm.layer_rates,
    )  # fmt: skip


def run_key(settings: InterventionSettings, *, model: str, data: str, prescribed: Mapping[str, Any] | None = None) -> str:
    """What every run of an experiment depends on besides itself: not the targets, rules, budgets or number of seeds.

    Args:
        prescribed: how the model is routed, where not by its own router.
    """
    left_out = {"domains", "budgets", "rules", "extras", "ideas", "idea_rule", "seeds", "first_seed", "rates", "masks", "permutations"}
    left_out |= {"protected", "protect", "protect_tokens", "protect_domains", "replay"}  # the data and the run say these
    if settings.routing == PLAIN:
        left_out.add("routing")  # plain experiments keep the key they had before there was a choice, and their finished runs
    kept = settings.model_dump(mode="json", exclude=left_out)
    content = [model, data, kept, *([prescribed] if prescribed is not None else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_configuration(file: Path | None, given: Mapping[str, Any]) -> InterventionSettings:
    """The settings of a YAML file (all defaults without one), with those given on the command line on top.

    Raises:
        SettingError: no such rule or idea is given.
        InterventionError: the file cannot be read, or a setting is unknown or wrong.
        PathError: a budget that is no share.
    """
    for kind, known, names in (("rule", RULES, ("rules", "protected")), ("idea", IDEAS, ("ideas",))):
        for name in (name for setting in names for name in given.get(setting, ()) if name not in known):
            raise SettingError(unknown(kind, name, known))
    content = read_named(file, error=InterventionError) if file is not None else {}
    settings = validated(InterventionSettings, {**content, **given}, where=file or "settings", error=InterventionError)
    for budget in settings.budgets:
        check_budget(budget)
    return settings
