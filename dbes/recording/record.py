"""Record a model's routing over documents: windows, batches, shards, resuming."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from dbes.errors import RecordingError
from dbes.files import write_json
from dbes.models import LoadedModel
from dbes.models.sites import RoutingSite, find_sites, max_positions, score_reason
from dbes.models.token_text import token_texts
from dbes.models.windows import embedding_rows, refuse_unknown, special_tokens, token_ids
from dbes.recording.forward import Batching, Recorder, Window, find_batching, record_within_memory
from dbes.trace.store import CONTROL, MANIFEST, Trace, TraceWriter, read_manifest
from dbes.trace.types import PROMPT, RoutingShape, TokenRoutes, storage_dtype
from dbes.trace.vocabulary import TokenText

SHARD_TOKENS = 65_536
SHARD_BYTES = 12 * 2**20
ACTIVATION_BYTES = 16 * 2**20
"""On a CPU a batch is as large as lets the experts' inputs (tokens x slots x hidden, float32) stay near the caches: measured on a
260 M-parameter OLMoE, 1,024 tokens are 1.5 times as fast as 4,096; a 4 M-parameter one is fastest with 8,192."""

CPU_BATCH_TOKENS = (512, 8_192)
ACCELERATOR_BATCH_TOKENS = 16_384
PADDING_LIMIT = 0.1
"""Largest share of padding in a batch whose size was not asked for."""

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
        batching: what could share a batch.
    """

    trace: Trace
    documents: int
    tokens: int
    seconds: float
    batching: Batching

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
    control: bool = True,
    stiffness: bool = True,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Routing of every token of the documents, as executed. The same whatever the batch size and the order of documents.

    Each document is cut into windows of at most ``window`` tokens, fewer where the model has fewer positions; each window is a
    forward of its own, with the special tokens the tokenizer adds around a text. These are not recorded.

    Args:
        domains: names of the domains, in the benchmark's order.
        output_path: folder of the trace. An interrupted recording of the same thing in it resumes from the last whole
            shard. None keeps the trace in memory.
        batch_size: windows per batch; "auto" fills a budget of tokens, halved when memory runs out.
        seed: of the random-router control and of the noise of the stability measures.
        control: record the random-router control in the same pass.
        stiffness: record margins and flips.
        provenance: further facts for the trace's manifest (name, version and fingerprint of the task).
        progress: called as progress(tokens done, tokens in all).

    Raises:
        RecordingError: no documents, a text without tokens, an unknown domain; a layer that did not fire; wrong counts; NaN in
            the router's output; memory too small for one window.
        ModelError: not a Mixture-of-Experts model, or one whose routing cannot be read.
        TraceError: the folder holds another recording.
    """
    sites = find_sites(loaded.model)
    shape = _shape(sites, documents, domains)
    texts = _token_ids(loaded, documents)
    before, after = special_tokens(loaded.tokenizer, [document.text for document in documents])
    refuse_unknown(np.asarray([*before, *after], int), embedding_rows(loaded.model), loaded.tokenizer, name="special tokens of a text")
    recorder = Recorder(loaded=loaded, sites=sites, before=before, after=after, seed=seed, control=control, stiffness=stiffness)
    limit = max_positions(loaded.model)
    if window < 1 or (limit is not None and limit <= recorder.extra):
        raise RecordingError(f"window: expected at least one token, got {window} (the model has {limit} positions)")
    window = window if limit is None else min(window, limit - recorder.extra)
    facts = {**_identity(recorder), **dict(provenance or {}), "window": window, "seed": seed, "control": control, "stiffness": stiffness}
    plan = list(_shards(texts, _bytes_per_token(recorder)))
    batching = find_batching(recorder, texts, window)
    budget = batch_size if isinstance(batch_size, int) else automatic_budget(loaded, sites)
    if budget < 1:
        raise RecordingError(f"batch_size: expected at least 1, or 'auto', got {batch_size}")

    with _destination(output_path, shape, facts, control=control) as target:
        tally = _Tally(len(sites), target.routes())
        total, done = sum(map(len, texts)), target.tokens
        started, first = time.perf_counter(), done
        for low, high in plan:
            if low < target.next_document:
                continue
            windows = [
                Window(index, documents[index].id, start, texts[index][start : start + window])
                for index in range(low, high)
                for start in range(0, len(texts[index]), window)
            ]
            blocks = []
            for batch in batches(windows, budget, by_count=isinstance(batch_size, int), batching=batching, extra=recorder.extra):
                for arrays in record_within_memory(recorder, batch):
                    blocks.append(arrays)
                    done += len(arrays["document"])
                    if progress is not None:
                        progress(done, total)
            routes, control_routes = _assembled(blocks)
            target.write(routes, control_routes, last_document=high - 1)
            tally.add(routes)
        seconds = time.perf_counter() - started
        vocabulary = token_texts(loaded.tokenizer, sorted(tally.seen))
        trace = target.finish(vocabulary=vocabulary, provenance=tally.facts(sites, stiffness=stiffness))
    return Recording(trace=trace, documents=len(documents), tokens=done - first, seconds=seconds, batching=batching)


def automatic_budget(loaded: LoadedModel, sites: Sequence[RoutingSite]) -> int:
    """Tokens per batch when nobody asks for a number; it changes no count."""
    if loaded.device != "cpu":
        return ACCELERATOR_BATCH_TOKENS
    hidden = getattr(loaded.model.config.get_text_config(), "hidden_size", None) or 1024
    fewest, most = CPU_BATCH_TOKENS
    return min(most, max(fewest, ACTIVATION_BYTES // (4 * hidden * max(site.top_k for site in sites))))


def _identity(recorder: Recorder) -> dict[str, Any]:
    loaded = recorder.loaded
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "family": loaded.config.get("model_type"),
        "parameters": loaded.parameters,
        "dtype": loaded.dtype,
        "attention": loaded.attention,
        "experts_implementation": loaded.experts_implementation,
        "device": loaded.device,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "notes": list(loaded.notes),
        "special_tokens_excluded": {"before": list(recorder.before), "after": list(recorder.after)},
        "versions": {"dbes": version("dbes"), "torch": torch.__version__, "transformers": version("transformers")},
    }


def _shape(sites: Sequence[RoutingSite], documents: Sequence[TextDocument], domains: Sequence[str]) -> RoutingShape:
    if not documents:
        raise RecordingError("no documents to record")
    places = {name: place for place, name in enumerate(domains)}
    for document in documents:
        if document.domain not in places:
            raise RecordingError(f"document {document.id!r} has the domain {document.domain!r}, expected one of {list(domains)}")
    return RoutingShape(
        layers=tuple(site.layer for site in sites),
        experts=tuple(site.num_experts for site in sites),
        top_k=tuple(site.top_k for site in sites),
        domains=tuple(domains),
        document_domain=np.asarray([places[document.domain] for document in documents], np.int32),
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


def _bytes_per_token(recorder: Recorder) -> int:
    ids = np.dtype(storage_dtype(max(site.num_experts for site in recorder.sites))).itemsize
    slot = (ids + 2) * (2 if recorder.control else 1)
    return len(recorder.sites) * (recorder.slots * slot + (13 if recorder.stiffness else 0)) + 13


def _shards(texts: Sequence[np.ndarray], bytes_per_token: int) -> Iterator[tuple[int, int]]:
    """[first, last + 1) documents of each shard: whole documents, bounded in tokens so that memory is."""
    # not below one full batch of an accelerator, however many layers a token has
    limit = min(SHARD_TOKENS, max(ACCELERATOR_BATCH_TOKENS, SHARD_BYTES // bytes_per_token))
    low, tokens = 0, 0
    for index, ids in enumerate(texts):
        if tokens and tokens + len(ids) > limit:
            yield low, index
            low, tokens = index, 0
        tokens += len(ids)
    yield low, len(texts)


def batches(windows: Sequence[Window], budget: int, *, by_count: bool, batching: Batching, extra: int) -> Iterator[list[Window]]:
    """The windows, longest first (what does not fit in memory fails at once), in batches of about equal lengths."""
    batch: list[Window] = []
    tokens = 0
    for window in sorted(windows, key=lambda window: (-len(window), window.document, window.start)):
        if batch:
            padded = (len(batch) + 1) * (len(batch[0]) + extra)
            wasted = 1 - (tokens + len(window) + extra) / padded
            full = len(batch) >= budget if by_count else padded > budget or wasted > PADDING_LIMIT
            apart = batching == "one at a time" or (batching == "equal lengths" and len(window) != len(batch[0]))
            if full or apart:
                yield batch
                batch, tokens = [], 0
        batch.append(window)
        tokens += len(window) + extra
    if batch:
        yield batch


def _assembled(blocks: Sequence[dict[str, np.ndarray]]) -> tuple[TokenRoutes, TokenRoutes | None]:
    """The batches' rows in order of (document, position). Empties the blocks, column by column, so as not to hold all of it twice."""
    document = np.concatenate([block["document"] for block in blocks])
    order = np.lexsort((np.concatenate([block["positions"] for block in blocks]), document))
    arrays = {name: np.concatenate([block.pop(name) for block in blocks])[order] for name in list(blocks[0])}
    about = {name: arrays.pop(name) for name in ("document", "positions", "token_ids")}
    about["phase"] = np.full(len(document), PROMPT, np.uint8)
    parts = {name: array for name, array in arrays.items() if not name.startswith("control_")}
    control = {name.removeprefix("control_"): array for name, array in arrays.items() if name.startswith("control_")}
    return TokenRoutes(**parts, **about), TokenRoutes(**control, **about) if control else None


class _Tally:
    """What is known only at the end: tokens seen, slots that ran nothing, rows without a score."""

    def __init__(self, layers: int, earlier: Iterator[TokenRoutes]) -> None:
        self.tokens = 0
        self.seen: set[int] = set()
        self.idle = np.zeros(layers, np.int64)
        self.unscored = np.zeros(layers, np.int64)
        self.unmargined = np.zeros(layers, np.int64)
        for routes in earlier:
            self.add(routes)

    def add(self, routes: TokenRoutes) -> None:
        assert routes.token_ids is not None
        self.tokens += len(routes)
        self.seen.update(np.unique(routes.token_ids).tolist())
        self.idle += (routes.ids == np.iinfo(routes.ids.dtype).max).sum(axis=(0, 2))
        if routes.kept is not None and routes.logit_margins is not None:
            self.unscored += (routes.kept[:, :, 0] == 255).sum(axis=0)
            self.unmargined += np.isnan(routes.logit_margins).sum(axis=0)

    def facts(self, sites: Sequence[RoutingSite], *, stiffness: bool) -> dict[str, Any]:
        """Per layer: why rows have no score, and the share of slots that went to zero-computation experts or were skipped."""
        reasons: dict[str, str] = {}
        logit_reasons: dict[str, str] = {}
        idle: dict[str, float] = {}
        slots = max(site.top_k for site in sites)
        for column, site in enumerate(sites):
            if stiffness and self.unscored[column]:
                reasons[str(site.layer)] = score_reason(site, int(self.unscored[column]), self.tokens)
            if stiffness and self.unmargined[column]:
                logit_reasons[str(site.layer)] = f"no router logits for {self.unmargined[column]} of {self.tokens} tokens"
            running = self.idle[column] - self.tokens * (slots - site.top_k)
            if running:
                idle[str(site.layer)] = float(running / (self.tokens * site.top_k))
        return {"scores_missing": reasons, "logits_missing": logit_reasons, "slots_without_expert": idle}


class _destination:
    """Where shards go: a trace folder with its control, or memory. The control's shard is written first, so that on resuming it
    is never behind, and is cut back when it is ahead."""

    def __init__(self, output_path: str | Path | None, shape: RoutingShape, facts: Mapping[str, Any], *, control: bool) -> None:
        self.shape, self.facts = shape, dict(facts)
        self.folder = None if output_path is None else Path(output_path)
        self.kept: list[TokenRoutes] = []
        self.kept_control: list[TokenRoutes] = []
        self.writer = self.control = None
        if self.folder is None:
            return
        self.writer = TraceWriter(self.folder, shape, facts)
        if control:
            inner = self.folder / CONTROL
            if (inner / MANIFEST).is_file() and (manifest := read_manifest(inner)).complete:
                # interrupted between finishing the control and finishing the trace
                write_json(inner / MANIFEST, manifest.model_copy(update={"complete": False}).model_dump(mode="json"))
            self.control = TraceWriter(inner, shape, {**facts, "router": "random"})
            self.control.keep_shards(self.writer.shards)

    def __enter__(self) -> _destination:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def next_document(self) -> int:
        return self.writer.next_document if self.writer is not None else 0

    @property
    def tokens(self) -> int:
        return self.writer.tokens if self.writer is not None else 0

    def routes(self) -> Iterator[TokenRoutes]:
        """Shards of an earlier, interrupted run."""
        if self.folder is not None:
            yield from Trace(shape=self.shape, path=self.folder, entries=read_manifest(self.folder).shards)

    def write(self, routes: TokenRoutes, control: TokenRoutes | None, *, last_document: int) -> None:
        if self.writer is None:
            self.kept.append(routes)
            if control is not None:
                self.kept_control.append(control)
            return
        if self.control is not None and control is not None:
            self.control.write(control, last_document=last_document)
        self.writer.write(routes, last_document=last_document)

    def finish(self, *, vocabulary: Mapping[int, TokenText], provenance: Mapping[str, Any]) -> Trace:
        if self.writer is None:
            control = None
            if self.kept_control:
                control = Trace(shape=self.shape, provenance={**self.facts, "router": "random"}, loaded=tuple(self.kept_control))
            facts = {**self.facts, **provenance}
            return Trace(shape=self.shape, provenance=facts, control=control, vocabulary=vocabulary, loaded=tuple(self.kept))
        if self.control is not None:
            self.control.finish()
        self.writer.finish(vocabulary=vocabulary, provenance=provenance)
        assert self.folder is not None
        return Trace.load(self.folder)
