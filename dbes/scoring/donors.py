"""Which text lends its hits to which in a surrogate: sparse matrices from hits to sums, with every text and without each in turn.

They depend on keys, texts and domains alone, so that all layers share them. A *cell* is one key in one unit (source text), a *pair*
one key in one domain, a *group* the cells of a pair that have equally many occurrences. Every key here is in two units at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import coo_array, csr_array

Terms = tuple[np.ndarray, np.ndarray, np.ndarray | float]
"""Rows, columns and values to be added up in a sparse matrix."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of some keys, in order of key, domain and unit.

    Attributes:
        unit, count: [cells], the unit of each, and occurrences of the key in it.
        pair, group: [cells].
        domain, key, size, cells, divisor: [pairs]; size: occurrences; cells: how many; divisor: domains that serve tokens of the pair.
        group_pair, group_count, group_cells: [groups], its pair, occurrences in each cell, and how many cells it has.
        first, width: [keys], the key's first pair, and how many it has.
    """

    unit: np.ndarray
    count: np.ndarray
    pair: np.ndarray
    group: np.ndarray
    domain: np.ndarray
    key: np.ndarray
    size: np.ndarray
    cells: np.ndarray
    divisor: np.ndarray
    group_pair: np.ndarray
    group_count: np.ndarray
    group_cells: np.ndarray
    first: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, key: np.ndarray, domain: np.ndarray, unit: np.ndarray, count: np.ndarray) -> Cells:
        """From key, domain, unit and occurrences of every cell, [cells], in that order."""
        pair_starts, pair = _runs(key, domain)
        first, pair_key = _runs(key[pair_starts])
        width = np.bincount(pair_key)
        cells = np.bincount(pair)
        order = np.lexsort((count, pair))
        group_starts, ordered = _runs(pair[order], count[order])
        group = np.empty(len(key), np.int64)
        group[order] = ordered
        return cls(
            unit=unit,
            count=count.astype(np.float64),
            pair=pair,
            group=group,
            domain=domain[pair_starts],
            key=pair_key,
            size=np.bincount(pair, count),
            cells=cells,
            divisor=(width[pair_key] - (cells == 1)).astype(np.float64),
            group_pair=pair[order][group_starts],
            group_count=count[order][group_starts].astype(np.float64),
            group_cells=np.bincount(ordered),
            first=first,
            width=width,
        )

    @cached_property
    def lent(self) -> np.ndarray:
        """Occurrences of a cell per occurrence in the rest of its pair, [cells]; 0 where there is no rest."""
        rest = self.size[self.pair] - self.count
        return np.divide(self.count, rest, out=np.zeros_like(rest), where=rest > 0)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The matrices of some keys.

    Tables of hits, one below the other: of every *pair*; *others*, mean hits of the key summed over the other domains; *within*, what
    the pair's tokens together get from their own domain; *without*, of every group the same without one of its texts.

    Attributes:
        rows: tokens, in order of their cells. cell_starts: [cells + 1], where each cell begins among them.
        tokens: [units]. lost_tokens: [units, domains], change without a unit.
        members: [units, cells], routed hits of every unit.
        own, own_tables: [units, cells], [units, tables], surrogate hits of every unit.
        lost, lost_pairs: [units x domains, cells], [.., pairs], change of the domains' routed hits without a unit.
        left, left_tables: [units x domains, cells], [.., tables], change of their surrogate hits.
        group, pairs, others, within, without: what the tables are made with.
    """

    rows: np.ndarray
    cell_starts: np.ndarray
    tokens: np.ndarray
    lost_tokens: np.ndarray
    members: csr_array
    own: csr_array
    own_tables: csr_array
    lost: csr_array
    lost_pairs: csr_array
    left: csr_array
    left_tables: csr_array
    group: csr_array
    pairs: csr_array
    others: csr_array
    within: csr_array
    without: csr_array

    def tables(self, hits: csr_array) -> np.ndarray:
        """The tables of one layer, [tables, experts], from the hits of the cells [cells, experts]."""
        groups = (self.group @ hits).toarray()
        pairs = self.pairs @ groups
        return np.concatenate([pairs, self.others @ pairs, self.within @ groups, self.without @ groups])


def block_of(rows: np.ndarray, unit: np.ndarray, key: np.ndarray, unit_domain: np.ndarray, domains: int) -> Block:
    """The matrices of some tokens.

    Args:
        rows, unit, key: [tokens], in order of key, domain and unit.
        unit_domain: [units].
    """
    starts, _ = _runs(key, unit)
    cells = Cells.of(key[starts], unit_domain[unit[starts]], unit[starts], np.diff(starts, append=len(key)))
    units, size, pairs, groups = len(unit_domain), len(starts), len(cells.size), len(cells.group_pair)
    every, each, pair = np.arange(size), np.arange(groups), cells.pair
    tables = 3 * pairs + groups
    taking, giving = _others(cells, np.arange(pairs))
    rest = np.zeros(groups)
    rest[cells.group] = np.bincount(pair, cells.lent)[pair] - cells.lent
    without, lent_without, self_lent = _within_without_one(cells)
    changes = Changes(domains=domains, cells=cells)
    changes.of_own_domain(lent_without, self_lent)
    changes.of_other_domains()
    domain_rows = units * domains
    return Block(
        rows=rows,
        cell_starts=np.append(starts, len(key)),
        tokens=np.bincount(cells.unit, cells.count, minlength=units),
        members=_matrix((units, size), [(cells.unit, every, 1.0)]),
        own=_matrix((units, size), [(cells.unit, every, -cells.lent / cells.divisor[pair])]),
        own_tables=_matrix(
            (units, tables),
            [(cells.unit, pair, cells.lent / cells.divisor[pair]), (cells.unit, pairs + pair, cells.count / cells.divisor[pair])],
        ),
        lost_tokens=_matrix((domain_rows, 1), changes.lost_tokens).toarray().reshape(units, domains),
        lost=_matrix((domain_rows, size), changes.lost),
        lost_pairs=_matrix((domain_rows, pairs), changes.lost_pairs),
        left=_matrix((domain_rows, size), changes.left),
        left_tables=_matrix((domain_rows, tables), changes.left_tables),
        group=_matrix((groups, size), [(cells.group, every, 1.0)]),
        pairs=_matrix((pairs, groups), [(cells.group_pair, each, 1.0)]),
        others=_matrix((pairs, pairs), [(taking, giving, 1 / cells.size[giving])]),
        within=_matrix((pairs, groups), [(cells.group_pair, each, rest)]),
        without=without,
    )


class Changes:
    """What leaving a unit out changes, as terms of the matrices of a ``Block``: once for every cell of the unit.

    With N_p and H_p the size and hits of a pair, V_p what the other domains give, O_p what its own does and m_p its divisor, its
    surrogate is (N_p V_p + O_p) / m_p.
    """

    def __init__(self, *, domains: int, cells: Cells) -> None:
        self.domains, self.cells = domains, cells
        self.left: list[Terms] = []
        self.left_tables: list[Terms] = []
        self.lost: list[Terms] = []
        self.lost_pairs: list[Terms] = []
        self.lost_tokens: list[Terms] = []

    def of_own_domain(self, lent_without: np.ndarray, self_lent: np.ndarray) -> None:
        """The pair that the unit itself belongs to.

        Args:
            lent_without, self_lent: [groups], see ``_within_without_one``.
        """
        cells, pairs = self.cells, len(self.cells.size)
        rows = cells.unit * self.domains + cells.domain[cells.pair]
        of = cells.cells[cells.pair]
        # Three or more units: the others lend to each other, as many domains serve.
        some = np.flatnonzero(of >= 3)
        row, pair, group, count = rows[some], cells.pair[some], cells.group[some], cells.count[some]
        divisor = cells.divisor[pair]
        self._lose_own(row, some, count)
        self.left.append((row, some, (self_lent - lent_without)[group] / divisor))
        self._tables(row, pair, pairs=lent_without[group] / divisor, others=-count / divisor, within=-1 / divisor)
        self.left_tables.append((row, 3 * pairs + group, -1 / divisor))
        # Two: the one that stays has no donor in its domain, and none at all where no other domain has the key.
        some = np.flatnonzero(of == 2)
        row, pair, count = rows[some], cells.pair[some], cells.count[some]
        self._lose_surrogate(row, pair)
        width = cells.width[cells.key[pair]]
        served = width > 1
        self._lose_own(row[served], some[served], count[served])
        stays = (cells.size[pair] - count)[served] / (width[served] - 1)
        self._tables(row[served], pair[served], others=stays)
        self._lose_pair(row[~served], pair[~served])
        # One: nothing stays.
        some = np.flatnonzero(of == 1)
        self._lose_own(rows[some], some, cells.count[some])
        self._lose_surrogate(rows[some], cells.pair[some])

    def of_other_domains(self) -> None:
        """The pairs of the same key in other domains, to which the unit lends."""
        cells = self.cells
        lender, taker = _others(cells, cells.pair)
        row = cells.unit[lender] * self.domains + cells.domain[taker]
        mine = cells.pair[lender]
        # The lender's domain goes on to lend, without the unit.
        some = cells.cells[mine] > 1
        at, cell, pair = row[some], lender[some], mine[some]
        share = (cells.size / cells.divisor)[taker[some]]
        self._tables(at, pair, pairs=share * cells.lent[cell] / cells.size[pair])
        self.left.append((at, cell, -share / (cells.size[pair] - cells.count[cell])))
        # It does not: the domains that are left share its part.
        alone = ~some & (cells.divisor[taker] > 1)
        at, pair, to = row[alone], mine[alone], taker[alone]
        fewer, size = 1 / (cells.divisor[to] - 1), cells.size[to]
        self._tables(at, to, others=fewer * size / cells.divisor[to], within=fewer / cells.divisor[to])
        self._tables(at, pair, pairs=-fewer * size / cells.size[pair])
        # There is none left.
        none = ~some & (cells.divisor[taker] == 1)
        self._lose_surrogate(row[none], taker[none])
        self._lose_pair(row[none], taker[none])

    def _tables(self, row: np.ndarray, pair: np.ndarray, **values: np.ndarray) -> None:
        for name, value in values.items():
            self.left_tables.append((row, ("pairs", "others", "within").index(name) * len(self.cells.size) + pair, value))

    def _lose_surrogate(self, row: np.ndarray, pair: np.ndarray) -> None:
        divisor = self.cells.divisor[pair]
        self._tables(row, pair, others=-self.cells.size[pair] / divisor, within=-1 / divisor)

    def _lose_own(self, row: np.ndarray, cell: np.ndarray, count: np.ndarray) -> None:
        self.lost.append((row, cell, -1.0))
        self.lost_tokens.append((row, np.zeros(len(row), np.int64), -count))

    def _lose_pair(self, row: np.ndarray, pair: np.ndarray) -> None:
        self.lost_pairs.append((row, pair, -1.0))
        self.lost_tokens.append((row, np.zeros(len(row), np.int64), -self.cells.size[pair]))


def _within_without_one(cells: Cells) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """What a pair's own domain gives to it when one of its three or more cells is left out; it depends on the cell's group alone.

    Returns:
        [groups, groups], weights of the hits of each group, those of the left-out cell included; what these weights sum up to without
        that cell, [groups]; and the weight of that cell, [groups].
    """
    groups = len(cells.group_pair)
    first, length = np.searchsorted(cells.group_pair, np.arange(len(cells.size))), np.bincount(cells.group_pair)
    some = np.flatnonzero(cells.cells[cells.group_pair] > 2)
    out, other = _joined(some, first[cells.group_pair[some]], length[cells.group_pair[some]])
    among = (out != other) | (cells.group_cells[other] > 1)
    out, other = out[among], other[among]
    same = out == other
    weight = cells.group_count[other] / (cells.size[cells.group_pair[other]] - cells.group_count[out] - cells.group_count[other])
    total = np.bincount(out, weight * (cells.group_cells[other] - same), minlength=groups)
    return _matrix((groups, groups), [(out, other, weight)]), total, np.bincount(out, weight * same, minlength=groups)


def _others(cells: Cells, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each element of ``pair`` with every pair of the same key in another domain: places in ``pair``, and pairs."""
    key = cells.key[pair]
    place, other = _joined(np.arange(len(pair)), cells.first[key], cells.width[key])
    different = other != pair[place]
    return place[different], other[different]


def _joined(values: np.ndarray, first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every value beside each whole number of its own range [first, first + length)."""
    ends = np.cumsum(length)
    inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
    return np.repeat(values, length), inside + np.repeat(first, length)


def _runs(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where equal rows begin, and the number of every row's run."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(new), np.cumsum(new) - 1


def _matrix(shape: tuple[int, int], terms: list[Terms]) -> csr_array:
    rows, columns = (np.concatenate([term[axis] for term in terms]).astype(np.int32) for axis in (0, 1))
    values = np.concatenate([np.broadcast_to(value, row.shape) for row, _, value in terms])
    return coo_array((values.astype(np.float64), (rows, columns)), shape=shape).tocsr()
