"""Scores within strata of tokens, and whether strata differ: paired by document, and on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dbes.errors import SettingError, TraceError
from dbes.result_parts import Strata, StrataDifference, Stratum, StratumScore
from dbes.scoring.counting import count_parts
from dbes.scoring.counts import Counts
from dbes.scoring.equal_usage import UsageTest
from dbes.scoring.estimates import Estimate, Measured, measure_layer, scored
from dbes.scoring.grouping import CHANCE_DRAWS, Grouping
from dbes.scoring.layer_counts import LayerCounts, shape_of
from dbes.scoring.layers import estimates_of
from dbes.scoring.permutation import permuted_labels, permuted_scores
from dbes.scoring.resampling import holm, jackknife
from dbes.scoring.strata import KINDS, Division, division_of, same_tokens
from dbes.scoring.workers import in_order
from dbes.text import unknown
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape, TokenRoutes

METRICS = ("specialization", "der", "domain_isolation", "stiffness")

LARGE_CHANCE = 0.1
"""A stratum whose chance level is a larger share of the ideal router's value has too few tokens: its score is too high."""

DEPENDENT = 10
"""How much larger chance is for tokens of documents than for independent tokens, about (9 to 17 times on real text)."""


def checked_kinds(strata: Sequence[str]) -> tuple[str, ...]:
    """The kinds of strata, each once.

    Raises:
        SettingError: there is no such kind.
    """
    for kind in strata:
        if kind not in KINDS:
            raise SettingError(unknown("kind of strata", kind, KINDS))
    return tuple(dict.fromkeys(strata))


def strata_of(
    source: Trace | Counts, kinds: Sequence[str], *, permutations: int, seed: int, phase: int | None = None
) -> dict[str, Strata]:
    """Every kind of strata of a trace, one after the other; memory follows a layer, as where a trace is scored.

    Raises:
        TraceError: these are counts, which know no single tokens.
    """
    if kinds and isinstance(source, Counts):
        raise TraceError("these are counts; strata need the trace, whose tokens they divide")
    assert not kinds or isinstance(source, Trace)
    return {kind: _strata(source, kind, permutations, seed, phase) for kind in kinds if isinstance(source, Trace)}


def _strata(trace: Trace, kind: str, permutations: int, seed: int, phase: int | None) -> Strata:
    division = division_of(kind, trace, phase=phase)
    if isinstance(division, str):
        return Strata(by="", reason=division)
    names = division.names
    matching = division.recurs and "token_ids" in next(iter(trace)).arrays()

    def parts(routes: TokenRoutes) -> list[np.ndarray]:
        label = division.label(routes)
        rows = [np.flatnonzero(label == number) for number in range(len(names))]
        return rows + (same_tokens(routes, label, seed=seed) if matching else [])

    counts = [each.by_unit() for each in count_parts(trace, parts, len(names) + 2 * matching, phase=phase)]
    strata, same = counts[: len(names)], counts[len(names) :]
    every = sum(int(each.tokens.sum()) for each in strata)
    found = [_stratum(name, each, every, permutations=permutations, seed=seed) for name, each in zip(names, strata, strict=True)]
    tests = [test for first, second in combinations(range(len(names)), 2) for test in _differences(strata, names, first, second)]
    if matching:
        tests += _matched(same, names, every)
    else:
        reason = "the trace has no token ids" if division.recurs else "a token id is in one stratum only"
        tests += [StrataDifference(first=a, second=b, metric=METRICS[0], matched=True, reason=reason) for a, b in combinations(names, 2)]
    return Strata(by=division.by, strata=tuple(found), differences=tuple(_corrected(tests)), notes=tuple(_notes(found, division)))


# ---------------------------------------------------------------------------------------------------------------------
# Within a stratum


def _stratum(name: str, counts: Counts, every: int, *, permutations: int, seed: int) -> Stratum:
    used = np.flatnonzero(counts.tokens > 0)
    about = {"name": name, "tokens": int(counts.tokens.sum()), "share": counts.tokens.sum() / max(every, 1), "documents": len(used)}
    if not len(used):
        return Stratum(**about)
    some = counts.take(used)
    domain, domains = some.shape.document_domain, len(some.shape.domains)
    grouping = Grouping.of(some.shape)
    labels = permuted_labels(domain, permutations=permutations if grouping is None else min(permutations, CHANCE_DRAWS), seed=seed)
    test = UsageTest.of(some.tokens, domain, domains=domains, permutations=permutations, seed=seed)
    left_out = domain if grouping is None else grouping.groups.label

    def layer(sums: LayerCounts) -> tuple[dict[str, Measured], dict[str, Estimate], np.ndarray]:
        measured = _chosen(measure_layer(sums, permuted_scores(sums, labels), grouping=grouping)[0])
        products = test.products(sums.hits[:, 0])
        return measured, estimates_of(measured, (), left_out, test.p(products)), products

    columns, products = [], np.zeros((1, 1))
    total: dict[str, Measured] = {}
    for measured, estimates, more in in_order(layer, some.layers(), size=len(domain) * some.shape.width):
        total = _plus(total, measured)
        products = products + more
        columns.append(estimates)
    mean = {metric: each.over(len(columns)) for metric, each in total.items()}
    columns.append(estimates_of(mean, (), left_out, test.p(products)))
    return Stratum(**about, scores=tuple(_scores(columns, some.shape)))


def _chosen(measured: dict[str, Measured]) -> dict[str, Measured]:
    return {metric: measured[metric] for metric in METRICS}


def _plus(total: dict[str, Measured], more: dict[str, Measured]) -> dict[str, Measured]:
    return {metric: total[metric].plus(each) if metric in total else each for metric, each in more.items()}


def _scores(columns: Sequence[dict[str, Estimate]], shape: RoutingShape) -> Iterator[StratumScore]:
    """All domains together, the model first and then every layer."""
    names = [name for name in StratumScore.model_fields if name not in ("metric", "layer")]
    for metric in METRICS:
        for layer, column in ((None, columns[-1]), *zip(shape.layers, columns, strict=False)):
            yield StratumScore(metric=metric, layer=layer, **{name: float(getattr(column[metric], name)[-1]) for name in names})


# ---------------------------------------------------------------------------------------------------------------------
# Between strata


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What two strata show in the documents that have tokens in both: the mean over layers of each, and the domains of what is left out."""

    sides: tuple[dict[str, Measured], dict[str, Measured]]
    domain: np.ndarray


def _pair(first: Counts, second: Counts) -> _Pair | None:
    """None where a domain has fewer than two documents with tokens in both."""
    shape = first.shape
    both = np.flatnonzero((first.tokens > 0) & (second.tokens > 0))
    if (np.bincount(shape.document_domain[both], minlength=len(shape.domains)) < 2).any():
        return None
    grouping = Grouping.of(shape_of(shape, both))
    sides = []
    for counts in (first.take(both), second.take(both)):
        total: dict[str, Measured] = {}
        size = len(both) * shape.width
        for measured in in_order(lambda sums: _chosen(measure_layer(sums, None, grouping=grouping)[0]), counts.layers(), size=size):
            total = _plus(total, measured)
        sides.append({metric: each.over(len(shape.layers)) for metric, each in total.items()})
    return _Pair(sides=(sides[0], sides[1]), domain=shape.document_domain[both] if grouping is None else grouping.groups.label)


def _differences(
    strata: Sequence[Counts], names: Sequence[str], first: int, second: int, *, matched: bool = False, covered: float = float("nan")
) -> list[StrataDifference]:
    pair = _pair(strata[first], strata[second])
    about = {"first": names[first], "second": names[second], "matched": matched, "covered": covered}
    if pair is None:
        reason = "fewer than two documents of a domain have tokens in both"
        return [StrataDifference(metric=METRICS[0], reason=reason, **about)]
    found = []
    for metric in METRICS:
        one, other = (scored(side[metric]) for side in pair.sides)
        paired = jackknife((one.whole - other.whole)[-1], (one.left_out - other.left_out)[:, -1], pair.domain)
        reach = np.where(paired.error > 0, paired.reach, paired.error)  # without error there are no degrees of freedom
        value, p = paired.corrected, paired.two_sided(paired.corrected)
        numbers = {"difference": float(value), "low": float(value - reach), "high": float(value + reach), "p": float(p)}
        found.append(StrataDifference(metric=metric, **numbers, **about))
    return found


def _matched(same: Sequence[Counts], names: Sequence[str], every: int) -> list[StrataDifference]:
    """The difference of two strata on the tokens that both have in the same document."""
    first, shape = same[0], same[0].shape
    have = np.bincount(shape.document_domain, first.tokens, minlength=len(shape.domains))
    covered = float(2 * first.tokens.sum() / max(every, 1))
    few = int(have.argmin())
    wanted = max(_tokens_wanted(len(shape.domains), experts, k) for experts, k in zip(shape.experts, shape.top_k, strict=True))
    if have[few] < wanted:
        reason = (
            f"only {have[few]:,.0f} tokens of domain {shape.domains[few]!r} occur in both strata of one document; "
            f"{wanted:,.0f} are needed, for chance to stay below {LARGE_CHANCE:.0%} of the ideal router"
        )
        about = {"first": names[0], "second": names[1], "matched": True, "covered": covered}
        return [StrataDifference(metric=METRICS[0], reason=reason, **about)]
    return _differences(same, names, 0, 1, matched=True, covered=covered)


def _tokens_wanted(domains: int, experts: int, top_k: int) -> float:
    """Tokens of a domain at which chance alone gives about ``LARGE_CHANCE`` of the ideal router's information (METRICS section 3)."""
    bound = min(np.log(max(domains, 2)), np.log(max(experts / top_k, 1 + 1e-9)))
    return DEPENDENT * (domains - 1) * (experts - top_k) / (2 * top_k * domains) / (LARGE_CHANCE * bound)


def _corrected(tests: Sequence[StrataDifference]) -> list[StrataDifference]:
    """p after Holm over the pairs of strata, for each metric, and apart for the same tokens."""
    found = list(tests)
    for family in {(test.metric, test.matched) for test in tests}:
        places = [place for place, test in enumerate(found) if (test.metric, test.matched) == family]
        for place, adjusted in zip(places, holm([found[place].p for place in places]).tolist(), strict=True):
            found[place] = found[place].model_copy(update={"p_holm": adjusted})
    return found


def _notes(found: Sequence[Stratum], division: Division) -> Iterator[str]:
    for each in found:
        model = next((score for score in each.scores if score.metric == METRICS[0] and score.layer is None), None)
        if model is None:
            yield f"{each.name}: no tokens"
        elif model.null > LARGE_CHANCE * model.reference:
            yield (
                f"{each.name}: chance alone gives {model.null / model.reference:.0%} of the ideal router's specialization, too few tokens "
                "for so many experts: its score, and differences to it, are too high"
            )
    if division.recurs:
        yield "matched: as many occurrences of each token id of each document in both strata, drawn at random"
