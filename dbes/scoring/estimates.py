"""Calibrated estimates: each metric with its chance level, jackknife, p, reference and score, for every domain and layer.

The score is the corrected value as a share of the ideal router's, with the interval of the corrected value; nothing is subtracted,
because the jackknife is centred on 0 already. Chance, the mean under permuted labels, is a line to look at; whether there is more
than chance is for the test of ``equal_usage``, which all domain metrics share.

They are made one layer at a time. Rows are the domains and, last, their mean; columns are the layers and, last, their mean. All
domain metrics are means over domains (``I(D;E)`` is the mean of the domains' divergences from the mixture), and what is measured
of the model is the mean over layers of what is measured at each, so that running sums over layers are enough. DER has the last
row only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np

from dbes.results import CalibratedRecord
from dbes.scoring import metrics
from dbes.scoring.contextual import Contextual
from dbes.scoring.draws import DrawSpread, draw_variance, ngram_draw_variance, without_each_expert
from dbes.scoring.grouping import Grouping
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.reference import ideal_values
from dbes.scoring.resampling import (
    DomainScores,
    document_scores,
    domain_ratio,
    domain_scores,
    jackknife,
    left_out_ratios,
    with_mean,
)
from dbes.trace.types import NOISE_SCALES, RoutingShape

STABILITY_SCALE = NOISE_SCALES.index(1e-2)
"""Index of the noise level whose set stability is the stiffness score."""

NGRAMS = tuple(f"ngram_expertise_{size}" for size in metrics.NGRAM_SIZES)

CALIBRATED = ("specialization", "specialization_normalized", "der", "domain_isolation", "stiffness", *NGRAMS)
"""Every calibrated metric of the package."""

NO_SPAN = 1e-9
"""An ideal router this close to 0 differs from it by rounding only: a score relative to it would be noise over noise."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric at one layer, or summed over layers, before anything is compared; None where the metric has no such thing.

    Attributes:
        value: [rows], of the counts as they are.
        whole, left_out: [rows], [documents, rows], what the jackknife starts from: of all documents and without each.
        null: [rows], mean of the value under permuted labels.
        reference: [rows], of the ideal router, see ``ideal_values``.
        chance, chance_left_out: [rows], [documents, rows], where chance is exact (n-grams).
        draw_variance: [rows], variance over draws of a random router: of the value, or of the score where chance is exact.
        zero, span: [rows], of a metric whose score is (value - zero) / span, see ``own.Metric``.
    """

    value: np.ndarray
    whole: np.ndarray
    left_out: np.ndarray
    null: np.ndarray | None = None
    reference: np.ndarray | None = None
    chance: np.ndarray | None = None
    chance_left_out: np.ndarray | None = None
    draw_variance: np.ndarray | None = None
    zero: np.ndarray | None = None
    span: np.ndarray | None = None

    def plus(self, other: Self) -> Self:
        """The sum of both; draws of the router are independent, so their variances add up."""
        pairs = ((entry.name, getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self))
        return replace(self, **{name: mine + theirs for name, mine, theirs in pairs if mine is not None})

    def over(self, layers: int) -> Self:
        """The mean, of a sum over so many layers."""
        found = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return replace(self, **{name: sums / layers ** (1 + (name == "draw_variance")) for name, sums in found if sums is not None})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One metric for every domain at one layer, arrays [rows]; or for all layers and their mean, [rows, columns].

    Attributes:
        replicates: float32 [documents] or [documents, columns], the score of the last row without each document, shifted by the
            jackknife's correction, so that they lie around the score; excess_replicates: the same of the excess.
        others: as in ``CalibratedRecord``.
    """

    value: np.ndarray
    null: np.ndarray
    p: np.ndarray
    reference: np.ndarray
    score: np.ndarray
    score_low: np.ndarray
    score_high: np.ndarray
    corrected: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    control: np.ndarray
    excess: np.ndarray
    excess_low: np.ndarray
    excess_high: np.ndarray
    replicates: np.ndarray
    excess_replicates: np.ndarray

    def widened(self, squared: np.ndarray) -> Self:
        """With an excess that reaches further, by a square that is added to the square of its own reach."""
        reach = np.sqrt((self.excess_high - self.excess) ** 2 + squared)
        return replace(self, excess_low=self.excess - reach, excess_high=self.excess + reach)

    @classmethod
    def side_by_side(cls, columns: list[Self]) -> Self:
        return cls(**{entry.name: np.stack([getattr(column, entry.name) for column in columns], axis=-1) for entry in fields(cls)})


def measure_layer(
    sums: LayerCounts, null: DomainScores | None, *, control: bool = False, grouping: Grouping | None = None
) -> tuple[dict[str, Measured], np.ndarray]:
    """Every calibrated metric of one layer, and the documents' shares in the n-grams above chance, [documents, sizes].

    With a grouping, what is left out, and what has shares, are its groups.

    Args:
        null: scores under permuted labels, with a leading [permutations] axis; None for a control, whose chance level nobody asks for.
        control: the trace is a draw of a random router; say how much its scores would vary with the draw, as far as one can tell.
    """
    documents, sums = sums, sums if grouping is None else grouping.sums(sums)
    shape = sums.shape
    domains, sizes, top_k = len(shape.domains), np.asarray(shape.experts), np.asarray(shape.top_k)
    counts, tokens = sums.by_domain(sums.hits), sums.by_domain(sums.active)
    value = domain_scores(counts, tokens, experts=sizes)
    whole, left_out = document_scores(sums.hits, shape.document_domain, domains, sizes=sizes)
    ideal = ideal_values(domains, int(sizes[0]), int(top_k[0]))
    fewer = without_each_expert(counts, tokens, experts=sizes) if control else None
    bound = metrics.information_bound(domains, sizes, top_k)
    choice = np.where(sizes > top_k, 1.0, np.nan)  # k = E leaves nothing to choose

    def of_domains(metric: str, cells: Callable[[DomainScores], np.ndarray], last: slice = slice(None)) -> Measured:
        def rows(scores: DomainScores) -> np.ndarray:
            return with_mean((cells(scores) * choice)[..., 0])[..., last]

        drawn = None if null is None else rows(null)
        return Measured(
            value=rows(value),
            whole=rows(whole),
            left_out=rows(left_out),
            null=None if drawn is None else drawn.mean(axis=0) if len(drawn) else np.full(drawn.shape[1:], np.nan),
            reference=ideal[metric],
            draw_variance=None if fewer is None else draw_variance(rows(fewer)),
        )

    ngrams, share = _ngrams(documents, sums, grouping, control=control)
    return {
        "specialization": of_domains("specialization", lambda scores: scores.divergence),
        "specialization_normalized": of_domains("specialization_normalized", lambda scores: scores.divergence / bound),
        "der": of_domains("der", lambda scores: scores.effective_rank[..., None, :], slice(-1, None)),
        "domain_isolation": of_domains("domain_isolation", lambda scores: scores.isolation),
        "stiffness": _stiffness(sums),
        **ngrams,
    }, share


def _stiffness(sums: LayerCounts) -> Measured:
    """Set stability at noise 1e-2."""
    shape, stiffness = sums.shape, sums.stiffness
    ratio = stiffness.unchanged[:, 0, STABILITY_SCALE], stiffness.kept_count[:, 0], shape.document_domain, len(shape.domains)
    value = with_mean(domain_ratio(*ratio))
    return Measured(value=value, whole=value, left_out=with_mean(left_out_ratios(*ratio)))


def _ngrams(
    documents: LayerCounts, sums: LayerCounts, grouping: Grouping | None, *, control: bool
) -> tuple[dict[str, Measured], np.ndarray]:
    """Repeated primary experts over n tokens; null: the exact mean over shuffles of the tokens inside each document.

    Args:
        documents: what chance is made of; sums: what is left out in turn, the same or its groups.
    """
    shape, ngrams, domains = sums.shape, sums.ngrams, len(sums.shape.domains)
    share = np.full((len(sums.tokens), len(NGRAMS)), np.nan)
    if ngrams is None or documents.ngrams is None:
        rows, left_out = np.full(domains + 1, np.nan), np.full((len(sums.tokens), domains + 1), np.nan)
        unknown = Measured(value=rows, whole=rows, left_out=left_out, chance=rows, chance_left_out=left_out)
        return dict.fromkeys(NGRAMS, unknown), share
    found = {}
    for index, (metric, size) in enumerate(zip(NGRAMS, metrics.NGRAM_SIZES, strict=True)):
        windows, alike = ngrams.windows[:, 0, index], ngrams.alike[:, 0, index]
        by_expert = metrics.shuffled_by_expert(documents.ngrams.primaries[:, 0], size) * documents.ngrams.windows[:, :1, index]
        expected = by_expert.sum(axis=-1)
        if grouping is not None:
            by_expert, expected = grouping.groups.add(by_expert), grouping.groups.add(expected)
        variance = None
        if control:
            parts = (sums.by_domain(part) for part in (alike, by_expert, windows, ngrams.primaries[:, 0]))
            variance = ngram_draw_variance(*parts, size=size)
        value, chance = (with_mean(domain_ratio(part, windows, shape.document_domain, domains)) for part in (alike, expected))
        without, chance_without = (with_mean(left_out_ratios(part, windows, shape.document_domain, domains)) for part in (alike, expected))
        found[metric] = Measured(
            value=value, whole=value, left_out=without, chance=chance, chance_left_out=chance_without, draw_variance=variance
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            share[:, index] = (alike - expected) / sums.by_domain(windows)[shape.document_domain]
    return found, share


@dataclass(frozen=True)
class Scored:
    """The score before its correction [rows], the same without each document [documents, rows], and its variance over routers."""

    whole: np.ndarray
    left_out: np.ndarray
    draw_variance: np.ndarray | float


def scored(found: Measured) -> Scored:
    """What the jackknife of the score starts from."""
    if found.chance is not None and found.chance_left_out is not None:
        ratios = metrics.above_chance(found.whole, found.chance), metrics.above_chance(found.left_out, found.chance_left_out)
        return Scored(*ratios, 0.0 if found.draw_variance is None else found.draw_variance)
    if found.reference is None:  # stiffness: its score is the value itself
        return Scored(found.whole, found.left_out, 0.0)
    span, zero = found.reference if found.span is None else found.span, 0.0 if found.zero is None else found.zero
    scale = np.where(np.abs(span) > NO_SPAN, span, np.nan)
    variance = 0.0 if found.draw_variance is None else found.draw_variance / scale**2
    return Scored((found.whole - zero) / scale, (found.left_out - zero) / scale, variance)


def draw_spread(drawn: Sequence[Measured], document_domain: np.ndarray) -> DrawSpread:
    """How much the scores of a random router vary with the draw of it: of the same metric and layer, in every recorded draw."""
    each = [scored(draw) for draw in drawn]
    scores = [jackknife(draw.whole, draw.left_out, document_domain).corrected for draw in each]
    one = np.broadcast_to(each[0].draw_variance, scores[0].shape)
    return DrawSpread(draws=len(each), one=one, several=np.var(scores, axis=0, ddof=1) if len(each) > 1 else None)


def estimate(found: Measured, drawn: Sequence[Measured], document_domain: np.ndarray, p: np.ndarray) -> Estimate:
    """The estimate of one metric at one layer, or of the model, beside what the random router shows.

    The intervals of the excess hold the texts only; see ``draw_reach`` for the draw of the random router.

    Args:
        drawn: the same of each draw of the random router; the excess is over their mean.
        p: [domains + 1], of the test of equal usage; used where the metric compares domains.
    """
    unknown = np.full(found.value.shape, np.nan)
    value = jackknife(found.whole, found.left_out, document_domain)
    own = scored(found)
    score = jackknife(own.whole, own.left_out, document_domain)
    control_score = excess = reach = unknown
    excess_left = np.full_like(own.left_out, np.nan)
    if drawn:
        randoms = [scored(draw) for draw in drawn]
        whole, left_out = (np.mean([getattr(random, name) for random in randoms], axis=0) for name in ("whole", "left_out"))
        control_score = jackknife(whole, left_out, document_domain).corrected
        # paired: both routers read the same documents
        paired = jackknife(own.whole - whole, own.left_out - left_out, document_domain)
        excess_left = own.left_out - left_out + (paired.corrected - (own.whole - whole))
        excess, reach = paired.corrected, paired.reach
    return Estimate(
        value=found.value,
        null=found.chance if found.chance is not None else unknown if found.null is None else found.null,
        p=unknown if found.null is None else np.where(np.isnan(found.value), np.nan, p[-len(found.value) :]),
        reference=unknown if found.reference is None else found.reference,
        score=score.corrected, score_low=score.corrected - score.reach, score_high=score.corrected + score.reach,
        corrected=value.corrected, ci_low=value.corrected - value.reach, ci_high=value.corrected + value.reach,
        control=control_score, excess=excess, excess_low=excess - reach, excess_high=excess + reach,
        replicates=(own.left_out + (score.corrected - own.whole))[:, -1].astype(np.float32),
        excess_replicates=excess_left[:, -1].astype(np.float32),
    )  # fmt: skip


def calibrated_records(metric: str, found: Estimate, beyond: Contextual | None, shape: RoutingShape) -> Iterator[CalibratedRecord]:
    """The records of one metric: the model first, then its domains, then every layer with its domains.

    Args:
        beyond: what the token and its position explain of it; None where that is unknown.
    """
    rows: list[str | None] = [*shape.domains, None] if len(found.value) > 1 else [None]
    columns: list[int | None] = [*shape.layers, None]
    parts = (found,) if beyond is None else (found, beyond)
    arrays = {each.name: getattr(part, each.name) for part in parts for each in fields(part) if not each.name.endswith("replicates")}
    for column in (len(columns) - 1, *range(len(columns) - 1)):
        for row in (len(rows) - 1, *range(len(rows) - 1)):
            cells = {name: array[row, column] for name, array in arrays.items()}
            yield CalibratedRecord(metric=metric, layer=columns[column], domain=rows[row], **cells)
