r"""How many slots of unseen texts the experts chosen by other texts take: cross-fitted sums, and the same without each text.

The texts of every domain are dealt to folds by a hash of their ids. The experts that a domain's other folds use most are chosen, and
what they take of the fold's own slots is counted. What a delete-one jackknife needs is computed with the choice made again: a choice
looks at texts that are elsewhere looked at as unseen ones, so that the texts' shares of a sum are not independent of each other, and
their plain spread would be too small by up to a factor of 2 in variance where there is nothing to find. The jackknife errs on the
safe side there (Efron & Stein 1981, doi:10.1214/aos/1176345462). The placement by overall load, which the domain's own is compared
with, is taken as given: made again it would only add jumps of experts that are tied in the mean of the domains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from dbes.scoring.resampling import PERMUTATION_CELLS

FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Slots of each domain, [1 + texts, domains]: of all texts in row 0, then without each text in turn, choices made again.

    Attributes:
        total: slots of the domain.
        uniform: those that as many experts drawn at random take on average.
        own: slots of unseen texts, taken by the experts that the domain's other texts use most.
        oracle: the most that as many experts could take of the same folds.
        load: as own, by the experts that the other texts of all domains use most, every domain weighing the same;
            this choice is that of all texts in every row.
        across: [1 + texts, domains of the choice, domains], slots taken by the experts that all texts of a domain use most; on the diagonal
            those of the very texts that chose.
    """

    total: np.ndarray
    uniform: np.ndarray
    own: np.ndarray
    oracle: np.ndarray
    load: np.ndarray
    across: np.ndarray

    def __add__(self, other: Slots) -> Slots:
        return Slots(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


def deal_folds(names: tuple[str, ...], label: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """The fold of every text, int [texts]: in each domain they differ by one text at most, whatever order the texts come in."""
    digests = np.asarray([hashlib.sha256(name.encode()).hexdigest() for name in names])
    fold = np.empty(len(names), np.int64)
    for each in np.unique(label):
        members = np.flatnonzero(label == each)
        fold[members[np.argsort(digests[members], kind="stable")]] = np.arange(len(members)) % folds
    return fold


def most_used(hits: np.ndarray, count: int) -> np.ndarray:
    """Bool [..., cells], the cells with most hits, ``count`` of them; of equal ones the lower first."""
    chosen = np.zeros(hits.shape, bool)
    np.put_along_axis(chosen, np.argsort(-hits, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return chosen


def covered_slots(hits: np.ndarray, label: np.ndarray, fold: np.ndarray, *, domains: int, count: int) -> Slots:
    """``Slots`` of one layer, or of all cells of a model among which ``count`` are chosen.

    Args:
        hits: float64 [texts, cells]; label, fold: int [texts].
    """
    texts, cells = hits.shape
    folds = int(fold.max()) + 1
    sums = np.zeros((domains, folds, cells))
    np.add.at(sums, (label, fold), hits)
    whole = sums.sum(axis=1)
    chosen = most_used(whole, count)
    total, across = whole.sum(axis=-1), chosen.astype(np.float64) @ whole.T
    by_load = most_used(_usage(whole[:, None] - sums).sum(axis=0), count).astype(np.float64)
    load = np.einsum("dkc,kc->d", sums, by_load)
    own, oracle = _crossed(sums, whole, count)
    rows = {"total": total, "own": own, "oracle": oracle, "load": load, "across": across}
    found = {name: np.repeat(row[None], 1 + texts, axis=0) for name, row in rows.items()}
    for domain, members in _pieces(label, folds * cells):
        rest = np.repeat(sums[domain][None], len(members), axis=0)
        rest[np.arange(len(members)), fold[members]] -= hits[members]
        left = whole[domain] - hits[members]
        places = 1 + members
        found["total"][places, domain] = left.sum(axis=-1)
        found["own"][places, domain], found["oracle"][places, domain] = _crossed(rest, left, count)
        found["load"][places, domain] = (by_load * rest).sum(axis=(1, 2))
        again = most_used(left, count).astype(np.float64)
        found["across"][places, :, domain] = left @ chosen.T.astype(np.float64)
        found["across"][places, domain] = again @ whole.T
        found["across"][places, domain, domain] = (again * left).sum(axis=-1)
    return Slots(uniform=found["total"] * (count / cells), **found)


def _crossed(sums: np.ndarray, whole: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of every fold taken by the cells that the other folds use most, and by its own, summed over folds.

    Args:
        sums: [..., folds, cells]; whole: [..., cells], their sum.
    """
    own = (sums * most_used(whole[..., None, :] - sums, count)).sum(axis=(-1, -2))
    first = sums.shape[-1] - count
    return own, np.partition(sums, first, axis=-1)[..., first:].sum(axis=(-1, -2))


def _usage(hits: np.ndarray) -> np.ndarray:
    """Shares of the slots, 0 where there are none."""
    slots = hits.sum(axis=-1, keepdims=True)
    return np.divide(hits, slots, out=np.zeros_like(hits), where=slots > 0)


def _pieces(label: np.ndarray, elements_each: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each domain with some of its texts at a time, so that memory stays bounded."""
    size = max(1, PERMUTATION_CELLS // elements_each)
    for domain in np.unique(label):
        members = np.flatnonzero(label == domain)
        for start in range(0, len(members), size):
            yield int(domain), members[start : start + size]
