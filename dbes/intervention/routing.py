"""Which router an experiment runs: the model's own, or the prescribed one that a testbed checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dbes.errors import InterventionError, MixError
from dbes.intervention.data import Texts
from dbes.intervention.settings import AS_TRAINED, PLAIN, InterventionSettings
from dbes.testbed.prescribed import Prescribed, Prescription, read_prescription


def prescription_of(model: str, settings: InterventionSettings) -> Prescription | None:
    """How the model is routed in every forward of the experiment; None where it routes by its own router.

    Raises:
        InterventionError: ``as-trained`` for a model that is no folder of ``dbes testbed train --prescribed``, or with domains that
            the model was not trained on.
    """
    if settings.routing == PLAIN:
        return None
    try:
        prescription = read_prescription(Path(model))
    except MixError as problem:
        raise InterventionError(f"routing {AS_TRAINED}: {problem}") from None
    blocks = f"a new domain has no block of experts; the model's blocks are those of {', '.join(prescription.domains)}"
    if settings.new:
        raise InterventionError(f"new domains {list(settings.new)}: routing {AS_TRAINED} refuses them: {blocks}")
    unknown = [name for name in settings.domains if name not in prescription.domains]
    if unknown:
        raise InterventionError(f"targets {unknown}: routing {AS_TRAINED} refuses domains that are new to the model: {blocks}")
    return prescription


def routable(texts: Texts, prescription: Prescription | None) -> tuple[Texts, tuple[str, ...]]:
    """The texts of domains that the model can be routed by, and the names of those left out."""
    if prescription is None:
        return texts, ()
    kept = [name for name in texts.domains if name in prescription.domains]
    left_out = tuple(name for name in texts.domains if name not in prescription.domains)
    return Texts(training={n: texts.training[n] for n in kept}, heldout={n: texts.heldout[n] for n in kept}), left_out


@contextmanager
def routed(model: Any, prescription: Prescription | None) -> Iterator[Prescribed | None]:
    """Inside the block the model is routed by the prescription, by its own router without one.

    Raises:
        InterventionError: the prescription does not fit the model.
    """
    if prescription is None:
        yield None
        return
    try:
        prescribed = Prescribed(model, prescription.routing, prescription.domains)
    except MixError as problem:
        raise InterventionError(f"routing {AS_TRAINED}: {problem}") from None
    with prescribed:
        yield prescribed


def under(prescribed: Prescribed | None, domain: str) -> AbstractContextManager[None]:
    """Forwards inside the block are of this domain; nothing to say to a model that routes by its own router."""
    return nullcontext() if prescribed is None else prescribed.domain(domain)
