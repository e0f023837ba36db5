"""Strata: the tokens of every document, divided by what is known of a token beside its domain.

A stratum is scored as a trace of its own, so every domain metric keeps its chance level, bound and interval. Strata of one kind are made
inside each document where they can be (`entropy`, `position`), so that no stratum holds other documents than another, and their
differences pair the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from dbes.scoring.sums import of_phase
from dbes.trace.store import Trace
from dbes.trace.types import TokenRoutes, document_starts
from dbes.trace.vocabulary import TokenText

KINDS = ("entropy", "position", "token-class", "frequency")

UNCERTAIN = 0.2
"""Share of a document's tokens, those of the highest entropy, that are told from the rest."""

BEGINNING = 0.25
"""Share of a document's tokens that is its beginning."""

CLASSES = ("word-initial", "continuation", "digits", "punctuation and space", "other")

BLANKS = (" ", "▁", "Ġ")
"""How the text of a token that begins a word begins."""

FREQUENCIES = ("frequent third", "middle third", "rare third")

NONE = -1
"""Label of a token that is in no stratum."""

Label = Callable[[TokenRoutes], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Division:
    """How tokens are divided.

    Attributes:
        by: what divides them, in words.
        names: of the strata.
        label: the stratum of each token, int [tokens], of routes that are whole documents.
        recurs: a token id can be in several strata, so that these can be compared on the same tokens.
    """

    by: str
    names: tuple[str, ...]
    label: Label
    recurs: bool


def division_of(kind: str, trace: Trace, *, phase: int | None = None) -> Division | str:
    """How the tokens of a trace are divided by a kind, one of ``KINDS``; or why they cannot be."""
    columns = _columns(trace)
    if kind == "entropy":
        return _by_entropy(trace, columns)
    if kind == "position":
        by = f"place among the tokens of its document: the first {BEGINNING:.0%} against the rest"
        return Division(by=by, names=("first quarter", "rest"), label=lambda routes: _first_share(routes, BEGINNING), recurs=True)
    if "token_ids" not in columns:
        return "the trace has no token ids"
    if kind == "token-class":
        if not trace.vocabulary:
            return "the trace has no texts of its tokens (vocabulary.json)"
        classes = token_classes(trace.vocabulary)
        by = "text of the token; word-initial: begins with a blank, continuation: letters without one before"
        return Division(by=by, names=CLASSES, label=lambda routes: _looked_up(routes, classes), recurs=False)
    thirds = frequency_thirds(_occurrences(trace, phase))
    by = "how often its token id occurs in the trace; each third holds about a third of all tokens"
    return Division(by=by, names=FREQUENCIES, label=lambda routes: _looked_up(routes, thirds), recurs=False)


def _columns(trace: Trace) -> set[str]:
    routes = next(iter(trace), None)
    return set() if routes is None else {*routes.arrays()}


def _by_entropy(trace: Trace, columns: set[str]) -> Division | str:
    if max(trace.shape.top_k) < 2:
        return "a token has one expert, whose gate weights have no entropy"
    if "weights" not in columns:
        return "the trace has no gate weights"
    by = (
        "entropy of the router, not of the next token: of the gate weights of the chosen experts over ln k, mean over layers; "
        f"the {UNCERTAIN:.0%} of the tokens of each document where it is highest against the rest"
    )
    top_k = np.asarray(trace.shape.top_k)

    def label(routes: TokenRoutes) -> np.ndarray:
        return _highest_share(routes, gate_entropy(routes, top_k), UNCERTAIN)

    return Division(by=by, names=("highest fifth", "rest"), label=label, recurs=True)


def gate_entropy(routes: TokenRoutes, top_k: np.ndarray) -> np.ndarray:
    """Entropy of the gate weights of each token over ln k, mean over the layers with k > 1, [tokens]; NaN where no expert ran."""
    assert routes.weights is not None
    total = np.zeros(len(routes))
    for column in np.flatnonzero(top_k > 1):  # a layer at a time, for memory
        weights = routes.weights[:, column].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            total += entr(weights / weights.sum(axis=1, keepdims=True)).sum(axis=1) / np.log(top_k[column])
    return total / np.count_nonzero(top_k > 1)


def _places(routes: TokenRoutes) -> tuple[np.ndarray, np.ndarray]:
    """Place of each token among those of its document, and how many these are, both int [tokens]."""
    starts = document_starts(routes.document)
    size = np.diff(starts, append=len(routes))
    return np.arange(len(routes)) - np.repeat(starts, size), np.repeat(size, size)


def _first_share(routes: TokenRoutes, share: float) -> np.ndarray:
    place, size = _places(routes)
    return np.where(place + 0.5 < share * size, 0, 1)


def _highest_share(routes: TokenRoutes, value: np.ndarray, share: float) -> np.ndarray:
    """0 for the tokens of each document with the highest values, 1 for the rest; tokens without a value are in neither."""
    known = np.flatnonzero(~np.isnan(value))
    order = known[np.lexsort((-value[known], routes.document[known]))]
    label = np.full(len(routes), NONE)
    label[order] = _first_share(routes.take(order), share)
    return label


def _looked_up(routes: TokenRoutes, table: np.ndarray) -> np.ndarray:
    assert routes.token_ids is not None
    inside = (routes.token_ids >= 0) & (routes.token_ids < len(table))
    return np.where(inside, table[np.where(inside, routes.token_ids, 0)], NONE)


def token_classes(vocabulary: Mapping[int, TokenText]) -> np.ndarray:
    """Index into ``CLASSES`` of each token id, int8 [largest id + 1]; ids without a text are "other"."""
    table = np.full(max(vocabulary) + 1, CLASSES.index("other"), np.int8)
    for token, text in vocabulary.items():
        table[token] = CLASSES.index(_class_of(text))
    return table


def _class_of(text: TokenText) -> str:
    if isinstance(text, bytes):
        return "other"  # a part of a character
    core = text.lstrip("".join(BLANKS)).strip()
    if core.isnumeric():
        return "digits"
    if not any(character.isalnum() for character in core):
        return "punctuation and space"
    if not core[0].isalpha():
        return "other"
    return "word-initial" if text.startswith(BLANKS) or text[0].isspace() else "continuation"


def _occurrences(trace: Trace, phase: int | None) -> np.ndarray:
    """How often each token id occurs, int [largest id + 1]."""
    counts = np.zeros(0, np.int64)
    for routes in trace.with_columns("token_ids", "phase"):
        assert routes.token_ids is not None
        tokens = routes.token_ids[of_phase(routes, phase)]
        found = np.bincount(tokens[tokens >= 0], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def frequency_thirds(counts: np.ndarray) -> np.ndarray:
    """Index into ``FREQUENCIES`` of each token id, int8 [ids]: the third of all tokens in which the middle of its occurrences lies."""
    order = np.argsort(-counts, kind="stable")
    ranked = counts[order]
    middle = (np.cumsum(ranked) - ranked / 2) / max(counts.sum(), 1)
    table = np.zeros(len(counts), np.int8)
    table[order] = np.minimum(np.floor(len(FREQUENCIES) * middle), len(FREQUENCIES) - 1)
    return table


def same_tokens(routes: TokenRoutes, label: np.ndarray, *, seed: int) -> list[np.ndarray]:
    """Rows of two strata that hold the same token ids equally often in every document, drawn at random: two arrays of ascending rows.

    Args:
        label: int [tokens], 0 and 1 are the strata.
    """
    assert routes.token_ids is not None
    rows = np.flatnonzero((label == 0) | (label == 1))
    if not len(rows):
        return [rows, rows]
    rows = rows[np.random.default_rng([seed, int(routes.document[0])]).permutation(len(rows))]
    pairs = np.stack([routes.document[rows].astype(np.int64), routes.token_ids[rows].astype(np.int64)], axis=1)
    key = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    often = np.zeros((int(key.max()) + 1, 2), np.int64)
    np.add.at(often, (key, label[rows]), 1)
    found = []
    for side in (0, 1):
        own = np.flatnonzero(label[rows] == side)
        own = own[np.argsort(key[own], kind="stable")]
        place = np.arange(len(own)) - np.searchsorted(key[own], key[own])
        found.append(np.sort(rows[own[place < often.min(axis=1)[key[own]]]]))
    return found
