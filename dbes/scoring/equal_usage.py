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

import numpy as np
from scipy.sparse import csr_array

from dbes.scoring.permutation import permuted_labels
from dbes.scoring.resampling import TIE, batches

BLOCKS = 512
"""Documents that are tested one by one; of more, documents of one domain are added up at random until so many are left."""

FEWEST_BLOCKS = 20
"""Blocks that a domain has at least, or as many as it has documents."""

TIED = 1e-4
"""Labellings whose statistic is this close to the observed one reach it: rounding must not break a tie."""


@dataclass(frozen=True, kw_only=True)
class UsageTest:
    """What the test needs beside the hits of a layer; the same for all layers.

    Attributes:
        blocks: float64 [blocks, documents], ones where a document belongs to a block.
        tokens: float64 [documents].
        labels: int16 [1 + permutations, blocks], the domain of each block, first the observed ones.
        forms: [domains + 1, domains, domains], C of each domain and, last, of their mean.
    """

    blocks: csr_array
    tokens: np.ndarray
    labels: np.ndarray
    forms: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, document_domain: np.ndarray, *, domains: int, permutations: int, seed: int) -> UsageTest:
        """The test of documents with ``tokens`` [documents] tokens."""
        block, label = _blocks(document_domain, domains, seed=seed)
        ones = np.ones(len(block))
        centre = np.eye(domains) - 1 / domains
        forms = centre[:, :, None] * centre[:, None, :]
        observed = label.astype(np.int16)
        return cls(
            blocks=csr_array((ones, (block, np.arange(len(block)))), shape=(len(label), len(block))),
            tokens=tokens.astype(np.float64),
            labels=np.concatenate([observed[None], permuted_labels(observed, permutations=permutations, seed=seed)]),
            forms=np.concatenate([forms, forms.mean(axis=0, keepdims=True)]),
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
        found = self.statistics(products)
        if len(found) < 2 or len(self.forms) < 3:
            return np.full(len(self.forms), np.nan)
        reached = (found[1:] >= found[0] - TIED * np.maximum(1.0, np.abs(found[0]))).sum(axis=0)
        return np.where(np.isnan(found[0]), np.nan, (1 + reached) / len(found))

    def statistics(self, products: np.ndarray) -> np.ndarray:
        """U / sqrt(V) of every labelling, [1 + permutations, domains + 1]."""
        count, domains = len(products), self.forms.shape[1]
        between = products / max(np.abs(products).max(initial=0.0), np.finfo(float).tiny)
        np.fill_diagonal(between, 0.0)
        both = np.stack([between, between**2]).astype(np.float32)
        weight = self.blocks @ self.tokens
        diagonal = np.arange(domains)
        found = []
        for labels in batches(self.labels, 3 * count * domains):
            member = (labels[:, :, None] == np.arange(domains, dtype=labels.dtype)).astype(np.float32)  # [labellings, blocks, domains]
            flat = np.ascontiguousarray(member.transpose(1, 0, 2)).reshape(count, -1)
            sums = (both @ flat).reshape(2, count, len(labels), domains).transpose(0, 2, 3, 1) @ member
            tokens, squared = np.einsum("b,pbd->pd", weight, member), np.einsum("b,pbd->pd", weight**2, member)
            pairs = tokens[:, :, None] * tokens[:, None, :]
            pairs[:, diagonal, diagonal] -= squared
            # A domain of one document has no pair of its own; the products with other domains are tested all the same.
            pairs[:, diagonal, diagonal] = np.where(pairs[:, diagonal, diagonal] > TIE * tokens**2, pairs[:, diagonal, diagonal], np.inf)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean, square = sums[0] / pairs, sums[1] / pairs**2
                value = np.einsum("rde,pde->pr", self.forms, mean)
                spread = np.sqrt(2 * np.einsum("rde,pde->pr", self.forms**2, square))
                found.append(np.where(spread > 0, value / spread, np.where(np.isnan(spread), np.nan, 0.0)))
        return np.concatenate(found)


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
