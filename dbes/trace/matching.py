"""Texts cut so that every domain has the same distribution of length, and so of the position of its tokens in the text.

A router that looks at nothing but the position scores above 0 where the domains' texts differ in length; on cut texts it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dbes.trace.store import Trace
from dbes.trace.types import TEMPLATE

MATCHED = "matched"
"""Key of the provenance: how many documents there are and how many were cut, tokens that are left and that there were."""


def matched_lengths(length: np.ndarray, document_domain: np.ndarray) -> np.ndarray:
    """Tokens to keep of each document, int64 [documents]: of the documents of a domain the quantile that is lowest among the domains.

    Where domains have equally many documents, each then has exactly the same lengths; else the same distribution in steps of single
    documents. Documents without tokens, and domains without such documents, are left out of account.

    Args:
        length: int [documents], tokens of each.
    """
    kept = np.zeros(len(length), np.int64)
    ranked = {}
    for domain in np.unique(document_domain[length > 0]):
        members = np.flatnonzero((document_domain == domain) & (length > 0))
        ranked[domain] = members[np.argsort(length[members], kind="stable")]
    for own in ranked.values():
        place = 2 * np.arange(len(own)) + 1  # middle of each document's share of its domain, in halves of it
        quantiles = [length[other[place * len(other) // (2 * len(own))]] for other in ranked.values()]
        kept[own] = np.min(quantiles, axis=0)
    return kept


def match_lengths(trace: Trace, *, phase: int | None = None) -> Trace:
    """The trace with its documents cut at the end to ``matched_lengths``; nothing is copied, shards are cut as they are read.

    Args:
        phase: match the lengths of the tokens of this phase (prompts begin where documents do); None: of all.

    Raises:
        TraceError: a shard is missing, altered or inconsistent.
    """
    length = np.zeros(len(trace.shape.document_domain), np.int64)
    for routes in trace.with_columns("phase"):
        of_text = None if routes.phase is None else routes.phase != TEMPLATE if phase is None else routes.phase == phase
        chosen = slice(None) if of_text is None else of_text
        np.maximum.at(length, routes.document[chosen], routes.positions[chosen] + 1)
    kept = matched_lengths(length, trace.shape.document_domain)
    told = {
        "documents": int((length > 0).sum()),
        "documents_cut": int((kept < length).sum()),
        "tokens": int(kept.sum()),
        "tokens_before": int(length.sum()),
    }
    return cut(trace, kept, {MATCHED: told})


def cut(trace: Trace, kept: np.ndarray, told: Mapping[str, Any]) -> Trace:
    """The trace with the tokens before a position of each document, int64 [documents]; ``told`` is added to its provenance."""
    return Trace(
        shape=trace.shape,
        provenance={**trace.provenance, **told},
        control=None if trace.control is None else cut(trace.control, kept, told),
        vocabulary=trace.vocabulary,
        parts=(replace(trace, control=None),),
        kept=kept,
    )
