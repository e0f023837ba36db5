"""How well bare words tell the domains apart: the ceiling of what format and topic alone give away to a router."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from dbes.tasks.documents import Document

FOLDS = 5
_WORD = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True, kw_only=True)
class Separability:
    """Cross-validated accuracy of a bag-of-words classifier of documents into domains.

    Attributes:
        accuracy: share of documents whose domain was told right; NaN when a domain has fewer than two source texts.
        chance: 1 / domains.
        recall: the same for the documents of each domain.
        folds: parts the documents were divided in; all documents of one source text are in the same part.
    """

    accuracy: float
    chance: float
    recall: dict[str, float]
    folds: int


def word_separability(documents: Sequence[Document], *, seed: int = 0) -> Separability:
    r"""Accuracy and recall per domain of multinomial naive Bayes on word counts, add-one smoothing, equal domain priors.

    .. math:: \hat d = \arg\max_d \sum_w n_w \ln\frac{N_{dw} + 1}{\sum_{w'} (N_{dw'} + 1)}

    Words are lower-cased runs of two or more word characters. Stratified folds, drawn with ``seed``.
    1 = words alone tell every document's domain; 1 / domains = chance.
    """
    domains = sorted({document.domain for document in documents})
    labels = np.array([domains.index(document.domain) for document in documents])
    groups = [document.source_document or document.id for document in documents]
    smallest = min(len({g for g, label in zip(groups, labels, strict=True) if label == d}) for d in range(len(domains)))
    folds = min(FOLDS, smallest)
    chance = 1 / len(domains)
    if folds < 2:
        return Separability(accuracy=float("nan"), chance=chance, recall=dict.fromkeys(domains, float("nan")), folds=folds)
    counts = word_counts([document.text for document in documents])
    part = fold_of(labels, groups, folds=folds, seed=seed)
    right = np.zeros(len(documents), dtype=bool)
    for fold in range(folds):
        held = part == fold
        right[held] = _told(counts[~held], labels[~held], counts[held], len(domains)) == labels[held]
    recall = {domain: float(right[labels == index].mean()) for index, domain in enumerate(domains)}
    return Separability(accuracy=float(right.mean()), chance=chance, recall=recall, folds=folds)


def word_counts(texts: Sequence[str]) -> sparse.csr_matrix:
    """Counts [documents, words]; words in order of first appearance."""
    columns: dict[str, int] = {}
    rows, places = [], []
    for row, text in enumerate(texts):
        for word in _WORD.findall(text.lower()):
            rows.append(row)
            places.append(columns.setdefault(word, len(columns)))
    ones = np.ones(len(rows), dtype=np.int64)
    return sparse.csr_matrix((ones, (rows, places)), shape=(len(texts), max(1, len(columns))))


def fold_of(labels: np.ndarray, groups: Sequence[str], *, folds: int, seed: int) -> np.ndarray:
    """int [documents]: part of each document; within a domain the source texts are dealt out in a random order."""
    generator = np.random.default_rng(seed)
    part = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        names = sorted({groups[member] for member in members.tolist()})
        place = {names[index]: turn % folds for turn, index in enumerate(generator.permutation(len(names)).tolist())}
        part[members] = [place[groups[member]] for member in members.tolist()]
    return part


def _told(counts: sparse.csr_matrix, labels: np.ndarray, unseen: sparse.csr_matrix, domains: int) -> np.ndarray:
    """int [unseen documents]: the likeliest domain."""
    totals = np.vstack([np.asarray(counts[labels == label].sum(axis=0)) for label in range(domains)]) + 1.0
    likelihood = np.log(totals) - np.log(totals.sum(axis=1, keepdims=True))
    return np.asarray(unseen @ likelihood.T).argmax(axis=1)
