"""The metrics as their papers define them, without chance level and interval."""

from __future__ import annotations

from typing import Any

import numpy as np

from dbes.results import PublishedMetric
from dbes.scoring import metrics
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.resampling import domain_ratio
from dbes.trace.types import RoutingShape


def published_values(totals: LayerCounts) -> dict[str, Any]:
    """The metrics as published, of the sums of each domain, see ``Counts.totals``."""
    shape = totals.shape
    experts = np.asarray(shape.experts)
    usage = metrics.usage_of(totals.by_domain(totals.hits))
    isolation, isolation_by_layer = metrics.published_domain_isolation(usage)
    sums = totals.stiffness
    margin = domain_ratio(sums.logit_margin, sums.logit_count, shape.document_domain, len(shape.domains))
    found: dict[str, Any] = {
        "rs": _by_layer(metrics.routing_specialization(usage, experts), shape),
        "ner": _by_domain(metrics.normalized_effective_rank(usage, experts), shape),
        "ner_entropy": _by_domain(metrics.normalized_effective_rank(usage, experts, entropy=True), shape),
        "di": _by_domain(isolation, shape, isolation_by_layer),
        "rss": _by_layer(margin, shape),
    }
    ngrams = totals.ngrams
    nothing = np.full((len(shape.domains), len(shape.layers)), np.nan)
    for name, counts in (("ngram_ratio", "alike"), ("ngram_group_ratio", "grouped")):
        found[name] = {}
        for index, size in enumerate(metrics.NGRAM_SIZES):
            ratio = nothing
            if ngrams is not None and (sums := getattr(ngrams, counts)) is not None:
                ratio = domain_ratio(sums[..., index], ngrams.windows[..., index], shape.document_domain, len(shape.domains))
            found[name][size] = _by_layer(ratio, shape)
    return found


def _by_layer(cells: np.ndarray, shape: RoutingShape) -> PublishedMetric:
    """A metric that is the mean over layers and domains of its cells [domains, layers]."""
    return _by_domain(cells.mean(axis=1), shape, cells)


def _by_domain(values: np.ndarray, shape: RoutingShape, cells: np.ndarray | None = None) -> PublishedMetric:
    layers = {} if cells is None else dict(zip(shape.layers, cells.mean(axis=0).tolist(), strict=True))
    return PublishedMetric(model=values.mean(), by_domain=dict(zip(shape.domains, values.tolist(), strict=True)), by_layer=layers)
