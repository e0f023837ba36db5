r"""Chance levels, intervals and false-discovery control, with the **document** as the unit of everything.

Tokens of one text are not independent: on real text the null from shuffling labels over tokens is 9 to 17 times too small.
So labels are permuted over documents, and the jackknife leaves out one document at a time. All functions take per-document
statistics and run as matrix products, never as a loop over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr
from scipy.stats import false_discovery_control
from scipy.stats import t as student

from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.metrics import (
    domain_divergence,
    effective_rank,
    grams,
    isolation_of_gram,
    unbiased_grams,
    usage_of,
)

TIE = 1e-12
"""Two values closer than this count as equal, so that rounding never makes a value 'beat' its own null."""

PERMUTATION_CELLS = 1 << 22
"""Array elements worked on at a time by the permutations and the jackknife: bounds memory, changes no value."""

CONFIDENCE = 0.95
"""Of all intervals."""

COUNT_BANDS = 4
"""Bands of expected count within which the null of the specialist test is pooled over the experts of a layer."""


@dataclass(frozen=True, kw_only=True)
class DomainScores:
    """The domain metrics of one set of counts, or of many: leading axes (permutations, left-out documents) come first.

    Attributes:
        divergence: [..., domains, layers], routing specialization of each domain in nats; their mean is that of the model.
        effective_rank: [..., layers], DER.
        isolation: [..., domains, layers].
    """

    divergence: np.ndarray
    effective_rank: np.ndarray
    isolation: np.ndarray

    @classmethod
    def of(cls, usage: np.ndarray, gram: np.ndarray, experts: np.ndarray) -> DomainScores:
        """The domain metrics of usage [..., domains, layers, experts].

        Args:
            gram: [..., layers, domains, domains], its inner products, with squared norms of the truth on the diagonal.
            experts: [layers], experts of each layer.
        """
        divergence = domain_divergence(usage)
        return cls(
            divergence=np.full_like(divergence, np.nan) if usage.shape[-3] == 1 else divergence,
            effective_rank=effective_rank(gram, experts),
            isolation=isolation_of_gram(gram),
        )

    @classmethod
    def stack(cls, parts: list[DomainScores], axis: int) -> DomainScores:
        return cls(**{field.name: np.concatenate([getattr(part, field.name) for part in parts], axis=axis) for field in fields(cls)})


def domain_scores(counts: np.ndarray, tokens: np.ndarray, *, experts: np.ndarray | None = None) -> DomainScores:
    """The domain metrics of counts [..., domains, layers, experts], with norms that are unbiased for independent tokens.

    Args:
        tokens: [..., domains, layers], tokens that were routed at each layer.
        experts: [layers], experts of each layer; the length of the last axis by default.
    """
    usage = usage_of(counts)
    experts = np.full(usage.shape[-2], usage.shape[-1]) if experts is None else experts
    return DomainScores.of(usage, unbiased_grams(usage, tokens, counts.sum(axis=-1, dtype=np.float64)), experts)


def with_mean(cells: np.ndarray) -> np.ndarray:
    """[..., domains] with their mean as a last row."""
    return np.concatenate([cells, cells.mean(axis=-1, keepdims=True)], axis=-1)


def batches(labels: np.ndarray, elements_each: int) -> Iterator[np.ndarray]:
    """The labels [permutations, documents], as many at a time as ``PERMUTATION_CELLS`` allows."""
    size = max(1, PERMUTATION_CELLS // max(elements_each, 1))
    for start in range(0, len(labels), size):
        yield labels[start : start + size]


def permutation_p(value: np.ndarray, null: np.ndarray) -> np.ndarray:
    """One-sided p of ``value`` [...] against draws ``null`` [permutations, ...]: (1 + draws at least as large) / (1 + draws)."""
    with np.errstate(invalid="ignore"):
        reached = (null >= value - TIE).sum(axis=0)
    return np.where(np.isnan(value), np.nan, (1 + reached) / (1 + len(null)))


# ---------------------------------------------------------------------------------------------------------------------
# Jackknife


def document_scores(
    hits: np.ndarray, document_domain: np.ndarray, domains: int, *, sizes: np.ndarray | None = None
) -> tuple[DomainScores, DomainScores]:
    r"""The domain metrics for the jackknife: of all documents, and with each left out in turn (a leading [documents] axis).

    Norms are those of section 10 of the contract: products of different documents only,

    .. math:: |p_d|^2 = \frac{|\sum_i h_i|^2 - \sum_i |h_i|^2}{(\sum_i n_i)^2 - \sum_i n_i^2},

    unbiased whatever the lengths of documents and however much they differ; NaN for a domain of one document. Leaving out one
    document changes one domain's row, so only that row, the mixture and one row of the Gram matrix are computed again.

    Args:
        hits: [documents, layers, experts].
        sizes: [layers], experts of each layer; the length of the last axis by default.
    """
    documents, layers, experts = hits.shape
    sizes = np.full(layers, experts) if sizes is None else sizes
    length = hits.sum(axis=-1, dtype=np.float64)
    square = np.einsum("nle,nle->nl", hits, hits, dtype=np.float64)
    inside = [document_domain == domain for domain in range(domains)]
    sums, slots, slots_squared, squares = (
        np.stack([part[each].sum(axis=0, dtype=np.float64) for each in inside]) for part in (hits, length, length**2, square)
    )
    usage = usage_of(sums)
    gram = grams(usage)
    diagonal = np.arange(domains)
    gram[..., diagonal, diagonal] = _norms(sums, slots, slots_squared, squares).swapaxes(-1, -2)
    whole = DomainScores.of(usage, gram, sizes)
    left_out = DomainScores(**{
        each.name: np.full((documents, *getattr(whole, each.name).shape), np.nan) for each in fields(DomainScores)
    })  # fmt: skip
    if domains < 2:
        return whole, left_out
    entropy = entr(usage).sum(axis=-1)
    by_layer = np.ascontiguousarray(np.moveaxis(usage, 0, 2))  # [layers, experts, domains]
    mixture = usage.mean(axis=0)
    size = max(1, PERMUTATION_CELLS // (layers * max(experts, domains * domains)))
    for domain in range(domains):
        members = np.flatnonzero(inside[domain])
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            fewer = sums[domain] - hits[chosen]
            row = usage_of(fewer)
            mixed = np.clip(mixture + (row - usage[domain]) / domains, 0.0, None)
            with np.errstate(divide="ignore"):
                log_mixed = np.where(mixed == 0, 0.0, np.log(mixed))
            crossed = np.moveaxis(log_mixed, 0, 1) @ by_layer  # [layers, chosen, domains]
            divergence = -entropy - np.moveaxis(crossed, 0, 1).swapaxes(-1, -2)
            divergence[:, domain] = -entr(row).sum(axis=-1) - (row * log_mixed).sum(axis=-1)
            left_out.divergence[chosen] = divergence
            products = np.moveaxis(np.moveaxis(row, 0, 1) @ by_layer, 0, 1)  # [chosen, layers, domains]
            products[..., domain] = _norms(
                fewer, slots[domain] - length[chosen], slots_squared[domain] - length[chosen] ** 2, squares[domain] - square[chosen]
            )
            changed = np.repeat(gram[None], len(chosen), axis=0)
            changed[..., domain, :] = products
            changed[..., :, domain] = products
            left_out.effective_rank[chosen] = effective_rank(changed, sizes)
            left_out.isolation[chosen] = isolation_of_gram(changed)
    return whole, left_out


def _norms(sums: np.ndarray, slots: np.ndarray, slots_squared: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Squared norms of usage from products of different documents, [...], of hits [..., experts] and sums over documents [...]."""
    pairs = slots**2 - slots_squared
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0.5, ((sums**2).sum(axis=-1) - squares) / pairs, np.nan)


def left_out_ratios(numerator: np.ndarray, denominator: np.ndarray, document_domain: np.ndarray, domains: int) -> np.ndarray:
    """Ratio of domain sums with each document left out in turn, [documents, domains, ...].

    Args:
        numerator, denominator: [documents, ...] sums of each document.
    """
    result = np.repeat(domain_ratio(numerator, denominator, document_domain, domains)[None], len(numerator), axis=0)
    for domain in range(domains):
        members = document_domain == domain
        above, below = numerator[members].sum(axis=0), denominator[members].sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            rest = (above - numerator[members]) / (below - denominator[members])
        result[members, domain] = np.where(below - denominator[members] > 0, rest, np.nan)
    return result


def domain_ratio(numerator: np.ndarray, denominator: np.ndarray, document_domain: np.ndarray, domains: int) -> np.ndarray:
    """Sum of numerators over sum of denominators per domain, [domains, ...]; NaN where the denominator is 0."""
    above, below = (np.stack([part[document_domain == d].sum(axis=0) for d in range(domains)]) for part in (numerator, denominator))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


@dataclass(frozen=True, kw_only=True)
class Jackknife:
    """Bias-corrected estimate, its standard error, and Satterthwaite's degrees of freedom of this, all of one shape."""

    corrected: np.ndarray
    error: np.ndarray
    freedom: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """Half the width of the 95 % interval (Student's t); NaN where the error is."""
        return student.ppf((1 + CONFIDENCE) / 2, self.freedom) * self.error

    def two_sided(self, value: np.ndarray | float) -> np.ndarray:
        """p that the truth of a value with this error is 0; of one without any error 1 where it is 0, else 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            p = 2 * student.sf(np.abs(value) / self.error, self.freedom)
        return np.where(self.error > 0, p, np.where(np.isnan(self.error), np.nan, np.equal(value, 0).astype(float)))


def jackknife(value: np.ndarray, left_out: np.ndarray, document_domain: np.ndarray) -> Jackknife:
    r"""The delete-one-document jackknife, stratified by domain.

    .. math:: \theta + \sum_d (n_d - 1)(\theta - \bar\theta_{(\cdot) d}), \qquad
              se^2 = \sum_d v_d, \quad v_d = \frac{n_d - 1}{n_d} \sum_{i \in d} (\theta_{(i)} - \bar\theta_{(\cdot) d})^2, \qquad
              \nu = \frac{(\sum_d v_d)^2}{\sum_d v_d^2 / (n_d - 1)}

    with Satterthwaite's degrees of freedom. The percentile bootstrap is not offered: resampling adds the small-sample bias a second
    time, and it covered the truth in no run.

    Args:
        value: [...]; left_out: [documents, ...], the value without each document. NaN comes out where a domain that matters has one
            document only.
    """
    corrected = np.array(value, np.float64, copy=True)
    variance, fourth = np.zeros_like(corrected), np.zeros_like(corrected)
    for domain in np.unique(document_domain):
        inside = left_out[document_domain == domain]
        count = len(inside)
        mean = inside.mean(axis=0)
        corrected += (count - 1) * (value - mean)
        part = (count - 1) / count * ((inside - mean) ** 2).sum(axis=0)
        variance += part
        fourth += part**2 / max(count - 1, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.where(fourth > 0, variance**2 / fourth, np.where(np.isnan(fourth), np.nan, np.inf))
    error = np.sqrt(variance)
    return Jackknife(corrected=np.where(np.isnan(error), np.nan, corrected), error=error, freedom=freedom)


def sign_flip_p(share: np.ndarray, document_domain: np.ndarray, domains: int, *, permutations: int, seed: int) -> np.ndarray:
    """One-sided p that documents' differences sum up to more than 0, by flipping the sign of whole documents.

    Used where chance is exact inside each document (n-grams), so that no label can be permuted.

    Args:
        share: [documents, layers, ...], each document's contribution to the difference of its domain (weights already applied).
    Returns:
        [domains + 1, layers + 1, ...], of each domain and layer and, last, of their means; NaN where a share is.
    """

    def with_means(cells: np.ndarray) -> np.ndarray:
        rows = np.concatenate([cells, cells.mean(axis=0, keepdims=True)])
        return np.concatenate([rows, rows.mean(axis=1, keepdims=True)], axis=1)

    rng = np.random.default_rng(seed)
    flat = np.nan_to_num(share.reshape(len(share), -1))
    members = [np.flatnonzero(document_domain == domain) for domain in range(domains)]
    observed = with_means(np.stack([share[each].sum(axis=0) for each in members]))
    reached = np.zeros(observed.shape, np.int64)
    for batch in batches(np.zeros((permutations, 0)), len(flat) + observed.size):
        signs = rng.integers(0, 2, size=(len(batch), len(flat))).astype(np.float64) * 2 - 1
        drawn = np.stack([(signs[:, each] @ flat[each]).T for each in members]).reshape(domains, *share.shape[1:], len(batch))
        reached += (with_means(drawn) >= observed[..., None] - TIE).sum(axis=-1)
    return np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + permutations))


# ---------------------------------------------------------------------------------------------------------------------
# Specialists


def studentized_difference(
    hits: np.ndarray, hits_squared: np.ndarray, hits_slots: np.ndarray, slots: np.ndarray, slots_squared: np.ndarray, documents: np.ndarray
) -> np.ndarray:
    r"""z = (p_d - pbar) / se, [..., domains, experts], se from the ratio estimator with documents as clusters.

    .. math:: var(p_d) = \frac{n_d}{n_d - 1} \frac{\sum_i (h_i - p_d s_i)^2}{(\sum_i s_i)^2}, \qquad
              var(p_d - \bar p) = (1 - \tfrac1D)^2 var(p_d) + \tfrac1{D^2} \sum_{d' \ne d} var(p_{d'})

    Args:
        hits, hits_squared, hits_slots: [..., domains, experts], sums over documents of h, h^2 and h s.
        slots, slots_squared, documents: [..., domains], sums of s, s^2 and 1.
    Returns:
        0 where the difference is 0; infinite where it is not and nothing varies; NaN for a domain with fewer than 2 documents.
    """
    usage, variance = usage_variance(hits, hits_squared, hits_slots, slots, slots_squared, documents)
    domains = usage.shape[-2]
    difference = usage - usage.mean(axis=-2, keepdims=True)
    share = 1 / domains
    total = (1 - share) ** 2 * variance + share**2 * (variance.sum(axis=-2, keepdims=True) - variance)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = difference / np.sqrt(total)
    return np.where((np.abs(difference) < TIE) & ~np.isnan(total), 0.0, z)


def clustered_usage(sums: LayerCounts) -> tuple[np.ndarray, np.ndarray]:
    """Usage of each domain and its sampling variance with documents as clusters, both [domains, layers, experts]."""
    moments: list[list[np.ndarray]] = []
    for domain in range(len(sums.shape.domains)):
        hits = sums.hits[sums.shape.document_domain == domain].astype(np.float64)
        slots = hits.sum(axis=-1)
        parts = (hits, hits**2, hits * slots[..., None], slots, slots**2, slots > 0)
        moments.append([part.sum(axis=0, dtype=np.float64) for part in parts])
    found = usage_variance(*(np.stack(part, axis=1) for part in zip(*moments, strict=True)))
    return np.swapaxes(found[0], 0, 1), np.swapaxes(found[1], 0, 1)


def usage_variance(
    hits: np.ndarray, hits_squared: np.ndarray, hits_slots: np.ndarray, slots: np.ndarray, slots_squared: np.ndarray, documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Usage of each domain and its sampling variance with documents as clusters, both [..., domains, experts]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        usage = hits / slots[..., None]
        residual = hits_squared - 2 * usage * hits_slots + usage**2 * slots_squared[..., None]
        factor = np.where(documents > 1, documents / (documents - 1), np.nan)
        return usage, np.clip(residual, 0.0, None) * (factor / slots**2)[..., None]


def pooled_p(z: np.ndarray, null: np.ndarray, *, expected: np.ndarray) -> np.ndarray:
    """One-sided p of z [domains, experts] against draws pooled over experts of a similar count.

    Pooling makes p-values far smaller than 1/permutations available, which FDR control over thousands of tests needs.

    Args:
        null: [permutations, domains, experts]; expected: [experts], total hits, by which experts are put in bands.
    """
    result = np.full(z.shape, np.nan)
    used = np.flatnonzero(expected > 0)
    if not len(used):
        return result
    ranked = used[np.argsort(expected[used], kind="stable")]
    for band in np.array_split(ranked, min(COUNT_BANDS, len(ranked))):
        pool = null[..., band].reshape(-1)
        pool = np.sort(pool[~np.isnan(pool)])
        if not len(pool):
            continue
        at_least = len(pool) - np.searchsorted(pool, (z[:, band] - TIE).astype(np.float32), side="left")
        result[:, band] = np.where(np.isnan(z[:, band]), np.nan, (1 + at_least) / (1 + len(pool)))
    return result


def false_discovery_q(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg q-values over all tests that could be made; NaN stays NaN."""
    result = np.full(p.shape, np.nan)
    made = ~np.isnan(p)
    if made.any():
        result[made] = false_discovery_control(p[made], method="bh")
    return result


def holm(p: ArrayLike) -> np.ndarray:
    """Step-down adjusted p-values of one family of tests (Holm 1979), [tests]; NaN, a test that was not made, stays NaN."""
    p = np.asarray(p, np.float64)
    result = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    result[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(order), 0, -1)))
    return result
