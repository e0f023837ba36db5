"""A trace is scored one layer at a time: the counts of one layer go in, small arrays come out, and these are put together.

Layers know nothing of each other, so that several are scored at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dbes.scoring.counts import Counts
from dbes.scoring.decoding import Decoder
from dbes.scoring.descriptive import random_halves, split_half_similarity
from dbes.scoring.draws import DrawSpread, draw_reach
from dbes.scoring.equal_usage import UsageTest
from dbes.scoring.estimates import NGRAMS, Estimate, Measured, draw_spread, estimate, measure_layer
from dbes.scoring.grouping import CHANCE_DRAWS, Grouping
from dbes.scoring.layer_counts import LayerCounts, joined_layers
from dbes.scoring.own import Metric, Problems, own_measured
from dbes.scoring.permutation import permuted_labels, permuted_scores
from dbes.scoring.placebo import Placebo, Placebos
from dbes.scoring.resampling import sign_flip_p
from dbes.scoring.specialists import LayerTests, SpecialistTable, SpecialistTest, joined
from dbes.scoring.workers import in_order
from dbes.trace.types import RoutingShape


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """What is kept of one layer.

    Attributes:
        totals: sums over the documents of each domain.
        specialists: what the test of specialists is made of.
        halves: [domains, 1], similarity of random halves of a domain's documents.
        estimates: of the layer.
        measured, controls: of the router and of draws of the random router, to be summed over layers.
        spread: how much the random router's scores vary with the draw of it.
        products: [blocks, blocks], what the test of equal usage needs of the layer, to be summed too.
        share: [documents, sizes], what each document (or group of them) adds to the n-grams above chance.
        problems: what is unknown of the user's own metrics.
    """

    totals: LayerCounts
    specialists: LayerTests
    halves: np.ndarray
    estimates: dict[str, Estimate]
    measured: dict[str, Measured]
    controls: tuple[dict[str, Measured], ...]
    spread: dict[str, DrawSpread]
    products: np.ndarray
    share: np.ndarray
    problems: dict[str, Problems]


@dataclass(frozen=True, kw_only=True)
class AllLayers:
    """What is kept of all layers: ``totals`` of each domain, ``halves`` [domains, layers], and what their names say.

    ``left_out``: the shape of what was left out in turn, documents or groups of them. ``problems``: of each layer, what is unknown of
    the user's own metrics.
    """

    totals: LayerCounts
    specialists: SpecialistTable
    halves: np.ndarray
    estimates: dict[str, Estimate]
    left_out: RoutingShape
    problems: tuple[dict[str, Problems], ...]
    decoder: Decoder | None = None
    placebo: dict[str, Placebo] | None = None


def score_layers(
    counts: Counts, *, permutations: int, seed: int, sign_flips: int | None = None, metrics: Sequence[Metric] = ()
) -> AllLayers:
    """The estimates and specialists of all layers.

    Args:
        counts: with those of the draws of the control, of the same documents, if there are any.
        sign_flips: draws of the n-gram test; by default as many as permutations.
        metrics: of the user's own.
    """
    shape, domain = counts.shape, counts.shape.document_domain
    design = replace(Design.of(counts, permutations=permutations, seed=seed), metrics=tuple(metrics))
    decoder = Decoder(domain, len(shape.domains), seed=seed)
    placebos = Placebos(counts.tokens, domain, shape.domains, permutations=permutations, seed=seed, grouping=design.grouping)
    each = (placebos.watching(decoder.watching(counts.layers())), *(draw.layers() for draw in counts.controls))
    layers = in_order(lambda sums: score_layer(sums[0], sums[1:], design), zip(*each, strict=False), size=len(domain) * shape.width)
    flips = permutations if sign_flips is None else sign_flips
    found = put_together(layers, design.usage, design.left_out, sign_flips=flips, seed=seed)
    return replace(found, decoder=decoder, placebo=placebos.found())


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is drawn once for all layers.

    Attributes:
        grouping: of the documents, where they are many.
        left_out: the shape of what is left out in turn: the documents, or their groups.
        labels: [permutations, documents], of the chance level, see ``permuted_labels``.
        half: 0 or 1 for each document, see ``random_halves``.
        usage, specialists: the tests.
        metrics: of the user's own.
    """

    grouping: Grouping | None
    left_out: RoutingShape
    labels: np.ndarray
    half: np.ndarray
    usage: UsageTest
    specialists: SpecialistTest
    metrics: tuple[Metric, ...] = ()

    @classmethod
    def of(cls, counts: Counts, *, permutations: int, seed: int) -> Design:
        shape, grouping = counts.shape, Grouping.of(counts.shape)
        domain, draws = shape.document_domain, permutations if grouping is None else min(permutations, CHANCE_DRAWS)
        return cls(
            grouping=grouping,
            left_out=shape if grouping is None else grouping.shape,
            labels=permuted_labels(domain, permutations=draws, seed=seed),
            half=random_halves(domain, seed=seed),
            usage=UsageTest.of(counts.tokens, domain, domains=len(shape.domains), permutations=permutations, seed=seed),
            specialists=SpecialistTest.of(shape, grouping, permutations=permutations, seed=seed),
        )


def score_layer(sums: LayerCounts, drawn: Sequence[LayerCounts], design: Design) -> LayerScores:
    """Everything of one layer that its counts are needed for.

    Args:
        drawn: sums of draws of the random router on the same documents.
    """
    grouping, domain = design.grouping, design.left_out.document_domain
    measured, share = measure_layer(sums, permuted_scores(sums, design.labels), grouping=grouping)
    controls = tuple(measure_layer(draw, None, control=number == 0, grouping=grouping)[0] for number, draw in enumerate(drawn))
    own, problems = own_measured(design.metrics, sums, design.labels, grouping=grouping)
    measured |= own
    for number, (found, draw) in enumerate(zip(controls, drawn, strict=True)):
        found |= own_measured(design.metrics, draw, None, grouping=grouping, control=number == 0)[0]
    products = design.usage.products(sums.hits[:, 0])
    return LayerScores(
        totals=sums.totals(),
        specialists=design.specialists.layer(sums),
        halves=split_half_similarity(sums, design.half),
        estimates=estimates_of(measured, controls, domain, design.usage.p(products)),
        measured=measured,
        controls=controls,
        spread={metric: draw_spread([draw[metric] for draw in controls], domain) for metric in measured if controls},
        products=products,
        share=share,
        problems=problems,
    )


def estimates_of(
    measured: dict[str, Measured], controls: Sequence[dict[str, Measured]], document_domain: np.ndarray, p: np.ndarray
) -> dict[str, Estimate]:
    return {metric: estimate(found, [draw[metric] for draw in controls], document_domain, p) for metric, found in measured.items()}


def put_together(layers: Iterable[LayerScores], test: UsageTest, left_out: RoutingShape, *, sign_flips: int, seed: int) -> AllLayers:
    """What all layers say together; only sums of what has a number for each document are kept from one layer to the next."""
    document_domain = left_out.document_domain
    kept: list[LayerScores] = []
    products = np.zeros((1, 1))
    sums: dict[str, Measured] = {}
    drawn: list[dict[str, Measured]] = []
    for layer in layers:
        drawn = drawn or [{} for _ in layer.controls]
        for total, more in zip((sums, *drawn), (layer.measured, *layer.controls), strict=True):
            total |= {metric: total[metric].plus(found) if metric in total else found for metric, found in more.items()}
        products = products + layer.products
        kept.append(replace(layer, measured={}, controls=(), products=np.zeros((0, 0))))
    means, *controls = ({metric: found.over(len(kept)) for metric, found in total.items()} for total in (sums, *drawn))
    columns = [layer.estimates for layer in kept] + [estimates_of(means, controls, document_domain, test.p(products))]
    estimates = {metric: Estimate.side_by_side([column[metric] for column in columns]) for metric in means}
    if controls:
        estimates = {metric: found.widened(draw_reach([layer.spread[metric] for layer in kept])) for metric, found in estimates.items()}
    if sign_flips:
        share = np.stack([layer.share for layer in kept], axis=1)
        p = sign_flip_p(share, document_domain, len(kept[0].totals.shape.domains), permutations=sign_flips, seed=seed)
        for index, metric in enumerate(NGRAMS):
            found = estimates[metric]
            estimates[metric] = replace(found, p=np.where(np.isnan(found.value), np.nan, p[..., index]))
    return AllLayers(
        totals=joined_layers([layer.totals for layer in kept]),
        specialists=joined([layer.specialists for layer in kept]),
        halves=np.concatenate([layer.halves for layer in kept], axis=1),
        estimates=estimates,
        left_out=left_out,
        problems=tuple(layer.problems for layer in kept),
    )
