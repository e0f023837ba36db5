"""Which arms an experiment has: the cells that every rule chooses, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dbes.errors import InterventionError, PathError
from dbes.finetuning.cells import TrainableCells
from dbes.intervention.data import Texts, tuning_split
from dbes.intervention.routing import under
from dbes.intervention.settings import AS_TRAINED, DOWN, LAYER_RATES, LAYERED, PATH_LORA, ROUTER_FIRST, Arm, InterventionSettings
from dbes.models import LoadedModel
from dbes.models.windows import token_ids
from dbes.paths.evidence import Evidence, gather
from dbes.paths.gradients import expert_parameters, gradient_norms, masking_effects
from dbes.paths.model_evidence import MASKING_TOKENS, cut_windows
from dbes.paths.rules import NEED_MODEL, Rule, score_cells
from dbes.paths.search import chosen_cells, expert_sizes, find_path
from dbes.paths.selection import cells_of, choose
from dbes.paths.types import Cell, ExpertPath
from dbes.recording.record import record_documents
from dbes.reporting.arms import ALL, CONTROL, FULL, FULL_REPLAY, LORA, PROTECTED, REPLAY, ROUTER, SLOWER
from dbes.testbed.mix import Text
from dbes.testbed.prescribed import Prescribed
from dbes.trace.joining import join_traces
from dbes.trace.store import Trace

SEARCH_SEED = 1000
"""Seed of the search for learning rates; no seed of the outcome."""

DOWN_SHARE = 3
"""An expert's down-projection is about a third of it, so that three times the cells have as many trainable parameters."""

RANDOM_RULES = ("random", CONTROL)
STABILITY_DRAWS = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every arm with every seed, the paths behind them, and what could not be made.

    Attributes:
        arms: for every seed, and for ``SEARCH_SEED``.
        paths: by (target, rule, budget), of the rules that do not depend on the seed.
        skipped: (target, arm, budget, reason).
    """

    arms: tuple[Arm, ...]
    paths: dict[tuple[str, str, float], ExpertPath]
    skipped: tuple[dict[str, Any], ...]


def evidence_of(
    loaded: LoadedModel, texts: Texts, *, targets: Sequence[str], settings: InterventionSettings, prescribed: Prescribed | None = None
) -> Evidence:
    """The model's routing of training texts of every domain (of a target without its tuning part); gradients if a rule needs them.

    Args:
        prescribed: routes the model by domain; every text then runs under its own.
    """
    documents = []
    for domain in texts.domains:
        own = texts.training[domain]
        own = tuning_split(own)[0] if domain in targets else own
        total = 0
        for text in own:
            if total >= settings.evidence_tokens:
                break
            length = len(token_ids(loaded.tokenizer, [text.text], names=lambda _, text=text: text.name, error=InterventionError)[0])
            if length:
                documents.append(text)
                total += length
    evidence = gather(_recorded(loaded, documents, texts.domains, settings, prescribed), permutations=settings.permutations)
    evidence = replace(evidence, sizes=expert_parameters(loaded.model))
    wanted = {*settings.rules, settings.idea_rule}
    by_domain = {domain: [text.text for text in documents if text.domain == domain] for domain in texts.domains}

    def windows(domain: str, tokens: int) -> list[np.ndarray]:
        return cut_windows(loaded, by_domain[domain], window=settings.length, tokens=tokens)

    if wanted & ({*NEED_MODEL} - {"causal"}):
        norms = []
        for domain in texts.domains:
            with under(prescribed, domain):
                norms.append(gradient_norms(loaded.model, windows(domain, settings.evidence_tokens)))
        evidence = replace(evidence, gradients=np.stack(norms))
    if "causal" in wanted:
        effects = []
        for domain in texts.domains:
            with under(prescribed, domain):
                effects.append(masking_effects(loaded.model, [windows(domain, MASKING_TOKENS)]))
        evidence = replace(evidence, effects=np.concatenate(effects))
    return evidence


def _recorded(
    loaded: LoadedModel, documents: Sequence[Text], domains: Sequence[str], settings: InterventionSettings, prescribed: Prescribed | None
) -> Trace:
    """The routing of the documents, in order of domains; where it is prescribed one recording per domain, put together."""

    def record(some: Sequence[Text]) -> Trace:
        return record_documents(loaded, some, domains=domains, window=settings.length, control=False, stiffness=False).trace

    if prescribed is None:
        return record(documents)
    traces = []
    for domain in domains:
        own = [text for text in documents if text.domain == domain]
        if own:
            with prescribed.domain(domain):
                traces.append(record(own))
    return join_traces(traces, provenance={"routing": AS_TRAINED})


def plan_arms(evidence: Evidence, model: Any, settings: InterventionSettings) -> Plan:
    """The arms of every target; an arm that cannot be made is skipped, with the reason."""
    arms: list[Arm] = []
    paths: dict[tuple[str, str, float], ExpertPath] = {}
    skipped: list[dict[str, Any]] = []
    seeds = (*range(settings.first_seed, settings.first_seed + settings.seeds), SEARCH_SEED)
    barred = cannot_protect(model, evidence) if settings.protects else None
    asked = (*(rule + PROTECTED for rule in settings.protected), *(name for name in settings.extras if name.endswith(PROTECTED)))
    for target in settings.domains:
        if barred is not None:
            skipped += [{"target": target, "arm": name, "budget": None, "reason": barred} for name in asked]
        index = evidence.domain(target)
        for budget in settings.budgets:
            for rule in settings.rules:
                try:
                    if rule not in RANDOM_RULES:
                        paths[target, rule, budget] = find_path(
                            evidence, domain=target, rule=rule, budget=budget, resamples=STABILITY_DRAWS, trajectories=3  # pyright: ignore[reportArgumentType]
                        )  # fmt: skip
                    match = _rule(settings.idea_rule)
                    drawn = [(s, chosen_cells(evidence, index, _rule(rule), budget=budget, match=match, seed=s)) for s in seeds]
                    made = [_cells_arm(rule, target, seed, budget, chosen, evidence, index) for seed, chosen in drawn]
                    arms += made
                    if rule in settings.protected and not barred:
                        arms += [protected_twin(arm, settings) for arm in made]
                except PathError as problem:
                    skipped.append({"target": target, "arm": rule, "budget": budget, "reason": str(problem)})
            for name in settings.ideas:
                try:
                    arms += _idea(name, evidence, index, target, budget, settings, seeds)
                except PathError as problem:
                    skipped.append({"target": target, "arm": name, "budget": budget, "reason": str(problem)})
            if LORA in settings.extras:
                rank = equal_rank(model, evidence, budget)
                every = cells_of(evidence.exists, evidence.shape)
                arms += [Arm(name=LORA, target=target, seed=s, kind="cells", budget=budget, cells=every, rank=rank) for s in seeds]
        arms += list(_without_budget(target, settings, seeds, evidence, protects=barred is None))
    return Plan(arms=tuple(arms), paths=paths, skipped=tuple(skipped))


def equal_rank(model: Any, evidence: Evidence, budget: float) -> int:
    """Rank at which low-rank updates of all experts have about as many trainable parameters as the budget, at least 1."""
    with TrainableCells(model, cells_of(evidence.exists, evidence.shape), rank=1) as cells:
        each = sum(parameter.numel() for parameter in cells.parameters())
    wanted = budget * float((expert_sizes(evidence) * np.asarray(evidence.shape.experts)).sum())
    return max(1, round(wanted / each))


def protected_twin(arm: Arm, settings: InterventionSettings) -> Arm:
    """The same cells, trained with updates that other domains hardly feel."""
    return arm.model_copy(update={"name": arm.name + PROTECTED, "protect": settings.protect})


def cannot_protect(model: Any, evidence: Evidence) -> str | None:
    """Why updates of this model's experts cannot be shaped; None where they can."""
    if TrainableCells(model, cells_of(evidence.exists, evidence.shape)).method == "split_bank":
        return None
    return "this model's experts have no experts interface of transformers, which protection needs"


def _without_budget(
    target: str, settings: InterventionSettings, seeds: Sequence[int], evidence: Evidence, *, protects: bool
) -> Iterator[Arm]:
    for seed in seeds:
        full = Arm(name=FULL, target=target, seed=seed, kind="full")
        for name, factor in REPLAY.items():
            # the learning rate of the first is searched, the others take theirs from it, as those of full finetuning without replay do
            own = name == FULL_REPLAY
            if name in settings.extras and (own or seed != SEARCH_SEED):
                change = {"name": name, "replay": settings.replay, "rate_of": None if own else FULL_REPLAY, "rate_factor": factor}
                yield full.model_copy(update=change)
        every = Arm(name=ALL, target=target, seed=seed, kind="cells", cells=cells_of(evidence.exists, evidence.shape), coverage=1.0)
        for arm in (full, every):
            if arm.name in settings.extras:
                yield arm
            if arm.name + PROTECTED in settings.extras and protects:
                yield protected_twin(arm, settings)
        for name in (name for name in SLOWER if name in settings.extras and seed != SEARCH_SEED):
            yield Arm(name=name, target=target, seed=seed, kind="full", rate_of=FULL, rate_factor=SLOWER[name])
        if ROUTER in settings.extras:
            yield Arm(name=ROUTER, target=target, seed=seed, kind="router")


def _idea(
    name: str, evidence: Evidence, index: int, target: str, budget: float, settings: InterventionSettings, seeds: Sequence[int]
) -> list[Arm]:
    rule = _rule(settings.idea_rule)
    if name == LAYERED:
        chosen = same_in_every_layer(evidence, index, rule, budget=budget)
    else:
        chosen = chosen_cells(evidence, index, rule, budget=min(1.0, DOWN_SHARE * budget) if name == DOWN else budget)
    arms = [_cells_arm(name, target, seed, budget, chosen, evidence, index) for seed in seeds]
    changes: dict[str, dict[str, Any]] = {DOWN: {"only": "down_proj"}, PATH_LORA: {"rank": settings.lora_rank}}
    if name == ROUTER_FIRST:
        changes[name] = {"router_steps": max(1, settings.steps // 3)}
    if name == LAYER_RATES:
        changes[name] = {"layer_rates": rates_by_layer(score_cells(evidence, index, rule), chosen, evidence)}
    return [arm.model_copy(update=changes.get(name, {})) for arm in arms]


def rates_by_layer(score: np.ndarray, chosen: np.ndarray, evidence: Evidence) -> tuple[tuple[int, float], ...]:
    """(decoder layer, factor) of every layer with chosen cells: their mean score over the mean score of all chosen cells.

    Args:
        score: [layers, experts]; chosen: bool, the same.

    Raises:
        PathError: the scores are not positive, so that their proportions mean nothing.
    """
    if not (score[chosen] > 0).all():
        raise PathError("layer-rates: the rule's scores are not all positive; take another --idea-rule")
    mean = float(score[chosen].mean())
    rows = [row for row in range(len(chosen)) if chosen[row].any()]
    return tuple((evidence.shape.layers[row], round(float(score[row][chosen[row]].mean()) / mean, 4)) for row in rows)


def same_in_every_layer(evidence: Evidence, domain: int, rule: Rule, *, budget: float) -> np.ndarray:
    """The best cells of every layer by themselves, each layer within the budget, bool [layers, experts].

    Raises:
        PathError: a layer in which the rule gives no cell a score, or whose budget is below one cell of all.
    """
    score = score_cells(evidence, domain, rule)
    sizes, experts = expert_sizes(evidence), np.asarray(evidence.shape.experts)
    if budget * float((sizes * experts).sum()) < sizes.sum():
        raise PathError(f"per-layer: a budget of {budget:.0%} does not reach one expert in every layer")
    rows = []
    for layer in range(len(score)):
        one = slice(layer, layer + 1)
        rows.append(choose(score[one], evidence.usage[domain][one], sizes=sizes[one], experts=experts[one], budget=budget))
    return np.concatenate(rows)


def _cells_arm(name: str, target: str, seed: int, budget: float, chosen: np.ndarray, evidence: Evidence, index: int) -> Arm:
    coverage = float(evidence.load[index][chosen].sum())
    cells: tuple[Cell, ...] = cells_of(chosen, evidence.shape)
    return Arm(name=name, target=target, seed=seed, kind="cells", budget=budget, cells=cells, coverage=coverage)


def _rule(name: str) -> Rule:
    return name  # pyright: ignore[reportReturnType]
