r"""Surrogate routes: every token takes the experts of other occurrences of its key, in other source texts, of any domain.

What a router shows under such a surrogate it would show if it looked at the key alone: at the token (``lexical``), at its place in
the document (``position``), at the token and the one before it (``bigram``). Nothing is drawn: hits are the mean over all draws. A
token with key w in source text s of domain d gets

.. math:: \frac{1}{|D_w|} \sum_{d' \in D_w} \frac{H_{d'}(w) - [d' = d] H_s(w)}{N_{d'}(w) - [d' = d] N_s(w)}

with H the hits and N the number of occurrences that ran, and D_w the domains with an occurrence outside s. A token whose key occurs
in no other source text is left out of the routed counts too.

The surrogate of one text is made of others. So a text that is left out is left out as a donor too: its hits vanish from the surrogates
of all others, and tokens that it alone could serve are no longer covered. A jackknife that holds donors fixed sees neither the noise
that a rare key's few occurrences give to both sides nor the bias it causes: its intervals cover in 82 % of runs, these in 95 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from dbes.scoring.donors import Block, block_of
from dbes.scoring.sampling import TokenSample
from dbes.trace.types import RoutingShape, TokenRoutes

EXACT_POSITIONS, BINS_PER_DOUBLING = 16, 8
"""Positions of a document that are bins of their own, and bins in every doubling of the position from there on."""

TABLE_CELLS = 1 << 22
"""Array elements of the tables of keys, and of the left-out sums, at a time: bounds memory, changes no value."""

KEYS = ("lexical", "position", "bigram")


def position_bins(positions: np.ndarray) -> np.ndarray:
    """Bins of the position in the document, int [tokens]: single positions at the beginning, later about 9 % wide."""
    doublings = np.log2(np.maximum(positions, EXACT_POSITIONS) / EXACT_POSITIONS)
    beyond = EXACT_POSITIONS + np.floor(BINS_PER_DOUBLING * doublings)
    return np.where(positions < EXACT_POSITIONS, positions, beyond).astype(np.int64)


def keys_of(routes: TokenRoutes, key: str) -> np.ndarray | None:
    """The key of every token, int [tokens]; None where the trace has no token ids and they are needed."""
    if key == "position":
        return position_bins(routes.positions)
    if routes.token_ids is None:
        return None
    tokens = routes.token_ids.astype(np.int64)
    if key == "lexical":
        return tokens
    follows = (np.diff(routes.document) == 0) & (np.diff(routes.positions) == 1)
    before = np.concatenate([[-1], np.where(follows, tokens[:-1], -1)])
    return (before + 1) * (tokens.max() + 1) + tokens


@dataclass(frozen=True, kw_only=True)
class SurrogateLayer:
    """The sums of one layer, of the tokens that a surrogate covers.

    Attributes:
        blocks: with the hits of their cells, [cells, experts].
        domain: int [units]; domains: how many there are.
    """

    blocks: Sequence[tuple[Block, csr_array]]
    domain: np.ndarray
    domains: int
    experts: int

    @cached_property
    def tokens(self) -> np.ndarray:
        """Covered tokens that ran, float64 [units]."""
        return sum((block.tokens for block, _ in self.blocks), np.zeros(len(self.domain)))

    @cached_property
    def routed(self) -> np.ndarray:
        """Hits of the router, float64 [units, experts]."""
        return sum((_dense(block.members, hits) for block, hits in self.blocks), np.zeros((len(self.domain), self.experts)))

    @cached_property
    def surrogate(self) -> np.ndarray:
        """Expected hits of the surrogate, float64 [units, experts]; each token has as many as a donor has on average."""
        total = np.zeros((len(self.domain), self.experts))
        for block, hits in self.blocks:
            total += block.own_tables @ block.tables(hits) + _dense(block.own, hits)
        return total

    def by_domain(self, per_unit: np.ndarray) -> np.ndarray:
        """Sums over the units of each domain, [domains, ...]."""
        total = np.zeros((self.domains, *per_unit.shape[1:]))
        np.add.at(total, self.domain, per_unit)
        return total

    def without_each(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """Sums of the domains as they would be without a unit, and what it lends to others, for some units at a time.

        Yields:
            which units; tokens [units, domains]; routed and surrogate hits, [units, domains, experts].
        """
        sums = [self.by_domain(each) for each in (self.tokens, self.routed, self.surrogate)]
        size = max(1, TABLE_CELLS // (self.domains * self.experts))
        for start in range(0, len(self.domain), size):
            part = slice(start, min(start + size, len(self.domain)))
            units, rows = part.stop - start, slice(start * self.domains, part.stop * self.domains)
            tokens, routed, surrogate = (np.repeat(each[None], units, axis=0) for each in sums)
            for block, hits in self.blocks:
                tables = block.tables(hits)
                tokens += block.lost_tokens[part]
                lost = _dense(block.lost[rows], hits) + block.lost_pairs[rows] @ tables[: block.pairs.shape[0]]
                routed += lost.reshape(routed.shape)
                surrogate += (_dense(block.left[rows], hits) + block.left_tables[rows] @ tables).reshape(routed.shape)
            yield part, tokens, routed, surrogate


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The surrogate of a sample for one kind of key.

    Attributes:
        key: see ``KEYS``.
        units: int [units], the source units with covered tokens, ascending, of all that the documents are cut from.
        domain: int [units].
        covered: float [domains + 1], share of the tokens of each domain, and of all, whose key occurs in another unit; NaN without tokens.
        tokens: int [units], covered tokens.
        rows, row_unit, row_key: the covered tokens, the place of their unit among ``units``, and their key.
    """

    key: str
    units: np.ndarray
    domain: np.ndarray
    covered: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray = field(repr=False)
    row_unit: np.ndarray = field(repr=False)
    row_key: np.ndarray = field(repr=False)
    shape: RoutingShape = field(repr=False)
    ids: np.ndarray = field(repr=False)

    def layer(self, column: int) -> SurrogateLayer:
        """The sums of one layer, by its place; tokens that did not run there are neither donors nor routed."""
        experts = self.shape.experts[column]
        ids = self.ids[self.rows, column]
        present = ids < experts  # what marks a missing expert is larger than any
        ran = present.any(axis=1)
        blocks = self._blocks if ran.all() else self._blocks_of(np.flatnonzero(ran))
        found = [(block, _hits(ids[block.rows], present[block.rows], block.cell_starts, experts)) for block in blocks]
        return SurrogateLayer(blocks=found, domain=self.domain, domains=len(self.shape.domains), experts=experts)

    @cached_property
    def _blocks(self) -> list[Block]:
        return self._blocks_of(np.arange(len(self.rows)))

    def _blocks_of(self, rows: np.ndarray) -> list[Block]:
        """All keys of these of the covered tokens, in pieces whose tables are of bounded size."""
        unit, key = self.row_unit[rows], self.row_key[rows]
        rows = rows[served(unit, key)]
        unit, key = self.row_unit[rows], self.row_key[rows]
        domain = self.domain[unit]
        order = np.lexsort((unit, domain, key))
        rows, unit, key, domain = rows[order], unit[order], key[order], domain[order]
        new = np.ones(len(key), bool)
        new[1:] = (np.diff(key) != 0) | (np.diff(unit) != 0)
        # A cell adds four rows to the tables at most; a key is never cut.
        begins = np.searchsorted(key, key)
        piece = (np.cumsum(new)[begins] - 1) * 4 * self.shape.width // TABLE_CELLS
        cuts = np.flatnonzero(np.diff(piece)) + 1
        domains = len(self.shape.domains)
        parts = (np.split(each, cuts) for each in (rows, unit, key))
        return [block_of(*part, self.domain, domains) for part in zip(*parts, strict=True) if len(part[0])]


def surrogate_of(sample: TokenSample, shape: RoutingShape, key: str) -> Surrogate | None:
    """The surrogate of the tokens of a sample; None where the trace has no token ids and the key needs them.

    Args:
        shape: of the documents that ``sample.routes.document`` counts; those cut from one source text are one unit.
        key: one of ``KEYS``.
    """
    keys = keys_of(sample.routes, key)
    if keys is None:
        return None
    unit = shape.units[sample.routes.document]
    unit_domain = np.zeros(len(shape.document_domain), np.int64)
    unit_domain[shape.units] = shape.document_domain
    key_number = np.unique(keys, return_inverse=True)[1]
    rows = np.flatnonzero(served(unit, key_number))
    units, row_unit = np.unique(unit[rows], return_inverse=True)
    domain, domains = unit_domain[units], len(shape.domains)
    every = np.bincount(unit_domain[unit], minlength=domains).astype(np.float64)
    have = np.bincount(unit_domain[unit[rows]], minlength=domains)
    with np.errstate(invalid="ignore"):
        covered = np.append(have, have.sum()) / np.append(every, every.sum())
    return Surrogate(
        key=key,
        units=units,
        domain=domain,
        covered=covered,
        tokens=np.bincount(row_unit, minlength=len(units)),
        rows=rows,
        row_unit=row_unit,
        row_key=key_number[rows],
        shape=shape,
        ids=sample.routes.ids,
    )


def served(unit: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Tokens whose key occurs in two units at least, bool [tokens].

    Args:
        unit, key: int [tokens], numbered from 0.
    """
    if not len(key):
        return np.zeros(0, bool)
    least, most = np.full(key.max() + 1, unit.max()), np.zeros(key.max() + 1, unit.dtype)
    np.minimum.at(least, key, unit)
    np.maximum.at(most, key, unit)
    return (least < most)[key]


def _hits(ids: np.ndarray, present: np.ndarray, cell_starts: np.ndarray, experts: int) -> csr_array:
    """Hits of every cell, [cells, experts], an entry for each hit; tokens in order of cells."""
    before = np.append(0, np.cumsum(present.sum(axis=1)))
    chosen = ids[present].astype(np.int32)
    return csr_array((np.ones(len(chosen)), chosen, before[cell_starts]), shape=(len(cell_starts) - 1, experts))


def _dense(matrix: csr_array, hits: csr_array) -> np.ndarray:
    return (matrix @ hits).toarray()
