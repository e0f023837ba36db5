"""find_path(): evidence and a rule -> the expert path of a domain."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from dbes.errors import PathError, SettingError
from dbes.paths.evidence import Evidence, given_evidence
from dbes.paths.rules import ESFT_SHARES, NEED_MODEL, RULES, WITHOUT_TEXTS, Rule, score_cells
from dbes.paths.selection import cells_of, check_budget, choose, jaccard, random_load_matched
from dbes.paths.trajectories import strongest
from dbes.paths.types import Average, ExpertPath, Overlap, Provenance
from dbes.results import Result
from dbes.scoring.counts import Counts
from dbes.shipped import EMBEDDED
from dbes.tasks.task import Task
from dbes.text import unknown
from dbes.trace.store import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dbes.evaluation.request import Model

DEFAULT_BUDGET = 0.15
MATCHED = "random-load-matched"
AVERAGES: tuple[Average, ...] = get_args(Average)

RESAMPLES = 20
"""Random halves of the texts in which the rule chooses again."""

RESAMPLE_PERMUTATIONS = 200
"""Permutations of the specialist test in each of them; pooled over experts, they resolve its p-values well enough."""

TRAJECTORIES = 5


def find_path(
    result: Result | Trace | Counts | Evidence | str | Path,
    *,
    domain: str,
    rule: str = "specialization",
    budget: float | Literal["auto"] | None = "auto",
    match: str = "specialization",
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Path | Task = EMBEDDED,
    average: str = "tokens",
    seed: int = 0,
    resamples: int = RESAMPLES,
    trajectories: int = TRAJECTORIES,
) -> ExpertPath:
    """The experts that serve a domain: cells chosen by a rule within a budget, what they cover, and how sure the choice is.

    Args:
        result: a result that kept its routes, its folder, or a trace or counts (in memory or their folder), whose specialists are
            tested with 1,000 permutations.
        domain: whose experts are wanted.
        rule: how cells are scored, see `dbes.paths.rules.score_cells`.
        budget: share of the routed-expert parameters, not exceeded; ``"auto"``: 0.15, or ESFT's own sets for ESFT's rules; None: all
            cells the rule admits.
        match: the rule whose cells ``random-load-matched`` carries the load of.
        model, tokenizer: the evaluated model as `evaluate` takes it, for rules that look at it (gradients, masking); with it, budgets
            count its parameters.
        tasks: the evaluated task, for rules that look at the model.
        average: of ESFT's rules: ``tokens`` pools the tokens of the domain, as the released code does; ``samples`` takes the mean over
            source texts of each one's mean, as the paper has it.
        seed: of random rules, the random halves of the stability figure and of the trajectories.
        resamples: random halves for the stability figure; 0 leaves it out.
        trajectories: chains to report at most.

    Raises:
        SettingError: there is no such domain, rule or average.
        PathError: the routes were not kept; a budget that is no share; no cell passes; the rule needs the model, or it is another one.
        ResultError, TraceError, TaskError, ModelError: what is given cannot be read.
    """
    rule, match = known_rule(rule), known_rule(match)
    if budget == "auto":
        budget = None if rule in ESFT_SHARES else DEFAULT_BUDGET
    if budget is not None:
        check_budget(budget)
    if average not in AVERAGES:
        raise SettingError(unknown("average", average, AVERAGES))
    evidence = replace(given_evidence(result), average=average)
    index = evidence.domain(domain)
    if model is not None:
        from dbes.evaluation.request import given_model
        from dbes.paths.model_evidence import with_model

        asked = {rule, match} if rule == MATCHED else {rule}
        gradients = bool(asked & {*NEED_MODEL} - {"causal"})
        with given_model(model, tokenizer) as given:
            evidence = with_model(evidence, given, tasks=tasks, gradients=gradients, effects="causal" in asked)
    chosen = chosen_cells(evidence, index, rule, budget=budget, match=match, seed=seed)
    shape = evidence.shape
    sizes = expert_sizes(evidence)
    return ExpertPath(
        domain=domain,
        rule=rule,
        average=average if rule in ESFT_SHARES else None,
        budget=budget,
        cells=cells_of(chosen, shape),
        layers=shape.layers,
        experts=shape.experts,
        share=float((chosen.sum(axis=1) * sizes).sum() / (sizes * np.asarray(shape.experts)).sum()),
        coverage=float(evidence.load[index][chosen].sum()),
        overlap=_overlap(evidence, index, chosen, rule, budget=budget),
        stability=_stability(evidence, index, chosen, rule, budget=budget, seed=seed, resamples=resamples),
        trajectories=strongest(evidence, index, limit=trajectories, seed=seed) if trajectories else (),
        provenance=provenance_of(evidence, seed=seed),
    )


def provenance_of(evidence: Evidence, *, seed: int) -> Provenance:
    """What a path says it was found on."""
    about = evidence.provenance
    task = about.get("task") or {}
    return Provenance(
        model=str(about.get("model", "unnamed")),
        revision=about.get("revision"),
        task=task.get("name"),
        task_version=task.get("version"),
        task_fingerprint=task.get("fingerprint"),
        dbes=version("dbes"),
        seed=seed,
    )


def known_rule(name: str) -> Rule:
    """The rule of a name; raises SettingError where there is none."""
    if name not in RULES:
        raise SettingError(unknown("rule", name, RULES))
    return name


def chosen_cells(
    evidence: Evidence, domain: int, rule: Rule, *, budget: float | None, match: Rule = "specialization", seed: int = 0
) -> np.ndarray:
    """Bool [layers, experts]; arguments and errors as of ``find_path``."""
    if rule == MATCHED:
        if match == rule:
            raise PathError("random-load-matched is matched with the cells of another rule (--match), not with itself")
        reference = chosen_cells(evidence, domain, match, budget=budget, seed=seed)
        return random_load_matched(reference, evidence.load[domain], evidence.exists, seed=seed)
    score = score_cells(evidence, domain, rule, seed=seed)
    limit = None if rule == "all" else budget
    if limit is None and rule not in (*ESFT_SHARES, "all", "specialization"):
        raise PathError(f"rule {rule!r} ranks cells but sets no limit of its own: give a budget")
    return choose(score, evidence.usage[domain], sizes=expert_sizes(evidence), experts=np.asarray(evidence.shape.experts), budget=limit)


def expert_sizes(evidence: Evidence) -> np.ndarray:
    """Parameters of one expert of each layer, float64 [layers]; 1 where the model was not looked at."""
    return np.ones(len(evidence.shape.layers)) if evidence.sizes is None else np.asarray(evidence.sizes, np.float64)


def _overlap(evidence: Evidence, domain: int, chosen: np.ndarray, rule: Rule, *, budget: float | None) -> dict[str, Overlap]:
    found = {}
    for index, name in enumerate(evidence.shape.domains):
        if index == domain or not evidence.hits[index].any():
            continue
        alike = None
        if rule not in ("random", MATCHED, "all"):
            try:
                alike = jaccard(chosen, chosen_cells(evidence, index, rule, budget=budget))
            except PathError:
                alike = None  # this domain has no path by the rule
        found[name] = Overlap(coverage=float(evidence.load[index][chosen].sum()), jaccard=alike)
    return found


def _stability(
    evidence: Evidence, domain: int, chosen: np.ndarray, rule: Rule, *, budget: float | None, seed: int, resamples: int
) -> float | None:
    """Share of the cells chosen again on random halves of the texts; a half in which no cell passes counts as none."""
    if rule in WITHOUT_TEXTS or not resamples or (evidence.shape.document_domain == domain).sum() < 2:
        return None
    again = []
    for draw in range(resamples):
        half = evidence.half(seed=[seed, draw, 11], permutations=min(RESAMPLE_PERMUTATIONS, evidence.permutations))
        try:
            same = chosen & chosen_cells(half, domain, rule, budget=budget)
            again.append(same.sum() / chosen.sum())
        except PathError:
            again.append(0.0)
    return float(np.mean(again))
