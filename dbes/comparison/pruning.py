"""prune(): what a domain and all others lose where only the domain's experts are left, against equally many chosen in other ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import t as student

from dbes.errors import ModelError, PathError
from dbes.finetuning.evaluation import Measured, measure_texts, ratio_of_sums
from dbes.models import LoadedModel, load_model
from dbes.models.router_mask import routing_masked
from dbes.models.saliency import reap_scores
from dbes.models.sites import max_positions
from dbes.paths.coverage import deal_folds
from dbes.paths.evidence import Evidence, given_evidence
from dbes.paths.model_evidence import check_model, cut_windows, recorded_benchmark
from dbes.paths.placement import Budget, Estimate, Placement, chosen_experts, place
from dbes.recording.documents import source_texts
from dbes.results import Result
from dbes.scoring.metrics import usage_of
from dbes.scoring.resampling import CONFIDENCE
from dbes.shipped import EMBEDDED
from dbes.tasks.entries import Entry, entry_of_document
from dbes.tasks.task import Task
from dbes.trace.store import Trace
from dbes.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dbes.evaluation.request import Model
    from dbes.scoring.counts import Counts

OWN = "domain load"
RIVALS = ("overall load", "reap", "random")
RANDOM_DRAWS = 3
READ_TEXTS = 40
"""Source texts of a domain that are read for every choice and budget."""

Finding = Literal["better", "worse", "no difference"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The model with equally many experts left in every layer, chosen in one way. Bits are per byte of unseen texts; more is worse.

    Attributes:
        name: ``domain load``, ``overall load``, ``reap`` (on texts of the domain) or ``random`` (the mean of several draws).
        added: by domain, bits that dropping the others adds.
        less: bits of the same texts with the domain's most used experts, minus those of this arm; None of the former themselves.
            Negative: the domain's are the better choice.
    """

    name: str
    added: Mapping[str, Estimate]
    less: Estimate | None

    @property
    def finding(self) -> Finding | None:
        """What the domain's most used experts are against this arm, by the interval of their difference; None of themselves."""
        if self.less is None:
            return None
        return "better" if self.less.high < 0 else "worse" if self.less.low > 0 else "no difference"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """One budget.

    Attributes:
        placement: coverage of unseen texts, cross-fitted, and the experts that all texts of the domain choose.
    """

    budget: float
    placement: Placement
    arms: tuple[Arm, ...]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Pruned for a domain, at one or several budgets.

    Attributes:
        bits_per_byte: of the whole model on the texts that were measured, by domain; texts: how many source texts these are.
        chosen_by: texts of the domain that chose; of every domain one half of the texts chooses and the other is measured.
        confidence: of every difference between arms, of all of them together (Bonferroni); bits that dropping adds have 95 % each.
        notes: what was left out and why.
    """

    model: str
    domain: str
    bits_per_byte: Mapping[str, float]
    texts: Mapping[str, int]
    chosen_by: int
    budgets: tuple[Pruned, ...]
    confidence: float
    notes: tuple[str, ...]


def prune(
    recorded: Result | Trace | Counts | Evidence | str | Path,
    *,
    domain: str,
    model: Model,
    budgets: Sequence[float] = (0.5,),
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Path | Task = EMBEDDED,
    limit: int | None = READ_TEXTS,
    seed: int = 0,
) -> Pruning:
    """Which experts a domain needs, and what it and the others lose without the rest, in bits per byte of texts that did not choose.

    One half of the texts, dealt by a hash of their ids, chooses the experts to keep, by several rules; the other half is read by the model
    with the rest masked in its routers, so that as many experts run for every token as before. Intervals are over the texts read, given
    what was chosen.

    Args:
        recorded: a result that kept its routes, a trace or counts of documents, or the folder of one.
        budgets: of each the share of a layer's experts that is kept, below 1, or how many.
        model, tokenizer: the model whose routing was recorded; tasks: the task that was recorded.
        limit: source texts of each domain that are read at most; None: the whole half.
        seed: of the random choices.

    Raises:
        SettingError: there is no such domain.
        PathError: counts of whole domains; another model or task; too few texts; a budget that leaves nothing to choose, or fewer
            experts than run for a token.
        ModelError: experts of this model cannot be masked in its routers.
        ResultError, TraceError, TaskError: what is given cannot be read.
    """
    from dbes.evaluation.request import given_model

    evidence = given_evidence(recorded)
    index = evidence.domain(domain)
    if not evidence.counts.by_documents:
        raise PathError("only counts of whole domains are known, not of documents: no text can be kept from the choice")
    for size in budgets:
        least, needed = min(map(Budget(size=size).count, evidence.shape.experts)), max(evidence.shape.top_k)
        if least < needed:
            raise PathError(f"budget {size:g} keeps {counted(least, 'expert')} of a layer, and every token runs {needed}: keep more")
    side = _halves(evidence, limit)
    placements = [place(evidence, budget=Budget(size=size), domain=domain) for size in budgets]
    with given_model(model, tokenizer) as given:
        loaded = given if isinstance(given, LoadedModel) else load_model(given)
        check_model(evidence, loaded)
        choosing, measured, window = _texts(evidence, tasks, side)
        half = evidence.counts.take(np.flatnonzero(side == 0))
        hits = half.by_domain(lambda sums: sums.hits)
        if not hits[index].any() or domain not in measured:
            raise PathError(f"domain {domain!r}: at least two of its texts must have been recorded, so that one can choose and one be read")
        scores, notes = _scores(loaded, hits, index, choosing[domain], window=window, seed=seed)
        reader = _Reader(loaded=loaded, texts=measured, evidence=evidence, length=min(window, max_positions(loaded.model) or window))
        whole = reader.bits({})
        rivals = sum(name != OWN for name in scores) * len(budgets)
        confidence = 1 - (1 - CONFIDENCE) / rivals
        arms = [_arms(reader, whole, scores, Budget(size=size), domain=domain, confidence=confidence) for size in budgets]
    return Pruning(
        model=loaded.name,
        domain=domain,
        bits_per_byte={name: float(found[0].sum() / found[1].sum()) for name, found in whole.items()},
        texts={name: len(found[0]) for name, found in whole.items()},
        chosen_by=int((half.shape.document_domain == index).sum()),
        budgets=tuple(Pruned(budget=size, placement=at, arms=own) for size, at, own in zip(budgets, placements, arms, strict=True)),
        confidence=confidence,
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """The model and the texts that are measured, by domain."""

    loaded: LoadedModel
    texts: Mapping[str, Sequence[Entry]]
    evidence: Evidence
    length: int

    def bits(self, dropped: Mapping[int, list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Bits and bytes of every source text, [texts] each, by domain."""
        with routing_masked(self.loaded.model, dropped):
            found = measure_texts(self.loaded.model, self.loaded.tokenizer, self.texts, length=self.length)
        return {name: _by_source(one) for name, one in found.items()}

    def pruned(self, score: np.ndarray, budget: Budget) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same with the experts of the highest scores, [layers, experts], alone."""
        shape = self.evidence.shape
        keep = chosen_experts(score, shape, budget)
        return self.bits({
            layer: np.flatnonzero(~kept[:experts]).tolist()
            for layer, experts, kept in zip(shape.layers, shape.experts, keep, strict=True)
        })  # fmt: skip


def _halves(evidence: Evidence, limit: int | None) -> np.ndarray:
    """0 for texts that choose, 1 for those that are read, 2 for those above the limit: int [texts]."""
    names, label = evidence.shape.document_ids, evidence.shape.document_domain
    side = deal_folds(names, label, 2)
    read = np.flatnonzero(side == 1)
    if limit is not None and len(read):
        place = deal_folds(tuple(names[text] for text in read), label[read], len(read))
        side[read[place >= limit]] = 2
    return side


def _by_source(found: Measured) -> tuple[np.ndarray, np.ndarray]:
    _, source = np.unique(found.sources, return_inverse=True)
    return np.bincount(source, found.bits), np.bincount(source, found.text_bytes)


def _texts(evidence: Evidence, tasks: str | Path | Task, side: np.ndarray) -> tuple[dict[str, list[str]], dict[str, list[Entry]], int]:
    """Texts of the half that chooses, entries of the half that is measured, by domain, and the window of the task."""
    benchmark, shape = recorded_benchmark(evidence, tasks), evidence.shape
    sides = {
        (shape.domains[label], name): int(at)
        for label, name, at in zip(shape.document_domain.tolist(), shape.document_ids, side, strict=True)
    }
    names = source_texts(benchmark.documents) or [document.id for document in benchmark.documents]
    choosing: dict[str, list[str]] = {name: [] for name in shape.domains}
    measured: dict[str, list[Entry]] = {name: [] for name in shape.domains}
    for document, name in zip(benchmark.documents, names, strict=True):
        at = sides.get((document.domain, name))
        if at == 0:
            choosing[document.domain].append(document.text)
        elif at == 1:
            measured[document.domain].append(replace(entry_of_document(document), source=name, item=None))
    return choosing, {name: entries for name, entries in measured.items() if entries}, benchmark.task.window


def _scores(
    loaded: LoadedModel, hits: np.ndarray, index: int, texts: Sequence[str], *, window: int, seed: int
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """By name of the arm its scores, [layers, experts], of every draw; and which arm is missing, and why."""
    random = np.random.default_rng([seed, 13])
    found = {
        OWN: [hits[index]],
        "overall load": [np.nanmean(usage_of(hits[hits.any(axis=(1, 2))]), axis=0)],
        "random": [random.random(hits.shape[1:]) for _ in range(RANDOM_DRAWS)],
    }
    try:
        windows = cut_windows(loaded, texts, window=window, tokens=sum(map(len, texts)) + 1)
        found["reap"] = [reap_scores(loaded.model, windows)]
    except ModelError as problem:
        return found, [f"Not compared with REAP: {problem}"]
    return found, []


def _arms(
    reader: _Reader,
    whole: Mapping[str, tuple[np.ndarray, np.ndarray]],
    scores: Mapping[str, list[np.ndarray]],
    budget: Budget,
    *,
    domain: str,
    confidence: float,
) -> tuple[Arm, ...]:
    bits: dict[str, dict[str, np.ndarray]] = {}
    for name in (OWN, *RIVALS):
        draws = [reader.pruned(score, budget) for score in scores.get(name, ())]
        if draws:
            bits[name] = {each: np.mean([draw[each][0] for draw in draws], axis=0) for each in whole}
    return tuple(
        Arm(
            name=name,
            added={each: _per_byte(found[each] - whole[each][0], whole[each][1], CONFIDENCE) for each in whole},
            less=None if name == OWN else _per_byte(bits[OWN][domain] - found[domain], whole[domain][1], confidence),
        )
        for name, found in bits.items()
    )


def _per_byte(bits: np.ndarray, sizes: np.ndarray, confidence: float) -> Estimate:
    """Bits per byte of some texts, and the interval over these; NaN where there is one text."""
    value, error = ratio_of_sums(bits, sizes)
    reach = float(student.ppf((1 + confidence) / 2, len(bits) - 1)) * error if len(bits) > 1 else math.nan
    return Estimate(value=value, low=value - reach, high=value + reach)
