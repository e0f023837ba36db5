"""From a trace to its result: counts per document, estimates, specialists, companions, published values.

Nothing here needs a model, so the same code scores recordings of dbes, traces from elsewhere and the routers of reference.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
from threadpoolctl import threadpool_limits

from dbes.errors import ResultError, SettingError, TraceError
from dbes.files import locked
from dbes.results import METRICS_VERSION, DomainFacts, RecordingFacts, Result, Specialist
from dbes.scoring import descriptive
from dbes.scoring.companions import companions, covered, similarity
from dbes.scoring.contextual import contextual_estimates
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts
from dbes.scoring.estimates import Estimate, calibrated_records
from dbes.scoring.facts import environment, model_facts, require_tokens, task_facts
from dbes.scoring.given import NO_TOKENS
from dbes.scoring.grouping import Grouping
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.layers import score_layers
from dbes.scoring.loops import find_loops, without_loops
from dbes.scoring.own import Metric, checked, own_warnings
from dbes.scoring.placebo import placebo_warnings
from dbes.scoring.published import published_values
from dbes.scoring.sampling import TokenSample, even_documents, example_tokens
from dbes.scoring.specialists import SpecialistTable, listed_specialists
from dbes.scoring.stored import COUNTS
from dbes.scoring.stratified import checked_kinds, strata_of
from dbes.scoring.tables import save_scores
from dbes.scoring.verdict import verdict
from dbes.text import unknown
from dbes.trace.baselines import ROUTERS, Router, blocks_overlap, imitate
from dbes.trace.matching import MATCHED, match_lengths
from dbes.trace.store import TRACE_FOLDER, Trace
from dbes.trace.types import GENERATED, PHASES, RoutingShape
from dbes.wording import counted, span

RECORDED = "recorded"

UNMATCHED = "none"
MATCHES = (UNMATCHED, "length")

SURROGATES = {"token": "lexical", "bigram": "bigram"}
"""What ``lexical`` values are made of, and the key of it in ``dbes.scoring.surrogates``."""

REPLICATED = ("specialization", "der", "domain_isolation", "stiffness", "ngram_expertise_2")
"""Metrics whose delete-one-document scores are kept, so that models can be compared on the same documents."""

EXCESS = "_excess"
"""Follows the name of a metric whose excess over the random router is kept in the same way."""

FEW_SOURCES = 8
DOMINANT_SHARE = 0.25
LARGE_CHANCE = 0.1
"""Fewer source texts in a domain, a larger share of its tokens in one text, or a higher chance level (as a share of the ideal
router's value) than these make intervals unreliable; see tests/simulate.py."""

FEW_OF_TWO, UNLIKE_LENGTHS = 20, 5
"""With two domains, one of fewer source texts than this, and texts so many times longer in one of them, p was seen to be too small."""

EXAMPLE_SPECIALISTS = 200
"""Specialists for which example tokens are looked up."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A result together with the arrays that are too large for it.

    ``counts``: of the source texts that have tokens; ``totals``: their sums for each domain.
    ``replicates``: for each headline metric the model's score at every layer and, last, their mean, with each document left out,
    float32 [documents, layers + 1], and the same of its excess where there is a random router; paired comparisons are made of them.
    ``left_out``: the shape of these documents, or of the groups that stand for them where they are many.
    """

    result: Result
    counts: Counts
    totals: LayerCounts
    specialists: SpecialistTable
    arrays: dict[str, np.ndarray]
    replicates: dict[str, np.ndarray]
    left_out: RoutingShape


def score(
    trace: Trace | Counts | str | Path,
    *,
    router: str = RECORDED,
    phase: str = PHASES[None],
    match: str = UNMATCHED,
    surrogate: str = "token",
    drop_loops: bool = False,
    seed: int = 0,
    permutations: int = 1000,
    metrics: Sequence[Metric] = (),
    strata: Sequence[str] = (),
    output_path: str | Path | None = None,
) -> Result:
    """Every metric of a trace, published and calibrated, per layer, per domain and for the model; needs no model.

    Args:
        trace: or its counts, or the folder of either. A trace on disk is counted once: its counts are kept beside it and used again.
        router: ``recorded``, or score the documents as another router would route them: ``reference`` (the ideal domain router),
            ``uniform``, ``collapsed`` or ``hash``.
        phase: which tokens to score: ``all``, ``prompt`` or ``generated``.
        match: ``none``, or ``length``, which cuts texts at the end, so that every domain has the same distribution of length and
            position: a check of what these do to the score. Result and page are of the cut texts, and not compared with others.
        surrogate: what ``lexical`` and ``contextual`` are beside: a router that looks at the ``token`` alone, or at the ``bigram`` of the
            token and the one before it.
        drop_loops: leave the generated text of answers that repeat themselves out.
        seed: of the permutations, the reference router and the random halves.
        permutations: shuffles of the documents' domain labels that make the chance level.
        metrics: of your own, see `dbes.Metric`.
        strata: score strata of tokens too, and test whether they differ: ``entropy``, ``position``, ``token-class``, ``frequency``.
        output_path: folder to write result and tables to.

    Raises:
        SettingError: there is no such router, phase, match or surrogate; a metric gives no numbers of the right shape; ``match``
            with the generated text alone, which begins where the prompt ends.
        TraceError: the trace is incomplete, altered or inconsistent, or holds no token of the phase; a router, a match or strata for
            counts, which know no single tokens.
        ResultError: ``output_path`` holds an evaluation with its recorded routes.
        FileError: it cannot be written, or another run is writing there.
    """
    code = _asked(router, phase, match, surrogate)
    target = None if output_path is None else Path(output_path)
    with nullcontext() if target is None else locked(target):
        routes = read_routes(trace) if isinstance(trace, str | Path) else trace
        if target is not None and (target / TRACE_FOLDER).is_dir():
            raise ResultError(f"{target}: holds an evaluation with its recorded routes; choose another --output-path")
        if router != RECORDED:
            if isinstance(routes, Counts):
                raise TraceError(f"these are counts; router {router} needs the trace, whose documents it routes")
            routes = imitate(routes, cast(Router, router), seed=seed)
        asked: dict[str, object] = {"trace": str(trace)} if isinstance(trace, str | Path) else {}
        notes: tuple[str, ...] = ()
        if drop_loops:
            if isinstance(routes, Counts):
                raise TraceError("these are counts; drop_loops needs the trace, whose answers it reads")
            loops = find_loops(routes)
            asked, routes = asked | {"drop_loops": True}, without_loops(routes, loops)
            notes += (f"{counted(int(loops.looping.sum()), 'answer')} that repeat themselves were left out",)
        if match != UNMATCHED:
            if isinstance(routes, Counts):
                raise TraceError(f"these are counts; match {match} needs the trace, whose texts it cuts")
            routes = match_lengths(routes, phase=code)
            found = routes.provenance[MATCHED]
            asked |= {"match": match, MATCHED: found}
            notes += (
                f"{found['documents_cut']:,} of {counted(found['documents'], 'document')} were cut, so that all domains have the same "
                f"lengths: {found['tokens']:,} of {found['tokens_before']:,} tokens are left",
            )
        scores = score_tables(routes, permutations=permutations, seed=seed, phase=code, surrogate=surrogate, metrics=metrics, strata=strata)
        result = scores.result
        result = result.model_copy(update={"settings": result.settings | asked, "warnings": (*notes, *result.warnings)})
        scores = replace(scores, result=result)
        return scores.result if target is None else save_scores(scores, target, scores.result)


def _asked(router: str, phase: str, match: str, surrogate: str) -> int | None:
    """The code of the phase, of options that can be asked for."""
    numbers = {name: number for number, name in PHASES.items()}
    known: dict[str, tuple[str, Iterable[str]]] = {
        "phase": (phase, numbers),
        "router": (router, (RECORDED, *ROUTERS)),
        "match": (match, MATCHES),
        "surrogate": (surrogate, SURROGATES),
    }
    for kind, (given, names) in known.items():
        if given not in names:
            raise SettingError(unknown(kind, given, names))
    if match != UNMATCHED and numbers[phase] == GENERATED:
        raise SettingError("match: generated text begins where the prompt ends, its positions cannot be matched; choose another phase")
    return numbers[phase]


def read_routes(folder: str | Path) -> Trace | Counts:
    """The counts or the trace in a folder.

    Raises:
        TraceError: there is neither, or it is incomplete or altered.
    """
    return Counts.load(folder) if (Path(folder) / COUNTS).is_file() else Trace.load(folder)


@threadpool_limits.wrap(limits=1, user_api="blas")
def score_tables(
    trace: Trace | Counts,
    *,
    permutations: int = 1000,
    seed: int = 0,
    phase: int | None = None,
    surrogate: str = "token",
    metrics: Sequence[Metric] = (),
    strata: Sequence[str] = (),
) -> Scores:
    """As ``score``, and the expert tables and matrices as arrays.

    Args:
        phase: 0 prompt, 1 generated, None all.
    """
    metrics, kinds = checked(metrics), checked_kinds(strata)
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
    units = units.take(used)
    grouping = Grouping.of(units.shape)
    unit_group = None
    if grouping is not None:
        unit_group = np.zeros(int(shape.units.max()) + 1, np.int64)
        unit_group[used] = grouping.groups.group
    beyond = None if sample is None else contextual_estimates(sample, shape, lexical=SURROGATES[surrogate], unit_group=unit_group)
    if sample is not None:
        sample = replace(sample, routes=replace(sample.routes, document=np.searchsorted(used, shape.units[sample.routes.document])))
    found = score_layers(units, permutations=permutations, seed=seed, metrics=metrics)
    totals, table = found.totals, found.specialists
    result = Result(
        metrics_version=METRICS_VERSION,
        status="ok",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_facts(counts),
        task=task,
        environment=environment(counts),
        settings={"permutations": permutations, "seed": seed, "surrogate": surrogate} | _settings(counts, kinds, grouping),
        recording=RecordingFacts(documents=sum(facts.documents for facts in task.domains.values()), tokens=int(counts.tokens.sum())),
        warnings=(
            *_model_notes(counts),
            *counts.notes,
            *_warnings(counts, totals, task.domains),
            *_small_sample_warnings(units, found.estimates["specialization"]),
            *placebo_warnings(found.placebo or {}),
            *own_warnings(metrics, found.problems, shape.layers),
        ),
        published=published_values(totals),
        calibrated=tuple(
            record
            for metric, each in found.estimates.items()
            for record in calibrated_records(metric, each, beyond and beyond.metrics.get(metric), units.shape)
        ),
        own_metrics={metric.name: metric.facts for metric in metrics},
        strata=strata_of(trace, kinds, permutations=permutations, seed=seed, phase=phase),
        specialists=tuple(_specialist_records(table, counts, kept)),
        companions=companions(found, sample, units, seed=seed) | covered(beyond, shape),
    )
    arrays = {"similarity": similarity(totals)}
    if sample is not None:
        arrays["coactivation"] = descriptive.coactivation(sample, shape)
        arrays["transitions"] = descriptive.transitions(sample, shape)
    return Scores(
        result=result.model_copy(update={"verdict": verdict(result)}),
        counts=units,
        totals=totals,
        specialists=table,
        arrays=arrays,
        replicates=_replicates(found.estimates, metrics, control=counts.control is not None) if counts.by_documents else {},
        left_out=found.left_out,
    )


def _settings(counts: Counts, kinds: Sequence[str], grouping: Grouping | None) -> dict[str, object]:
    found: dict[str, object] = {"phase": PHASES[counts.phase], "control": len(counts.controls)}
    found |= {} if counts.by_documents else {"documents": "unknown"}
    found |= {"strata": list(kinds)} if kinds else {}
    return found | ({} if grouping is None else {"groups": len(grouping.groups.label)})


def _replicates(estimates: Mapping[str, Estimate], metrics: Sequence[Metric], *, control: bool) -> dict[str, np.ndarray]:
    names = (*REPLICATED, *(metric.name for metric in metrics))
    found = {name: estimates[name].replicates for name in names}
    return found | ({f"{name}{EXCESS}": estimates[name].excess_replicates for name in names} if control else {})


def _model_notes(counts: Counts) -> Iterator[str]:
    """What loading the checkpoint told (tensors that were left out, an adapter that was merged), or importing its routing."""
    for note in counts.provenance.get("notes") or ():
        yield f"model: {note}"
    for note in (counts.provenance.get("import") or {}).get("told") or ():
        yield f"import: {note}"


def _warnings(counts: Counts, totals: LayerCounts, facts: Mapping[str, DomainFacts]) -> Iterator[str]:
    shape, distinct = counts.shape, counts.texts.distinct
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
        yield f"fewer than domains x k experts at {where}: the ideal router's expert blocks overlap, its effective rank scores below 1"
    full = [layer for layer, experts, k in sizes if experts <= k]
    if full:
        where = f"layer {full[0]}" if len(full) == 1 else f"layers {full}"
        yield f"every expert is used by every token at {where}: nothing is chosen there, values are NaN"
    if NO_TOKENS in counts.notes:
        return
    if totals.ngrams is None:
        yield "the trace has no gate weights: the primary expert is unknown, n-gram values are NaN"
    if not totals.stiffness.kept_count.any():
        yield "the trace has no selection scores: stiffness is NaN"


def _small_sample_warnings(counts: Counts, specialization: Estimate) -> Iterator[str]:
    """Where intervals were seen to fail in simulations, and how far."""
    shape = counts.shape
    tokens = {domain: counts.tokens[shape.document_domain == index] for index, domain in enumerate(shape.domains)}
    few = {domain: len(each) for domain, each in tokens.items() if 1 < len(each) < FEW_SOURCES}
    if few:
        names = f"domain {next(iter(few))!r} has" if len(few) == 1 else f"{len(few)} domains have"
        yield (
            f"{names} fewer than {FEW_SOURCES} source texts ({span(list(few.values()))}): in simulations of 4 texts that differ strongly "
            "from each other, 95 % intervals held the truth in 85 to 93 % and specialization was up to 0.01 nats too high; "
            f"from {FEW_SOURCES} texts on they held it in 90 to 99 %"
        )
    lengths, sizes = [each.mean() for each in tokens.values() if len(each)], [len(each) for each in tokens.values()]
    if len(tokens) == 2 and min(sizes) < FEW_OF_TWO and max(lengths) > UNLIKE_LENGTHS * min(lengths):
        yield (
            f"two domains of {span(sizes)} source texts, on average {max(lengths) / min(lengths):.0f} times longer in one: in simulations "
            "of 8 texts that differ strongly from each other, ten times longer in one domain, routers that use experts alike in both were "
            "told apart (p <= 0.05) in up to 19 % of runs; look at `dbes score --match length` too"
        )
    for domain, each in tokens.items():
        if len(each) >= FEW_SOURCES and each.max() > DOMINANT_SHARE * each.sum():
            yield (
                f"one source text holds {each.max() / each.sum():.0%} of the tokens of domain {domain!r}: in simulations 95 % intervals "
                "still held the truth where one text of each domain held a quarter, but where it held half specialization was 0.04 to "
                "0.11 nats too high and they seldom did"
            )
    chance, ideal = specialization.null[-1, -1], specialization.reference[-1, -1]
    if chance > LARGE_CHANCE * ideal:
        yield (
            f"chance alone gives {chance / ideal:.0%} of the ideal router's specialization, too few tokens for so many experts: in "
            "simulations specialization was 0.03 nats too high where chance gave 17 % and 0.15 where it gave 35 %, and intervals missed it"
        )


def _specialist_records(table: SpecialistTable, counts: Counts, sample: TokenSample | None) -> Iterator[Specialist]:
    """Specialists by falling lift, the first of them with their most over-represented tokens."""
    ranked = listed_specialists(table)
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
