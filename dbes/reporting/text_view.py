"""What the routes say about single tokens: documents with the experts of every token, examples in context, trajectories.

Read from the recorded trace, on whole documents spread evenly over the domains up to a budget that is stated on the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbes.results import Specialist
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts
from dbes.scoring.sampling import READ_BEGINNING, TokenSample, documents_to_read
from dbes.text import TOKEN_WIDTH, label, labels, legible
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape, TokenRoutes
from dbes.trace.vocabulary import TokenText, joined, shown

TEXT_CELLS = 160_000
"""Tokens x layers x slots shown in the text view, over all documents, as long as a document keeps its shortest length."""

DOCUMENT_TOKENS = (48, READ_BEGINNING)
"""Shortest and longest beginning of a document that is shown."""

CONTEXT_SPECIALISTS, CONTEXTS, CONTEXT_REACH = 200, 3, 7
"""Specialists with examples, examples of each, tokens shown on either side."""

CHARACTER_BYTES = 4
"""Of one character in UTF-8 at most, so over as many tokens."""


MOVES = 10
"""Strongest moves kept for each domain and pair of layers."""


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """Routes of whole documents, in order, and each row's domain, [tokens]."""

    shape: RoutingShape
    kept: TokenSample
    domain: np.ndarray
    vocabulary: Mapping[int, TokenText]

    @property
    def routes(self) -> TokenRoutes:
        return self.kept.routes

    @property
    def primary(self) -> np.ndarray | None:
        return self.kept.primary

    @property
    def tokens(self) -> int:
        return len(self.routes)

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """Gate weights of some rows, float64 [rows, layers, slots]; None where they were not kept."""
        if self.kept.weights is None or self.kept.weighted is None or not np.isin(rows, self.kept.weighted).all():
            return None
        return self.kept.weights[np.searchsorted(self.kept.weighted, rows)].astype(np.float64)

    def token(self, row: int) -> TokenText:
        """Text of a row's token; bytes where it is only a part of a character."""
        assert self.routes.token_ids is not None
        token = int(self.routes.token_ids[row])
        return self.vocabulary.get(token, f"#{token}")

    def texts(self, rows: Sequence[int]) -> list[str]:
        """Text of each of some rows, in the order of a document. A character that several tokens share stands at the first.

        Rows that follow are looked at, so that a character which begins in the last of these is whole.
        """
        document, last = self.routes.document, rows[-1] if len(rows) else -1
        after = [row for row in range(last + 1, min(last + CHARACTER_BYTES, self.tokens)) if document[row] == document[last]]
        return joined([self.token(row) for row in (*rows, *after)])[: len(rows)]


def token_text(text: str) -> str:
    """A token's text on one line: line ends and tabs as signs."""
    return legible(text[: TOKEN_WIDTH + 1].replace("\n", "⏎").replace("\t", "⇥"))


def read_sample(trace: Trace | Counts) -> TextSample | None:
    """Whole documents of a trace, evenly over the domains; None when it holds no token."""
    counts = counts_of(trace)
    shape, kept = counts.shape, counts.sample
    if kept is None:
        return None
    among = None if kept.whole else np.isin(np.arange(len(shape.document_domain)), kept.routes.document)
    chosen = kept.of(documents_to_read(shape, kept.tokens, among=among))
    if chosen is None:
        return None
    return TextSample(shape=shape, kept=chosen, domain=shape.document_domain[chosen.routes.document], vocabulary=counts.vocabulary)


def documents(sample: TextSample, named: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Documents to read, one or two of each domain: token texts, and k experts with weights per token and layer.

    ``experts`` and ``weights`` are flat in the order tokens, layers, slots, the heaviest slot first; weights are whole percent
    of the token's gate weight, -1 stands for a slot that did not run. ``weights`` is empty where the trace has none.
    A character that several tokens share stands at the first and leaves nothing to the others; ``bytes`` are those of such tokens, by
    place.

    Args:
        named: how the page calls each domain, if not as `labels` of the trace's own.
    """
    routes, shape = sample.routes, sample.shape
    if routes.token_ids is None or not sample.vocabulary:
        return []
    named = labels(shape.domains) if named is None else named
    missing = np.iinfo(routes.ids.dtype).max
    cells = len(shape.layers) * shape.slots
    chosen, tokens = [], 0
    for each in (2, 1):
        chosen = [found for domain in range(len(shape.domains)) for found in np.unique(routes.document[sample.domain == domain])[:each]]
        tokens = TEXT_CELLS // (max(1, len(chosen)) * cells)
        if tokens >= DOCUMENT_TOKENS[0]:
            break
    tokens = int(np.clip(tokens, *DOCUMENT_TOKENS))
    ids_shown = labels((shape.document_ids[document] for document in chosen), 80)
    found = []
    for document in chosen:
        rows = np.flatnonzero(routes.document == document)[:tokens]
        ids = np.where(routes.ids[rows] == missing, -1, routes.ids[rows].astype(np.int64))
        weights = sample.weights(rows)
        if weights is not None:
            weights = np.where(ids < 0, -1.0, weights)
            order = np.lexsort((ids, -weights), axis=-1)  # equal weights: the lower expert id first, as primaries are defined
            ids, weights = (np.take_along_axis(each, order, axis=-1) for each in (ids, weights))
        found.append(
            {
                "id": ids_shown[shape.document_ids[document]],
                "domain": named.get(domain := shape.domains[sample.domain[rows[0]]], label(domain)),
                "tokens": [token_text(text) for text in sample.texts(rows.tolist())],
                "bytes": {str(place): shown(token) for place, token in enumerate(map(sample.token, rows)) if isinstance(token, bytes)},
                "experts": ids.reshape(-1).tolist(),
                "weights": [] if weights is None else _percent(weights).reshape(-1).tolist(),
                "whole": bool(len(rows) == (routes.document == document).sum()),
            }
        )
    return found


def contexts(sample: TextSample | None, specialists: Sequence[Specialist]) -> list[list[list[str]]]:
    """For each specialist up to three places where its typical tokens stand: [text before, token, text after]."""
    nothing: list[list[list[str]]] = [[] for _ in specialists]
    if sample is None or sample.routes.token_ids is None or not sample.vocabulary:
        return nothing
    routes, shape = sample.routes, sample.shape
    token_ids = routes.token_ids
    assert token_ids is not None
    written: dict[str, list[int]] = {}
    for token, text in sample.vocabulary.items():
        written.setdefault(shown(text), []).append(token)
    members = [np.flatnonzero(sample.domain == domain) for domain in range(len(shape.domains))]
    for index, specialist in enumerate(specialists[:CONTEXT_SPECIALISTS]):
        if specialist.layer not in shape.layers or specialist.domain not in shape.domains:
            continue
        column, domain = shape.layers.index(specialist.layer), shape.domains.index(specialist.domain)
        here = members[domain][(routes.ids[members[domain], column] == specialist.expert).any(axis=-1)]
        used: set[int] = set()
        for text in specialist.tokens:
            rows = here[np.isin(token_ids[here], written.get(text, []))]
            fresh = [int(row) for row in rows[:50] if int(routes.document[row]) not in used] or [int(row) for row in rows[:1]]
            if fresh:
                used.add(int(routes.document[fresh[0]]))
                nothing[index].append(_surroundings(sample, fresh[0]))
            if len(nothing[index]) == CONTEXTS:
                break
    return nothing


def _surroundings(sample: TextSample, row: int) -> list[str]:
    document = sample.routes.document
    start, stop = max(0, row - CONTEXT_REACH), min(sample.tokens, row + CONTEXT_REACH + 1)
    near = [place for place in range(start, stop) if document[place] == document[row]]
    texts = dict(zip(near, map(token_text, sample.texts(near)), strict=True))
    token = texts[row] or shown(sample.token(row))
    return ["".join(texts[place] for place in near if place < row), token, "".join(texts[place] for place in near if place > row)]


def trajectories(sample: TextSample) -> list[list[list[list[float]]]] | None:
    """Strongest moves of each domain between neighbouring layers: [domains][layer pairs][moves] of from, to, share, lift.

    A move is from a token's primary expert to its primary expert at the next MoE layer; ``share`` is over the domain's tokens in
    the sample, ``lift`` against the mean of the domains' shares. None where primaries are unknown (no weights, k > 1).
    """
    if sample.primary is None or len(sample.shape.layers) < 2:
        return None
    width, domains = sample.shape.width, len(sample.shape.domains)
    members = [np.flatnonzero(sample.domain == domain) for domain in range(domains)]
    found: list[list[list[list[float]]]] = [[] for _ in range(domains)]
    for column in range(len(sample.shape.layers) - 1):
        shares = np.zeros((domains, width * width))
        for domain, rows in enumerate(members):
            here, there = (sample.primary[rows, layer].astype(np.int64) for layer in (column, column + 1))
            ran = (here >= 0) & (here < width) & (there >= 0) & (there < width)
            if ran.any():
                shares[domain] = np.bincount(here[ran] * width + there[ran], minlength=width * width) / ran.sum()
        mean = shares.mean(axis=0)
        for domain in range(domains):
            best = np.argsort(-shares[domain], kind="stable")[:MOVES]
            best = best[shares[domain, best] > 0]
            moves = [(int(move), float(shares[domain, move])) for move in best]
            found[domain].append([[move // width, move % width, _short(share), _short(share / mean[move])] for move, share in moves])
    return found


def _percent(weights: np.ndarray) -> np.ndarray:
    """Weights [..., slots] as whole percent of their sum, -1 where no slot ran."""
    known = np.clip(weights, 0, None)
    total = known.sum(axis=-1, keepdims=True)
    return np.where(weights < 0, -1, np.rint(100 * known / np.where(total > 0, total, 1))).astype(int)


def _short(number: float) -> float:
    return float(f"{number:.4g}")
