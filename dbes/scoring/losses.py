"""Loss by domain, and what masking does to it: sums of documents in, values with intervals and tests out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from dbes.measures import DomainAblation, DomainLoss, Measured
from dbes.scoring.layer_counts import shape_by_unit, units_of
from dbes.scoring.masks import Masks
from dbes.scoring.resampling import domain_ratio, holm, jackknife, left_out_ratios
from dbes.trace.loss import DocumentLoss
from dbes.trace.types import RoutingShape

LEVEL = 0.05

MATCHED = 0.8
"""Share of the specialists' load that a control must carry at least to be one."""


def by_unit(per_document: np.ndarray, shape: RoutingShape) -> np.ndarray:
    """Sums over the documents of each source text, [units, ...]."""
    _, order, starts = units_of(shape)
    return np.add.reduceat(per_document[order], starts)


def loss_by_domain(loss: DocumentLoss, shape: RoutingShape) -> dict[str, DomainLoss]:
    r"""Bits per byte of each domain, a ratio of sums over its texts.

    .. math:: \frac{\sum_i -\log_2 p(x_i)}{\sum_i \mathrm{bytes}_i}

    with the delete-one-document jackknife over source texts; the interval is NaN where a domain has one. A domain without a byte to
    predict is left out.
    """
    bits, sizes, domain = by_unit(loss.bits, shape), by_unit(loss.text_bytes, shape), shape_by_unit(shape).document_domain
    found = {}
    for place, name in enumerate(shape.domains):
        own = domain == place
        if sizes[own].sum() > 0:
            value, left = _ratios(bits[own], sizes[own], np.zeros(int(own.sum()), int), 1)
            told = measured(value[0], left[:, 0], np.zeros(int(own.sum()), int))
            told = told.model_copy(update={"p": math.nan})
            found[name] = DomainLoss(sources=int(own.sum()), text_bytes=int(sizes[own].sum()), bits_per_byte=told)
    return found


def measured(value: float, left_out: np.ndarray, document_domain: np.ndarray) -> Measured:
    """A value with its jackknife interval, and the two-sided p that it is 0 (Student's t).

    Args:
        left_out: [documents], the value without each of them.
    """
    found = jackknife(np.asarray(value), left_out, document_domain)
    error, reach = float(found.error), float(found.reach)
    if math.isnan(error):
        p = math.nan
    elif error > 0:
        p = float(2 * student.sf(abs(value) / error, found.freedom))
    else:
        p, reach = (1.0 if value == 0 else 0.0), 0.0
    return Measured(value=float(value), low=float(value - reach), high=float(value + reach), p=p)


def _ratios(above: np.ndarray, below: np.ndarray, domain: np.ndarray, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """Ratios of domain sums [domains, ...], and the same without each document [documents, domains, ...]."""
    return domain_ratio(above, below, domain, domains), left_out_ratios(above, below, domain, domains)


def ablation_by_domain(
    masks: Masks, *, base: np.ndarray, own: np.ndarray, control: np.ndarray, text_bytes: np.ndarray
) -> dict[str, DomainAblation]:
    """What the specialists of each domain do for its loss, beyond cells of the same load.

    A source text is measured with the cells that the other half of the texts chose; where that half chose none, it is left out. Tests
    are corrected over the domains (Holm). The cells are taken as given: intervals are over source texts.

    Args:
        base: bits of each source text, float64 [units].
        own, control: the same with the specialists of each domain masked, and with their controls, [domains, units].
        text_bytes: int64 [units].
    """
    names, domain = masks.shape.domains, masks.shape.document_domain
    found: dict[str, DomainAblation] = {}
    for place, name in enumerate(names):
        cells = tuple(len(masks.own[half][place]) for half in (0, 1))
        load, control_load = masks.load_of(place)
        drawn = tuple(len(masks.control[half][place]) for half in (0, 1))
        about = {"cells": cells, "control_cells": drawn, "load": load, "control_load": control_load}
        seen = masks.measured(place) & (text_bytes > 0)
        inside = seen & (domain == place)
        if not inside.any():
            found[name] = DomainAblation(**about)
            continue
        added = np.stack([own[place] - base, control[place] - base], axis=1)[seen]
        sizes = np.repeat(text_bytes[seen, None], 2, axis=1)
        value, left = _ratios(added, sizes, domain[seen], len(names))
        there = np.unique(domain[seen])
        others = [other for other in there if other != place]
        out, left_out = value[others].mean(axis=0), left[:, others].mean(axis=1)

        def told(
            of_inside: Sequence[float], of_outside: Sequence[float],
            value: np.ndarray = value, left: np.ndarray = left, out: np.ndarray = out, left_out: np.ndarray = left_out,
            place: int = place, seen: np.ndarray = seen,
        ) -> Measured:  # fmt: skip
            """Of a sum of the two inside and the two outside with these signs."""
            whole = float(value[place] @ np.asarray(of_inside) + out @ np.asarray(of_outside))
            return measured(whole, left[:, place] @ np.asarray(of_inside) + left_out @ np.asarray(of_outside), domain[seen])

        found[name] = DomainAblation(
            **about, sources=int(inside.sum()),
            inside=told((1, 0), (0, 0)), control_inside=told((0, 1), (0, 0)), outside=told((0, 0), (1, 0)),
            control_outside=told((0, 0), (0, 1)), beyond=told((1, -1), (0, 0)), selectivity=told((1, -1), (-1, 1)),
        )  # fmt: skip
    return _judged(found)


def _judged(found: Mapping[str, DomainAblation]) -> dict[str, DomainAblation]:
    """With p-values corrected over the domains, and what follows from them."""
    judged = dict(found)
    for kind in ("beyond", "selectivity"):
        tests = {name: test for name, each in judged.items() if (test := getattr(each, kind)) is not None}
        for (name, test), adjusted in zip(tests.items(), holm([each.p for each in tests.values()]).tolist(), strict=True):
            judged[name] = judged[name].model_copy(update={kind: test.model_copy(update={"p_holm": adjusted})})
    return {name: each.model_copy(update={"finding": _finding(each)}) for name, each in judged.items()}


def _finding(each: DomainAblation) -> str:
    beyond, selective = each.beyond, each.selectivity
    if beyond is None or selective is None:
        return "no specialists"
    if not beyond.p_holm <= LEVEL:
        return "no effect"
    if beyond.value < 0:
        return "worse"
    if each.control_load < MATCHED * each.load:
        return "unmatched"
    more_inside = each.inside is not None and each.outside is not None and each.inside.value > each.outside.value
    return "drives" if selective.p_holm <= LEVEL and selective.value > 0 and more_inside else "not alone"
