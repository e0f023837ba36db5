"""Calibrated estimates: each metric with its chance level, jackknife, p, reference and score, for every domain and layer.

Every array has the axes ``rows columns``: rows are the domains and, last, their mean; columns are the layers and, last, their
mean. All domain metrics are means over domains (``I(D;E)`` is the mean of the domains' divergences from the mixture), so one
rule makes the model's values from the cells. DER has the last row only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from dbes.results import CalibratedRecord
from dbes.scoring import metrics
from dbes.scoring.counting import count_routes
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.metrics import effective_rank_of_gram
from dbes.scoring.resampling import (
    DomainScores,
    NullDraws,
    domain_ratio,
    domain_scores,
    jackknife,
    left_out_ratios,
    left_out_scores,
    permutation_null,
    permutation_p,
    sign_flip_p,
    usage_variance,
    without_each_expert,
)
from dbes.trace.baselines import ideal_trace, one_layer_each
from dbes.trace.types import NOISE_SCALES, RoutingShape

STABILITY_SCALE = NOISE_SCALES.index(1e-2)
"""Index of the noise level whose set stability is the stiffness score."""

SIGNIFICANCE = 0.05

NO_SPAN = 1e-9
"""An ideal router this close to chance differs from it by rounding only: a score relative to it would be noise over noise."""

Z95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One metric for every domain and layer and their means; arrays [rows, columns].

    Attributes:
        value, null, p, reference, score, corrected, ci_low, ci_high: as in ``CalibratedRecord``.
        left_out_score: [documents, rows, columns], score without each document.
        draw_variance: variance of the score over draws of the router, for a router whose experts are random (the control).
    """

    metric: str
    value: np.ndarray
    null: np.ndarray
    p: np.ndarray
    reference: np.ndarray
    score: np.ndarray
    corrected: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    left_out_score: np.ndarray
    draw_variance: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """All estimates of one trace, and the permutation draws that the specialist test uses."""

    by_metric: dict[str, Estimate]
    null: NullDraws


def estimate_all(
    statistics: LayerCounts, labels: np.ndarray, reference: DomainScores, *, sign_flips: int, seed: int, control: bool = False
) -> Estimates:
    """Every calibrated metric of a trace.

    Args:
        labels: [permutations, documents], permuted domain labels.
        reference: scores of the ideal router on the same documents, see ``reference_scores``.
        sign_flips: draws of the n-gram test.
        control: the trace is of a random router; say how much its scores vary with the draw of it.
    """
    shape = statistics.shape
    domains = len(shape.domains)
    sizes = np.asarray(shape.experts)
    counts, tokens = statistics.by_domain(statistics.hits), statistics.by_domain(statistics.active)
    point = domain_scores(counts, tokens, experts=sizes)
    null = permutation_null(statistics.hits, statistics.active, labels, shape.document_domain, domains, sizes=sizes)
    left_out = left_out_scores(statistics.hits, statistics.active, shape.document_domain, domains, sizes=sizes)
    undefined = np.asarray(shape.experts) <= np.asarray(shape.top_k)
    for scores in (point, null.scores, left_out, reference):
        for array in (scores.divergence, scores.effective_rank, scores.isolation):
            array[..., undefined] = np.nan  # k = E leaves nothing to choose
    bound = metrics.information_bound(domains, np.asarray(shape.experts), np.asarray(shape.top_k))
    sources = _Sources(
        point=point,
        null=null.scores,
        left_out=left_out,
        reference=reference,
        shape=shape,
        fewer_experts=without_each_expert(counts, tokens, experts=sizes) if control else None,
    )
    rank = _domain_estimate("der", sources, lambda scores: scores.effective_rank[..., None, :], means_only=True)
    found = [
        _domain_estimate("specialization", sources, lambda scores: scores.divergence),
        _domain_estimate("specialization_normalized", sources, lambda scores: scores.divergence / bound),
        _with_rank_interval(rank, statistics),
        _domain_estimate("domain_isolation", sources, lambda scores: scores.isolation),
        _stiffness(statistics),
        *(_ngrams(statistics, index, size, sign_flips=sign_flips, seed=seed) for index, size in enumerate(metrics.NGRAM_SIZES)),
    ]
    return Estimates(by_metric={estimate.metric: estimate for estimate in found}, null=null)


def reference_scores(statistics: LayerCounts, *, seed: int) -> DomainScores:
    """The ideal domain router on the same documents and lengths, through the same code, for each layer of the trace."""
    distinct, index = one_layer_each(statistics.shape)
    ideal = count_routes(ideal_trace(distinct, statistics.tokens, seed=seed), plain=True).whole()
    scores = domain_scores(ideal.by_domain(ideal.hits), ideal.by_domain(ideal.active), experts=np.asarray(distinct.experts))
    return DomainScores(
        information=scores.information[..., index],
        divergence=scores.divergence[..., index],
        effective_rank=scores.effective_rank[..., index],
        isolation=scores.isolation[..., index],
    )


def with_means(cells: np.ndarray) -> np.ndarray:
    """[..., domains, layers] with the mean over domains as a last row and the mean over layers as a last column."""
    rows = np.concatenate([cells, cells.mean(axis=-2, keepdims=True)], axis=-2)
    return np.concatenate([rows, rows.mean(axis=-1, keepdims=True)], axis=-1)


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """The domain scores an estimate is made of: as measured, under permuted labels, without each document, of the ideal router.

    ``fewer_experts``: without each expert, for a random router.
    """

    point: DomainScores
    null: DomainScores
    left_out: DomainScores
    reference: DomainScores
    shape: RoutingShape
    fewer_experts: DomainScores | None


def _domain_estimate(metric: str, sources: _Sources, cells: Callable[[DomainScores], np.ndarray], *, means_only: bool = False) -> Estimate:
    last = slice(-1, None) if means_only else slice(None)
    scores = (sources.point, sources.null, sources.left_out, sources.reference)
    value, draws, without, ideal = (with_means(cells(each))[..., last, :] for each in scores)
    chance = draws.mean(axis=0) if len(draws) else np.full(value.shape, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        span = np.where(np.abs(ideal - chance) > NO_SPAN, ideal - chance, np.nan)
    return Estimate(
        metric=metric,
        value=value,
        null=chance,
        p=permutation_p(value, draws) if len(draws) else np.full(value.shape, np.nan),
        reference=ideal,
        score=(value - chance) / span,
        **_jackknifed(value, without, sources.shape.document_domain),
        left_out_score=(without - chance) / span,
        draw_variance=None
        if sources.fewer_experts is None
        else _draw_variance(cells(sources.fewer_experts), sources.shape)[last] / span**2,
    )


def _draw_variance(fewer: np.ndarray, shape: RoutingShape) -> np.ndarray:
    """Variance over draws of a random router, [rows, columns], by the jackknife over its experts; layers are independent draws.

    Args:
        fewer: [experts, domains, layers], values with each expert left out.
    """
    rows = np.concatenate([fewer, fewer.mean(axis=-2, keepdims=True)], axis=-2)
    sizes = np.asarray(shape.experts)
    real = (np.arange(len(fewer))[:, None] < sizes)[:, None, :]
    mean = np.where(real, rows, 0.0).sum(axis=0) / sizes
    variance = (sizes - 1) / sizes * (np.where(real, rows - mean, 0.0) ** 2).sum(axis=0)
    return np.concatenate([variance, variance.sum(axis=-1, keepdims=True) / len(sizes) ** 2], axis=-1)


def _jackknifed(value: np.ndarray, left_out: np.ndarray, document_domain: np.ndarray) -> dict[str, np.ndarray]:
    corrected, error = jackknife(value, left_out, document_domain)
    return {"corrected": corrected, "ci_low": corrected - Z95 * error, "ci_high": corrected + Z95 * error}


def _with_rank_interval(rank: Estimate, statistics: LayerCounts) -> Estimate:
    r"""DER with an interval that covers: its bias near 0 is of order 1/sqrt(n), which no jackknife removes.

    Singular values are square roots, so sampling noise lifts DER by far more than the information. Two estimates err to
    opposite sides in simulations of correlated documents: the jackknife stays too high, and DER of the Gram matrix with each
    domain's sampling variance taken off its diagonal comes out too low. ``corrected`` is their mean, the interval runs from
    1.96 se below the lower to 1.96 se above the higher one, and reaches down to 0 whenever the permutation test does not
    reject 0. Coverage in these simulations: 94-100 %.
    """
    hits, slots = statistics.hits.astype(np.float64), statistics.slots
    moments = (hits, hits**2, hits * slots[..., None])
    sums = [np.moveaxis(statistics.by_domain(moment), 0, 1) for moment in moments]
    total, squared, documents = (statistics.by_domain(size).T for size in (slots, slots**2, slots > 0))
    usage, variance = usage_variance(sums[0], sums[1], sums[2], total, squared, documents)  # [layers, domains, experts]
    noise = variance.sum(axis=-1)
    gram = usage @ np.swapaxes(usage, -1, -2) - noise[..., None] * np.eye(usage.shape[1])
    lower = effective_rank_of_gram(gram, np.asarray(statistics.shape.experts))[None]
    lower = np.where(np.isnan(rank.value), np.nan, np.concatenate([lower, lower.mean(axis=-1, keepdims=True)], axis=-1))
    error = (rank.ci_high - rank.corrected) / Z95
    ci_low = np.minimum(lower, rank.corrected) - Z95 * error
    return replace(
        rank,
        corrected=(lower + rank.corrected) / 2,
        ci_low=np.where(rank.p > SIGNIFICANCE, np.minimum(ci_low, 0.0), ci_low),
        ci_high=np.maximum(lower, rank.corrected) + Z95 * error,
    )


def _stiffness(statistics: LayerCounts) -> Estimate:
    """Set stability at noise 1e-2: its score is the value itself; it has no null and no reference."""
    sums, shape = statistics.stiffness, statistics.shape
    unchanged, count = sums.unchanged[..., STABILITY_SCALE], sums.kept_count
    value = with_means(domain_ratio(unchanged, count, shape.document_domain, len(shape.domains)))
    without = with_means(left_out_ratios(unchanged, count, shape.document_domain, len(shape.domains)))
    unknown = np.full(value.shape, np.nan)
    return Estimate(
        metric="stiffness",
        value=value,
        null=unknown,
        p=unknown,
        reference=unknown,
        score=value,
        **_jackknifed(value, without, shape.document_domain),
        left_out_score=without,
    )


def _ngrams(statistics: LayerCounts, index: int, size: int, *, sign_flips: int, seed: int) -> Estimate:
    """Repeated primary experts over n tokens; null: the exact mean over shuffles of the tokens inside each document."""
    shape, ngrams, domains = statistics.shape, statistics.ngrams, len(statistics.shape.domains)
    metric = f"ngram_expertise_{size}"
    if ngrams is None:
        unknown = np.full((domains + 1, len(shape.layers) + 1), np.nan)
        without = np.full((len(shape.document_domain), *unknown.shape), np.nan)
        return Estimate(metric=metric, value=unknown, null=unknown, p=unknown, reference=unknown, score=unknown,
                        corrected=unknown, ci_low=unknown, ci_high=unknown, left_out_score=without)  # fmt: skip
    windows, alike = ngrams.windows[..., index], ngrams.alike[..., index]
    expected = np.nan_to_num(metrics.shuffled_ratio(ngrams.primaries, size)) * windows
    value, chance = (with_means(domain_ratio(part, windows, shape.document_domain, domains)) for part in (alike, expected))
    without, chance_without = (with_means(left_out_ratios(part, windows, shape.document_domain, domains)) for part in (alike, expected))
    p = np.full(value.shape, np.nan)
    if sign_flips:
        member = shape.document_domain[:, None] == np.arange(domains)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (alike - expected) / statistics.by_domain(windows)[shape.document_domain]
        p = sign_flip_p(with_means(np.where(member[..., None], share[:, None], 0.0)), permutations=sign_flips, seed=seed)
        p = np.where(np.isnan(value), np.nan, p)
    return Estimate(
        metric=metric,
        value=value,
        null=chance,
        p=p,
        reference=np.full(value.shape, np.nan),
        score=metrics.above_chance(value, chance),
        **_jackknifed(value, without, shape.document_domain),
        left_out_score=metrics.above_chance(without, chance_without),
    )


def calibrated_records(estimate: Estimate, control: Estimate | None, shape: RoutingShape) -> Iterator[CalibratedRecord]:
    """The records of one metric: the model first, then its domains, then every layer with its domains."""
    domains = shape.document_domain
    _, score_error = jackknife(estimate.score, estimate.left_out_score, domains)
    unknown = np.full(estimate.value.shape, np.nan)
    control_score = excess = excess_error = unknown
    if control is not None:
        control_score = control.score
        excess = estimate.score - control.score
        # Paired: both routers read the same documents. An excess has to be larger than what another draw of the random router
        # would show against this one, or an untrained model would "exceed" its control: hence twice the variance of a draw.
        _, paired_error = jackknife(excess, estimate.left_out_score - control.left_out_score, domains)
        excess_error = np.sqrt(paired_error**2 + (0.0 if control.draw_variance is None else 2 * control.draw_variance))
    rows: list[str | None] = [*shape.domains, None] if len(estimate.value) > 1 else [None]
    columns: list[int | None] = [*shape.layers, None]
    for column in (len(columns) - 1, *range(len(columns) - 1)):
        for row in (len(rows) - 1, *range(len(rows) - 1)):
            at = (row, column)
            yield CalibratedRecord(
                metric=estimate.metric,
                layer=columns[column],
                domain=rows[row],
                value=estimate.value[at],
                null=estimate.null[at],
                corrected=estimate.corrected[at],
                ci_low=estimate.ci_low[at],
                ci_high=estimate.ci_high[at],
                p=estimate.p[at],
                reference=estimate.reference[at],
                score=estimate.score[at],
                score_low=estimate.score[at] - Z95 * score_error[at],
                score_high=estimate.score[at] + Z95 * score_error[at],
                control=control_score[at],
                excess=excess[at],
                excess_low=excess[at] - Z95 * excess_error[at],
                excess_high=excess[at] + Z95 * excess_error[at],
            )
