"""How much of the domain metrics is the token itself, or its place, and how much is more: routed beside surrogate counts.

Rows are the domains and, last, their mean; columns the layers and, last, their mean. Both sides are of the tokens that the surrogate
covers, in the documents of the sample, and the interval is that of their paired difference over source texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from dbes.scoring.metrics import cosines_of_gram, domain_divergence, effective_rank, grams, information_bound, isolation_of, usage_of
from dbes.scoring.resampling import jackknife, with_mean
from dbes.scoring.sampling import TokenSample
from dbes.scoring.surrogates import Surrogate, SurrogateLayer, surrogate_of
from dbes.scoring.workers import in_order
from dbes.trace.types import RoutingShape

ROUNDING = 1e-9
"""Routed and surrogate hits that are closer, as a share of the domain's, are equal: a router that looks at nothing but the key
then has a contextual part of 0 and not of a rounding error."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One metric beside what a key gives, [rows, columns]; DER has the last row only.

    Attributes:
        routed, surrogate: corrected by the jackknife, of the router and of its surrogate.
        beyond, low, high: routed less surrogate, with its 95 % interval.
    """

    routed: np.ndarray
    surrogate: np.ndarray
    beyond: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Contextual:
    """One metric beside what the token and what its position give, [rows, columns]; NaN where the trace has no token ids.

    Attributes:
        lexical: corrected value of the lexical surrogate.
        contextual, contextual_low, contextual_high: of the router less lexical, on the tokens that the lexical surrogate covers.
        position: corrected value of the position surrogate.
    """

    lexical: np.ndarray
    contextual: np.ndarray
    contextual_low: np.ndarray
    contextual_high: np.ndarray
    position: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ContextualEstimates:
    """Of every calibrated domain metric; and ``covered``: for each key the share of tokens, [domains + 1], all of them last."""

    metrics: dict[str, Contextual]
    covered: dict[str, np.ndarray]


def contextual_estimates(
    sample: TokenSample, shape: RoutingShape, *, lexical: str = "lexical", unit_group: np.ndarray | None = None
) -> ContextualEstimates:
    """What the token and its position explain of each domain metric.

    Args:
        shape: of the documents that ``sample.routes.document`` counts; those cut from one source text are one unit.
        lexical: ``lexical``, or ``bigram`` to count the token before as well.
        unit_group: see ``surrogate_of``.
    """
    explained: dict[str, dict[str, Explained]] = {}
    covered: dict[str, np.ndarray] = {}
    for key in (lexical, "position"):  # one after the other: what a surrogate is made of is large
        surrogate = surrogate_of(sample, shape, key, unit_group=unit_group)
        covered[key] = np.full(len(shape.domains) + 1, np.nan) if surrogate is None else surrogate.covered
        if surrogate is not None:
            explained[key] = explained_by(surrogate)
    position = explained["position"]
    unknown = {name: np.full(each.surrogate.shape, np.nan) for name, each in position.items()}
    tokens = explained.get(lexical)
    return ContextualEstimates(
        metrics={
            name: Contextual(
                lexical=unknown[name] if tokens is None else tokens[name].surrogate,
                contextual=unknown[name] if tokens is None else tokens[name].beyond,
                contextual_low=unknown[name] if tokens is None else tokens[name].low,
                contextual_high=unknown[name] if tokens is None else tokens[name].high,
                position=each.surrogate,
            )
            for name, each in position.items()
        },
        covered=covered,
    )


def explained_by(surrogate: Surrogate) -> dict[str, Explained]:
    """Every domain metric of the router beside that of its surrogate, layer by layer and in the mean of the layers."""
    shape, columns = surrogate.shape, range(len(surrogate.shape.layers))
    cells: dict[str, list[Explained]] = {}
    sums: dict[str, Pair] = {}
    _ = surrogate.blocks  # made once, before several layers ask for them at a time
    scored = in_order(
        lambda column: _layer_scores(surrogate.layer(column), shape, column), columns, size=len(surrogate.group_domain) * shape.width
    )
    for found in scored:  # what every group leaves is kept as a sum over layers only
        for name, pair in found.items():
            cells.setdefault(name, []).append(_explained(pair, surrogate.group_domain))
            sums[name] = pair if name not in sums else Pair(*(mine + theirs for mine, theirs in zip(sums[name], pair, strict=True)))
    explained = {}
    for name, total in sums.items():
        mean = Pair(*(side / len(columns) for side in total))
        every = [*cells[name], _explained(mean, surrogate.group_domain)]
        explained[name] = Explained(
            **{each.name: np.stack([getattr(cell, each.name) for cell in every], axis=-1) for each in fields(Explained)}
        )
    return explained


class Pair(NamedTuple):
    """Routed and surrogate values [rows], and both without each group, [groups, rows]."""

    routed: np.ndarray
    surrogate: np.ndarray
    routed_left: np.ndarray
    surrogate_left: np.ndarray


def _layer_scores(layer: SurrogateLayer, shape: RoutingShape, column: int) -> dict[str, Pair]:
    metrics = _metrics_of(shape, column)
    sums = layer.by_domain(layer.routed), layer.by_domain(layer.surrogate)
    values = [metrics(each) for each in _equal(*sums)]
    parts = [[metrics(each) for each in _equal(part.routed, part.surrogate)] for part in layer.without_each()]
    found = {}
    for name, value in values[0].items():
        left_out = (np.concatenate([np.empty((0, len(value))), *(part[side][name] for part in parts)]) for side in (0, 1))
        found[name] = Pair(value, values[1][name], *left_out)
    return found


def _metrics_of(shape: RoutingShape, column: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The domain metrics of sums [..., domains, experts], each [..., rows], as smooth functions that the jackknife can correct."""
    experts, top_k, domains = shape.experts[column], shape.top_k[column], len(shape.domains)
    bound = information_bound(domains, np.array([experts]), np.array([top_k]))[0]
    choice = 1.0 if experts > top_k and domains > 1 else np.nan  # k = E leaves nothing to choose

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        usage = usage_of(sums)[..., None, :]
        divergence = domain_divergence(usage)[..., 0] * choice
        gram = grams(usage)
        return {
            "specialization": with_mean(divergence),
            "specialization_normalized": with_mean(divergence / bound),
            "der": effective_rank(gram, np.array([experts])) * choice,
            "domain_isolation": with_mean(isolation_of(cosines_of_gram(gram))[..., 0] * choice),
        }

    return metrics


def _equal(routed: np.ndarray, surrogate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, with domains of the surrogate that differ by rounding only made equal."""
    near = np.abs(surrogate - routed).max(axis=-1, keepdims=True) <= ROUNDING * routed.sum(axis=-1, keepdims=True)
    return routed, np.where(near, routed, surrogate)


def _explained(pair: Pair, domain: np.ndarray) -> Explained:
    beyond = jackknife(pair.routed - pair.surrogate, pair.routed_left - pair.surrogate_left, domain)
    reach = np.where(beyond.error > 0, beyond.reach, beyond.error)  # a table of tokens has no error and no degrees of freedom
    return Explained(
        routed=jackknife(pair.routed, pair.routed_left, domain).corrected,
        surrogate=jackknife(pair.surrogate, pair.surrogate_left, domain).corrected,
        beyond=beyond.corrected,
        low=beyond.corrected - reach,
        high=beyond.corrected + reach,
    )
