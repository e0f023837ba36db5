"""Simulated routing of words: what a router looks at (the token, the place, the document, the domain) is known exactly.

Vocabularies are Zipfian, lean to their domain, and are bursty: a document draws its own frequencies around its domain's.
``python tests/simulate_tokens.py 400`` prints how often the interval of the part beyond the key covers 0.
"""

from __future__ import annotations

import sys

import numpy as np

from dbes.scoring.contextual import Explained, explained_by
from dbes.scoring.sampling import TokenSample
from dbes.scoring.surrogates import surrogate_of
from dbes.trace.types import RoutingShape, TokenRoutes


def drawn_sample(
    router: str,
    random: np.random.Generator,
    *,
    domains: int = 4,
    documents: int = 20,
    experts: int = 32,
    top_k: int = 2,
    types: int = 1500,
    zipf: float = 1.0,
    lean: float = 1.0,
    burst: float = 300.0,
    shortest: int = 30,
    longest: int = 480,
    longer: float = 1.0,
    effect: float = 0.3,
) -> tuple[TokenSample, RoutingShape]:
    """A sample of one layer.

    Args:
        router: ``lookup`` (the token's experts); ``noisy``, ``documents``, ``domains`` (the same for half of the tokens; others take
            random ones, those their document leans to, or those their document and, by ``effect``, their domain lean to);
            ``position`` (experts by the logarithm of the place).
        documents: of each domain. types: different tokens.
        lean: standard deviation over domains of the logarithm of a token's frequency.
        burst: sum of the Dirichlet parameters of a document's frequencies.
        shortest, longest: lengths are log-uniform between them. longer: factor of the last domain's longest to the first's.
    """
    frequency = (np.arange(types) + 3.0) ** -zipf * np.exp(lean * random.normal(size=(domains, types)))
    frequency /= frequency.sum(axis=1, keepdims=True)
    domain = np.repeat(np.arange(domains), documents)
    most = longest * longer ** (domain / max(domains - 1, 1))
    length = np.exp(random.uniform(np.log(shortest), np.log(most))).astype(int)
    document = np.repeat(np.arange(len(domain)), length)
    positions = np.arange(len(document)) - np.searchsorted(document, document)
    own = random.gamma(burst * frequency[domain]) + 1e-12
    steps = (own / own.sum(axis=1, keepdims=True)).cumsum(axis=1)
    draws = [np.searchsorted(row, random.random(tokens)) for row, tokens in zip(steps, length, strict=True)]
    tokens = np.minimum(np.concatenate(draws), types - 1)

    def chosen(odds: np.ndarray) -> np.ndarray:
        return np.argsort(-(odds + random.gumbel(size=(len(tokens), experts))), axis=1)[:, :top_k]

    if router == "position":
        ids = chosen(2 * random.normal(size=(16, experts))[np.log2(positions + 1).astype(int)])
    else:
        ids = np.argsort(random.random((types, experts)), axis=1)[tokens, :top_k]
        odds = np.zeros((len(domain), experts))
        if router in ("documents", "domains"):
            odds = 0.7 * random.normal(size=odds.shape)
        if router == "domains":
            odds += effect * random.normal(size=(domains, experts))[domain]
        if router != "lookup":
            ids = np.where(random.random((len(tokens), 1)) < 0.5, chosen(odds[document]), ids)
    routes = TokenRoutes(
        ids=ids.astype(np.uint8)[:, None],
        document=document.astype(np.int32),
        positions=positions.astype(np.int32),
        token_ids=tokens.astype(np.int32),
    )
    shape = RoutingShape(
        layers=(0,),
        experts=(experts,),
        top_k=(top_k,),
        domains=tuple(f"domain{number}" for number in range(domains)),
        document_domain=domain,
        document_ids=tuple(map(str, range(len(domain)))),
    )
    return TokenSample(routes=routes), shape


def explained_runs(router: str, *, key: str, runs: int, seed: int = 0, grouped: int = 1, **settings: float) -> dict[str, list[Explained]]:
    """Every metric of every run, another population in each; so many documents are left out together."""
    found: dict[str, list[Explained]] = {}
    for run in range(runs):
        sample, shape = drawn_sample(router, np.random.default_rng((seed, run)), **settings)
        group = np.arange(len(shape.document_domain)) // grouped
        surrogate = surrogate_of(sample, shape, key, unit_group=None if grouped == 1 else group)
        assert surrogate is not None
        for name, each in explained_by(surrogate).items():
            found.setdefault(name, []).append(each)
    return found


def contextual_coverage(router: str, *, key: str = "lexical", runs: int, **settings: float) -> dict[str, float]:
    """Share of runs in which the model's interval of what is beyond the key covers 0, of each metric."""
    found = explained_runs(router, key=key, runs=runs, **settings)
    return {name: float(np.mean([each.low[-1, -1] <= 0 <= each.high[-1, -1] for each in runs])) for name, runs in found.items()}


SETTINGS = {
    "plain": {},
    "wide": {"experts": 64, "top_k": 4, "types": 3000},
    "few": {"experts": 16, "zipf": 1.3, "lean": 0.5},
    "bursty": {"experts": 64, "top_k": 4, "types": 4000, "burst": 100.0, "lean": 1.5},
}

if __name__ == "__main__":
    print("setting router metric: routed surrogate beyond (its sd, mean half width) covers 0", flush=True)
    cells = [(name, router, "lexical") for name in SETTINGS for router in ("noisy", "documents", "domains")]
    for name, router, key in [*cells, ("few", "position", "position"), ("plain", "lookup", "lexical")]:
        more = {"longer": 4.0, "longest": 240} if key == "position" else {}
        for metric, runs in explained_runs(router, key=key, runs=int(sys.argv[1]), **SETTINGS[name], **more).items():
            last = np.array([[part[-1, -1] for part in vars(each).values()] for each in runs])
            covers = np.mean((last[:, 3] <= 0) & (last[:, 4] >= 0))
            means = f"{last[:, 0].mean():8.5f} {last[:, 1].mean():8.5f} {last[:, 2].mean():8.5f}"
            spread = f"({last[:, 2].std():.5f}, {(last[:, 4] - last[:, 3]).mean() / 2:.5f})"
            print(f"{name:7s}{router:10s}{metric:26s} {means} {spread} {covers:.3f}", flush=True)
