"""From the cells of a grid to tables and verdicts: every claim is a contrast between arms, paired by seed, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from dbes.testbed.contrasts import AS_TRAINED, LOSS, NATS, SPECIALIZATION, UTILIZATION, Grid, Interval, Value, interval
from dbes.testbed.presets import SCOPES
from dbes.testbed.tables import (
    GLOBAL,
    METHODS,
    SEQUENCE,
    arm_table,
    explained_by,
    forking_gap,
    forking_table,
    information,
    level_table,
    metric_table,
    probe_table,
)

Reproduction = Literal["reproduces", "does not reproduce", "undecided", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim, what became of it, and the sentence that says so with numbers."""

    claim: str
    outcome: Reproduction
    sentence: str
    experiment: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Tables by name and the verdicts of every experiment of a grid."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)


def analyse(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Findings:
    """Tables and verdicts of every experiment that has finished cells."""
    grid = Grid(about, records)
    findings = Findings()
    for experiment, (tables, claims) in EXPERIMENTS.items():
        if grid.arms(experiment):
            findings.tables.update({name: table(grid) for name, table in tables.items()})
            findings.verdicts.extend(replace(verdict, experiment=experiment) for verdict in claims(grid))
    if grid.arms("metrics"):
        findings.tables["metrics"] = metric_table(grid)
        findings.verdicts.extend(replace(verdict, experiment="metrics") for verdict in _metrics(findings.tables["metrics"]))
    return findings


def _scope(grid: Grid) -> Iterator[Verdict]:
    yield from _scope_or_method(grid, SPECIALIZATION, "as a plain checkpoint routes")
    yield from _scope_or_method(grid, AS_TRAINED, "as training routes, with its assignment")
    learned = grid.contrast(GLOBAL, "frozen", SPECIALIZATION)
    narrow = grid.contrast(SEQUENCE, "frozen", SPECIALIZATION)
    if learned.seeds:
        yield Verdict(
            claim="a learned router with wide scope specializes more than a frozen random one",
            outcome=_sign(learned, wanted=1),
            sentence=f"Against the frozen random router, the auxiliary loss adds {learned} with global scope "
            f"and {narrow} with sequence scope.",
        )
    dropping = grid.contrast(f"{GLOBAL}/dropping", GLOBAL, SPECIALIZATION)
    if dropping.seeds:
        kept = grid.contrast(f"{GLOBAL}/dropping", SEQUENCE, SPECIALIZATION)
        by_scope = {scope: grid.contrast(f"aux_loss/{scope}/dropping", f"aux_loss/{scope}", SPECIALIZATION) for scope in SCOPES}
        told = ", ".join(f"{scope} {found}" for scope, found in by_scope.items() if found.seeds)
        yield Verdict(
            claim="strict dropping cancels the specialization that wide scope allows",
            outcome="reproduces" if dropping.high < 0 and kept.low <= 0 else _sign(kept, wanted=-1),
            sentence=f"Strict dropping (capacity 1.0 within the scope, while training) changes specialization by {told}; "
            f"with it, global scope is still {kept} above per-sequence scope without.",
        )
    alternating = grid.contrast("aux_loss/micro_batch/mixed order", "aux_loss/micro_batch", SPECIALIZATION)
    if alternating.seeds:
        yield Verdict(
            claim="what counts is how many domains a scope spans, not its size",
            outcome=_sign(alternating, wanted=1),
            sentence="Micro-batches of the same size that hold several domains instead of one change normalised specialization "
            f"by {alternating} (same sequences in every global batch).",
        )
    utilization, loss = grid.contrast(GLOBAL, SEQUENCE, UTILIZATION), grid.contrast(GLOBAL, SEQUENCE, LOSS)
    if utilization.seeds:
        yield Verdict(
            claim="equal utilization is not equal loss",
            outcome="reproduces" if _excludes_zero(loss) and _about_zero(utilization) == "reproduces" else "undecided",
            sentence=f"Global against sequence scope: utilization differs by {utilization}, bits per byte by {loss}.",
        )


def _scope_or_method(grid: Grid, value: Value, how: str) -> Iterator[Verdict]:
    """Whether specialization follows the scope of balancing whatever the method: every method's contrast must say so by itself."""
    gains = {method: grid.differences(f"{method}/global_batch", f"{method}/sequence", value) for method in METHODS}
    gains = {method: of for method, of in gains.items() if of}
    # Methods of one seed share weights and data, so they are averaged before seeds are compared.
    pooled = interval([float(np.mean(of)) for of in zip(*gains.values(), strict=False)])
    if not pooled.seeds:
        return
    signs = {method: _sign(interval(of), wanted=1) for method, of in gains.items()}
    shares = explained_by(grid, value)
    variance = (
        f" Scope explains {shares['scope']:.0%} of the variance between the {len(METHODS) * len(SCOPES)} method-by-scope arms, "
        f"method {shares['method']:.0%}, their interplay {shares['interplay']:.0%}."
        if shares
        else ""
    )
    if set(signs.values()) == {"reproduces"} and (shares is None or shares["scope"] > shares["method"]):
        outcome: Reproduction = "reproduces"
    elif "does not reproduce" in signs.values() or (shares is not None and shares["scope"] < shares["method"]):
        outcome = "does not reproduce"
    else:
        outcome = "undecided"
    told = ", ".join(f"{method} {interval(of)}" for method, of in gains.items())
    yield Verdict(
        claim=f"scope, not method, decides how far experts specialize ({how})",
        outcome=outcome,
        sentence=f"Widening the scope from one sequence to the global batch adds {pooled} of normalised specialization "
        f"(mean over methods, paired by seed; by method: {told}).{variance}",
    )


def _soft(grid: Grid) -> Iterator[Verdict]:
    """The contrasts of scope where domains overlap; arms are named like those of separable domains, with a suffix."""
    suffix = "/" + grid.arms("soft")[0].split("/")[-1]
    found = grid.contrast(GLOBAL + suffix, SEQUENCE + suffix, SPECIALIZATION)
    if not found.seeds:
        return
    above = grid.contrast(GLOBAL + suffix, f"frozen{suffix}", SPECIALIZATION)
    separable = grid.contrast(GLOBAL, SEQUENCE, SPECIALIZATION)
    yield Verdict(
        claim="the contrast of scope survives domains that overlap",
        outcome=_sign(found, wanted=1),
        sentence=f"With {suffix[1:]} in every document, global minus sequence scope is {found} of normalised specialization "
        f"(separable domains: {separable}); global minus frozen random router {above}.",
    )


def _scale(grid: Grid) -> Iterator[Verdict]:
    sizes = list(dict.fromkeys(arm.rsplit("/", 1)[1] for arm in grid.arms("scale")))
    contrasts = {size: grid.contrast(f"{GLOBAL}/{size}", f"{SEQUENCE}/{size}", SPECIALIZATION) for size in sizes}
    contrasts = {size: found for size, found in contrasts.items() if found.seeds}
    if not contrasts:
        return
    told = ", ".join(f"{size.split(',')[0]} {found}" for size, found in contrasts.items())
    outcomes = {_sign(found, wanted=1) for found in contrasts.values()}
    above = {size: grid.contrast(f"{GLOBAL}/{size}", f"frozen/{size}", SPECIALIZATION) for size in sizes}
    beyond = ", ".join(f"{size.split(',')[0]} {found}" for size, found in above.items() if found.seeds)
    yield Verdict(
        claim="the order of scopes holds at every size",
        outcome="reproduces" if outcomes == {"reproduces"} else "undecided" if "undecided" in outcomes else "does not reproduce",
        sentence=f"Global minus sequence scope, normalised specialization on equally many tokens: {told}."
        + (f" Global scope minus frozen random router: {beyond}." if beyond else ""),
    )


def _frozen(grid: Grid) -> Iterator[Verdict]:
    published = {"frozen": 9.810 / 9.907, "rerandomised": 11.752 / 9.907}
    for arm, paper in published.items():
        ratio = grid.contrast(arm, GLOBAL, NATS)
        if not ratio.seeds:
            continue
        perplexity = Interval(math.exp(ratio.mean), math.exp(ratio.low), math.exp(ratio.high), ratio.seeds)
        wanted = 1 if paper > 1.05 else 0
        yield Verdict(
            claim=f"perplexity of a {arm} router is {'clearly above' if wanted else 'about'} that of a learned one",
            outcome=_sign(ratio, wanted=1) if wanted else _about_zero(ratio),
            sentence=f"Perplexity relative to the learned router: {arm} {perplexity} (published: {paper:.3f}).",
        )
    hashed = grid.contrast("hash", GLOBAL, NATS)
    if hashed.seeds:
        perplexity = Interval(math.exp(hashed.mean), math.exp(hashed.low), math.exp(hashed.high), hashed.seeds)
        specialization = grid.contrast("hash", "frozen", SPECIALIZATION)
        yield Verdict(
            claim="a persistent arbitrary partition is about as good as a learned one",
            # Better than a learned router is as good, too.
            outcome="reproduces" if hashed.high < EQUAL else "does not reproduce" if hashed.low > EQUAL else "undecided",
            sentence=f"Routing by a hash of the token id has {perplexity} times the learned router's perplexity; "
            f"its normalised specialization differs from the frozen random router's by {specialization}.",
        )


def _levels(grid: Grid) -> Iterator[Verdict]:
    topic = grid.contrast("sequence level", GLOBAL, information("topic"))
    syntax = grid.contrast("sequence level", GLOBAL, information("syntax"))
    if not topic.seeds:
        return
    both = topic.low > 0 and syntax.high < 0
    gains = []
    for change in ("16 experts, top-2", "32 experts, top-4"):
        for level in (GLOBAL, "sequence level"):
            found = grid.contrast(f"{level}/{change}", level, LOSS)
            if found.seeds:
                gains.append(f"{'token' if level == GLOBAL else 'sequence'} level with {change}: {found}")
    yield Verdict(
        claim="routing by sequence follows topic, routing by token follows syntax",
        outcome="reproduces" if both else "undecided" if not (_excludes_zero(topic) and _excludes_zero(syntax)) else "does not reproduce",
        sentence=f"Sequence-level minus token-level routing: topic information {topic} nats, syntax information {syntax} nats "
        f"(classes of the tokenizer's own vocabulary). Bits per byte against 32 experts, top-2: {'; '.join(gains) or 'not measured'}.",
    )


def _upstream(grid: Grid) -> Iterator[Verdict]:
    scratch, merged = "8 experts from scratch", "8 experts from domain models"
    specialization, loss = grid.contrast(merged, scratch, SPECIALIZATION), grid.contrast(merged, scratch, LOSS)
    if specialization.seeds:
        yield Verdict(
            claim="experts made of domain models specialize more than experts trained from scratch",
            outcome=_sign(specialization, wanted=1),
            sentence=f"At equal tokens, merging domain models changes normalised specialization by {specialization} "
            f"and bits per byte by {loss} against training from scratch.",
        )
    probes = [grid.cells[GLOBAL, seed]["probe"] for seed in grid.seeds(GLOBAL)]
    probes = [probe for probe in probes if probe]
    if probes:
        reads, uses = ([float(np.mean(probe[name])) for probe in probes] for name in ("input", "experts"))
        read, used, more = interval(reads), interval(uses), interval([one - other for one, other in zip(reads, uses, strict=True)])
        yield Verdict(
            claim="the representation tells domains apart better than the router uses",
            outcome=_sign(more, wanted=1),
            sentence=f"A linear probe on the router's input names a token's domain in {read} of cases, "
            f"the experts chosen in {used} (chance {np.mean(probes[0]['chance']):.3g}; mean over layers): {more} more.",
        )
    gap = interval([forking_gap(grid.cells[GLOBAL, seed]) for seed in grid.seeds(GLOBAL)])
    if gap.seeds:
        yield Verdict(
            claim="the least certain 20 % of tokens are routed more by domain than the others",
            outcome=_sign(gap, wanted=1),
            sentence=f"Specialization on high-entropy tokens minus that on as many others: {gap} (auxiliary loss, global scope).",
        )


def _metrics(table: pd.DataFrame) -> Iterator[Verdict]:
    if table.empty:
        return
    rows = table.set_index("metric")
    fails = {metric: bool(failed) for metric, failed in rows["fails"].items()}
    told = ", ".join(f"{metric} {row['tau']:.2f} [{row['tau_low']:.2f}, {row['tau_high']:.2f}]" for metric, row in rows.iterrows())
    worse = [published for published, calibrated in FORMS.items() if fails.get(published) and not fails.get(calibrated, True)]
    both = [published for published, calibrated in FORMS.items() if fails.get(published) and fails.get(calibrated, True)]
    yield Verdict(
        claim="the published domain metrics order routers of known specialization as their calibrated forms do",
        outcome="does not reproduce" if worse else "undecided" if both else "reproduces",
        sentence=f"Order of reference > global > frozen > sequence, Kendall's tau: {told}. "
        f"Published forms that fail (interval reaches 0) where the calibrated one does not: {', '.join(worse) or 'none'}. "
        "Stiffness and n-gram expertise ask other questions: their order is no defect.",
    )


FORMS = {
    "published rs": "calibrated specialization_normalized",
    "published ner": "calibrated der",
    "published ner_entropy": "calibrated der",
    "published di": "calibrated domain_isolation",
}
"""The domain metrics: published form and calibrated form."""

EQUAL = 0.05
"""Differences within this count as none: 5 % of perplexity, 5 points of utilization."""


def _about_zero(found: Interval) -> Reproduction:
    """Whether the whole interval lies within ``EQUAL`` of 0; no difference found is not the same as none."""
    if not found.seeds:
        return "not measured"
    if found.low > -EQUAL and found.high < EQUAL:
        return "reproduces"
    return "does not reproduce" if found.low > EQUAL or found.high < -EQUAL else "undecided"


def _excludes_zero(found: Interval) -> bool:
    return found.low > 0 or found.high < 0


def _sign(found: Interval, *, wanted: int) -> Reproduction:
    """Whether a contrast has the sign that a claim needs; undecided when its interval reaches 0 or there is one seed only."""
    if not found.seeds:
        return "not measured"
    if not _excludes_zero(found):
        return "undecided"
    return "reproduces" if found.mean * wanted > 0 else "does not reproduce"


EXPERIMENTS: dict[str, tuple[dict[str, Callable[[Grid], pd.DataFrame]], Callable[[Grid], Iterator[Verdict]]]] = {
    **{
        name: ({name: partial(arm_table, experiment=name)}, claims)
        for name, claims in (("scope", _scope), ("soft", _soft), ("scale", _scale), ("frozen", _frozen))
    },
    "levels": ({"levels": level_table}, _levels),
    "upstream": ({"upstream": partial(arm_table, experiment="upstream"), "probe": probe_table, "forking": forking_table}, _upstream),
}
"""The tables and claims of each experiment, in the order of the page; that of the metrics comes last."""
