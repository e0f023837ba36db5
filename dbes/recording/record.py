"""Record the routing of documents with any engine: shards, resuming, and what a trace says of its making."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dbes.errors import RecordingError
from dbes.files import write_json
from dbes.models import LoadedModel
from dbes.models.sites import find_sites, max_positions
from dbes.models.token_text import token_texts
from dbes.models.windows import embedding_rows, refuse_unknown, special_tokens, token_ids
from dbes.recording.background import Background
from dbes.recording.batches import Batching
from dbes.recording.batching import find_batching
from dbes.recording.engine import Engine
from dbes.recording.forward import ForwardEngine
from dbes.recording.streaming import streaming
from dbes.recording.units import SHARD_TOKENS, Unit, work_units
from dbes.trace.blocks import Assembly, Block, Contents, Work
from dbes.trace.manifest import MANIFEST, read_manifest
from dbes.trace.store import CONTROL, Trace
from dbes.trace.types import UNKNOWN, RoutingShape, TokenRoutes
from dbes.trace.vocabulary import TokenText
from dbes.trace.writer import TraceWriter

CONTROL_DRAWS = 3
Progress = Callable[[int, int], None]


class TextDocument(Protocol):
    """What is recorded: a text with its id and the name of its domain."""

    @property
    def id(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recorded trace and what it took; nothing but ``trace`` is part of the result's identity.

    Attributes:
        tokens: recorded now, without those an earlier, interrupted run had already recorded.
        batching: what could share a batch; None where the engine does not batch windows.
        engine: whether the weights were in memory, or read layer by layer; None for other engines.
        bytes_read, bytes_skipped: of the weights, by the streaming engine: read, and not read because the last layer ends
            with its router.
    """

    trace: Trace
    documents: int
    tokens: int
    seconds: float
    batching: Batching | None = None
    engine: Literal["memory", "streaming"] | None = None
    bytes_read: int | None = None
    bytes_skipped: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def record_documents(
    loaded: LoadedModel,
    documents: Sequence[TextDocument],
    *,
    domains: Sequence[str],
    window: int,
    output_path: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    control: int = CONTROL_DRAWS,
    stiffness: bool = True,
    max_memory: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Routing of every token of the documents, as executed. The same whatever the batch size and the order of documents.

    Each document is cut into windows of at most ``window`` tokens, fewer where the model has fewer positions; each window is a
    forward of its own, with the special tokens the tokenizer adds around a text. These are not recorded.

    Args:
        domains: names of the domains, in the benchmark's order.
        output_path: folder of the trace. An interrupted recording of the same thing in it resumes from the last whole
            work unit. None keeps the trace in memory.
        batch_size: windows per batch; "auto" fills a budget of tokens, halved when memory runs out.
        seed: of the random-router control and of the noise of the stability measures.
        control: draws of the random-router control to record in the same pass; their spread tells what another draw would show.
        stiffness: record margins and flips.
        max_memory: bytes that this process may use, where the model's layers were left on disk; by default what is free.
        provenance: further facts for the trace's manifest (name, version and fingerprint of the task).
        progress: called as progress(tokens done, tokens in all).

    Raises:
        RecordingError: no documents, a text without tokens, an unknown domain; a layer that did not fire; wrong counts; NaN in
            the router's output; memory too small for one window.
        ModelError: not a Mixture-of-Experts model, or one whose routing cannot be read.
        TraceError: the folder holds another recording.
    """
    sites = find_sites(loaded.model)
    _placed(documents, domains)
    texts = _token_ids(loaded, documents)
    before, after = special_tokens(loaded.tokenizer, [document.text for document in documents])
    refuse_unknown(np.asarray([*before, *after], int), embedding_rows(loaded.model), loaded.tokenizer, name="special tokens of a text")
    limit, extra = max_positions(loaded.model), len(before) + len(after)
    if window < 1 or (limit is not None and limit <= extra):
        raise RecordingError(f"window: expected at least one token, got {window} (the model has {limit} positions)")
    if batch_size != "auto" and batch_size < 1:
        raise RecordingError(f"batch_size: expected at least 1, or 'auto', got {batch_size}")
    engine = ForwardEngine(
        loaded=loaded,
        sites=sites,
        before=before,
        after=after,
        seed=seed,
        control=int(control),
        stiffness=stiffness,
        window=window if limit is None else min(window, limit - extra),
        batch_size=None if batch_size == "auto" else batch_size,
    )
    before = (0, 0) if loaded.layerwise is None else (loaded.layerwise.bytes_read, loaded.layerwise.bytes_skipped)
    folder = None if output_path is None else Path(output_path)
    if loaded.layerwise is None:
        engine = replace(engine, batching=find_batching(engine, texts, folder))
    else:
        engine = streaming(engine, texts, max_memory=max_memory, folder=folder)
    done = record_with(
        engine,
        documents,
        texts,
        domains=domains,
        spelled=lambda ids: token_texts(loaded.tokenizer, ids),
        output_path=output_path,
        provenance=provenance,
        progress=progress,
    )
    if loaded.layerwise is None:
        return replace(done, batching=engine.batching, engine="memory")
    read, skipped = loaded.layerwise.bytes_read - before[0], loaded.layerwise.bytes_skipped - before[1]
    return replace(done, batching=engine.batching, engine="streaming", bytes_read=read, bytes_skipped=skipped)


def record_with(
    engine: Engine,
    documents: Sequence[TextDocument],
    texts: Sequence[np.ndarray],
    *,
    domains: Sequence[str],
    spelled: Callable[[Sequence[int]], Mapping[int, TokenText]] = lambda _: {},
    output_path: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Recording:
    """The routes an engine tells of the documents, checked, in shards of whole documents.

    Args:
        texts: int32 [tokens] of each document, without special tokens.
        spelled: texts of token ids, for the trace's vocabulary.
        domains, output_path, provenance, progress: see `record_documents`.

    Raises:
        RecordingError: no documents, an unknown domain; blocks that are not the routes of every token at every layer, once.
        TraceError: the folder holds another recording.
    """
    contents = engine.contents
    shape = _shape(contents, documents, domains)
    facts = {**engine.identity, **dict(provenance or {}), **engine.settings}
    target = _Destination(output_path, shape, facts, draws=contents.control)
    tally = _Tally(len(contents.layers), target.routes())
    started, told = time.perf_counter(), _Told(tally.tokens, len(contents.layers), sum(map(len, texts)), progress)
    lengths = [len(text) + contents.answer for text in texts]
    with Background() as host:
        for unit in work_units(lengths, contents.bytes_per_token, shard_tokens=SHARD_TOKENS):
            low, high = unit.documents
            if high > target.next_document:
                _record_unit(engine, unit, Work(low, shape.document_ids[low:high], texts[low:high]), target, tally, host, told)
    seconds = time.perf_counter() - started
    trace = target.finish(vocabulary=spelled(sorted(tally.seen)), provenance=tally.facts(engine))
    return Recording(trace=trace, documents=len(documents), tokens=tally.tokens - told.earlier, seconds=seconds)


def _record_unit(engine: Engine, unit: Unit, work: Work, target: _Destination, tally: _Tally, host: Background, told: _Told) -> None:
    """One work unit: while the engine runs, another thread puts its routes together and writes its shards, and those of the one before."""
    where = str(engine.identity.get("model"))
    assembly = Assembly(engine.contents, work, where=where, error=RecordingError, folder=target.folder)
    reduced: int | None = None
    for block in engine.blocks(work):
        host.do(assembly.add, block)
        reduced = block.reduced or reduced
        told.add(block)

    def store() -> None:
        tally.reduced |= {} if reduced is None else {str(work.first): reduced}
        kept = [bounds for bounds in unit.shards if bounds[0] >= target.next_document]
        for (_, end), (routes, controls) in zip(kept, assembly.parts(kept), strict=True):
            target.write(routes, controls, last_document=end - 1)
            tally.add(routes)

    host.do(store)


class _Told:
    """Tells progress; tokens count when all their layers have come.

    Attributes:
        earlier: tokens that were recorded before.
    """

    def __init__(self, earlier: int, layers: int, total: int, progress: Progress | None) -> None:
        self.earlier, self._layers, self._total, self._progress, self._cells = earlier, layers, total, progress, 0

    def add(self, block: Block) -> None:
        self._cells += len(block.document) * len(block.layers)
        if self._progress is not None:
            self._progress(self.earlier + self._cells // self._layers, self._total)


def _placed(documents: Sequence[TextDocument], domains: Sequence[str]) -> np.ndarray:
    """Index of each document's domain."""
    if not documents:
        raise RecordingError("no documents to record")
    places = {name: place for place, name in enumerate(domains)}
    for document in documents:
        if document.domain not in places:
            raise RecordingError(f"document {document.id!r} has the domain {document.domain!r}, expected one of {list(domains)}")
    return np.asarray([places[document.domain] for document in documents], np.int32)


def _shape(contents: Contents, documents: Sequence[TextDocument], domains: Sequence[str]) -> RoutingShape:
    return RoutingShape(
        layers=contents.layers,
        experts=contents.experts,
        top_k=contents.top_k,
        domains=tuple(domains),
        document_domain=_placed(documents, domains),
        document_ids=tuple(document.id for document in documents),
        document_source=_sources(documents),
    )


def _sources(documents: Sequence[TextDocument]) -> tuple[str, ...] | None:
    """Source text of each document; one that names none is its own, and repeats of a text are one. None when all are their own."""
    first: dict[str, str] = {}
    sources = tuple(
        getattr(document, "source_document", None) or first.setdefault(" ".join(document.text.split()), document.id)
        for document in documents
    )
    distinct = {(source, document.domain) for source, document in zip(sources, documents, strict=True)}
    return sources if len(distinct) < len(documents) else None


def _token_ids(loaded: LoadedModel, documents: Sequence[TextDocument]) -> list[np.ndarray]:
    def name(place: int) -> str:
        return f"document {documents[place].id!r} (domain {documents[place].domain!r})"

    texts = token_ids(loaded.tokenizer, [document.text for document in documents], names=name)
    rows = embedding_rows(loaded.model)
    for place, ids in enumerate(texts):
        if not len(ids):
            raise RecordingError(f"{name(place)} has no tokens; give it a text or take it out")
        refuse_unknown(ids, rows, loaded.tokenizer, name=name(place))
    return texts


class _Tally:
    """What is known only at the end: tokens seen, slots that ran nothing, rows without a score."""

    def __init__(self, layers: int, earlier: Iterator[TokenRoutes]) -> None:
        self.tokens = 0
        self.seen: set[int] = set()
        self.idle = np.zeros(layers, np.int64)
        self.unscored = np.zeros(layers, np.int64)
        self.unmargined = np.zeros(layers, np.int64)
        self.reduced: dict[str, int] = {}
        for routes in earlier:
            self.add(routes)

    def add(self, routes: TokenRoutes) -> None:
        assert routes.token_ids is not None
        self.tokens += len(routes)
        self.seen.update(np.unique(routes.token_ids).tolist())
        self.idle += (routes.ids == np.iinfo(routes.ids.dtype).max).sum(axis=(0, 2))
        if routes.kept is not None and routes.logit_margins is not None:
            self.unscored += (routes.kept[:, :, 0] == UNKNOWN).sum(axis=0)
            self.unmargined += np.isnan(routes.logit_margins).sum(axis=0)

    def facts(self, engine: Engine) -> dict[str, Any]:
        """Per layer: why rows have no score, and the share of slots that went to zero-computation experts or were skipped."""
        reasons: dict[str, str] = {}
        logit_reasons: dict[str, str] = {}
        idle: dict[str, float] = {}
        contents = engine.contents
        for column, (layer, top_k) in enumerate(zip(contents.layers, contents.top_k, strict=True)):
            if self.unscored[column]:
                reasons[str(layer)] = engine.score_reason(layer, int(self.unscored[column]), self.tokens)
            if self.unmargined[column]:
                logit_reasons[str(layer)] = f"no router logits for {self.unmargined[column]} of {self.tokens} tokens"
            running = self.idle[column] - self.tokens * (contents.slots - top_k)
            if running:
                idle[str(layer)] = float(running / (self.tokens * top_k))
        found = {"scores_missing": reasons, "logits_missing": logit_reasons, "slots_without_expert": idle}
        # where memory ran out texts shared smaller batches, by the first document of the work unit
        return found | ({"batches_reduced_to": self.reduced} if self.reduced else {})


class _Destination:
    """Where shards go: a trace folder with its controls, or memory. A control's shard is written before the trace's, so that on resuming
    it is never behind, and is cut back when it is ahead."""

    def __init__(self, output_path: str | Path | None, shape: RoutingShape, facts: Mapping[str, Any], *, draws: int) -> None:
        self.shape, self.facts = shape, dict(facts)
        self.folder = None if output_path is None else Path(output_path)
        self.kept: list[tuple[TokenRoutes, ...]] = []
        self.writer: TraceWriter | None = None
        self.controls: list[TraceWriter] = []
        if self.folder is None:
            return
        self.writer = TraceWriter(self.folder, shape, facts)
        inner = self.folder
        for draw in range(draws):
            inner = inner / CONTROL
            if (inner / MANIFEST).is_file() and (manifest := read_manifest(inner)).complete:
                # interrupted between finishing the control and finishing the trace
                write_json(inner / MANIFEST, manifest.model_copy(update={"complete": False}).model_dump(mode="json"))
            self.controls.append(TraceWriter(inner, shape, self._control_facts(draw)))
            self.controls[-1].keep_shards(self.writer.shards)

    def _control_facts(self, draw: int) -> dict[str, Any]:
        return {**self.facts, "router": "random", "draw": draw}

    @property
    def next_document(self) -> int:
        return self.writer.next_document if self.writer is not None else 0

    def routes(self) -> Iterator[TokenRoutes]:
        """Shards of an earlier, interrupted run."""
        if self.folder is not None:
            yield from Trace(shape=self.shape, path=self.folder, entries=read_manifest(self.folder).shards)

    def write(self, routes: TokenRoutes, controls: Sequence[TokenRoutes], *, last_document: int) -> None:
        if self.writer is None:
            self.kept.append((routes, *controls))
            return
        for writer, control in zip(self.controls, controls, strict=False):
            writer.write(control, last_document=last_document)
        self.writer.write(routes, last_document=last_document)

    def finish(self, *, vocabulary: Mapping[int, TokenText], provenance: Mapping[str, Any]) -> Trace:
        if self.writer is None:
            loaded, *controls = zip(*self.kept, strict=True)
            control = None
            for draw, routes in reversed(list(enumerate(controls))):
                control = Trace(shape=self.shape, provenance=self._control_facts(draw), control=control, loaded=routes)
            facts = {**self.facts, **provenance}
            return Trace(shape=self.shape, provenance=facts, control=control, vocabulary=vocabulary, loaded=loaded)
        for writer in reversed(self.controls):
            writer.finish()
        self.writer.finish(vocabulary=vocabulary, provenance=provenance)
        assert self.folder is not None
        return Trace.load(self.folder)
