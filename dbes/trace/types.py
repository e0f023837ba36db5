"""The values that flow through dbes: plain frozen dataclasses of numpy arrays with named axes.

Axes, everywhere in this order: ``documents``, ``domains``, ``tokens``, ``layers``, ``experts``, ``slots``.
``slots`` are the k places of a token's top-k; their order means nothing.
Nothing here imports torch, so a trace can be read and scored on a machine without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

PROMPT, GENERATED, TEMPLATE = 0, 1, 2
"""Values of ``TokenRoutes.phase``: text that was given, text the model wrote, and what a chat template put around the text."""

PHASES = {None: "all", PROMPT: "prompt", GENERATED: "generated"}
"""What can be scored. All is all text: tokens of a template are recorded, but no text, and never scored."""

NOISE_SCALES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Noise levels of the flip-stability measure, in units of the standard deviation over experts of the selection score."""

LOGIT_NOISE = (0.01, 0.1, 1.0)
"""Half-widths eps of the uniform noise of the published stability variant of RSS, in router logits."""

UNKNOWN = 255
"""Mark of ``kept`` and ``logit_stable`` where a row had no score."""

PIECE_TOKENS = 4_096
"""Tokens worked on at a time: bounds the memory of the pass and keeps them in the cache; changes no value."""


@dataclass(frozen=True, kw_only=True)
class TokenRoutes:
    """Which experts a run of tokens used; the rows of one shard of a trace.

    Rows are ordered by (document, position). Optional arrays are None when the source could not give them.

    Attributes:
        ids: uint8 or uint16 [tokens, layers, slots], experts that were **executed**. The largest value of the dtype
            (255, 65535: minus one, wrapped) marks a slot that did not run.
        document: int32 [tokens], index of the document, the unit of sampling.
        positions: int32 [tokens], place of the token in its document (windows of one document go on counting).
        token_ids: int32 [tokens], vocabulary ids.
        phase: uint8 [tokens], PROMPT, GENERATED or TEMPLATE.
        weights: float16 [tokens, layers, slots], gate weights as the model used them (0 where no slot ran).
        logit_margins: float16 [tokens, layers], router logit of the weakest chosen minus that of the strongest rejected
            expert (RSS). Can be negative where the router selects on something else than its logits.
        logit_stable: uint8 [tokens, layers], bit i set when the chosen logits all stayed above the strongest rejected one
            after adding U(-LOGIT_NOISE[i], LOGIT_NOISE[i]) to each of these k+1.
        selection_margins: float32 [tokens, layers], s_(k) - s_(k+1) of the number the top-k was really taken on; >= 0.
        scaled_margins: float16 [tokens, layers], selection margin / standard deviation over experts of the score.
        kept: uint8 [tokens, layers, len(NOISE_SCALES)], how many of the chosen experts are chosen again after adding
            N(0, (NOISE_SCALES[i] * std_e(s))^2) to all scores; 255 where there is no score.
    NaN in a margin: this row had no score.
    """

    ids: np.ndarray
    document: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray | None = None
    phase: np.ndarray | None = None
    weights: np.ndarray | None = None
    logit_margins: np.ndarray | None = None
    logit_stable: np.ndarray | None = None
    selection_margins: np.ndarray | None = None
    scaled_margins: np.ndarray | None = None
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.document)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are present, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: array for name, array in named if array is not None}

    def take(self, rows: np.ndarray | slice) -> TokenRoutes:
        """The same routes for chosen rows."""
        return TokenRoutes(**{name: array[rows] for name, array in self.arrays().items()})


@dataclass(frozen=True, kw_only=True)
class RoutingShape:
    """What a trace is about: the router's sizes and the documents' domains.

    Attributes:
        layers: the model's own decoder-layer numbers of its MoE layers, ascending (dense layers are left out).
        experts: routed experts of each of these layers, from the model's modules (dead ones count).
        top_k: slots per token of each of these layers.
        domains: names of the domains, in the order of the benchmark.
        document_domain: int [documents], index into ``domains``.
        document_ids: the benchmark's id of each document.
        document_source: the source text each document was cut from, where the benchmark names it. Documents of one domain and
            one source are **one** unit of every permutation, jackknife and split: they are not independent.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    domains: tuple[str, ...]
    document_domain: np.ndarray
    document_ids: tuple[str, ...]
    document_source: tuple[str, ...] | None = None

    @property
    def units(self) -> np.ndarray:
        """Unit of sampling of each document, int [documents], numbered in order of first appearance."""
        if self.document_source is None:
            return np.arange(len(self.document_domain))
        numbers: dict[tuple[int, str], int] = {}
        pairs = zip(self.document_domain.tolist(), self.document_source, strict=True)
        return np.asarray([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int64)

    @property
    def numbered(self) -> bool:
        """Whether document ids are mere numbers, which say nothing of the documents."""
        return self.document_ids == tuple(map(str, range(len(self.document_ids))))

    @property
    def width(self) -> int:
        """Experts of the widest layer: the length of the experts axis of counts."""
        return max(self.experts)

    @property
    def slots(self) -> int:
        """Slots of the widest layer: the length of the slots axis of routes."""
        return max(self.top_k)


def storage_dtype(experts: int) -> type[np.unsignedinteger]:
    """The smallest unsigned dtype that holds every expert id and the mark of a missing slot."""
    return np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16


def pieces_of(routes: TokenRoutes, tokens: int = PIECE_TOKENS) -> Iterator[TokenRoutes]:
    """The routes in pieces of whole documents, of at least one document and at most about ``tokens`` tokens."""
    starts = document_starts(routes.document)
    begin = 0
    for end in [*starts[1:], len(routes)]:
        following = starts[np.searchsorted(starts, end) :]
        until = following[1] if len(following) > 1 else len(routes)
        if end == len(routes) or until - begin > tokens:
            yield routes.take(slice(begin, end))
            begin = end


def document_starts(document: np.ndarray) -> np.ndarray:
    """Rows at which a document begins."""
    return np.flatnonzero(np.r_[True, document[1:] != document[:-1]]) if len(document) else np.zeros(0, np.int64)
