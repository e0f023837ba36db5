"""Simulated traces of correlated documents whose truth is known exactly, and the share of runs in which an interval covers it.

A router takes one expert out of each of k groups of E/k experts, so that k of E are chosen and the expected usage is exact.
Every document has its own usage, drawn around its domain's (Dirichlet): its tokens are correlated, as in real text.

``python tests/simulate.py coverage 400`` prints the coverage table, ``python tests/simulate.py null 400`` the rejection rates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import naive
import numpy as np

from dbes.scoring.counting import count_routes
from dbes.scoring.counts import Counts, LayerCounts, StiffnessSums
from dbes.scoring.equal_usage import UsageTest
from dbes.scoring.estimates import Estimate, Measured, measure_layer
from dbes.scoring.grouping import Grouping
from dbes.scoring.layers import estimates_of, score_layers
from dbes.trace.store import Trace
from dbes.trace.types import LOGIT_NOISE, NOISE_SCALES, RoutingShape


@dataclass(frozen=True, kw_only=True)
class Population:
    """A router's true usage [domains, layers, experts] and how much single documents stray from it.

    Attributes:
        top_k: groups of experts, one choice in each.
        concentration: of the Dirichlet of a document's usage inside a group; small means strongly correlated tokens.
    """

    usage: np.ndarray
    top_k: int
    concentration: float

    @property
    def shape(self) -> tuple[int, int, int]:
        domains, layers, experts = self.usage.shape
        return domains, layers, experts


def population(
    seed: int,
    *,
    domains: int = 4,
    layers: int = 2,
    experts: int = 32,
    top_k: int = 4,
    effect: float = 0.0,
    skew: float = 0.7,
    concentration: float = 12.0,
) -> Population:
    """Usage that leans to its domain by normal log-odds of standard deviation ``effect`` on a load of log-odds ``skew``."""
    random = np.random.default_rng(seed)
    base = random.normal(0, skew, (1, layers, top_k, experts // top_k))
    lean = random.normal(0, 1, (domains, layers, top_k, experts // top_k)) * effect
    odds = np.exp(base + lean)
    usage = odds / odds.sum(axis=-1, keepdims=True) / top_k
    return Population(usage=usage.reshape(domains, layers, experts), top_k=top_k, concentration=concentration)


def truth(about: Population) -> dict[str, np.ndarray]:
    """Each metric of infinitely many documents, [rows, columns] as the estimates have them."""
    domains, layers, _ = about.shape
    cells: dict[str, list[list[float]]] = {
        name: [[0.0] * layers for _ in range(domains)] for name in ("specialization", "domain_isolation")
    }
    ranks = []
    for layer in range(layers):
        rows = about.usage[:, layer].tolist()
        for domain, value in enumerate(naive.divergences(rows)):
            cells["specialization"][domain][layer] = value
        for domain, value in enumerate(naive.di(rows)):
            cells["domain_isolation"][domain][layer] = value
        ranks.append(naive.der(rows))
    found = {name: np.array(naive.with_means(values)) for name, values in cells.items()}
    found["der"] = np.array([[*ranks, naive.mean(ranks)]])
    return found


def document_usage(about: Population, domain: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Usage of each document inside each group, [documents, layers, groups, experts of the group]."""
    domains, layers, experts = about.shape
    centre = about.usage.reshape(domains, layers, about.top_k, experts // about.top_k) * about.top_k
    gamma = random.gamma(about.concentration * centre[domain]) + 1e-300
    return gamma / gamma.sum(axis=-1, keepdims=True)


def lengths(random: np.random.Generator, documents: int, tokens: float, spread: float = 0.6) -> np.ndarray:
    """Log-normal lengths of documents with mean about ``tokens``, at least 2."""
    return np.maximum(2, (random.lognormal(np.log(tokens) - spread**2 / 2, spread, documents)).astype(int))


LENGTHS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "equal": lambda _, domain: np.full(len(domain), 200),
    "60 or 600 by domain": lambda _, domain: np.where(domain % 2, 600, 60),
    "30 to 1,500": lambda random, domain: np.exp(random.uniform(np.log(30), np.log(1500), len(domain))).astype(int),
    "one domain ten times shorter": lambda _, domain: np.where(domain == 0, 20, 200),
}
"""Lengths of documents of domains [documents], in tokens."""


def draw_statistics(
    about: Population, random: np.random.Generator, *, documents: int, tokens: float = 100.0, spread: str = "log-normal"
) -> LayerCounts:
    """Counts of a recording of ``documents`` documents per domain, without going through its tokens."""
    domains, layers, experts = about.shape
    domain = np.repeat(np.arange(domains), documents)
    size = lengths(random, len(domain), tokens) if spread == "log-normal" else LENGTHS[spread](random, domain)
    usage = document_usage(about, domain, random)
    hits = random.multinomial(size[:, None, None], usage).reshape(len(domain), layers, experts).astype(np.float32)
    return of_hits(hits, size, domain, domains=domains, top_k=about.top_k)


def of_hits(hits: np.ndarray, size: np.ndarray, domain: np.ndarray, *, domains: int, top_k: int) -> LayerCounts:
    """Statistics with these hits [documents, layers, experts] and tokens [documents], and nothing else known."""
    documents, layers, experts = hits.shape
    nothing = np.zeros((documents, layers))
    scales, widths = np.zeros((documents, layers, len(NOISE_SCALES))), np.zeros((documents, layers, len(LOGIT_NOISE)))
    flat = ("logit_margin", "logit_count", "stable_count", "selection_margin", "scaled_margin", "selection_count", "kept_count")
    stiffness = StiffnessSums(**dict.fromkeys(flat, nothing), logit_stable=widths, unchanged=scales, kept=scales)
    return LayerCounts(
        shape=RoutingShape(
            layers=tuple(range(layers)),
            experts=(experts,) * layers,
            top_k=(top_k,) * layers,
            domains=tuple(f"domain{index}" for index in range(domains)),
            document_domain=domain.astype(np.int32),
            document_ids=tuple(map(str, range(documents))),
        ),
        tokens=size.astype(np.int64),
        hits=hits.astype(np.float32),
        active=np.repeat(size[:, None], layers, axis=1).astype(float),
        mass=None,
        neighbours=nothing,
        overlap_any=nothing,
        overlap_share=nothing,
        ngrams=None,
        stiffness=stiffness,
    )


def draw_trace(about: Population, random: np.random.Generator, *, documents: int, tokens: float = 60.0, weights: bool = True) -> Trace:
    """A whole trace of ``documents`` documents per domain; tokens are independent given their document (no persistence)."""
    domains, layers, experts = about.shape
    domain = np.repeat(np.arange(domains), documents)
    size = lengths(random, len(domain), tokens)
    usage = document_usage(about, domain, random)
    document = np.repeat(np.arange(len(domain)), size)
    group = experts // about.top_k
    steps = usage.cumsum(axis=-1)[document]
    ids = (random.random((*steps.shape[:-1], 1)) > steps[..., :-1]).sum(axis=-1) + np.arange(about.top_k) * group
    return Trace.from_arrays(
        ids,
        document=document,
        domain=domain,
        domains=[f"domain{index}" for index in range(domains)],
        layers=range(layers),
        experts=experts,
        weights=random.dirichlet(np.ones(about.top_k), size=ids.shape[:2]).astype(np.float32) if weights else None,
    )


def estimates(statistics: LayerCounts, *, permutations: int, seed: int) -> dict[str, Estimate]:
    """The estimates of one draw."""
    return score_layers(Counts.of(statistics), permutations=permutations, sign_flips=0, seed=seed).estimates


def intervals(sums: LayerCounts) -> dict[str, Estimate]:
    """The estimates of one draw without tests and specialists, which no interval needs."""
    grouping, layers = Grouping.of(sums.shape), range(len(sums.shape.layers))
    domain = (sums.shape if grouping is None else grouping.shape).document_domain
    measured = [measure_layer(sums.column(layer), None, grouping=grouping)[0] for layer in layers]
    means = {metric: reduce(Measured.plus, [each[metric] for each in measured]).over(len(measured)) for metric in measured[0]}
    columns = [estimates_of(each, (), domain, np.full(len(sums.shape.domains) + 1, np.nan)) for each in (*measured, means)]
    return {metric: Estimate.side_by_side([column[metric] for column in columns]) for metric in means}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of one metric in one setting: share of runs whose interval holds the truth, for the model, single layers and domains."""

    metric: str
    true: float
    mean_corrected: float
    mean_value: float
    model: float
    layer: float
    domain: float
    width: float


def coverage(
    about: Population,
    *,
    documents: int,
    runs: int,
    seed: int = 0,
    tokens: float = 100.0,
    spread: str = "log-normal",
) -> Iterator[Coverage]:
    """How often the 95 % intervals hold the truth."""
    true = truth(about)
    held: dict[str, list[np.ndarray]] = {name: [] for name in true}
    corrected: dict[str, list[float]] = {name: [] for name in true}
    values: dict[str, list[float]] = {name: [] for name in true}
    widths: dict[str, list[float]] = {name: [] for name in true}
    for run in range(runs):
        random = np.random.default_rng((seed, run))
        statistics = draw_statistics(about, random, documents=documents, tokens=tokens, spread=spread)
        found = intervals(statistics)
        for name, value in true.items():
            held[name].append((found[name].ci_low <= value + 1e-12) & (value - 1e-12 <= found[name].ci_high))
            corrected[name].append(found[name].corrected[-1, -1])
            values[name].append(found[name].value[-1, -1])
            widths[name].append(found[name].ci_high[-1, -1] - found[name].ci_low[-1, -1])
    for name, value in true.items():
        share = np.mean(held[name], axis=0)
        yield Coverage(
            metric=name,
            true=float(value[-1, -1]),
            mean_corrected=float(np.mean(corrected[name])),
            mean_value=float(np.mean(values[name])),
            model=float(share[-1, -1]),
            layer=float(share[-1, :-1].mean()),
            domain=float(share[:-1, -1].mean()) if len(share) > 1 else float("nan"),
            width=float(np.mean(widths[name])),
        )


EFFECTS = {"null": 0.0, "weak": 0.2, "strong": 0.8}


def shuffled(statistics: LayerCounts, random: np.random.Generator) -> LayerCounts:
    """The same documents with their domain labels shuffled: whatever the router does, the domains now mean nothing."""
    return replace(
        statistics, shape=replace(statistics.shape, document_domain=random.permutation(statistics.shape.document_domain).astype(np.int32))
    )


def tested(sums: LayerCounts, *, permutations: int, seed: int) -> np.ndarray:
    """p of the test of equal usage, [domains + 1, layers + 1] (last row, last column: all together)."""
    shape = sums.shape
    test = UsageTest.of(sums.tokens, shape.document_domain, domains=len(shape.domains), permutations=permutations, seed=seed)
    layers = [test.products(sums.hits[:, layer]) for layer in range(len(shape.layers))]
    return np.stack([*(test.p(each) for each in layers), test.p(np.sum(layers, axis=0))], axis=1)


def rejections(
    about: Population, *, documents: int, runs: int, spread: str, permutations: int = 199, seed: int = 0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Shares of runs in which the test of equal usage rejects at 5 %: of the model, of each layer [layers], of each domain [domains]."""
    found = []
    for run in range(runs):
        sums = draw_statistics(about, np.random.default_rng((seed, run)), documents=documents, spread=spread)
        found.append(tested(sums, permutations=permutations, seed=run))
    share = (np.array(found) <= 0.05).mean(axis=0)
    return float(share[-1, -1]), share[-1, :-1], share[:-1, -1]


def null_p(*, runs: int, permutations: int = 200, seed: int = 0, documents: int = 12, effect: float = 0.8) -> dict[str, np.ndarray]:
    """p-values of the domain metrics on shuffled traces of a router that does specialize, [runs] (model), [runs, ...] (cells)."""
    about = population(3, domains=4, layers=3, experts=24, top_k=3, effect=effect)
    found: dict[str, list[np.ndarray]] = {}
    for run in range(runs):
        random = np.random.default_rng((seed, run, 1))
        statistics = shuffled(draw_statistics(about, random, documents=documents, tokens=50), random)
        p = tested(statistics, permutations=permutations, seed=run)
        for name in ("specialization", "domain_isolation", "der"):
            found.setdefault(name, []).append(p[-1:] if name == "der" else p)
    return {name: np.array(values) for name, values in found.items()}


def ngram_p(*, runs: int, permutations: int = 200, seed: int = 0, documents: int = 8, tokens: float = 60.0) -> dict[str, np.ndarray]:
    """p-values of n-gram expertise on traces without persistence (tokens independent given their document)."""
    about = population(5, domains=3, layers=2, experts=12, top_k=2, effect=0.5, skew=1.0)
    found: dict[str, list[np.ndarray]] = {}
    for run in range(runs):
        trace = draw_trace(about, np.random.default_rng((seed, run, 2)), documents=documents, tokens=tokens)
        made = score_layers(count_routes(trace), permutations=0, sign_flips=permutations, seed=run).estimates
        for name, estimate in made.items():
            if name.startswith("ngram"):
                found.setdefault(name, []).append(estimate.p)
    return {name: np.array(values) for name, values in found.items()}


def print_coverage(runs: int) -> None:
    print("domains docs effect metric true plug-in corrected cover(model) cover(layer) cover(domain) width", flush=True)
    for domains in (8, 4):
        for effect, strength in EFFECTS.items():
            for documents in (20, 80, 160):
                about = population(7, domains=domains, effect=strength)
                for row in coverage(about, documents=documents, runs=runs):
                    means = f"{row.true:8.5f} {row.mean_value:8.5f} {row.mean_corrected:8.5f}"
                    shares = f"{row.model:6.3f} {row.layer:6.3f} {row.domain:6.3f} {row.width:8.5f}"
                    print(f"{domains} {documents:4d} {effect:7s}{row.metric:18s} {means} {shares}", flush=True)


def print_null(runs: int) -> None:
    print("metric: rejections at 5 % and 20 %, model; all cells", flush=True)
    for name, p in {**null_p(runs=runs), **ngram_p(runs=runs)}.items():
        model = p[:, -1, -1]
        print(f"{name:28s} {np.mean(model <= 0.05):6.3f} {np.mean(model <= 0.2):6.3f} {np.nanmean(p <= 0.05):6.3f}", flush=True)


if __name__ == "__main__":
    {"coverage": print_coverage, "null": print_null}[sys.argv[1]](int(sys.argv[2]))
