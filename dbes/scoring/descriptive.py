"""Companion statistics: not the five metrics, but what users of MoE models ask for beside them.

Those that need pairs of slots or token ids are computed on a sample of whole documents, see ``sampling``; how many tokens were used
is part of the result.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from dbes.scoring import metrics
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.sampling import TokenSample
from dbes.trace.types import RoutingShape

IDENTITY_TOKENS = 1 << 16
"""Tokens at most for the token-identity control."""

IDENTITY_OCCURRENCES = 20
"""Token ids that occur less often in the sample are left out of the token-identity control."""


def coactivation(sample: TokenSample, shape: RoutingShape) -> np.ndarray:
    """Tokens that chose both experts, int64 [layers, experts, experts]: all pairs of slots, symmetric; diagonal: tokens of the expert."""
    width = shape.width
    counts = np.zeros((len(shape.layers), width, width), np.int64)
    for column in range(len(shape.layers)):
        slots = _slot_columns(sample, column, width)
        for first, second in combinations(slots, 2):
            counts[column] += _pair_counts(first * (width + 1), second, width)
        counts[column] += counts[column].T.copy()
        counts[column][np.diag_indices(width)] = np.bincount(np.concatenate(slots), minlength=width + 1)[:width]
    return counts


def transitions(sample: TokenSample, shape: RoutingShape) -> np.ndarray:
    """How tokens move to the next MoE layer, float64 [layers - 1, experts, experts].

    Entry (e, f) sums over tokens the share 1/(k k') of each pair (slot with e at a layer, slot with f at the next).
    """
    width = shape.width
    counts = np.zeros((len(shape.layers) - 1, width, width))
    following = _slot_columns(sample, 0, width)
    for column in range(len(shape.layers) - 1):
        slots, following = following, _slot_columns(sample, column + 1, width)
        for here in slots:
            rows = here * (width + 1)
            for there in following:
                counts[column] += _pair_counts(rows, there, width)
        counts[column] /= shape.top_k[column] * shape.top_k[column + 1]
    return counts


def token_identity(sample: TokenSample, shape: RoutingShape, *, seed: int) -> dict[str, np.ndarray] | None:
    r"""How much of routing is token identity, per layer, in nats; None where the trace has no token ids.

    ``token``: plug-in I(token; E), and ``token_null``, the same with token ids shuffled. Only token ids that occur often enough in the
    sample count. What the domain tells beyond the token is in ``dbes.scoring.contextual``.
    """
    routes = sample.routes
    if routes.token_ids is None:
        return None
    _, which, occurrences = np.unique(routes.token_ids, return_inverse=True, return_counts=True)
    frequent = occurrences >= IDENTITY_OCCURRENCES
    rows = np.flatnonzero(frequent[which])
    if not len(rows):
        return None
    token = (np.cumsum(frequent) - 1)[which[rows]]
    kinds_used = int(frequent.sum())
    missing = np.iinfo(routes.ids.dtype).max
    rng = np.random.default_rng(seed)
    shuffled = token[rng.permutation(len(token))]
    found = {name: np.full(len(shape.layers), np.nan) for name in ("token", "token_null")}
    for column, experts in enumerate(shape.experts):
        ids = routes.ids[rows, column].astype(np.int64)
        present = ids != missing
        slots = present.sum(axis=1)
        chosen = ids[present]
        owner = np.repeat(np.arange(len(rows)), slots)
        found["token"][column] = metrics.mutual_information(_table(token[owner], chosen, kinds_used, experts))
        found["token_null"][column] = metrics.mutual_information(_table(shuffled[owner], chosen, kinds_used, experts))
    return found


def split_half_similarity(sums: LayerCounts, half: np.ndarray) -> np.ndarray:
    """Cosine (unbiased norms) between two halves of the documents of a domain, [domains, layers]: the ceiling of similarity.

    Args:
        half: 0 or 1 for each document, see ``random_halves``.
    """
    sides = [sums.take(np.flatnonzero(half == side)).totals() for side in (0, 1)]
    hits, tokens = (np.stack([getattr(side, name) for side in sides]) for name in ("hits", "active"))
    similarity = []
    for domain in range(hits.shape[1]):
        slots = hits[:, domain].sum(axis=-1)
        gram = metrics.unbiased_grams(metrics.usage_of(hits[:, domain]), tokens[:, domain], slots)
        similarity.append(metrics.unbiased_cosines(gram)[:, 0, 1])
    return np.stack(similarity)


def random_halves(document_domain: np.ndarray, *, seed: int) -> np.ndarray:
    """0 or 1 for each document; each domain is split evenly (an odd document goes to half 0)."""
    rng = np.random.default_rng(seed)
    half = np.zeros(len(document_domain), np.int8)
    for domain in np.unique(document_domain):
        members = rng.permutation(np.flatnonzero(document_domain == domain))
        half[members[1::2]] = 1
    return half


def _slot_columns(sample: TokenSample, column: int, width: int) -> list[np.ndarray]:
    """Expert of each slot at a layer, int64 [tokens] each; ``width`` where the slot did not run."""
    ids = sample.routes.ids[:, column]
    missing = np.iinfo(ids.dtype).max
    slots = np.ascontiguousarray(ids.T).astype(np.int64)
    slots[slots == missing] = width
    return list(slots)


def _pair_counts(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """How often each pair of experts occurs, [experts, experts]; ``rows`` are already multiplied by ``width`` + 1."""
    side = width + 1
    return np.bincount(rows + columns, minlength=side * side).reshape(side, side)[:width, :width]


def _table(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.bincount(rows * width + columns, minlength=height * width).reshape(height, width)
