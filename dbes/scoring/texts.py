"""What a trace holds of the texts that were read: a fingerprint of the data, and how many different texts there are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dbes.scoring.sums import of_phase
from dbes.trace.types import PROMPT, RoutingShape, TokenRoutes

DIGITS = 24
"""Hexadecimal digits of the sha256 of a text that are kept."""

DATA = "data:"
"""Beginning of a fingerprint that was made from the data of a trace, for want of the task's own."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a trace holds of the texts that were read.

    Attributes:
        fingerprint: of the data, see ``TextReader``; None where nothing in the trace tells its data from others.
        digests: of the different source texts of each domain, by token ids; empty where the trace has none.
    """

    fingerprint: str | None = None
    digests: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def distinct(self) -> dict[str, int]:
        """Different source texts of each domain; empty where they are not known."""
        return {domain: len(found) for domain, found in self.digests.items()}


def combined(parts: Sequence[Texts], *, apart: bool) -> Texts:
    """What is known of the texts of several recordings together.

    Args:
        apart: no document is in two of them; of a text that is cut over several the digest of the whole is unknown.
    """
    data = hashlib.sha256()
    for part in parts:
        data.update(f"{part.fingerprint}\n".encode())
    digests = {}
    if apart and all(part.digests for part in parts):
        digests = {domain: frozenset().union(*(part.digests[domain] for part in parts)) for domain in parts[0].digests}
    return Texts(fingerprint=DATA + data.hexdigest() if all(part.fingerprint for part in parts) else None, digests=digests)


class TextReader:
    """Reads the texts of a trace shard by shard.

    The fingerprint is a sha256 over the domains, the document ids and sources that were given, and the token ids of the prompts
    (what a model wrote itself is no part of the data). Ids that only number the documents, as ``Trace.from_arrays`` makes them, say
    nothing: without others and without token ids there is no fingerprint.

    Args:
        phase: count different texts by the tokens of this phase; None: by all.
    """

    def __init__(self, shape: RoutingShape, phase: int | None = None) -> None:
        self.shape, self.phase, self.units = shape, phase, shape.units
        self.data = hashlib.sha256()
        given = () if shape.numbered else shape.document_ids
        for part in (shape.domains, shape.document_domain.tolist(), given, shape.document_source or ()):
            self.data.update(f"{len(part)}:".encode() + "\0".join(map(str, part)).encode("utf-8", "backslashreplace"))
        self.texts: dict[int, hashlib._Hash] = {}
        self.known: bool | None = None
        self.prompted = False

    def add(self, routes: TokenRoutes) -> None:
        """Read the next shard, of all phases."""
        self.known = routes.token_ids is not None and self.known is not False
        if not self.known:
            self.prompted = False
            return
        given = routes.take(np.flatnonzero(of_phase(routes, PROMPT)))
        self.prompted |= len(given) > 0
        for document, ids in _by_document(given):
            self.data.update(f"{document}:{len(ids)}:".encode() + ids.tobytes())
        for document, ids in _by_document(routes.take(np.flatnonzero(of_phase(routes, self.phase)))):
            self.texts.setdefault(int(self.units[document]), hashlib.sha256()).update(ids.tobytes())

    def done(self) -> Texts:
        shape = self.shape
        different: dict[str, set[str]] = {domain: set() for domain in shape.domains}
        domain_of = dict(zip(self.units.tolist(), shape.document_domain.tolist(), strict=True))
        for unit, text in self.texts.items():
            different[shape.domains[domain_of[unit]]].add(text.hexdigest()[:DIGITS])
        return Texts(
            fingerprint=None if shape.numbered and not self.prompted else DATA + self.data.hexdigest(),
            digests={domain: frozenset(found) for domain, found in different.items()} if self.known else {},
        )


def _by_document(routes: TokenRoutes) -> list[tuple[int, np.ndarray]]:
    """The token ids of each document of a shard, int32."""
    assert routes.token_ids is not None
    documents, starts = np.unique(routes.document, return_index=True)
    ids = routes.token_ids.astype("<i4")
    return list(zip(documents.tolist(), np.split(ids, starts[1:]), strict=True)) if len(documents) else []
