"""place(): do the experts that a domain's texts use most serve its unseen texts, better than chance, and better than overall load?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import t as student

from dbes.errors import PathError, SettingError
from dbes.paths.coverage import FOLDS, Slots, covered_slots, deal_folds, most_used
from dbes.paths.evidence import Evidence, given_evidence
from dbes.paths.search import provenance_of
from dbes.paths.selection import cells_of
from dbes.paths.types import Cell, ExpertPath, Overlap
from dbes.results import Result
from dbes.scoring.counts import Counts
from dbes.scoring.grouping import Grouping
from dbes.scoring.resampling import CONFIDENCE, jackknife
from dbes.text import unknown
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape

ALLOCATIONS = ("layer", "global")
Finding = Literal["unknown", "none", "load", "domain"]

PLACED = "target-load"
"""The rule of the paths: the experts that the domain uses most."""

WITHOUT_DOCUMENTS = "only counts of whole domains are known, not of documents, so nothing can be said about unseen texts"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many experts are chosen.

    Attributes:
        size: below 1 a share of the experts, else a number of them.
        allocation: ``layer``: of every layer; ``global``: of all cells of the model, wherever they lie.
    """

    size: float
    allocation: str = "layer"

    def count(self, cells: int) -> int:
        """Experts to choose among so many: a share is rounded, and is at least one.

        Raises:
            PathError: more than there are.
        """
        count = max(1, round(self.size * cells)) if self.size < 1 else int(self.size)
        if count >= cells:
            where = "there are" if self.allocation == "global" else "of a layer"
            raise PathError(f"budget {self.size:g} is all of the {cells} experts {where}: nothing is left to choose")
        return count

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise SettingError(unknown("allocation", self.allocation, ALLOCATIONS))
        if not 0 < self.size < math.inf or (self.size >= 1 and self.size != int(self.size)):
            raise PathError(f"budget {self.size:g}: expected a share of the experts above 0 and below 1, or a whole number of them")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its interval over texts; NaN where unknown."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What the experts chosen for one domain do for another.

    Attributes:
        covered: share of the other domain's slots that they take.
        lost: what its own experts take of its unseen texts, minus that.
    """

    covered: Estimate
    lost: Estimate


@dataclass(frozen=True, kw_only=True)
class DomainPlacement:
    """What a domain's most used experts do for its unseen texts. Shares are of the slots of all layers.

    Attributes:
        texts: source texts with tokens.
        covered: share of the slots of unseen texts, by experts that the other texts of the domain use most.
        gain: (covered - uniform) / (oracle - uniform): 0 as experts drawn at random, 1 as if the unseen texts had chosen themselves.
        knowing: covered minus ``by_load``: what knowing the domain adds to a placement by the load of all domains.
        by_load: share of the slots of unseen texts, by experts that the other texts of all domains use most.
        uniform: share that as many experts at random take; oracle: the most that as many can take of the unseen texts.
        seen: share of the slots of the very texts that chose, which says nothing about others.
        elsewhere: by name of each other domain, with the experts that all texts of this one chose.
        cells: the experts that all texts of the domain use most.
        reason: why something is unknown.
    """

    domain: str
    texts: int
    covered: Estimate = Estimate()
    gain: Estimate = Estimate()
    knowing: Estimate = Estimate()
    by_load: Estimate = Estimate()
    uniform: float
    oracle: float = math.nan
    seen: float
    elsewhere: Mapping[str, Elsewhere] = field(default_factory=dict)
    cells: tuple[Cell, ...]
    reason: str | None = None

    @property
    def finding(self) -> Finding:
        """Decided by the intervals: no exploitable skew; a skew that overall load knows too; or one that only the domain's texts tell."""
        if math.isnan(self.gain.low):
            return "unknown"
        if self.gain.low <= 0:
            return "none"
        return "domain" if self.knowing.low > 0 else "load"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The placements of one or of all domains of a recording.

    Attributes:
        chosen: experts chosen, of ``cells`` in all layers together.
        confidence: of every interval; where several domains stand in one table, of all their intervals of a kind together (Bonferroni).
        groups: texts were left out in so many groups; None: one by one.
    """

    model: str
    budget: float
    allocation: str
    chosen: int
    cells: int
    folds: int
    confidence: float
    groups: int | None
    domains: tuple[DomainPlacement, ...]

    def __getitem__(self, domain: str) -> DomainPlacement:
        return next(each for each in self.domains if each.domain == domain)


def place(
    recorded: Result | Trace | Counts | Evidence | str | Path,
    *,
    budget: float | Budget = 0.25,
    allocation: str = "layer",
    domain: str | None = None,
    folds: int = FOLDS,
) -> Placement:
    """Which experts to keep near for a domain, and what they are worth on texts that did not choose them.

    Texts are dealt to folds by their ids, and each fold is served by the experts that the other folds use most. Intervals leave out one
    source text at a time (a group of them above 2,000) and make every choice again.

    Args:
        recorded: a result that kept its routes, a trace or counts, or the folder of one.
        budget: a share of the experts below 1, or how many; ``allocation``: of every layer, or of all cells of the model.
        domain: this domain only; all by default.

    Raises:
        SettingError: there is no such domain or allocation.
        PathError: a budget that leaves nothing to choose; no tokens.
        ResultError, TraceError: what is given cannot be read.
    """
    evidence = given_evidence(recorded)
    size = budget if isinstance(budget, Budget) else Budget(size=budget, allocation=allocation)
    shape, counts = evidence.shape, evidence.counts
    wanted = [index for index in range(len(shape.domains)) if evidence.hits[index].any()] if domain is None else [evidence.domain(domain)]
    chosen = [chosen_experts(evidence.hits[index], shape, size) for index in wanted]
    confidence = 1 - (1 - CONFIDENCE) / len(wanted)
    grouping = Grouping.of(shape)
    units = shape if grouping is None else grouping.shape
    fold = deal_folds(units.document_ids, units.document_domain, folds)
    slots = _slots(counts, grouping, fold, size) if counts.by_documents else None
    texts = np.bincount(shape.document_domain, minlength=len(shape.domains))
    found = []
    for index, cells in zip(wanted, chosen, strict=True):
        about = {"domain": shape.domains[index], "texts": int(texts[index]) if counts.by_documents else 0, "cells": cells_of(cells, shape)}
        seen = float(evidence.load[index][cells].sum())
        if slots is None:
            share = float(cells.sum()) / sum(shape.experts)
            found.append(DomainPlacement(**about, seen=seen, uniform=share, reason=WITHOUT_DOCUMENTS))
        else:
            found.append(_domain_placement(slots, index, units, confidence=confidence, seen=seen, **about))
    return Placement(
        model=str(evidence.provenance.get("model", "unnamed")),
        budget=size.size,
        allocation=size.allocation,
        chosen=int(chosen[0].sum()),
        cells=sum(shape.experts),
        folds=folds,
        confidence=confidence,
        groups=None if grouping is None else len(units.document_ids),
        domains=tuple(found),
    )


def chosen_experts(hits: np.ndarray, shape: RoutingShape, budget: Budget) -> np.ndarray:
    """The experts with most hits within a budget, bool [layers, experts].

    Args:
        hits: or any other score, [layers, experts].

    Raises:
        PathError: as ``Budget.count``.
    """
    exists = np.asarray(shape.experts)[:, None] > np.arange(shape.width)
    found = np.zeros(hits.shape, bool)
    if budget.allocation == "global":
        found[exists] = most_used(hits[exists], budget.count(sum(shape.experts)))
        return found
    for layer, experts in enumerate(shape.experts):
        found[layer, :experts] = most_used(hits[layer, :experts], budget.count(experts))
    return found


def path_of(placement: Placement, domain: str, evidence: Evidence) -> ExpertPath:
    """The experts of a domain as an expert path, which `dbes export` and `dbes finetune` read."""
    found, shape = placement[domain], evidence.shape
    mask = chosen_experts(evidence.hits[shape.domains.index(domain)], shape, Budget(size=placement.budget, allocation=placement.allocation))
    overlap = {
        name: Overlap(coverage=float(evidence.load[index][mask].sum()))
        for index, name in enumerate(shape.domains)
        if name != domain and evidence.hits[index].any()
    }
    share = len(found.cells) / placement.cells
    return ExpertPath(
        domain=domain, rule=PLACED, budget=share, cells=found.cells, layers=shape.layers, experts=shape.experts, share=share,
        coverage=found.seen, overlap=overlap, provenance=provenance_of(evidence, seed=0),
    )  # fmt: skip


def _slots(counts: Counts, grouping: Grouping | None, fold: np.ndarray, budget: Budget) -> Slots:
    shape = counts.shape if grouping is None else grouping.shape
    layers = (sums if grouping is None else grouping.sums(sums) for sums in counts.layers())
    hits = [sums.hits[:, 0, :experts].astype(np.float64) for sums, experts in zip(layers, shape.experts, strict=True)]
    blocks: Sequence[np.ndarray] = [np.concatenate(hits, axis=1)] if budget.allocation == "global" else hits
    known = {"domains": len(shape.domains)}
    return reduce(add, (covered_slots(each, shape.document_domain, fold, count=budget.count(each.shape[1]), **known) for each in blocks))


def _domain_placement(slots: Slots, index: int, units: RoutingShape, *, confidence: float, texts: int, **about: object) -> DomainPlacement:
    """The figures of one domain; ``units`` are what the jackknife leaves out."""

    def estimate(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
        # where the best set is no better than any other there is nothing to gain; without slots nothing is known
        empty = np.where(total > 0, 0.0, np.nan)
        return _estimate(np.divide(numerator, denominator, out=empty, where=denominator > 0), units.document_domain, confidence)

    total, uniform = slots.total[:, index], slots.uniform[:, index]
    about |= {"texts": texts, "uniform": float(uniform[0] / total[0])}
    elsewhere = {}
    for other, name in enumerate(units.domains):
        if other == index or not slots.total[0, other]:
            continue
        lost = np.full(len(total), np.nan) if _texts(units, other) < 2 else slots.own[:, other] - slots.across[:, index, other]
        elsewhere[name] = Elsewhere(
            covered=estimate(slots.across[:, index, other], slots.total[:, other]), lost=estimate(lost, slots.total[:, other])
        )
    about["elsewhere"] = elsewhere
    if texts < 3:
        told = "only one text" if texts == 1 else f"only {texts} texts"
        return DomainPlacement(**about, reason=f"{told}: at least 3 are needed to choose by some and look at others")  # pyright: ignore[reportArgumentType]
    alone = len(np.unique(units.document_domain)) < 2
    return DomainPlacement(
        **about,  # pyright: ignore[reportArgumentType]
        covered=estimate(slots.own[:, index], total),
        gain=estimate(slots.own[:, index] - uniform, slots.oracle[:, index] - uniform),
        knowing=Estimate() if alone else estimate(slots.own[:, index] - slots.load[:, index], total),
        by_load=Estimate() if alone else estimate(slots.load[:, index], total),
        oracle=float(slots.oracle[0, index] / total[0]),
        reason="there is one domain only: whether knowing it helps cannot be said" if alone else None,
    )


def _texts(units: RoutingShape, domain: int) -> int:
    return int((units.document_domain == domain).sum())


def _estimate(rows: np.ndarray, label: np.ndarray, confidence: float) -> Estimate:
    """Of the value in row 0 and those without each text, [1 + texts]."""
    value = float(rows[0])
    found = jackknife(rows[0], rows[1:], label)
    # nothing varies: the interval is the value, whatever Student's t would be
    reach = 0.0 if float(found.error) == 0 else float(student.ppf((1 + confidence) / 2, found.freedom) * found.error)
    return Estimate(value=value, low=value - reach, high=value + reach)
