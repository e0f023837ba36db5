"""Record the routing of documents with any engine: shards, resuming, and what a trace says of its making."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dbes.errors import RecordingError
from dbes.locks import Held
from dbes.models import LoadedModel
from dbes.models.token_text import token_texts
from dbes.recording.background import Background
from dbes.recording.batches import Batching
from dbes.recording.batching import find_batching
from dbes.recording.chat import Template
from dbes.recording.crew import Crew
from dbes.recording.decode import GenerationEngine, answer, generating
from dbes.recording.documents import TextDocument, names_of, placed, plain_engine, predicted_bytes, source_texts, token_ids_of
from dbes.recording.engine import Engine, PassEngine
from dbes.recording.forward import ForwardEngine
from dbes.recording.generation import Generation
from dbes.recording.ledger import Ledger, Tally
from dbes.recording.streaming import streaming
from dbes.recording.units import SHARD_TOKENS, UNIT_TOKENS, Unit, work_units
from dbes.trace.blocks import Assembly, Block, Contents, Work
from dbes.trace.loss import DIGEST, DocumentLoss, save_loss
from dbes.trace.store import Trace
from dbes.trace.types import RoutingShape
from dbes.trace.vocabulary import TokenText

CONTROL_DRAWS = 3

TRIED = 4
"""Tokens of an answer by which is found which prompts may share a batch."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recorded trace and what it took; nothing but ``trace`` is part of the result's identity.

    Attributes:
        tokens: recorded now, without those an earlier, interrupted run had already recorded.
        batching: what could share a batch; None where the engine does not batch windows.
        engine: whether the weights were in memory, or read layer by layer; None for other engines.
        bytes_read, bytes_skipped: of the weights, by the streaming engine: read, and not read because the last layer ends
            with its router.
        loss: of every document, where it was asked for.
    """

    trace: Trace
    documents: int
    tokens: int
    seconds: float
    batching: Batching | None = None
    engine: Literal["memory", "streaming"] | None = None
    bytes_read: int | None = None
    bytes_skipped: int | None = None
    loss: DocumentLoss | None = None

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
    loss: bool = False,
    max_memory: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    crew: Crew | None = None,
    generation: Generation | None = None,
    template: Template | None = None,
) -> Recording:
    """Routing of every token of the documents, as executed. The same whatever the batch size and the order of documents.

    Each document is cut into windows of at most ``window`` tokens, fewer where the model has fewer positions; each window is a
    forward of its own, with the special tokens the tokenizer adds around a text. These are not recorded.

    Args:
        domains: names of the domains, in the benchmark's order.
        output_path: folder of the trace, in which an interrupted recording resumes from its last whole unit; None: in memory.
        batch_size: windows per batch; "auto" fills a budget of tokens. seed: of the random routers and of the stability measures' noise.
        control: draws of the random router to record in the same pass.
        stiffness: record margins and flips.
        loss: record how well the model predicts the texts; the head runs too then.
        max_memory: bytes that this process may use, where layers were left on disk.
        provenance: further facts for the trace's manifest; progress: called as progress(tokens done, tokens in all).
        crew: the processes that record into the folder together; the first of them returns the trace, the others one without routes.
        generation, template: let the model answer each document, cut to a window, in a chat template; answers are recorded too.

    Raises:
        RecordingError: no documents, a text without tokens, an unknown domain; a layer that did not fire; wrong counts; NaN in
            the router's output; memory too small for one window.
        ModelError: not a Mixture-of-Experts model, or one whose routing cannot be read.
        TraceError: the folder holds another recording.
    """
    placed(documents, domains)
    texts, marks = token_ids_of(loaded, documents, template)
    engine = plain_engine(loaded, documents, window=window, batch_size=batch_size, seed=seed)
    engine = replace(engine, control=int(control), stiffness=stiffness, loss=loss)
    if loss and loaded.layerwise is not None:
        raise RecordingError("loss: streaming ends the last layer with its router, so no token is predicted; use --engine memory")
    earlier, given = _read(loaded), None if template is None else (template, marks)
    folder, names = None if output_path is None else Path(output_path), names_of(documents)
    running, texts = _running(engine, generation, texts, given, names=names, folder=folder, max_memory=max_memory)
    engine = running.base if isinstance(running, GenerationEngine) else running
    done = record_with(
        running,
        documents,
        texts,
        domains=domains,
        spelled=lambda ids: token_texts(loaded.tokenizer, ids),
        text_bytes=predicted_bytes(engine, documents, texts) if loss else None,
        output_path=output_path,
        provenance=provenance,
        progress=progress,
        crew=crew,
    )
    if loaded.layerwise is None:
        return replace(done, batching=engine.batching, engine="memory")
    read, skipped = (now - then for now, then in zip(_read(loaded), earlier, strict=True))
    return replace(done, batching=engine.batching, engine="streaming", bytes_read=read, bytes_skipped=skipped)


def _running(
    engine: ForwardEngine, generation: Generation | None, texts: list[np.ndarray],
    template: tuple[Template, Sequence[np.ndarray]] | None, *, names: Callable[[int], str], folder: Path | None, max_memory: int | None,
) -> tuple[ForwardEngine | GenerationEngine, list[np.ndarray]]:  # fmt: skip
    """The engine that knows what may share a batch, and the texts as it is given them."""
    if generation is None:
        return _settled(engine, texts, folder, max_memory), texts
    answering, prompts = generating(engine, generation, texts, template, names=names)
    batching = _batching_of_answers(answering, prompts, folder)
    return replace(answering, base=replace(answering.base, batching=batching)), prompts


def _settled(engine: ForwardEngine, texts: Sequence[np.ndarray], folder: Path | None, max_memory: int | None) -> ForwardEngine:
    """The engine that knows what may share a batch, and reads layer by layer where they were left on disk."""
    if engine.loaded.layerwise is not None:
        return streaming(engine, texts, max_memory=max_memory, folder=folder)
    return replace(engine, batching=find_batching(engine, texts, folder))


def _batching_of_answers(engine: GenerationEngine, texts: Sequence[np.ndarray], folder: Path | None) -> Batching:
    """What prompts may share a batch, found by letting two be answered with TRIED tokens, as plain texts."""
    short = replace(engine, generation=Generation(TRIED), template=(), end=())
    return find_batching(
        engine.base, texts, folder, run=lambda base, windows: answer(replace(short, base=base), windows), answer=TRIED - 1
    )


def _read(loaded: LoadedModel) -> tuple[int, int]:
    """Bytes of the weights that were read layer by layer so far, and that need not be."""
    return (0, 0) if loaded.layerwise is None else (loaded.layerwise.bytes_read, loaded.layerwise.bytes_skipped)


def record_with(
    engine: Engine,
    documents: Sequence[TextDocument],
    texts: Sequence[np.ndarray],
    *,
    domains: Sequence[str],
    spelled: Callable[[Sequence[int]], Mapping[int, TokenText]] = lambda _: {},
    text_bytes: np.ndarray | None = None,
    output_path: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    crew: Crew | None = None,
) -> Recording:
    """The routes an engine tells of the documents, checked, in shards of whole documents.

    Args:
        texts: int32 [tokens] of each document, without special tokens.
        spelled: texts of token ids, for the trace's vocabulary.
        text_bytes: int64 [documents], of what is predicted, where the engine tells of the loss.
        domains, output_path, provenance, progress, crew: see `record_documents`.

    Raises:
        RecordingError: no documents, an unknown domain; blocks that are not the routes of every token at every layer, once.
        TraceError: the folder holds another recording.
    """
    crew, contents = crew or Crew(), engine.contents
    shape = _shape(contents, documents, domains)
    facts = {**engine.identity, **dict(provenance or {}), **engine.settings}
    lengths = [len(text) + contents.answer for text in texts]
    units = work_units(lengths, contents.bytes_per_token, shard_tokens=SHARD_TOKENS)
    most = _most(engine, units, lengths, crew.size)
    folder = None if output_path is None else Path(output_path)
    ledger = Ledger(folder, shape, facts, draws=contents.control, units=units, first=crew.first)
    crew.tell("recording")
    earlier, started, total = ledger.tokens, time.perf_counter(), sum(lengths)  # answers may be shorter
    told = _Told(earlier, len(contents.layers), total, progress)
    with crew.holding() as locks, Background() as host:
        while True:
            for claims in _passes(crew.units(ledger), locks, most=most):
                works = [Work(low, shape.document_ids[low:high], texts[low:high]) for low, high in (each.unit.documents for each in claims)]
                _record_units(engine, claims, works, ledger, host, told)
                told.others(ledger.tokens)
            host.finish()
            if ledger.look() or not crew.first:
                break
            told.others(ledger.tokens)
            crew.wait()
    seconds = time.perf_counter() - started
    if not crew.first:
        return Recording(trace=Trace(shape=shape, provenance=facts), documents=0, tokens=0, seconds=seconds)
    tally = ledger.tally()
    provenance, nats, loss = _facts(ledger, tally, engine), ledger.nats(), None
    if nats is not None and text_bytes is not None:
        loss = DocumentLoss(nats / np.log(2), text_bytes)
        provenance |= {} if folder is None else {DIGEST: save_loss(loss, folder)}
    trace = ledger.finish(vocabulary=spelled(tally.seen), provenance=provenance)
    return Recording(trace=trace, documents=len(documents), tokens=tally.tokens - earlier, seconds=seconds, loss=loss)


@dataclass(frozen=True)
class _Claim:
    """A work unit that this process records, and the lock that says so."""

    unit: Unit
    held: Held | None


def _passes(claimed: Iterator[tuple[Unit, Held | None]], locks: list[Held], *, most: int) -> Iterator[list[_Claim]]:
    """Units that an engine is given at a time, at most so many; their locks are added to the list as soon as they are held."""
    claims: list[_Claim] = []
    for unit, held in claimed:
        locks += [held] if held is not None else []
        claims.append(_Claim(unit, held))
        if len(claims) == most:
            yield claims
            claims = []
    if claims:
        yield claims


def _most(engine: Engine, units: Sequence[Unit], lengths: Sequence[int], processes: int) -> int:
    """How many units an engine is given at a time: one; of those that may be given several, its share, up to about UNIT_TOKENS."""
    if not isinstance(engine, PassEngine):
        return 1
    fitting = -(-UNIT_TOKENS * len(units) // max(1, sum(lengths)))
    return max(1, min(-(-len(units) // processes), fitting))


def _record_units(
    engine: Engine, claims: Sequence[_Claim], works: Sequence[Work], ledger: Ledger, host: Background, told: _Told
) -> None:
    """Work units: while the engine runs, another thread puts their routes together, and writes the shards of these and those before."""
    about: dict[str, Any] = {"where": str(engine.identity.get("model")), "error": RecordingError, "folder": ledger.folder}
    assemblies = [Assembly(engine.contents, work, **about, beside=len(works) - 1) for work in works]
    firsts = [work.first for work in works]
    reduced: dict[int, int] = {}
    several = isinstance(engine, PassEngine)
    for block in engine.blocks_of(works) if several else engine.blocks(works[0]):
        place = bisect_right(firsts, int(block.document.min(initial=firsts[-1]))) - 1 if several else 0
        host.do(assemblies[place].add, block)
        if block.reduced is not None:
            reduced[place] = block.reduced
        told.add(block)

    def store(place: int) -> None:
        unit, held = claims[place].unit, claims[place].held
        ledger.keep(unit, assemblies[place].parts(unit.shards), reduced=reduced.get(place), nats=assemblies[place].nats())
        if held is not None:
            held.release()

    for place in range(len(claims)):
        host.do(store, place)


class _Told:
    """Tells progress; tokens count when all their layers have come."""

    def __init__(self, earlier: int, layers: int, total: int, progress: Progress | None) -> None:
        self._layers, self._total, self._progress = layers, total, progress
        self._earlier, self._cells, self._done = earlier, 0, earlier

    def add(self, block: Block) -> None:
        self._cells += len(block.document) * len(block.layers)
        self.others(self._earlier + self._cells // self._layers)

    def others(self, done: int) -> None:
        """So many tokens are done by now by all processes."""
        self._done = max(self._done, done)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _shape(contents: Contents, documents: Sequence[TextDocument], domains: Sequence[str]) -> RoutingShape:
    return RoutingShape(
        layers=contents.layers,
        experts=contents.experts,
        top_k=contents.top_k,
        domains=tuple(domains),
        document_domain=placed(documents, domains),
        document_ids=tuple(document.id for document in documents),
        document_source=source_texts(documents),
    )


def _facts(ledger: Ledger, tally: Tally, engine: Engine) -> dict[str, Any]:
    """Per layer: why rows have no score, and the share of slots that went to zero-computation experts or were skipped; and where memory
    ran out."""
    reasons: dict[str, str] = {}
    logit_reasons: dict[str, str] = {}
    idle: dict[str, float] = {}
    contents = engine.contents
    for column, (layer, top_k) in enumerate(zip(contents.layers, contents.top_k, strict=True)):
        if tally.unscored[column]:
            reasons[str(layer)] = engine.score_reason(layer, tally.unscored[column], tally.tokens)
        if tally.unmargined[column]:
            logit_reasons[str(layer)] = f"no router logits for {tally.unmargined[column]} of {tally.tokens} tokens"
        running = tally.idle[column] - tally.tokens * (contents.slots - top_k)
        if running:
            idle[str(layer)] = float(running / (tally.tokens * top_k))
    found = {"scores_missing": reasons, "logits_missing": logit_reasons, "slots_without_expert": idle}
    reduced = ledger.reduced()
    return found | ({"batches_reduced_to": reduced} if reduced else {})
