"""Routers that need no model: the ideal domain router, and the baselines that must score 0.

Each emits the same ``Trace`` type as a recorded model, with the same documents and lengths, and goes through the same code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape, TokenRoutes, storage_dtype

Router = Literal["reference", "uniform", "collapsed", "hash"]
ROUTERS: tuple[Router, ...] = get_args(Router)

DRAWS = 1 << 22
"""Random numbers drawn at a time."""


def expert_blocks(domains: int, experts: int, top_k: int) -> list[np.ndarray]:
    """Experts of each domain under the ideal router: contiguous blocks, each with at least k experts, whose sizes differ by at most one.

    Where domains * k > experts they overlap: blocks of k are dealt round robin, domain d takes experts d k .. d k + k - 1 modulo E, so that
    all experts serve equally many domains but for one. See `dbes.scoring.reference` for what no router exceeds.
    """
    if not blocks_overlap(domains, experts, top_k):
        return np.array_split(np.arange(experts), domains)
    return [(domain * top_k + np.arange(top_k)) % experts for domain in range(domains)]


def blocks_overlap(domains: int, experts: int, top_k: int) -> bool:
    """Whether the ideal router has to share experts between domains."""
    return experts // domains < top_k


def ideal_trace(shape: RoutingShape, tokens: np.ndarray, *, seed: int) -> Trace:
    """The ideal domain router on documents of ``tokens`` [documents] tokens: k experts drawn evenly inside the domain's block."""
    return baseline_trace(shape, tokens, router="reference", seed=seed)


def baseline_trace(
    shape: RoutingShape,
    tokens: np.ndarray,
    *,
    router: Router,
    seed: int,
    token_ids: np.ndarray | None = None,
    phase: np.ndarray | None = None,
) -> Trace:
    """A router without a model, on documents of the given lengths.

    Args:
        shape: layers, sizes and domains of the trace to imitate.
        tokens: [documents], tokens of each document.
        router: ``reference`` draws inside the domain's block; ``uniform`` among all experts; ``collapsed`` always takes experts
            0..k-1; ``hash`` takes k experts fixed by the token id (needs ``token_ids``).
        token_ids, phase: int [tokens], in order of documents.
    """
    document = np.repeat(np.arange(len(tokens), dtype=np.int32), tokens)
    positions = (np.arange(len(document)) - np.repeat(np.cumsum(tokens) - tokens, tokens)).astype(np.int32)
    rng = np.random.default_rng(seed)
    missing = np.iinfo(storage_dtype(shape.width)).max
    ids = np.full((len(document), len(shape.layers), shape.slots), missing, storage_dtype(shape.width))
    weights = np.zeros(ids.shape, np.float16)
    domain = shape.document_domain[document]
    for column, (experts, k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
        # The draw order is random, so falling weights make every chosen expert equally often the primary one.
        weights[:, column, :k] = np.arange(k, 0, -1) / (k * (k + 1) / 2)
        if router == "collapsed":
            ids[:, column, :k] = np.arange(k)
        elif router == "hash":
            if token_ids is None:
                raise ValueError("the hash router needs token ids")
            kinds, which = np.unique(token_ids, return_inverse=True)
            ids[:, column, :k] = _choices(len(kinds), np.arange(experts), k, rng)[which]
        elif router == "uniform":
            ids[:, column, :k] = _choices(len(document), np.arange(experts), k, rng)
        else:
            for index, block in enumerate(expert_blocks(len(shape.domains), experts, k)):
                rows = np.flatnonzero(domain == index)
                ids[rows, column, :k] = _choices(len(rows), block, k, rng)
    routes = TokenRoutes(ids=ids, document=document, positions=positions, weights=weights, token_ids=token_ids, phase=phase)
    return Trace(shape=shape, provenance={"model": f"{router} router", "seed": seed}, loaded=(routes,))


def imitate(trace: Trace, router: Router, *, seed: int) -> Trace:
    """The documents, tokens and sizes of a trace, routed by a router without a model."""
    tokens = np.zeros(len(trace.shape.document_domain), np.int64)
    ids: list[np.ndarray] = []
    phases: list[np.ndarray] = []
    for routes in trace:
        tokens += np.bincount(routes.document, minlength=len(tokens))
        if routes.token_ids is not None:
            ids.append(routes.token_ids)
        if routes.phase is not None:
            phases.append(routes.phase)
    token_ids = np.concatenate(ids) if ids else None
    phase = np.concatenate(phases) if phases else None
    made = baseline_trace(trace.shape, tokens, router=router, seed=seed, token_ids=token_ids, phase=phase)
    about = {key: trace.provenance[key] for key in ("task", "tokenizer") if key in trace.provenance}
    return replace(made, provenance={**made.provenance, **about}, vocabulary=trace.vocabulary)


def _choices(rows: int, experts: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct experts drawn evenly, in random order, [rows, k]."""
    chosen = np.empty((rows, k), experts.dtype)
    size = max(1, DRAWS // len(experts))
    for start in range(0, rows, size):
        keys = rng.random((min(size, rows - start), len(experts)), dtype=np.float32)
        nearest = np.argpartition(keys, k - 1, axis=1)[:, :k] if k < len(experts) else np.tile(np.arange(len(experts)), (len(keys), 1))
        # argpartition leaves the k in an order that depends on their keys; sorting by key makes it random.
        order = np.argsort(np.take_along_axis(keys, nearest, axis=1), axis=1)
        chosen[start : start + size] = experts[np.take_along_axis(nearest, order, axis=1)]
    return chosen
