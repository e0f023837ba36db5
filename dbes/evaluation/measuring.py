"""What is measured with the model beside its routing: accuracy on the task's items, and what masking its specialists does."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest

from dbes.errors import SettingError
from dbes.evaluation.harness import HARNESS, harness_accuracy
from dbes.evaluation.options import Progress
from dbes.evaluation.request import NEEDS_MEMORY, Job
from dbes.measures import DomainAblation, DomainAccuracy, Measured, Measures
from dbes.results import RecordingFacts
from dbes.scoring.counting import counts_of
from dbes.scoring.layer_counts import units_of
from dbes.scoring.losses import ablation_by_domain, by_unit, loss_by_domain
from dbes.scoring.masks import HALVES, Masks, choose_masks
from dbes.tasks.documents import Document
from dbes.tasks.entries import Item, multiple_choice
from dbes.trace.loss import DocumentLoss
from dbes.trace.store import Trace
from dbes.wording import counted, duration

if TYPE_CHECKING:
    from dbes.models import LoadedModel

notes = logging.getLogger("dbes")


def require_measurable(job: Job, loaded: LoadedModel) -> None:
    """Refuse, before anything is recorded, what cannot be measured with this model.

    Raises:
        SettingError: its layers are read one at a time.
        ModelError: its experts cannot be masked one by one.
    """
    from dbes.models.masking import require_maskable

    if job.request.beside and loaded.layerwise is not None:
        raise SettingError(f"{job.request.beside}: {NEEDS_MEMORY}")
    if job.request.ablate:
        require_maskable(loaded.model)


def lacking(job: Job, found: Measures | None) -> list[str]:
    """What is asked for and not in a result."""
    found, request = found or Measures(), job.request
    by = HARNESS if request.accuracy == HARNESS else "own"
    missing = [("loss", request.loss and not found.loss), ("accuracy", bool(request.accuracy) and found.accuracy_by != by)]
    return [name for name, lacks in (*missing, ("ablation", request.ablate and not found.ablation)) if lacks]


def measured_beside(
    job: Job, loaded: LoadedModel, trace: Trace, loss: DocumentLoss | None, facts: RecordingFacts, *, earlier: Measures | None,
    progress: Progress | None,
) -> Measures | None:  # fmt: skip
    """All that is asked for beside specialization; None where nothing is, and nothing was."""
    wanted, found = lacking(job, earlier), {} if earlier is None else dict(earlier)
    if "loss" in wanted and loss is not None:
        found["loss"] = loss_by_domain(loss, trace.shape)
    if "accuracy" in wanted:
        found["accuracy"], found["accuracy_by"] = accuracy_of(job, loaded), HARNESS if job.request.accuracy == HARNESS else "own"
    if "ablation" in wanted:
        found["ablation"] = ablated(job, loaded, trace, facts, progress=progress)
    return Measures(**found) if found else None


def items_of(documents: Sequence[Document]) -> dict[str, list[Item]]:
    """The multiple-choice items of each domain that has some."""
    found: dict[str, list[Item]] = {}
    for document in documents:
        if (item := multiple_choice(document.question or "", document.choices, document.answer)) is not None:
            found.setdefault(document.domain, []).append(item)
    return found


def accuracy_of(job: Job, loaded: LoadedModel) -> dict[str, DomainAccuracy]:
    """How often the right choice of an item is the likeliest after its question, and the likeliest per byte; by domain."""
    items = items_of(job.benchmark.documents)
    if not items:
        notes.warning("accuracy: no document of this task has a question with choices and a right answer, so there is nothing to measure")
        return {}
    if job.request.accuracy == HARNESS:
        shares: Mapping[str, tuple[float, float]] = harness_accuracy(loaded, items, task=job.benchmark.task.name)
    else:
        shares = {name: _own_accuracy(job, loaded, own) for name, own in items.items()}
    return {
        name: DomainAccuracy(
            items=len(own), chance=math.fsum(1 / len(item.choices) for item in own) / len(own),
            accuracy=_wilson(shares[name][0], len(own)), accuracy_per_byte=_wilson(shares[name][1], len(own)),
        )
        for name, own in items.items()
    }  # fmt: skip


def _own_accuracy(job: Job, loaded: LoadedModel, items: Sequence[Item]) -> tuple[float, float]:
    from dbes.models.choices import choice_likelihoods, encode_choices, right_choices
    from dbes.models.sites import max_positions
    from dbes.models.windows import embedding_rows, padding_id

    known, limit = embedding_rows(loaded.model), max_positions(loaded.model)
    length = min(job.benchmark.task.window, limit or job.benchmark.task.window)
    samples = [sample for item in items for sample in encode_choices(item, loaded.tokenizer, length=length, known=known)]
    right = right_choices(
        choice_likelihoods(loaded.model, samples, padding=padding_id(loaded.tokenizer, known)),
        text_bytes=[sample.text_bytes for sample in samples],
        choices=[len(item.choices) for item in items],
        right=[item.right for item in items],
    )
    own, per_byte = right.mean(axis=1).tolist()
    return own, per_byte


def _wilson(share: float, items: int) -> Measured:
    interval = binomtest(round(share * items), items).proportion_ci(method="wilson")
    return Measured(value=share, low=float(interval.low), high=float(interval.high))


def ablated(job: Job, loaded: LoadedModel, trace: Trace, facts: RecordingFacts, *, progress: Progress | None) -> dict[str, DomainAblation]:
    """Bits per byte with each domain's specialists masked, and with as many cells of the same load."""
    from dbes.models.masking import masked
    from dbes.recording.documents import predicted_bytes, prepared
    from dbes.recording.losses import document_nats
    from dbes.trace.blocks import Work

    counts, documents, request = counts_of(trace), job.benchmark.documents, job.request
    masks = choose_masks(counts, permutations=request.permutations or 1000, seed=request.seed)
    _, order, starts = units_of(trace.shape)
    half = np.zeros(len(documents), np.int64)
    half[order] = np.repeat(masks.half, np.diff([*starts.tolist(), len(documents)]))
    engine, texts = prepared(loaded, documents, window=job.benchmark.task.window, batch_size=request.batch_size, seed=request.seed)
    engine = replace(engine, batching=trace.provenance.get("batching", engine.batching))
    _tell_cost(masks, facts)
    done = 0

    def bits(which: int, cells: Sequence[tuple[int, int]]) -> np.ndarray:
        """Of the documents of one half, the cells masked; 0 for the others, [documents]."""
        nonlocal done
        if progress is not None:
            progress("masking", done, masks.passes)
        members = np.flatnonzero(half == which)
        found = np.zeros(len(documents))
        work = Work(0, [documents[place].id for place in members], [texts[place] for place in members])
        with masked(loaded.model, cells):
            found[members] = document_nats(engine, work) / np.log(2)
        done += 1
        return found

    nothing = masks.passes == HALVES
    base = np.zeros(len(documents)) if nothing else bits(0, ()) + bits(1, ())
    own, control = np.zeros((2, len(trace.shape.domains), len(documents)))
    for chose in range(HALVES):
        for domain, cells in enumerate(masks.own[chose]):
            if cells:
                own[domain] += bits(1 - chose, cells)
                control[domain] += bits(1 - chose, masks.control[chose][domain])
    text_bytes = predicted_bytes(engine, documents, texts)
    return ablation_by_domain(
        masks, base=by_unit(base, trace.shape), own=by_unit(own.T, trace.shape).T, control=by_unit(control.T, trace.shape).T,
        text_bytes=by_unit(text_bytes, trace.shape),
    )  # fmt: skip


def _tell_cost(masks: Masks, facts: RecordingFacts) -> None:
    """What the passes will take, before they begin."""
    if masks.passes == HALVES:
        notes.warning("ablate: neither half of the texts finds a specialist of any domain, so there is nothing to mask")
        return
    passes = masks.passes / HALVES
    time = ""
    if facts.tokens_per_second > 0:
        time = f", about {duration(passes * facts.tokens / facts.tokens_per_second)} at the speed of the recording"
    sets = sum(len(cells) > 0 for own in masks.own for cells in own)
    notes.warning(
        f"ablate: {counted(sets, 'set')} of specialists and as many controls, {passes:g} forwards over all {facts.tokens:,} tokens{time}"
    )
