"""Tokens that are kept beside the counts: whole documents, spread evenly over the domains, with the experts of every token.

What needs pairs of slots, token ids or texts is made from them. A trace of at most ``KEPT_TOKENS`` tokens is kept whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dbes.scoring.sums import of_phase, primary_experts
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape, TokenRoutes
from dbes.trace.vocabulary import TokenText, shown

KEPT_TOKENS, KEPT_CELLS = 1 << 19, 1 << 27
"""Tokens, and tokens x layers x slots, of a trace that is kept whole; of a larger one the documents of ``SAMPLE_TOKENS``."""

SAMPLE_TOKENS = 1 << 18
"""Tokens at most for co-activation and transitions."""

READ_TOKENS, READ_CELLS = 1 << 17, 1 << 26
"""Tokens, and tokens x layers x slots, for texts and trajectories at most."""

READ_DOCUMENTS, READ_BEGINNING = 2, 240
"""Documents of each domain to read, and tokens of their beginnings whose gate weights are kept."""


EXAMPLE_TOKENS = 6
"""Token texts shown with a specialist."""


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Routes of some whole documents, in order.

    Attributes:
        routes: ids, document, positions and, where the trace has them, token ids.
        primary: int [tokens, layers], see ``primary_experts``; None where they are unknown.
        weighted, weights: rows whose gate weights are kept, and these [rows, layers, slots]; None where the trace has none.
        whole: no document of the trace (of the phase that was counted) was left out.
    """

    routes: TokenRoutes
    primary: np.ndarray | None = None
    weighted: np.ndarray | None = None
    weights: np.ndarray | None = None
    whole: bool = False

    @property
    def tokens(self) -> int:
        return len(self.routes)

    def of(self, documents: np.ndarray) -> TokenSample | None:
        """The part that is of some documents, bool [documents of the trace]; None where there is none."""
        rows = np.flatnonzero(documents[self.routes.document])
        if not len(rows):
            return None
        if len(rows) == len(self.routes):
            return self
        weighted = weights = None
        if self.weighted is not None and self.weights is not None:
            among = documents[self.routes.document[self.weighted]]
            weighted, weights = np.searchsorted(rows, self.weighted[among]), self.weights[among]
        primary = None if self.primary is None else self.primary[rows]
        return TokenSample(routes=self.routes.take(rows), primary=primary, weighted=weighted, weights=weights)

    def in_order(self) -> TokenSample:
        """The same rows in order of documents and positions."""
        order = np.lexsort((self.routes.positions, self.routes.document))
        if np.array_equal(order, np.arange(len(order))):
            return self
        weighted, weights = self.weighted, self.weights
        if weighted is not None and weights is not None:
            moved = np.argsort(order)[weighted]
            again = np.argsort(moved)
            weighted, weights = moved[again], weights[again]
        primary = None if self.primary is None else self.primary[order]
        return replace(self, routes=self.routes.take(order), primary=primary, weighted=weighted, weights=weights)


def even_documents(shape: RoutingShape, tokens: np.ndarray, *, limit: int = SAMPLE_TOKENS) -> np.ndarray:
    """Whole documents, spread evenly over the domains, of at most about ``limit`` tokens: bool [documents].

    Args:
        tokens: [documents].
    """
    keep = np.zeros(len(tokens), bool)
    for domain in range(len(shape.domains)):
        members = np.flatnonzero((shape.document_domain == domain) & (tokens > 0))
        budget = limit // len(shape.domains)
        wanted = tokens[members].sum()
        keep[members if wanted <= budget else _spread(members, int(len(members) * budget / wanted))] = True
    return keep


def documents_to_read(shape: RoutingShape, tokens: int, *, among: np.ndarray | None = None) -> np.ndarray:
    """Documents, evenly over the domains, from which texts and trajectories are taken: bool [documents].

    Args:
        tokens: of the trace, or of the documents ``among`` which they are chosen, bool [documents].
    """
    budget = min(READ_TOKENS, READ_CELLS // max(1, len(shape.layers) * shape.slots))
    part = min(1.0, budget / max(tokens, 1))
    keep = np.zeros(len(shape.document_domain), bool)
    for domain in range(len(shape.domains)):
        own = shape.document_domain == domain
        members = np.flatnonzero(own if among is None else own & among)
        keep[_spread(members, int(len(members) * part))] = True
    return keep


def _spread(members: np.ndarray, count: int) -> np.ndarray:
    """At least one of the members, evenly from the first to the last."""
    return members[np.linspace(0, len(members) - 1, max(1, count)).astype(int)] if len(members) else members


class Sampler:
    """Collects the sample while a trace is read."""

    def __init__(self, trace: Trace, phase: int | None) -> None:
        self.trace, self.phase, self.shape = trace, phase, trace.shape
        cells = trace.tokens * len(self.shape.layers) * self.shape.slots
        self.whole = trace.tokens <= KEPT_TOKENS and cells <= KEPT_CELLS
        self.read = documents_to_read(self.shape, trace.tokens) if self.whole else None
        self.parts: list[TokenSample] = []
        self.seen: dict[int, set[int]] = {}

    def add(self, routes: TokenRoutes, primary: np.ndarray | None) -> None:
        """Add routes (of the phase) that are whole documents, in order."""
        if self.whole:
            self._keep(routes, primary)

    def _keep(self, routes: TokenRoutes, primary: np.ndarray | None) -> None:
        kept = replace(routes, **dict.fromkeys({*routes.arrays()} - {"ids", "document", "positions", "token_ids"}))
        weighted = None if routes.weights is None else self._to_read(routes.document)
        if primary is not None:
            primary = primary.astype(np.int16 if self.shape.width < 2**15 else np.int32)
        weights = None if routes.weights is None else routes.weights[weighted]
        self.parts.append(TokenSample(routes=kept, primary=primary, weighted=weighted, weights=weights))

    def _to_read(self, document: np.ndarray) -> np.ndarray:
        """Rows of the beginnings of the first documents of each domain that are read."""
        assert self.read is not None
        rows = []
        for number in np.unique(document[self.read[document]]).tolist():
            first = self.seen.setdefault(int(self.shape.document_domain[number]), set())
            if number in first or len(first) < READ_DOCUMENTS:
                first.add(number)
                rows.append(np.flatnonzero(document == number)[:READ_BEGINNING])
        return np.concatenate(rows) if rows else np.zeros(0, np.int64)

    def done(self, tokens: np.ndarray) -> TokenSample | None:
        """The sample; None when no token was seen.

        Args:
            tokens: int [documents], tokens that were counted. Of a large trace only they tell which documents to take, so the rows of
                these are read now.
        """
        if not self.whole:
            keep = even_documents(self.shape, tokens)
            self.read = documents_to_read(self.shape, int(tokens[keep].sum()), among=keep)
            for routes in self.trace.documents(keep, "token_ids", "phase", "weights"):
                chosen = routes.take(np.flatnonzero(of_phase(routes, self.phase)))
                if len(chosen):
                    self._keep(chosen, primary_experts(chosen))
        return joined_sample(self.parts, whole=self.whole) if self.parts else None


def joined_sample(parts: Sequence[TokenSample], *, whole: bool) -> TokenSample:
    """The samples one after the other, with the columns that all of them have."""
    names = set.intersection(*(set(part.routes.arrays()) for part in parts))
    routes = TokenRoutes(**{name: np.concatenate([part.routes.arrays()[name] for part in parts]) for name in names})
    starts = np.cumsum([0, *(len(part.routes) for part in parts)])
    primary = weighted = weights = None
    if all(part.primary is not None for part in parts):
        primary = np.concatenate([part.primary for part in parts if part.primary is not None])
    if all(part.weights is not None for part in parts):
        weighted = np.concatenate([part.weighted + start for part, start in zip(parts, starts, strict=False) if part.weighted is not None])
        weights = np.concatenate([part.weights for part in parts if part.weights is not None])
    return TokenSample(routes=routes, primary=primary, weighted=weighted, weights=weights, whole=whole)


def example_tokens(
    sample: TokenSample | None, shape: RoutingShape, vocabulary: Mapping[int, TokenText], cells: np.ndarray
) -> list[tuple[str, ...]]:
    """For each (domain, layer, expert): the tokens the expert takes there more often than their share of the domain's text explains.

    Tokens are ranked by hits x ln(share among the expert's tokens / share in the domain), so that neither rare accidents nor
    common words lead the list.
    """
    if sample is None or sample.routes.token_ids is None:
        return [() for _ in cells]
    routes, token_ids = sample.routes, sample.routes.token_ids
    row_domain = shape.document_domain[routes.document]
    rows = {int(domain): np.flatnonzero(row_domain == domain) for domain in np.unique(cells[:, 0])}
    text = {domain: Counter(token_ids[own].tolist()) for domain, own in rows.items()}
    examples = []
    for domain, column, expert in cells.tolist():
        own = rows[domain]
        hits = Counter(token_ids[own[(routes.ids[own, column] == expert).any(axis=-1)]].tolist())
        chosen, total = hits.total(), text[domain].total()
        scored = {token: n * np.log((n / chosen) / (text[domain][token] / total)) for token, n in hits.items()}
        best = sorted(scored, key=lambda token: (-scored[token], token))[:EXAMPLE_TOKENS]
        examples.append(tuple(shown(vocabulary.get(token, f"#{token}")) for token in best))
    return examples
