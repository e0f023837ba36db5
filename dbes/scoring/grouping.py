"""Groups of documents: of many documents, a group of them is left out in turn, and not one after the other.

The delete-a-group jackknife (Shao & Wu 1989, doi:10.1214/aos/1176347263) estimates the same variance from fewer values: what it costs
is degrees of freedom, which Student's t pays for. Its work and memory do not grow with the documents. Chance inside documents (n-grams),
the test of equal usage, and what names single documents are still made of the documents themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from dbes.scoring.layer_counts import LayerCounts, per_document
from dbes.trace.types import RoutingShape

MANY_DOCUMENTS = 2000
"""More source texts than this are put into groups."""

MOST_GROUPS, FEWEST_GROUPS, ALL_GROUPS = 50, 20, 1000
"""Groups of a domain: at most, at least (or as many as it has documents), and about how many all domains have together."""

CHANCE_DRAWS, SPECIALIST_DRAWS = 50, 200
"""Labellings at most of grouped documents, for the chance level (a mean over them) and for the specialists' null, which is pooled over
domains and experts. The tests of equal usage take all that were asked for."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which group each of some rows is in, int [rows], and the label of each group, int [groups]."""

    group: np.ndarray
    label: np.ndarray

    @classmethod
    def dealt(cls, label: np.ndarray, rank: np.ndarray, *, most: int) -> Groups:
        """Rows of each label in order of ``rank``, dealt in turn to as many groups, so that these differ by one row at most."""
        group, labels = np.empty(len(label), np.int64), []
        for each in np.unique(label):
            members = np.flatnonzero(label == each)
            count = min(len(members), most)
            group[members[np.argsort(rank[members], kind="stable")]] = len(labels) + np.arange(len(members)) % count
            labels += [each] * count
        return cls(group=group, label=np.asarray(labels, label.dtype))

    def add(self, rows: np.ndarray) -> np.ndarray:
        """Sums over the rows of each group: [rows, ...] to float64 [groups, ...]."""
        return (self._members @ rows.reshape(len(rows), -1)).reshape(len(self.label), *rows.shape[1:])

    @cached_property
    def _members(self) -> csr_array:
        """[groups, rows], ones where a row is in a group."""
        every = np.arange(len(self.group))
        return csr_array((np.ones(len(every)), (self.group, every)), shape=(len(self.label), len(every)))


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The groups of the documents of a trace, inside their domains.

    Attributes:
        groups: of the documents; their label is the domain.
        rank: int [documents], the order in which documents are dealt: that of a hash of their ids, whatever order they come in.
        most: groups of a domain at most.
        shape: of the groups, as if each were a document. Its name is a digest of its documents' ids, so that two results have equal names
            only where the groups hold the same documents.
    """

    groups: Groups
    rank: np.ndarray
    most: int
    shape: RoutingShape

    @classmethod
    def of(cls, shape: RoutingShape) -> Grouping | None:
        """Groups of the documents of a shape; None where they are few enough to be left out one by one."""
        if len(shape.document_ids) <= MANY_DOCUMENTS:
            return None
        most = int(np.clip(ALL_GROUPS // len(shape.domains), FEWEST_GROUPS, MOST_GROUPS))
        digests = [hashlib.sha256(name.encode()).digest() for name in shape.document_ids]
        rank = np.empty(len(digests), np.int64)
        rank[sorted(range(len(digests)), key=digests.__getitem__)] = np.arange(len(digests))
        groups = Groups.dealt(shape.document_domain, rank, most=most)
        members = np.split(np.argsort(groups.group, kind="stable"), np.cumsum(np.bincount(groups.group))[:-1])
        names = tuple(f"{len(each)} texts {_digest(digests[index] for index in each)}" for each in members)
        grouped = replace(shape, document_domain=groups.label, document_ids=names, document_source=None)
        return cls(groups=groups, rank=rank, most=most, shape=grouped)

    def sums(self, sums: LayerCounts) -> LayerCounts:
        """The sums of one layer, or of several, with the documents of each group added up."""
        shape = replace(sums.shape, document_domain=self.groups.label, document_ids=self.shape.document_ids, document_source=None)
        return replace(per_document(sums, self.groups.add), shape=shape)

    def inside(self, documents: np.ndarray, side: np.ndarray) -> Groups:
        """Groups of some documents, int [documents], inside each of two sides, int [documents]: together about as many as of a domain."""
        return Groups.dealt(side, self.rank[documents], most=self.most // 2)


def _digest(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]
