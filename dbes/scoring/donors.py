"""Which text lends its hits to which in a surrogate: sparse matrices from the hits of single cells to all sums.

They depend on keys, texts and domains alone, so that all layers share them. A *cell* is one key in one unit (source text), a *pair*
one key in one domain. Every key here is in two units at least. A *group* is of one unit, or of several of a domain that are left out
together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array


@dataclass(frozen=True, kw_only=True)
class Block:
    """The matrices of some keys.

    Attributes:
        rows, row_cell: tokens, and the cell of each. cells: how many.
        tokens: float64 [groups].
        pairs: [pairs, cells].
        others: [pairs, pairs], mean hits of the key, summed over the other domains.
        surrogate: [cells, 2 pairs], from hits of pairs and of others to the surrogate hits of every cell, before its own are taken off.
        own: [cells], how much of a cell's own hits has to be taken off.
        members: [groups, cells].
        order: int [cells], the cells in order of groups. groups: (number, first, end) of each group among these.
        lent: [cells, domains], in this order, how often a hit of the cell is expected in a domain's surrogate, less once in its own unit's.
    """

    rows: np.ndarray
    row_cell: np.ndarray
    cells: int
    tokens: np.ndarray
    pairs: csr_array
    others: csr_array
    surrogate: csr_array
    own: np.ndarray
    members: csr_array
    order: np.ndarray
    groups: list[tuple[int, int, int]]
    lent: np.ndarray

    def hits(self, ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
        """Hits of every group at one layer, [groups, experts], and what those of every cell are beyond its surrogate, [cells, experts].

        Args:
            ids: [rows, slots], experts of the tokens; numbers from ``experts`` on are none.
        """
        at = self.row_cell[:, None] * experts + ids
        at = at.ravel() if ids.max(initial=0) < experts else at[ids < experts]
        cells = np.bincount(at, np.ones(len(at)), minlength=self.cells * experts).reshape(self.cells, experts)
        groups, pairs = self.members @ cells, self.pairs @ cells
        cells *= (1 + self.own)[:, None]
        cells -= self.surrogate @ np.concatenate([pairs, self.others @ pairs])
        return groups, cells

    def lend(self, beyond: np.ndarray, to: np.ndarray) -> None:
        """Add to [groups, domains, experts] what the hits of each group are beyond their surrogate as often as it is lent to a domain.

        Args:
            beyond: [cells, experts], see ``hits``.
        """
        beyond = beyond[self.order]
        for group, start, end in self.groups:
            to[group] += self.lent[start:end].T @ beyond[start:end]


def block_of(
    rows: np.ndarray, unit: np.ndarray, key: np.ndarray, unit_domain: np.ndarray, domains: int, *, unit_group: np.ndarray, groups: int
) -> Block:
    """The matrices of some tokens.

    Args:
        rows, unit, key: [tokens], in order of key, domain and unit.
        unit_domain, unit_group: [units]; a group lies in one domain.
    """
    starts, row_cell = _runs(key, unit)
    cell_unit, count = unit[starts], np.diff(starts, append=len(key)).astype(np.float64)
    domain = unit_domain[cell_unit]
    pair_starts, pair = _runs(key[starts], domain)
    first, key_of = _runs(key[starts][pair_starts])
    width, in_pair, size = np.bincount(key_of), np.bincount(pair), np.bincount(pair, count)
    divisor = (width[key_of] - (in_pair == 1)).astype(np.float64)  # domains that serve the pair's tokens
    rest = size[pair] - count
    per_rest = np.divide(count, rest, out=np.zeros_like(rest), where=rest > 0)
    inside = (np.bincount(pair, per_rest)[pair] - per_rest) / divisor[pair]
    cells, pairs, every, cell_group = len(starts), len(size), np.arange(len(starts)), unit_group[cell_unit]
    taking, giving = _others(np.arange(pairs), first, width, key_of)
    by_key = np.zeros((len(width), domains))
    by_key[key_of, domain[pair_starts]] = size / divisor
    order = np.argsort(cell_group, kind="stable")
    lent = by_key[key_of[pair[order]]] / size[pair[order], None]
    lent[every, domain[order]] = inside[order] - 1
    starts, _ = _runs(cell_group[order])
    ends = [*starts[1:].tolist(), cells]
    return Block(
        rows=rows,
        row_cell=row_cell,
        cells=cells,
        tokens=np.bincount(cell_group, count, minlength=groups),
        pairs=_matrix((pairs, cells), pair, every, np.ones(cells)),
        others=_matrix((pairs, pairs), taking, giving, 1 / size[giving]),
        surrogate=_matrix(
            (cells, 2 * pairs),
            np.tile(every, 2),
            np.append(pair, pairs + pair),
            np.append(per_rest, count) / np.tile(divisor[pair], 2),
        ),
        own=per_rest / divisor[pair],
        members=_matrix((groups, cells), cell_group, every, np.ones(cells)),
        order=order,
        groups=list(zip(cell_group[order][starts].tolist(), starts.tolist(), ends, strict=True)),
        lent=lent,
    )


def _others(pair: np.ndarray, first: np.ndarray, width: np.ndarray, key_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each element of ``pair`` beside every pair of the same key in another domain: places in ``pair``, and pairs.

    Args:
        first, width: [keys], the first pair of each key, and how many it has.
        key_of: [pairs].
    """
    length = width[key_of[pair]]
    ends = np.cumsum(length)
    place = np.repeat(np.arange(len(pair)), length)
    other = np.arange(len(place)) - np.repeat(ends - length, length) + first[key_of[pair]][place]
    different = other != pair[place]
    return place[different], other[different]


def _runs(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where equal rows begin, and the number of every row's run."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(new), np.cumsum(new) - 1


def _matrix(shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> csr_array:
    return coo_array((values, (rows.astype(np.int32), columns.astype(np.int32))), shape=shape).tocsr()
