"""What stands beside the metrics in a result: load, similarity, purity, overlap of neighbours, stiffness, n-grams, token identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dbes.scoring import descriptive, metrics
from dbes.scoring.contextual import ContextualEstimates
from dbes.scoring.counts import Counts
from dbes.scoring.decoding import Decoded, Decoder, decoded_words
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.layers import AllLayers
from dbes.scoring.placebo import Placebo
from dbes.scoring.resampling import domain_ratio
from dbes.scoring.sampling import TokenSample
from dbes.scoring.specialists import FALSE_DISCOVERY_RATE, LIFTS, listed_specialists
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, RoutingShape


def similarity(totals: LayerCounts) -> np.ndarray:
    """Cosine similarity of the domains at each layer with unbiased norms, [layers, domains, domains]."""
    hits = totals.by_domain(totals.hits)
    return metrics.unbiased_cosines(metrics.unbiased_grams(metrics.usage_of(hits), totals.by_domain(totals.active), hits.sum(axis=-1)))


def companions(found: AllLayers, sample: TokenSample | None, counts: Counts, *, seed: int) -> dict[str, Any]:
    """The companion totals of a result.

    Args:
        found: what is known of all layers.
        sample: its ``document`` numbers the documents of ``counts``.
        counts: of the source texts that have tokens.
    """
    totals, table = found.totals, found.specialists
    shape = totals.shape
    experts, top_k = np.asarray(shape.experts), np.asarray(shape.top_k)
    usage = metrics.usage_of(totals.by_domain(totals.hits))
    real = np.arange(shape.width) < experts[:, None]
    neighbours = {
        name: domain_ratio(part, totals.neighbours, shape.document_domain, len(shape.domains)).mean(axis=0)
        for name, part in (("any", totals.overlap_any), ("share", totals.overlap_share))
    }
    by_layer: dict[str, np.ndarray] = {
        "load": metrics.load_divergence(usage, experts),
        "rs_exact": metrics.domain_information(usage) + metrics.load_divergence(usage, experts),
        "utilization": metrics.utilization(usage, experts),
        "max_violation": metrics.max_violation(usage, experts),
        "load_entropy": metrics.load_entropy(usage, experts),
        "dead_experts": ((totals.hits.sum(axis=0) == 0) & real).sum(axis=1),
        "der_entropy": metrics.entropy_rank(usage, experts),
        "purity": metrics.purity(usage),
        "within_domain_similarity": found.halves.mean(axis=0),
        "neighbour_overlap_any": neighbours["any"],
        "neighbour_overlap_share": neighbours["share"],
        "neighbour_overlap_any_uniform": metrics.overlap_chance(experts, top_k),
        **_stiffness_companions(totals),
    }
    identity = descriptive.token_identity(_first_tokens(sample), counts.shape, seed=seed) if sample is not None else None
    if identity is not None:
        by_layer |= {f"information_{name}": values for name, values in identity.items()}
    told: dict[str, Any] = {
        "by_layer": {name: dict(zip(map(str, shape.layers), _plain(values), strict=True)) for name, values in by_layer.items()},
        "model": {name: _plain(np.asarray(values, float).mean()) for name, values in by_layer.items()},
        "purity_chance": 1 / len(shape.domains),
        "similarity": {"domains": list(shape.domains), "mean_over_layers": _plain(similarity(totals).mean(axis=0))},
        "specialists": {
            "tests": int((~np.isnan(table.p)).sum()),
            "specialists": int(table.specialist.sum()),
            "not_listed": int(table.specialist.sum()) - len(listed_specialists(table)),
            "by_domain": dict(zip(shape.domains, table.specialist.sum(axis=(1, 2)).tolist(), strict=True)),
            "by_lift": {f"{lift:g}": int(table.at_least(lift).sum()) for lift in LIFTS},
            "unknown": int(table.unknown.sum()),
            "significant_not_replicated": int(((table.q <= FALSE_DISCOVERY_RATE) & ~table.replicated).sum()),
        },
        "sample_tokens": {
            "coactivation_and_transitions": sample.tokens if sample is not None else 0,
            "token_identity": _first_tokens(sample).tokens if sample is not None else 0,
        },
        "ngram": _ngram_companions(totals),
        "slots_without_expert": dict(counts.provenance.get("slots_without_expert", {})),
    }
    if found.decoder is not None:
        words = decoded_words(sample, counts.shape.document_domain, len(shape.domains), seed=seed)
        told["decoding"] = _decoding_companions(found.decoder, words, shape.layers)
    if found.placebo is not None:
        told["placebo"] = _placebo_companions(found.placebo)
    return told | ({"distinct_texts": counts.texts.distinct} if counts.texts.digests else {})


def _decoding_companions(decoder: Decoder, words: Decoded, layers: Sequence[int]) -> dict[str, Any]:
    """How often the domain of an unseen text is named, beside chance and beside what its words alone tell."""
    beside = {"chance": 1 / decoder.domains, "bag_of_words": words.accuracy, "bag_of_words_texts": words.texts}

    def told(found: Decoded) -> dict[str, Any]:
        return {name: _plain(value) for name, value in (asdict(found) | beside).items()}

    by_layer = zip(map(str, layers), decoder.layers, strict=True)
    return {"model": told(decoder.together()), "by_layer": {layer: told(found) for layer, found in by_layer}}


def _placebo_companions(placebo: Mapping[str, Placebo]) -> dict[str, Any]:
    """For each kind of split what each domain shows, and under ``summary`` what all domains show together."""

    def plain(cells: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _plain(value) for name, value in cells.items()}

    told: dict[str, Any] = {kind: {name: plain(asdict(split)) for name, split in each.domains.items()} for kind, each in placebo.items()}
    summary = {kind: plain(asdict(each) | {"domains": len(each.domains), "rejected": len(each.rejected)}) for kind, each in placebo.items()}
    return told | {"summary": summary}


def covered(beyond: ContextualEstimates | None, shape: RoutingShape) -> dict[str, Any]:
    """Shares of the tokens of the sample that have another occurrence of their token, and of their position, in another source text."""
    if beyond is None:
        return {}
    told = {
        key: {"all": _plain(shares[-1]), "by_domain": dict(zip(shape.domains, _plain(shares[:-1]), strict=True))}
        for key, shares in beyond.covered.items()
    }
    return {"surrogate_covered": told}


def _first_tokens(sample: TokenSample) -> TokenSample:
    """Every n-th document of the sample, so that the token-identity control stays cheap."""
    if sample.tokens <= descriptive.IDENTITY_TOKENS:
        return sample
    step = -(-sample.tokens // descriptive.IDENTITY_TOKENS)
    order = np.unique(sample.routes.document, return_inverse=True)[1]
    return TokenSample(routes=sample.routes.take(np.flatnonzero(order % step == 0)))


def _stiffness_companions(totals: LayerCounts) -> dict[str, np.ndarray]:
    sums, shape = totals.stiffness, totals.shape

    def mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return domain_ratio(total, count, shape.document_domain, len(shape.domains)).mean(axis=0)

    found = {
        "selection_margin": mean(sums.selection_margin, sums.selection_count),
        "scaled_margin": mean(sums.scaled_margin, sums.selection_count),
    }
    for index, scale in enumerate(NOISE_SCALES):
        found[f"set_stability_{scale:g}"] = mean(sums.unchanged[..., index], sums.kept_count)
        found[f"expected_overlap_{scale:g}"] = mean(sums.kept[..., index], sums.kept_count)
    for index, width in enumerate(LOGIT_NOISE):
        found[f"rss_stability_{width:g}"] = mean(sums.logit_stable[..., index], sums.stable_count)
    return found


def _ngram_companions(totals: LayerCounts) -> dict[str, Any]:
    """Means over layers and domains: the ratio without windows of one repeated token, and the group ratio above chance g^n."""
    ngrams, shape = totals.ngrams, totals.shape
    if ngrams is None:
        return {}
    count = len(shape.domains)
    found: dict[str, Any] = {}
    share = np.full((count, len(shape.layers)), np.nan)
    if ngrams.groups is not None and ngrams.in_group is not None:
        known = ngrams.primaries.sum(axis=-1, dtype=np.float64)
        share = domain_ratio(ngrams.in_group, known, shape.document_domain, count)
        found = {"group_share": _plain(share.mean()), "group_size": _plain(ngrams.groups.sum(axis=-1).mean())}
    for index, size in enumerate(metrics.NGRAM_SIZES):
        if ngrams.grouped is not None:
            grouped = domain_ratio(ngrams.grouped[..., index], ngrams.windows[..., index], shape.document_domain, count)
            found[f"group_excess_{size}"] = _plain((grouped - share**size).mean())
        if ngrams.distinct_windows is not None and ngrams.distinct_alike is not None:
            varied = domain_ratio(ngrams.distinct_alike[..., index], ngrams.distinct_windows[..., index], shape.document_domain, count)
            found[f"ratio_without_repeated_tokens_{size}"] = _plain(varied.mean())
    return found


def _plain(values: Any) -> Any:
    """Arrays as lists for JSON, NaN as None."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [_plain(value) for value in values]
    number = values.item() if hasattr(values, "item") else values
    return None if isinstance(number, float) and not np.isfinite(number) else number
