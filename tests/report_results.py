"""Results for the tests of pages and comparisons: simulated routing, through the same scoring code as a recording."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dbes.scoring.counts import Counts
from dbes.scoring.score import score, score_tables
from dbes.scoring.tables import write_tables
from dbes.trace.baselines import baseline_trace
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape, TokenRoutes

HOSTILE = (
    "<script>window.hacked = 1</script>", '"><img src=x onerror="window.hacked = 1">', "=1+1",
    "</script><script>window.hacked = 1</script>",
    "\u202egnirts", "a\x00b", "`${window.hacked = 1}`", "&lt;b&gt;",
    "' onmouseover='window.hacked = 1", "x" * 10_000_000, "\u2028", "{{ 7 * 7 }}",

)  # fmt: skip


def simulated_trace(
    seed: int = 0,
    *,
    lean: float = 0.4,
    domains: tuple[str, ...] = ("law", "code", "math", "general"),
    documents: int = 12,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 2,
    model: str = "simulated",
    vocabulary: dict[int, str] | None = None,
    tokens: tuple[int, int] = (40, 90),
    family: str = "olmoe",
    generated: bool = False,
) -> Trace:
    """Documents whose tokens follow the ideal router with probability ``lean`` (rising with the layer), else any expert.

    Args:
        generated: mark every document from its 20th token on as generated.
    """
    random = np.random.default_rng(seed)
    count = documents * len(domains)
    lengths = np.random.default_rng(7).integers(*tokens, count)
    shape = RoutingShape(
        layers=tuple(range(1, layers + 1)), experts=(experts,) * layers, top_k=(top_k,) * layers, domains=domains,
        document_domain=np.repeat(np.arange(len(domains)), documents).astype(np.int32),
        document_ids=tuple(f"doc-{i}" for i in range(count)),
    )  # fmt: skip
    words = vocabulary or {token: f" word{token}" for token in range(60)}
    token_ids = np.random.default_rng(8).integers(0, len(words), lengths.sum()).astype(np.int32)
    parts = [
        next(iter(baseline_trace(shape, lengths, router=router, seed=seed, token_ids=token_ids))) for router in ("reference", "uniform")
    ]
    own = random.random((len(token_ids), layers)) < np.linspace(0, lean, layers)
    ids = np.where(own[..., None], parts[0].ids, parts[1].ids)
    weights = -np.sort(-random.dirichlet(np.ones(top_k), ids.shape[:2]), axis=-1).astype(np.float16)
    phase = (parts[0].positions >= 20).astype(np.uint8) if generated else None
    routes = TokenRoutes(
        ids=ids, document=parts[0].document, positions=parts[0].positions, token_ids=token_ids, phase=phase, weights=weights
    )
    about = {"model": model, "revision": f"sha256:{seed:064x}", "family": family, "dtype": "float32", "versions": {"dbes": "0.1.0"},
             "task": {"name": "simulated", "version": 1, "fingerprint": "ab" * 32, "separability": 0.9}}  # fmt: skip
    made = Trace(shape=shape, provenance=about, loaded=(routes,), vocabulary=words)
    control = Trace(shape=shape, provenance=about, loaded=(replace(parts[1], phase=phase),))
    return replace(made, control=control)


def write_result(folder: Path, trace: Trace, *, keep_trace: bool = True, permutations: int = 60, phase: int | None = None) -> Path:
    """A result folder as `dbes evaluate` leaves it, or `dbes score --phase`."""
    scores = score_tables(trace, permutations=permutations, phase=phase)
    write_tables(scores, folder)
    scores.result.save(folder)
    if keep_trace:
        trace.save(folder / "trace")
    return folder


def counted_domains(folder: Path, domains: int = 3) -> Path:
    """A result of counts of whole domains: no document, interval or test."""
    hits = np.random.default_rng(3).integers(1, 300, (domains, 2, 8))
    counts = Counts.from_domains(hits, domains=[f"domain {place}" for place in range(domains)], top_k=2)
    score(counts, output_path=folder)
    return folder
