"""Documents as an engine is given them: placed in their domains, cut to source texts, as token ids; and the engine that routes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from dbes.errors import RecordingError
from dbes.models import LoadedModel
from dbes.models.sites import find_sites, max_positions
from dbes.models.token_text import token_bytes
from dbes.models.windows import embedding_rows, refuse_unknown, special_tokens, token_ids
from dbes.recording.forward import ForwardEngine

if TYPE_CHECKING:
    from dbes.recording.chat import Template


class TextDocument(Protocol):
    """What is recorded: a text with its id and the name of its domain."""

    @property
    def id(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def text(self) -> str: ...


def placed(documents: Sequence[TextDocument], domains: Sequence[str]) -> np.ndarray:
    """Index of each document's domain."""
    if not documents:
        raise RecordingError("no documents to record")
    places = {name: place for place, name in enumerate(domains)}
    for document in documents:
        if document.domain not in places:
            raise RecordingError(f"document {document.id!r} has the domain {document.domain!r}, expected one of {list(domains)}")
    return np.asarray([places[document.domain] for document in documents], np.int32)


def source_texts(documents: Sequence[TextDocument]) -> tuple[str, ...] | None:
    """Source text of each document; one that names none is its own, and repeats of a text are one. None when all are their own."""
    first: dict[str, str] = {}
    sources = tuple(
        getattr(document, "source_document", None) or first.setdefault(" ".join(document.text.split()), document.id)
        for document in documents
    )
    distinct = {(source, document.domain) for source, document in zip(sources, documents, strict=True)}
    return sources if len(distinct) < len(documents) else None


def names_of(documents: Sequence[TextDocument]) -> Callable[[int], str]:
    return lambda place: f"document {documents[place].id!r} (domain {documents[place].domain!r})"


def token_ids_of(
    loaded: LoadedModel, documents: Sequence[TextDocument], template: Template | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of each document, and which of them are the template's."""
    names, given = names_of(documents), [document.text for document in documents]
    if template is not None:
        return template.render(given, names=names)
    texts = token_ids(loaded.tokenizer, given, names=names)
    rows = embedding_rows(loaded.model)
    for place, ids in enumerate(texts):
        if not len(ids):
            raise RecordingError(f"{names(place)} has no tokens; give it a text or take it out")
        refuse_unknown(ids, rows, loaded.tokenizer, name=names(place))
    return texts, []


def prepared(
    loaded: LoadedModel, documents: Sequence[TextDocument], *, window: int, batch_size: int | Literal["auto"] = "auto", seed: int = 0
) -> tuple[ForwardEngine, list[np.ndarray]]:
    """An engine that routes only, and the documents' token ids, int32 [tokens] each; raises as `record_documents`."""
    texts, _ = token_ids_of(loaded, documents, None)
    return plain_engine(loaded, documents, window=window, batch_size=batch_size, seed=seed), texts


def plain_engine(
    loaded: LoadedModel, documents: Sequence[TextDocument], *, window: int, batch_size: int | Literal["auto"], seed: int
) -> ForwardEngine:
    """An engine that routes only."""
    sites = find_sites(loaded.model)
    before, after = special_tokens(loaded.tokenizer, [document.text for document in documents])
    refuse_unknown(np.asarray([*before, *after], int), embedding_rows(loaded.model), loaded.tokenizer, name="special tokens of a text")
    limit, extra = max_positions(loaded.model), len(before) + len(after)
    if window < 1 or (limit is not None and limit <= extra):
        raise RecordingError(f"window: expected at least one token, got {window} (the model has {limit} positions)")
    if batch_size != "auto" and batch_size < 1:
        raise RecordingError(f"batch_size: expected at least 1, or 'auto', got {batch_size}")
    return ForwardEngine(
        loaded=loaded,
        sites=sites,
        before=before,
        after=after,
        seed=seed,
        control=0,
        stiffness=False,
        window=window if limit is None else min(window, limit - extra),
        batch_size=None if batch_size == "auto" else batch_size,
    )


def predicted_bytes(engine: ForwardEngine, documents: Sequence[TextDocument], texts: Sequence[np.ndarray]) -> np.ndarray:
    """UTF-8 bytes of each document but of tokens that nothing stands before, int64 [documents]."""
    found = np.asarray([len(document.text.encode()) for document in documents], np.int64)
    if not engine.before:
        firsts = [[token_bytes(engine.loaded.tokenizer, int(token)) for token in ids[:: engine.window]] for ids in texts]
        found = np.maximum(found - [sum(each) for each in firsts], 0)
    return found
