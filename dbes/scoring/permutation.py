"""The permutation null: what the scores and the specialist test give when the domain labels of whole documents are shuffled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.resampling import DomainScores, batches, domain_scores, pooled_p, studentized_difference

MANY_DOMAINS = 16
"""From so many domains on, adding up each domain's documents is cheaper than a product with a matrix of zeros and ones. It is done
for whole numbers whose sums float32 holds, so that both give the same."""


def permuted_labels(document_domain: np.ndarray, *, permutations: int, seed: int) -> np.ndarray:
    """Domain labels shuffled over documents, int16 [permutations, documents]; every domain keeps its number of documents."""
    rng = np.random.default_rng(seed)
    labels = np.tile(document_domain.astype(np.int16), (permutations, 1))
    return rng.permuted(labels, axis=1, out=labels)


@dataclass(frozen=True, kw_only=True)
class NullDraws:
    """What the permutations gave: the scores of every draw, and the p-values of the specialist test.

    Attributes:
        scores: DomainScores with a leading [permutations] axis.
        specialist_p: [domains, layers, experts]; NaN where the test cannot be made.
        z: [domains, layers, experts], the studentized difference that was tested.
    """

    scores: DomainScores
    specialist_p: np.ndarray
    z: np.ndarray


def permutation_null(sums: LayerCounts, labels: np.ndarray) -> NullDraws:
    """Scores of the documents under permuted domain labels.

    Args:
        sums: of one layer.
        labels: [permutations, documents], see ``permuted_labels``.
    """
    shape = sums.shape
    domains, experts = len(shape.domains), shape.width
    columns = _moment_columns(sums.hits[:, 0], sums.active[:, 0])
    domain_sums = _domain_sums(columns, domains)
    observed = _layer_moments(domain_sums(shape.document_domain[None]), experts)
    z = studentized_difference(*observed.parts)[0]
    scores = [domain_scores(np.zeros((0, domains, 1, experts)), np.zeros((0, domains, 1)))]
    null_z: list[np.ndarray] = []
    for batch in batches(labels, domains * (columns.shape[1] + len(columns))):
        drawn = _layer_moments(domain_sums(batch), experts)
        scores.append(domain_scores(drawn.hits[..., None, :], drawn.tokens[..., None]))
        null_z.append(studentized_difference(*drawn.parts).astype(np.float32))
    p = pooled_p(z, np.concatenate(null_z), expected=observed.hits[0].sum(axis=0)) if null_z else np.full(z.shape, np.nan)
    return NullDraws(scores=DomainScores.stack(scores, axis=0), specialist_p=p[:, None], z=z[:, None])


@dataclass(frozen=True)
class _Moments:
    """Per domain: sums over documents of h, h^2, h s, and of s, s^2, tokens, 1 (h hits of an expert, s slots of the document)."""

    hits: np.ndarray
    hits_squared: np.ndarray
    hits_slots: np.ndarray
    slots: np.ndarray
    slots_squared: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return self.hits, self.hits_squared, self.hits_slots, self.slots, self.slots_squared, self.documents


def _moment_columns(hits: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The per-document columns whose domain sums give every moment by one matrix product: [documents, 3 experts + 4]."""
    hits = hits.astype(np.float32)
    slots = hits.sum(axis=-1, keepdims=True)
    ran = (slots > 0).astype(np.float32)
    return np.concatenate([hits, hits**2, hits * slots, slots, slots**2, active[:, None].astype(np.float32), ran], axis=1)


def _layer_moments(sums: np.ndarray, experts: int) -> _Moments:
    sums = sums.astype(np.float64)
    thirds = [sums[..., index * experts : (index + 1) * experts] for index in range(3)]
    return _Moments(*thirds, *(sums[..., 3 * experts + index] for index in range(4)))


def _domain_sums(columns: np.ndarray, domains: int) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the sums of columns [documents, columns] per domain under labellings, float32 [permutations, domains, columns].

    Every row of the labellings [permutations, documents] has as many documents of each domain.
    """
    exact = columns.sum(axis=0, dtype=np.float64) < 2**24 if domains >= MANY_DOMAINS else np.zeros(columns.shape[1], bool)
    added, multiplied = columns[:, exact], columns[:, ~exact]

    def sums(labels: np.ndarray) -> np.ndarray:
        found = np.empty((len(labels) * domains, columns.shape[1]), np.float32)
        if added.size:
            ends = np.cumsum(np.tile(np.bincount(labels[0], minlength=domains), len(labels)))
            order = np.argsort(labels, axis=1, kind="stable").ravel()
            found[:, exact] = csr_array((np.ones(order.size, np.float32), order, np.r_[0, ends]), shape=(len(found), len(added))) @ added
        if multiplied.size:
            one_hot = (labels[:, None, :] == np.arange(domains, dtype=labels.dtype)[:, None]).astype(np.float32)
            found[:, ~exact] = one_hot.reshape(len(found), -1) @ multiplied
        return found.reshape(len(labels), domains, -1)

    return sums
