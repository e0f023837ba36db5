"""Which cells an ablation masks: of each half of the texts the specialists of every domain, and others of the same load."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from dbes.scoring.counts import Counts
from dbes.scoring.specialists import find_specialists
from dbes.trace.types import RoutingShape

Cells = tuple[tuple[int, int], ...]
"""(layer of the model, expert) each."""

HALVES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """The cells that each half of the source texts chose.

    Attributes:
        shape: with source texts as documents.
        half: 0 or 1 of each source text, int [units].
        own, control: by half, by domain; of the same load in the same layers, see `matched`.
        load: share of the domain's slots that they carry on the half that chose them, [halves, domains, 2] (own, control).
    """

    shape: RoutingShape
    half: np.ndarray
    own: tuple[tuple[Cells, ...], ...]
    control: tuple[tuple[Cells, ...], ...]
    load: np.ndarray

    def measured(self, domain: int) -> np.ndarray:
        """Source texts that are measured for a domain: those whose other half chose cells of it, bool [units]."""
        return np.asarray([len(self.own[1 - half][domain]) > 0 for half in (0, 1)])[self.half]

    def load_of(self, domain: int) -> tuple[float, float]:
        """Mean load of the cells, and of their controls, over the halves that chose some; NaN where none did."""
        chose = [half for half in range(HALVES) if self.own[half][domain]]
        return (float("nan"), float("nan")) if not chose else tuple(self.load[chose, domain].mean(axis=0).tolist())

    @property
    def passes(self) -> int:
        """Times that a half of the texts is read, the unmasked one included."""
        return HALVES + 2 * sum(len(cells) > 0 for own in self.own for cells in own)


def halves_of(shape: RoutingShape) -> np.ndarray:
    """0 or 1 of each document: every other one of its domain, in the order of the sha256 of its id; the same in every run."""
    half = np.zeros(len(shape.document_ids), np.int64)
    digests = [hashlib.sha256(name.encode()).digest() for name in shape.document_ids]
    for domain in range(len(shape.domains)):
        own = sorted(np.flatnonzero(shape.document_domain == domain).tolist(), key=lambda place: digests[place])
        half[own[1::2]] = 1
    return half


def choose_masks(counts: Counts, *, permutations: int, seed: int) -> Masks:
    """The specialists that each half of the source texts finds by itself, as a result finds its own, and their controls.

    Args:
        counts: of whole texts; they are added up by source text here.
    """
    units = counts.by_unit()
    shape, half = units.shape, halves_of(units.shape)
    own: list[tuple[Cells, ...]] = []
    control: list[tuple[Cells, ...]] = []
    load = np.zeros((HALVES, len(shape.domains), 2))
    for which in range(HALVES):
        part = units.take(np.flatnonzero((half == which) & (units.tokens > 0)))
        if len(np.unique(part.shape.document_domain)) < len(shape.domains):
            own.append(((),) * len(shape.domains))
            control.append(own[-1])
            continue
        table = find_specialists(part, permutations=permutations, seed=seed)
        chosen = [matched(table.specialist[d], table.lift[d], table.share[d], shape) for d in range(len(shape.domains))]
        own.append(tuple(cells for cells, _ in chosen))
        control.append(tuple(cells for _, cells in chosen))
        for d, pair in enumerate(chosen):
            load[which, d] = [sum(table.share[d, shape.layers.index(layer), expert] for layer, expert in cells) for cells in pair]
    load /= len(shape.layers)
    return Masks(shape=shape, half=half, own=tuple(own), control=tuple(control), load=load)


def matched(specialist: np.ndarray, lift: np.ndarray, share: np.ndarray, shape: RoutingShape) -> tuple[Cells, Cells]:
    """The specialists of a domain, and in every layer other experts that together carry as much of the domain.

    Specialists are taken by falling lift while those that are none carry as much. Each is paired with one of these (least sum of
    differences in load); where the pairs carry less, more are added while that brings the sum closer: a control never has fewer cells
    but where there are fewer.

    Args:
        specialist: bool [layers, experts]; lift, share: [layers, experts], of the domain.
    """
    own: list[tuple[int, int]] = []
    control: list[tuple[int, int]] = []
    for column, layer in enumerate(shape.layers):
        load, others = share[column], np.flatnonzero(~specialist[column, : shape.experts[column]])
        chosen: list[int] = []
        for expert in sorted(np.flatnonzero(specialist[column]).tolist(), key=lambda expert: -lift[column, expert]):
            if load[[*chosen, expert]].sum() <= load[others].sum() * (1 + 1e-9):
                chosen.append(expert)
        pairs = linear_sum_assignment(np.abs(load[chosen][:, None] - load[others]))[1]
        drawn, rest = others[pairs].tolist(), np.delete(others, pairs).tolist()
        while rest and chosen:
            short = load[chosen].sum() - load[drawn].sum()
            best = min(rest, key=lambda expert: abs(short - load[expert]))
            if abs(short - load[best]) >= abs(short):
                break
            rest.remove(best)
            drawn.append(best)
        own += [(layer, expert) for expert in chosen]
        control += [(layer, expert) for expert in drawn]
    return tuple(own), tuple(control)
