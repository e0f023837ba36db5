"""What a result says of itself: model, environment, task, and the texts that were read."""

from __future__ import annotations

import platform
from importlib.metadata import version

import numpy as np

from dbes.errors import TraceError
from dbes.results import DomainFacts, ModelFacts, TaskFacts
from dbes.scoring.counts import Counts
from dbes.trace.types import PHASES
from dbes.wording import counted


def require_tokens(counts: Counts) -> None:
    """Refuse counts of a phase of which the trace held no token.

    Raises:
        TraceError: says which phases the trace holds.
    """
    if counts.phase is None or counts.tokens.any():
        return
    held = [counted(count, f"{PHASES[code]} token") for code, count in enumerate(counts.phase_tokens) if count]
    found = f"it holds {' and '.join(held)}; choose that phase, or all" if held else "it holds no tokens at all"
    name = PHASES[counts.phase]
    raise TraceError(f"phase {name}: the trace has no {name} tokens to score; {found}")


def model_facts(counts: Counts) -> ModelFacts:
    shape, about = counts.shape, counts.provenance
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


def environment(counts: Counts) -> dict[str, str | None]:
    """What can change a score besides model and task: where and with which versions it was recorded and scored."""
    about = counts.provenance
    recorded = {key: str(about[key]) for key in ("device", "attention", "experts_implementation") if key in about}
    recorded |= {f"recorded_with_{name}": str(number) for name, number in about.get("versions", {}).items()}
    return {**recorded, "dbes": version("dbes"), "numpy": np.__version__, "python": platform.python_version()}


def task_facts(counts: Counts) -> TaskFacts:
    """Name, version and fingerprint of the task, and the size of its domains.

    The fingerprint of the texts stands in where the recording names none. Where no documents are known, their number is 0.
    """
    shape = counts.shape
    about = counts.provenance.get("task") or {}
    used = (counts.tokens > 0) & counts.by_documents
    domains = {
        domain: DomainFacts(
            documents=int(((shape.document_domain == index) & used).sum()),
            sources=len(np.unique(shape.units[(shape.document_domain == index) & used])),
            tokens=int(counts.tokens[shape.document_domain == index].sum()),
            cautions=tuple((about.get("cautions") or {}).get(domain, ())),
        )
        for index, domain in enumerate(shape.domains)
    }
    return TaskFacts(
        name=str(about.get("name", "unnamed")),
        version=about.get("version"),
        fingerprint=about.get("fingerprint") or counts.texts.fingerprint,
        domains=domains,
        separability=about.get("separability", float("nan")),
        note=about.get("note"),
    )
