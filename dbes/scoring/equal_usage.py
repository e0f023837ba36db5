r"""The test that all domains use the experts alike, whatever the lengths of their texts and however much these differ.

The statistic is made of products of **different** documents only, so that its mean is 0 under equal usage; the permutation test of
plug-in information assumes documents of equal length, and called the uniform router specialized in every run where one domain had
ten times longer texts. With h_i the hits of document i, n_i their sum, q the usage of all documents (the same for every labelling),
t_i the tokens of a document,

.. math::
    r_i = t_i (h_i / n_i - q) / \sqrt q, \qquad K_{ij} = \langle r_i, r_j \rangle, \qquad
    A_{dd'} = \sum_{i \in d, j \in d', i \ne j} K_{ij} / M_{dd'}, \qquad U = \sum_{dd'} C_{dd'} A_{dd'}

with M the sum of t_i t_j over the same pairs. C = c c' / D, summed over domains with c = e_d - 1/D, gives the mean over domains of
|p_d - pbar|^2 / q, so that U / 2 is the domain information to second order; c of one domain gives that domain's. It is studentized
by V = 2 sum C^2 B, B as A with squared products (after Chen & Qin 2010), and p comes from permuting the domain labels of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array

from dbes.scoring.permutation import permuted_labels
from dbes.scoring.resampling import PERMUTATION_CELLS, TIE, batches

BLOCKS = 512
"""Documents that are tested one by one; of more, documents of one domain are added up at random until so many are left."""

FEWEST_BLOCKS = 20
"""Blocks that a domain has at least, or as many as it has documents."""

FEW_OF_BLOCKS = 8
"""Products inside a domain of less than this part of the blocks are picked out; of more, a product with zeros and ones adds them up."""

TIED = 1e-4
"""Labellings whose statistic is this close to the observed one reach it: rounding must not break a tie."""


@dataclass(frozen=True, kw_only=True)
class UsageTest:
    """What the test needs beside the hits of a layer; the same for all layers.

    Attributes:
        blocks: float64 [blocks, documents], ones where a document belongs to a block.
        tokens: float64 [documents].
        labels: int16 [1 + permutations, blocks], the domain of each block, first the observed ones.
        domains: how many.
    """

    blocks: csr_array
    tokens: np.ndarray
    labels: np.ndarray
    domains: int

    @classmethod
    def of(cls, tokens: np.ndarray, document_domain: np.ndarray, *, domains: int, permutations: int, seed: int) -> UsageTest:
        """The test of documents with ``tokens`` [documents] tokens."""
        block, label = _blocks(document_domain, domains, seed=seed)
        ones = np.ones(len(block))
        observed = label.astype(np.int16)
        return cls(
            blocks=csr_array((ones, (block, np.arange(len(block)))), shape=(len(label), len(block))),
            tokens=tokens.astype(np.float64),
            labels=np.concatenate([observed[None], permuted_labels(observed, permutations=permutations, seed=seed)]),
            domains=domains,
        )

    def products(self, hits: np.ndarray) -> np.ndarray:
        """K of one layer, float64 [blocks, blocks], from hits [documents, experts]; layers are tested together by their sum."""
        slots = hits.sum(axis=1, dtype=np.float64)
        pooled = hits.sum(axis=0, dtype=np.float64) / max(slots.sum(), 1)
        used = pooled > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            usage = np.where(slots[:, None] > 0, hits[:, used] / slots[:, None], pooled[used])
        apart = usage - pooled[used]
        apart[np.abs(apart) < TIE] = 0.0
        rows = self.blocks @ (apart / np.sqrt(pooled[used]) * self.tokens[:, None])
        return rows @ rows.T

    def p(self, products: np.ndarray) -> np.ndarray:
        """One-sided p of every domain and, last, of all of them, [domains + 1].

        NaN without permutations, with one domain, or with a domain without tokens.
        """
        if len(self.labels) < 2 or self.domains < 2:
            return np.full(self.domains + 1, np.nan)
        found = self.statistics(products)
        reached = (found[1:] >= found[0] - TIED * np.maximum(1.0, np.abs(found[0]))).sum(axis=0)
        return np.where(np.isnan(found[0]), np.nan, (1 + reached) / len(found))

    def statistics(self, products: np.ndarray) -> np.ndarray:
        """U / sqrt(V) of every labelling, [1 + permutations, domains + 1].

        Off its diagonal, A is made of products of tokens, so that C A needs no sums over pairs of domains, but those inside each domain
        and one product of K with the weights of the blocks.
        """
        between = products / max(np.abs(products).max(initial=0.0), np.finfo(float).tiny)
        np.fill_diagonal(between, 0.0)
        both = np.stack([between, between**2]).astype(np.float32)
        return np.concatenate([self._studentized(both, labels) for labels in batches(self.labels, 8 * (len(products) + self.domains))])

    def _studentized(self, both: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The statistic [labellings, domains + 1] of products and squared products [2, blocks, blocks]."""
        domains = self.domains
        cells = (np.arange(len(labels))[:, None] * domains + labels).ravel()

        def by_domain(blocks: np.ndarray) -> np.ndarray:
            return np.bincount(cells, blocks.ravel(), minlength=len(labels) * domains).reshape(-1, domains)

        weight = np.broadcast_to(self.blocks @ self.tokens, labels.shape)
        tokens = by_domain(weight)
        own = tokens**2 - by_domain(weight**2)
        # A domain of one document has no pair of its own; the products with other domains are tested all the same.
        own = np.where(own > TIE * tokens**2, own, np.inf)
        one, rest = (1 - 1 / domains) ** 2 - 1 / domains**2, 1 / domains**2
        moments = []
        with np.errstate(invalid="ignore", divide="ignore"):
            for power, inside in zip((1, 2), _inside(both, labels, domains), strict=True):
                inverse = 1 / tokens**power
                weights = np.take_along_axis(inverse, labels, axis=1)
                row = inverse * by_domain((both[power - 1] @ weights.T.astype(np.float32)).T)  # of A with all pairs on its diagonal
                alone = inside / own**power
                extra = alone - inside * inverse**2
                moments.append((row + extra, alone, (row + extra).sum(axis=1, keepdims=True)))
            (row, alone, every), (row_squared, alone_squared, every_squared) = moments
            value = alone - 2 / domains * row + rest * every
            spread = rest**2 * every_squared + 2 * rest * one * row_squared + one**2 * alone_squared
            mean = rest**2 * every_squared + (((1 - 1 / domains) / domains) ** 2 - rest**2) * alone_squared.sum(axis=1, keepdims=True)
            value, spread = np.append(value, value.mean(axis=1, keepdims=True), axis=1), np.append(spread, mean, axis=1)
            spread = np.sqrt(2 * spread)
            return np.where(spread > 0, value / spread, np.where(np.isnan(spread), np.nan, 0.0))


def _inside(both: np.ndarray, labels: np.ndarray, domains: int) -> np.ndarray:
    """Sums of products and squared products [2, blocks, blocks] inside each domain, float64 [2, labellings, domains].

    Every labelling has as many blocks of each domain.
    """
    found = np.zeros((2, len(labels), domains))
    order = np.argsort(labels, axis=1, kind="stable")
    ends = np.cumsum(np.bincount(labels[0], minlength=domains))
    for domain, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if FEW_OF_BLOCKS * (end - start) > labels.shape[1]:
            member = np.ascontiguousarray((labels == domain).T, np.float32)
            found[:, :, domain] = np.einsum("kbp,bp->kp", both @ member, member)
            continue
        for first in range(0, len(labels), size := max(1, PERMUTATION_CELLS // (4 * (end - start) ** 2 + 1))):
            part = slice(first, first + size)
            members = order[part, start:end]
            pairs = both[0].take(members[:, :, None] * labels.shape[1] + members[:, None, :])
            found[0, part, domain] = pairs.sum(axis=(1, 2), dtype=np.float64)
            found[1, part, domain] = np.einsum("pij,pij->p", pairs, pairs)
    return found


def _blocks(document_domain: np.ndarray, domains: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The block of each document, int [documents], and the domain of each block, int [blocks]."""
    block, label = np.arange(len(document_domain)), np.asarray(document_domain)
    if len(block) <= BLOCKS:
        return block, label
    rng = np.random.default_rng(seed)
    labels: list[int] = []
    for domain in range(domains):
        members = np.flatnonzero(document_domain == domain)
        count = min(len(members), max(FEWEST_BLOCKS, BLOCKS * len(members) // len(document_domain)))
        block[rng.permutation(members)] = len(labels) + np.arange(len(members)) % max(count, 1)
        labels += [domain] * count
    return block, np.asarray(labels)
