"""From a trace to its result: counts per document, estimates, specialists, companions, published values.

Nothing here needs a model, so the same code scores recordings of dbes, traces from elsewhere and the routers of reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dbes.results import DomainFacts, PublishedMetric, RecordingFacts, Result, Specialist
from dbes.scoring import descriptive, metrics
from dbes.scoring.counts import PHASES, Counts
from dbes.scoring.estimates import Estimate, calibrated_records, estimate_all, reference_scores
from dbes.scoring.facts import environment, model_facts, require_tokens, task_facts
from dbes.scoring.given import NO_TOKENS
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.resampling import domain_ratio, permuted_labels
from dbes.scoring.sampling import TokenSample, even_documents, example_tokens
from dbes.scoring.specialists import SpecialistTable, find_specialists
from dbes.scoring.stored import counts_of
from dbes.scoring.verdict import verdict
from dbes.trace.baselines import blocks_overlap
from dbes.trace.store import Trace
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, RoutingShape
from dbes.wording import counted

REPLICATED = ("specialization", "der", "domain_isolation", "stiffness", "ngram_expertise_2")
"""Metrics whose delete-one-document scores are kept, so that models can be compared on the same documents."""

FEW_SOURCES = 10
DOMINANT_SHARE = 0.25
LARGE_CHANCE = 0.2
"""Fewer source texts in a domain, a larger share of its tokens in one text, or a higher chance level (as a share of the ideal
router's value) than these make intervals unreliable; see tests/simulate.py."""

EXAMPLE_SPECIALISTS = 200
"""Specialists for which example tokens are looked up."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A result together with the arrays that are too large for it.

    ``replicates``: for each headline metric the model's score at every layer and, last, their mean, with each document left out,
    float32 [documents, layers + 1]; what paired comparisons of models are made of.
    """

    result: Result
    statistics: LayerCounts
    specialists: SpecialistTable
    arrays: dict[str, np.ndarray]
    replicates: dict[str, np.ndarray]


def score(trace: Trace | Counts, *, permutations: int = 1000, seed: int = 0, phase: int | None = None) -> Result:
    """Every metric of a trace, published and calibrated, per layer, per domain and for the model.

    Args:
        trace: or its counts. A trace on disk is counted once: its counts are kept beside it and used again.
        permutations: draws of the document-label null.
        seed: of the permutations, the reference router and the random halves.
        phase: score only tokens of this phase (0 prompt, 1 generated); None scores all.

    Raises:
        TraceError: the trace is incomplete, altered or inconsistent, or holds no token of the phase.
    """
    return score_tables(trace, permutations=permutations, seed=seed, phase=phase).result


def score_tables(trace: Trace | Counts, *, permutations: int = 1000, seed: int = 0, phase: int | None = None) -> Scores:
    """As ``score``, and the expert tables and matrices as arrays."""
    counts = counts_of(trace, phase=phase)
    require_tokens(counts)
    shape = counts.shape
    permutations = permutations if counts.by_documents else 0
    units = counts.by_unit()
    task = task_facts(counts)
    kept = counts.sample
    sample = None if kept is None else kept.of(even_documents(shape, counts.tokens)) if kept.whole else kept
    # A document without tokens (of this phase) says nothing: counted as one, it would move the jackknife and the null.
    used = np.flatnonzero(units.tokens > 0) if units.tokens.any() else np.arange(len(units.tokens))
    statistics = units.take(used).whole()
    if sample is not None:
        sample = replace(sample, routes=replace(sample.routes, document=np.searchsorted(used, shape.units[sample.routes.document])))
    labels = permuted_labels(statistics.shape.document_domain, permutations=permutations, seed=seed)
    reference = reference_scores(statistics, seed=seed)
    estimates = estimate_all(statistics, labels, reference, sign_flips=permutations, seed=seed)
    control = None
    if counts.control is not None:
        control_counts = counts.control.by_unit().take(used).whole()
        control = estimate_all(control_counts, labels, reference, sign_flips=0, seed=seed, control=True)
    records = [
        record
        for metric, estimate in estimates.by_metric.items()
        for record in calibrated_records(estimate, control.by_metric[metric] if control else None, statistics.shape)
    ]
    table = find_specialists(statistics, estimates.null, seed=seed)
    result = Result(
        status="ok",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_facts(counts),
        task=task,
        environment=environment(counts),
        settings={"permutations": permutations, "seed": seed, "phase": PHASES[counts.phase], "control": counts.control is not None}
        | ({} if counts.by_documents else {"documents": "unknown"}),
        recording=RecordingFacts(documents=sum(facts.documents for facts in task.domains.values()), tokens=int(counts.tokens.sum())),
        warnings=(
            *_model_notes(counts),
            *counts.notes,
            *_warnings(counts, statistics, task.domains, counts.texts.distinct),
            *_small_sample_warnings(statistics, estimates.by_metric["specialization"]),
        ),
        published=_published(statistics),
        calibrated=tuple(records),
        specialists=tuple(_specialist_records(table, counts, kept)),
        companions=_companions(statistics, table, sample, counts, seed=seed),
    )
    arrays = {"similarity": _similarity(statistics)}
    if sample is not None:
        arrays["coactivation"] = descriptive.coactivation(sample, shape)
        arrays["transitions"] = descriptive.transitions(sample, shape)
    return Scores(
        result=result.model_copy(update={"verdict": verdict(result)}),
        statistics=statistics,
        specialists=table,
        arrays=arrays,
        replicates={
            metric: estimates.by_metric[metric].left_out_score[:, -1].astype(np.float32) for metric in REPLICATED if counts.by_documents
        },
    )


def _model_notes(counts: Counts) -> Iterator[str]:
    """What loading the checkpoint told: tensors that were left out, an adapter that was merged."""
    for note in counts.provenance.get("notes") or ():
        yield f"model: {note}"


def _warnings(counts: Counts, statistics: LayerCounts, facts: Mapping[str, DomainFacts], distinct: Mapping[str, int]) -> Iterator[str]:
    shape = statistics.shape
    if len(shape.domains) == 1:
        yield "one domain only: specialization, effective rank and domain isolation compare domains and are undefined"
    for domain, found in facts.items():
        texts = distinct.get(domain, found.sources)
        if found.tokens == 0:
            yield f"domain {domain!r} has no tokens: its values, and all that compare it with other domains, are NaN"
        elif found.documents == 1:
            yield f"domain {domain!r} has one document only: values without interval"
        elif found.sources == 1:
            yield f"domain {domain!r} has one source text only, cut into {found.documents:,} documents: values without interval"
        elif texts < found.sources:
            words = "is one text, repeated" if texts == 1 else f"has {texts:,} different texts"
            yield (
                f"domain {domain!r} {words} in {counted(found.documents, 'document')}: copies are no further evidence, but intervals "
                "and p count them and are too small"
            )
    sizes = list(zip(shape.layers, shape.experts, shape.top_k, strict=True))
    crowded = [layer for layer, experts, k in sizes if blocks_overlap(len(shape.domains), experts, k)]
    if crowded and len(shape.domains) > 1:
        where = counted(len(crowded), "layer")
        yield f"fewer than domains x k experts at {where}: the ideal router's expert blocks overlap, its scores are below 1"
    full = [layer for layer, experts, k in sizes if experts <= k]
    if full:
        where = f"layer {full[0]}" if len(full) == 1 else f"layers {full}"
        yield f"every expert is used by every token at {where}: nothing is chosen there, values are NaN"
    if NO_TOKENS in counts.notes:
        return
    if statistics.ngrams is None:
        yield "the trace has no gate weights: the primary expert is unknown, n-gram values are NaN"
    if not statistics.stiffness.kept_count.any():
        yield "the trace has no selection scores: stiffness is NaN"


def _small_sample_warnings(statistics: LayerCounts, specialization: Estimate) -> Iterator[str]:
    """Where intervals were seen to fail in simulations although the permutation test holds."""
    shape = statistics.shape
    for index, domain in enumerate(shape.domains):
        tokens = statistics.tokens[shape.document_domain == index]
        if 1 < len(tokens) < FEW_SOURCES:
            yield f"domain {domain!r} has {len(tokens)} source texts: trust p, not the intervals"
        elif len(tokens) > 1 and tokens.max() > DOMINANT_SHARE * tokens.sum():
            yield f"one source text holds {tokens.max() / tokens.sum():.0%} of the tokens of domain {domain!r}: trust p, not the intervals"
    chance, ideal = specialization.null[-1, -1], specialization.reference[-1, -1]
    if chance > LARGE_CHANCE * ideal:
        yield (
            f"chance alone gives {chance / ideal:.0%} of the ideal router's specialization: too few tokens for so many experts; "
            "trust p, not the intervals or single specialists"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Published values


def _published(statistics: LayerCounts) -> dict[str, Any]:
    shape = statistics.shape
    experts = np.asarray(shape.experts)
    usage = metrics.usage_of(statistics.by_domain(statistics.hits))
    isolation, isolation_by_layer = metrics.published_domain_isolation(usage)
    sums = statistics.stiffness
    margin = domain_ratio(sums.logit_margin, sums.logit_count, shape.document_domain, len(shape.domains))
    found: dict[str, Any] = {
        "rs": _by_layer(metrics.routing_specialization(usage, experts), shape),
        "ner": _by_domain(metrics.normalized_effective_rank(usage, experts), shape),
        "ner_entropy": _by_domain(metrics.normalized_effective_rank(usage, experts, entropy=True), shape),
        "di": _by_domain(isolation, shape, isolation_by_layer),
        "rss": _by_layer(margin, shape),
    }
    ngrams = statistics.ngrams
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


# ---------------------------------------------------------------------------------------------------------------------
# Specialists and companions


def _specialist_records(table: SpecialistTable, counts: Counts, sample: TokenSample | None) -> Iterator[Specialist]:
    """Specialists by falling lift, the first of them with their most over-represented tokens."""
    found = np.argwhere(table.specialist)
    order = np.argsort(-table.lift[tuple(found.T)], kind="stable")
    ranked = found[order]
    examples = example_tokens(sample, counts.shape, counts.vocabulary, ranked[:EXAMPLE_SPECIALISTS])
    for index, (domain, column, expert) in enumerate(ranked):
        at = (domain, column, expert)
        yield Specialist(
            layer=counts.shape.layers[column],
            expert=int(expert),
            domain=counts.shape.domains[domain],
            hits=int(table.hits[at]),
            share=float(table.share[at]),
            lift=float(table.lift[at]),
            lift_low=float(table.lift_low[at]),
            lift_high=float(table.lift_high[at]),
            z=float(table.z[at]),
            p=float(table.p[at]),
            q=float(table.q[at]),
            tokens=examples[index] if index < len(examples) else (),
        )


def _similarity(statistics: LayerCounts) -> np.ndarray:
    """Cosine similarity of the domains at each layer with unbiased norms, [layers, domains, domains]."""
    hits = statistics.by_domain(statistics.hits)
    gram = metrics.grams(metrics.usage_of(hits))
    return metrics.unbiased_cosines(gram, statistics.by_domain(statistics.active), hits.sum(axis=-1))


def _companions(
    statistics: LayerCounts,
    table: SpecialistTable,
    sample: TokenSample | None,
    counts: Counts,
    *,
    seed: int,
) -> dict[str, Any]:
    shape = statistics.shape
    experts, top_k = np.asarray(shape.experts), np.asarray(shape.top_k)
    usage = metrics.usage_of(statistics.by_domain(statistics.hits))
    real = np.arange(shape.width) < experts[:, None]
    neighbours = {
        name: domain_ratio(part, statistics.neighbours, shape.document_domain, len(shape.domains)).mean(axis=0)
        for name, part in (("any", statistics.overlap_any), ("share", statistics.overlap_share))
    }
    by_layer: dict[str, np.ndarray] = {
        "load": metrics.load_divergence(usage, experts),
        "rs_exact": metrics.domain_information(usage) + metrics.load_divergence(usage, experts),
        "utilization": metrics.utilization(usage, experts),
        "max_violation": metrics.max_violation(usage, experts),
        "load_entropy": metrics.load_entropy(usage, experts),
        "dead_experts": ((statistics.hits.sum(axis=0) == 0) & real).sum(axis=1),
        "purity": metrics.purity(usage),
        "within_domain_similarity": descriptive.split_half_similarity(statistics, seed=seed).mean(axis=0),
        "neighbour_overlap_any": neighbours["any"],
        "neighbour_overlap_share": neighbours["share"],
        "neighbour_overlap_any_uniform": metrics.overlap_chance(experts, top_k),
        **_stiffness_companions(statistics),
    }
    identity = descriptive.token_identity(_first_tokens(sample), shape, seed=seed) if sample is not None else None
    if identity is not None:
        by_layer |= {f"information_{name}": values for name, values in identity.items()}
    found: dict[str, Any] = {
        "by_layer": {name: dict(zip(map(str, shape.layers), _plain(values), strict=True)) for name, values in by_layer.items()},
        "model": {name: _plain(np.asarray(values, float).mean()) for name, values in by_layer.items()},
        "purity_chance": 1 / len(shape.domains),
        "similarity": {"domains": list(shape.domains), "mean_over_layers": _plain(_similarity(statistics).mean(axis=0))},
        "specialists": {
            "tests": int((~np.isnan(table.p)).sum()),
            "specialists": int(table.specialist.sum()),
            "by_domain": dict(zip(shape.domains, table.specialist.sum(axis=(1, 2)).tolist(), strict=True)),
            "unknown": int(table.unknown.sum()),
            "significant_not_replicated": int(((table.q <= 0.05) & (table.lift > 1) & ~table.replicated).sum()),
        },
        "sample_tokens": {
            "coactivation_and_transitions": sample.tokens if sample is not None else 0,
            "token_identity": _first_tokens(sample).tokens if sample is not None else 0,
        },
        "ngram": _ngram_companions(statistics),
        "slots_without_expert": dict(counts.provenance.get("slots_without_expert", {})),
    }
    return found | ({"distinct_texts": counts.texts.distinct} if counts.texts.digests else {})


def _first_tokens(sample: TokenSample) -> TokenSample:
    """Every n-th document of the sample, so that the token-identity control stays cheap."""
    if sample.tokens <= descriptive.IDENTITY_TOKENS:
        return sample
    step = -(-sample.tokens // descriptive.IDENTITY_TOKENS)
    order = np.unique(sample.routes.document, return_inverse=True)[1]
    return TokenSample(routes=sample.routes.take(np.flatnonzero(order % step == 0)))


def _stiffness_companions(statistics: LayerCounts) -> dict[str, np.ndarray]:
    sums, shape = statistics.stiffness, statistics.shape

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


def _ngram_companions(statistics: LayerCounts) -> dict[str, Any]:
    """Means over layers and domains: the ratio without windows of one repeated token, and the group ratio above chance g^n."""
    ngrams, shape = statistics.ngrams, statistics.shape
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
