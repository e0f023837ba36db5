"""The permutation null: what the scores give when the domain labels of whole documents are shuffled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.resampling import DomainScores, batches, domain_scores

MANY_DOMAINS = 16
"""From so many domains on, adding up each domain's documents is cheaper than a product with a matrix of zeros and ones. It is done
for whole numbers whose sums float32 holds, so that both give the same."""


def permuted_labels(document_domain: np.ndarray, *, permutations: int, seed: int) -> np.ndarray:
    """Domain labels shuffled over documents, int16 [permutations, documents]; every domain keeps its number of documents."""
    rng = np.random.default_rng(seed)
    labels = np.tile(document_domain.astype(np.int16), (permutations, 1))
    return rng.permuted(labels, axis=1, out=labels)


def permuted_scores(sums: LayerCounts, labels: np.ndarray) -> DomainScores:
    """Scores of the documents of one layer under permuted domain labels, with a leading [permutations] axis.

    Args:
        labels: [permutations, documents], see ``permuted_labels``.
    """
    shape = sums.shape
    domains, scores = len(shape.domains), []
    columns = np.concatenate([sums.hits[:, 0], sums.active.astype(np.float32)], axis=1)
    sums_of = domain_sums(columns, domains)
    for batch in batches(labels, domains * (columns.shape[1] + len(columns))):
        drawn = sums_of(batch).astype(np.float64)
        scores.append(domain_scores(drawn[..., None, :-1], drawn[..., -1:]))
    return DomainScores.stack(scores or [domain_scores(np.zeros((0, domains, 1, shape.width)), np.zeros((0, domains, 1)))], axis=0)


def domain_sums(columns: np.ndarray, domains: int) -> Callable[[np.ndarray], np.ndarray]:
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
