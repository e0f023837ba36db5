"""What the rules look at: the counts of a trace, the routes of a sample, and tables made of them when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dbes.errors import PathError, SettingError
from dbes.paths.types import Average
from dbes.results import RESULT_FILE, Result, load_result
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts
from dbes.scoring.descriptive import transitions
from dbes.scoring.metrics import usage_of
from dbes.scoring.sampling import TokenSample, even_documents
from dbes.scoring.score import read_routes
from dbes.scoring.specialists import SpecialistTable, find_specialists
from dbes.scoring.stored import COUNTS
from dbes.scoring.sums import of_phase
from dbes.text import unknown
from dbes.trace.store import MANIFEST, TRACE_FOLDER, Trace
from dbes.trace.types import PHASES, RoutingShape, TokenRoutes


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a model's routing of a benchmark shows about its cells.

    Attributes:
        counts: per source text (the unit of sampling); texts without tokens are left out.
        routes: routes of some whole texts, with ``document`` numbering the texts of ``counts``; None where nothing ran.
        permutations, seed: of the specialist test; the result's own, so that the same experts pass.
        gradients: [domains, layers, experts], squared gradient norm of each cell on each domain; None without a model.
        effects: [domains, layers, experts], nats per token added on each domain when one cell's output is zero; None
            without a model.
        sizes: [layers], parameters of one expert; equal when the model was not looked at.
        provenance: as of the trace.
        gate_sums: reads ``gates`` from the trace; None where only counts are known.
        average: what ESFT's shares are means over, see ``esft_share``.
    """

    counts: Counts
    routes: TokenRoutes | None
    permutations: int = 1000
    seed: int = 0
    gradients: np.ndarray | None = None
    effects: np.ndarray | None = None
    sizes: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    gate_sums: Callable[[], np.ndarray | None] | None = None
    average: Average = "tokens"

    @property
    def shape(self) -> RoutingShape:
        return self.counts.shape

    @cached_property
    def hits(self) -> np.ndarray:
        """(token, slot) pairs, float64 [domains, layers, experts]."""
        return self.counts.by_domain(lambda sums: sums.hits)

    @cached_property
    def usage(self) -> np.ndarray:
        """Share of a layer's slots, p[d,l,e]; a domain without tokens is NaN."""
        return usage_of(self.hits)

    @cached_property
    def load(self) -> np.ndarray:
        """Share of all slots of a domain, over all its layers, that each cell takes: [domains, layers, experts]."""
        return self.hits / self.hits.sum(axis=(1, 2), keepdims=True)

    @cached_property
    def gates(self) -> np.ndarray | None:
        """Sums of gate weights as the model used them, float32 [texts, layers, experts]; None where the trace has none or is not known."""
        return self.gate_sums() if self.gate_sums else None

    @cached_property
    def exists(self) -> np.ndarray:
        """Bool [layers, experts]: false where a narrow layer has no such expert."""
        return np.asarray(self.shape.experts)[:, None] > np.arange(self.shape.width)

    @cached_property
    def specialists(self) -> SpecialistTable:
        return find_specialists(self.counts, permutations=self.permutations, seed=self.seed)

    @cached_property
    def transitions(self) -> np.ndarray:
        """Pairs of slots of one token in neighbouring MoE layers, float64 [domains, layers - 1, experts, experts]."""
        return self._pairs(np.ones(len(self.shape.document_domain), bool))

    def transitions_of(self, texts: np.ndarray) -> np.ndarray:
        """As ``transitions``, of the texts where bool [texts] is true."""
        return self._pairs(texts)

    def _pairs(self, texts: np.ndarray) -> np.ndarray:
        shape = self.shape
        counts = np.zeros((len(shape.domains), max(len(shape.layers) - 1, 0), shape.width, shape.width))
        if self.routes is None or len(shape.layers) < 2:
            return counts
        pairs = np.asarray(shape.top_k[:-1]) * np.asarray(shape.top_k[1:])
        domain = np.where(texts[self.routes.document], shape.document_domain[self.routes.document], -1)
        for index in range(len(shape.domains)):
            rows = np.flatnonzero(domain == index)
            if len(rows):
                chosen = TokenSample(routes=self.routes.take(rows))
                counts[index] = transitions(chosen, shape) * pairs[:, None, None]
        return counts

    def domain(self, name: str) -> int:
        """Index of a domain.

        Raises:
            SettingError: there is no such domain.
            PathError: it has no tokens.
        """
        if name not in self.shape.domains:
            raise SettingError(unknown("domain of this result", name, self.shape.domains))
        index = self.shape.domains.index(name)
        if not self.hits[index].any():
            raise PathError(f"domain {name!r} has no tokens in this result: nothing can be said about its experts")
        return index

    def half(self, *, seed: int | list[int], permutations: int) -> Evidence:
        """The evidence of a random half of every domain's texts (of an odd number the larger half)."""
        random = np.random.default_rng(seed)
        domains = self.shape.document_domain
        kept = np.sort(np.concatenate([random.permutation(m)[: (len(m) + 1) // 2] for m in map(self._members, np.unique(domains))]))
        routes = self.routes
        if routes is not None:
            rows = np.flatnonzero(np.isin(routes.document, kept))
            routes = replace(routes.take(rows), document=np.searchsorted(kept, routes.document[rows]))
        gates = None if self.gate_sums is None else lambda: None if self.gates is None else self.gates[kept]
        return replace(self, counts=self.counts.take(kept), routes=routes, permutations=permutations, gate_sums=gates)

    def _members(self, domain: int) -> np.ndarray:
        return np.flatnonzero(self.shape.document_domain == domain)


def gather(trace: Trace | Counts, *, permutations: int = 1000, seed: int = 0, phase: int | None = None) -> Evidence:
    """The evidence in a trace, or in its counts.

    Raises:
        TraceError: the trace is incomplete, altered or inconsistent.
        PathError: it has no tokens.
    """
    counts = counts_of(trace, phase=phase)
    if not counts.tokens.any():
        raise PathError("the trace has no tokens (of this phase): there is nothing to choose experts by")
    units = counts.by_unit()
    used = np.flatnonzero(units.tokens > 0)
    sample = counts.sample
    if sample is not None and sample.whole:
        sample = sample.of(even_documents(counts.shape, counts.tokens))
    routes = None
    if sample is not None:
        routes = replace(sample.routes, document=np.searchsorted(used, counts.shape.units[sample.routes.document]))
    found = Evidence(counts=units.take(used), routes=routes, permutations=permutations, seed=seed, provenance=dict(counts.provenance))
    if isinstance(trace, Counts):
        return found
    texts = np.where(np.isin(counts.shape.units, used), np.searchsorted(used, counts.shape.units), -1)
    return replace(found, gate_sums=lambda: _gate_sums(trace, texts, phase=phase))


def _gate_sums(trace: Trace, texts: np.ndarray, *, phase: int | None) -> np.ndarray | None:
    """``Evidence.gates``, from one reading of the trace.

    Args:
        texts: int [documents], the text of each document of the trace; -1: none.
    """
    shape = trace.shape
    count, width = int(texts.max()) + 1, shape.width
    sums = np.zeros((count, len(shape.layers), width), np.float32)
    for routes in trace.with_columns("weights", "phase"):
        if routes.weights is None:
            return None
        rows = np.flatnonzero(of_phase(routes, phase) & (texts[routes.document] >= 0))
        ids, weights = routes.ids[rows], routes.weights[rows]
        ran = ids != np.iinfo(ids.dtype).max
        cells = texts[routes.document[rows]][:, None, None] * width + ids
        for layer in range(len(shape.layers)):
            there = ran[:, layer]
            found = np.bincount(cells[:, layer][there], weights[:, layer][there], minlength=count * width)
            sums[:, layer] += found.reshape(count, width)
    return sums


def read_evidence(result: Result | str | Path) -> Evidence:
    """The evidence of a result that kept its trace, or in a folder of a trace or of counts.

    Raises:
        ResultError: no result there.
        PathError: the evaluation failed, or its trace was not kept.
        TraceError: the trace is incomplete or altered.
    """
    if isinstance(result, Result) and result.folder is None:
        raise PathError("this result was not written to a folder, where its routes would lie; give the trace or the counts")
    folder = Path(result if isinstance(result, str | Path) else result.folder or "")
    folder = folder.parent if folder.is_file() else folder
    if not (folder / RESULT_FILE).exists() and any((folder / name).is_file() for name in (MANIFEST, COUNTS)):
        return gather(read_routes(folder))
    found = result if isinstance(result, Result) else load_result(folder)
    if found.status != "ok":
        raise PathError(f"{folder}: this evaluation failed ({found.error}); evaluate again")
    if not (folder / TRACE_FOLDER).is_dir():
        raise PathError(f"{folder}: the routes were not kept beside the result; evaluate again with --save-trace --overwrite")
    phases = {name: number for number, name in PHASES.items()}
    return gather(
        Trace.load(folder / TRACE_FOLDER),
        permutations=int(found.settings.get("permutations", 1000)),
        seed=int(found.settings.get("seed", 0)),
        phase=phases.get(str(found.settings.get("phase", "all"))),
    )


def given_evidence(given: Result | Trace | Counts | Evidence | str | Path) -> Evidence:
    """The evidence of whatever was recorded; errors as of ``gather`` and ``read_evidence``."""
    if isinstance(given, Evidence):
        return given
    return gather(given) if isinstance(given, Trace | Counts) else read_evidence(given)
