"""What a result says of itself: model, environment, task, and the texts that were read."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from dbes.errors import TraceError
from dbes.results import DomainFacts, ModelFacts, TaskFacts
from dbes.scoring.counting import of_phase
from dbes.scoring.counts import Counts
from dbes.trace.store import Trace
from dbes.trace.types import PROMPT, TokenRoutes
from dbes.wording import counted

PHASES = {None: "all", 0: "prompt", 1: "generated"}

DATA = "data:"
"""Beginning of a fingerprint that was made from the data of a trace, for want of the task's own."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a trace holds of the texts that were read.

    Attributes:
        fingerprint: of the data, see ``read_texts``; None where nothing in the trace tells its data from others.
        distinct: different source texts of each domain, by token ids; empty where the trace has none.
    """

    fingerprint: str | None
    distinct: Mapping[str, int]


def read_texts(trace: Trace, *, phase: int | None = None) -> Texts:
    """Fingerprint of the data of a trace, and how many different texts each domain has.

    The fingerprint is a sha256 over the domains, the document ids and sources that were given, and the token ids of the prompts
    (what a model wrote itself is no part of the data). Ids that only number the documents, as ``Trace.from_arrays`` makes them, say
    nothing: without others and without token ids there is no fingerprint.

    Args:
        phase: count different texts by the tokens of this phase; None: by all.
    """
    shape = trace.shape
    numbered = tuple(map(str, shape.document_ids)) == tuple(map(str, range(len(shape.document_ids))))
    data = hashlib.sha256()
    for part in (shape.domains, shape.document_domain.tolist(), () if numbered else shape.document_ids, shape.document_source or ()):
        data.update(f"{len(part)}:".encode() + "\0".join(map(str, part)).encode("utf-8", "backslashreplace"))
    units = shape.units
    texts: dict[int, hashlib._Hash] = {}
    known = prompted = False
    for routes in trace.with_columns("token_ids", "phase"):
        if routes.token_ids is None:
            known = prompted = False
            break
        known = True
        given = routes.take(np.flatnonzero(of_phase(routes, PROMPT)))
        prompted |= len(given) > 0
        for document, ids in _by_document(given):
            data.update(f"{document}:{len(ids)}:".encode() + ids.tobytes())
        for document, ids in _by_document(routes.take(np.flatnonzero(of_phase(routes, phase)))):
            texts.setdefault(int(units[document]), hashlib.sha256()).update(ids.tobytes())
    different: dict[str, set[bytes]] = {domain: set() for domain in shape.domains}
    domain_of = dict(zip(units.tolist(), shape.document_domain.tolist(), strict=True))
    for unit, text in texts.items():
        different[shape.domains[domain_of[unit]]].add(text.digest())
    return Texts(
        fingerprint=None if numbered and not prompted else DATA + data.hexdigest(),
        distinct={domain: len(found) for domain, found in different.items()} if known else {},
    )


def _by_document(routes: TokenRoutes) -> list[tuple[int, np.ndarray]]:
    """The token ids of each document of a shard, int32."""
    assert routes.token_ids is not None
    documents, starts = np.unique(routes.document, return_index=True)
    ids = routes.token_ids.astype("<i4")
    return list(zip(documents.tolist(), np.split(ids, starts[1:]), strict=True)) if len(documents) else []


def require_phase(trace: Trace, phase: int | None) -> None:
    """Refuse a phase of which the trace holds no token.

    Raises:
        TraceError: no such phase, or no token of it; says which phases the trace holds.
    """
    if phase not in PHASES:
        raise TraceError(f"phase: expected 0 (prompt), 1 (generated) or None (all tokens), got {phase!r}")
    if phase is None:
        return
    tokens = {name: 0 for code, name in PHASES.items() if code is not None}
    for routes in trace.with_columns("phase"):
        for code, name in PHASES.items():
            if code is not None:
                tokens[name] += int(of_phase(routes, code).sum())
    if tokens[PHASES[phase]]:
        return
    held = [f"{counted(count, f'{name} token')}" for name, count in tokens.items() if count]
    found = f"it holds {' and '.join(held)}; choose that phase, or all" if held else "it holds no tokens at all"
    raise TraceError(f"phase {PHASES[phase]}: the trace has no {PHASES[phase]} tokens to score; {found}")


def model_facts(trace: Trace) -> ModelFacts:
    shape, about = trace.shape, trace.provenance
    return ModelFacts(
        name=str(about.get("model", "unnamed")),
        revision=about.get("revision"),
        family=about.get("family"),
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        parameters=about.get("parameters"),
        dtype=about.get("dtype"),
    )


def environment(trace: Trace) -> dict[str, str | None]:
    """What can change a score besides model and task: where and with which versions it was recorded and scored."""
    about = trace.provenance
    recorded = {key: str(about[key]) for key in ("device", "attention", "experts_implementation") if key in about}
    recorded |= {f"recorded_with_{name}": str(number) for name, number in about.get("versions", {}).items()}
    return {**recorded, "dbes": version("dbes"), "numpy": np.__version__, "python": platform.python_version()}


def task_facts(trace: Trace, counts: Counts, texts: Texts) -> TaskFacts:
    """Name, version and fingerprint of the task, and the size of its domains.

    Args:
        counts: of each document.
        texts: its fingerprint stands in where the recording names none.
    """
    shape = counts.shape
    about = trace.provenance.get("task") or {}
    domains = {
        domain: DomainFacts(
            documents=int(((shape.document_domain == index) & (counts.tokens > 0)).sum()),
            sources=len(np.unique(shape.units[(shape.document_domain == index) & (counts.tokens > 0)])),
            tokens=int(counts.tokens[shape.document_domain == index].sum()),
        )
        for index, domain in enumerate(shape.domains)
    }
    return TaskFacts(
        name=str(about.get("name", "unnamed")),
        version=about.get("version"),
        fingerprint=about.get("fingerprint") or texts.fingerprint,
        domains=domains,
        separability=about.get("separability", float("nan")),
        note=about.get("note"),
    )
