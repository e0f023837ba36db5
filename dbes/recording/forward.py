"""The engine that runs a transformers model in this process: documents cut into windows, batches of them, one forward each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dbes.errors import RecordingError, out_of_memory
from dbes.models import LoadedModel
from dbes.models.execution import forward, input_device, is_offloaded
from dbes.models.hooks import Decision, watching
from dbes.models.sites import RoutingSite, router_std, score_reason
from dbes.models.windows import embedding_rows, padded, padding_id
from dbes.recording.stiffness import Noise, logit_stiffness, noise_rows, selection_stiffness
from dbes.trace.blocks import SKIPPED, STORED, Assembly, Block, Contents, Work
from dbes.trace.types import NOISE_SCALES, PROMPT

Batching = Literal["padded", "equal lengths", "one at a time"]
"""What may share a batch without changing the routing: any windows, windows of one length, or none."""

ACTIVATION_BYTES = 16 * 2**20
"""On a CPU a batch is as large as lets the experts' inputs (tokens x slots x hidden, float32) stay near the caches: measured on a
260 M-parameter OLMoE, 1,024 tokens are 1.5 times as fast as 4,096; a 4 M-parameter one is fastest with 8,192."""

CPU_BATCH_TOKENS = (512, 8_192)
ACCELERATOR_BATCH_TOKENS = 16_384
DRAW_STRIDE = (1 << 32) // 3
"""Between the seeds of draws of the random router, far from those of any layer; torch uses the low 32 bits of a seed only."""

PADDING_LIMIT = 0.1
"""Largest share of padding in a batch whose size was not asked for."""


@dataclass(frozen=True)
class Window:
    """A run of tokens of one document that the model sees at once.

    Attributes:
        document: index of the document.
        document_id: its id in the benchmark; names it in errors and picks its noise.
        start: position of the first token in the document.
        token_ids: int32 [tokens], without special tokens.
    """

    document: int
    document_id: str
    start: int
    token_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ForwardEngine:
    """A model, and all that stays the same from batch to batch of one recording.

    Attributes:
        before, after: special tokens the tokenizer puts around a text; fed to the model, never recorded.
        control: draws of the random router to record too.
        stiffness: record margins and flips too.
        window: tokens of a document that the model sees at once.
        batch_size: windows per batch; None fills a budget of tokens.
    """

    loaded: LoadedModel
    sites: tuple[RoutingSite, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    seed: int
    control: int
    stiffness: bool
    window: int
    batch_size: int | None = None
    batching: Batching = "padded"

    @property
    def contents(self) -> Contents:
        return Contents(
            layers=tuple(site.layer for site in self.sites),
            experts=tuple(site.num_experts for site in self.sites),
            top_k=tuple(site.top_k for site in self.sites),
            zero_experts=tuple(site.zero_experts for site in self.sites),
            gives=frozenset(STORED if self.stiffness else ("weights",)),
            control=self.control,
        )

    @property
    def identity(self) -> dict[str, Any]:
        loaded = self.loaded
        return {
            "model": loaded.name,
            "revision": loaded.revision,
            "family": loaded.config.get("model_type"),
            "parameters": loaded.parameters,
            "dtype": loaded.dtype,
            **({} if loaded.quantization is None else {"quantization": loaded.quantization}),
            "attention": loaded.attention,
            "experts_implementation": loaded.experts_implementation,
            "device": loaded.device,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "notes": list(loaded.notes),
            "special_tokens_excluded": {"before": list(self.before), "after": list(self.after)},
            "versions": {"dbes": version("dbes"), "torch": torch.__version__, "transformers": version("transformers")},
        }

    @property
    def settings(self) -> dict[str, Any]:
        return {"window": self.window, "seed": self.seed, "control": self.control, "stiffness": self.stiffness}

    def blocks(self, work: Work) -> Iterator[Block]:
        for batch in self.batches(work):
            yield from record_within_memory(self, batch)

    def batches(self, work: Work) -> Iterator[list[Window]]:
        """The windows of the texts, in batches."""
        windows = [
            Window(work.first + place, work.document_ids[place], start, ids[start : start + self.window])
            for place, ids in enumerate(work.texts)
            for start in range(0, len(ids), self.window)
        ]
        budget = automatic_budget(self.loaded, self.sites) if self.batch_size is None else self.batch_size
        by_count = self.batch_size is not None
        return batches(windows, budget, by_count=by_count, batching=self.batching, extra=self.extra)

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:
        return score_reason(next(site for site in self.sites if site.layer == layer), missing, tokens)

    @property
    def extra(self) -> int:
        """Special tokens of every window."""
        return len(self.before) + len(self.after)

    @cached_property
    def slots(self) -> int:
        return self.contents.slots

    @cached_property
    def noise(self) -> Noise:
        # one class more than there are experts: some routers can choose to skip
        classes = max(site.num_experts + site.zero_experts for site in self.sites) + 1
        return Noise.drawn(classes=classes, slots=self.slots, seed=self.seed)

    @cached_property
    def proven(self) -> dict[tuple[int, int], int]:
        """What was found out about experts that are modules; see `dbes.models.hooks.watching`."""
        return {}

    @cached_property
    def _on_device(self) -> dict:
        return {}

    def noise_on(self, device: torch.device) -> Noise:
        key = ("noise", device)
        if key not in self._on_device:
            self._on_device[key] = self.noise.to(device)
        return self._on_device[key]

    def random_router(self, index: int, draw: int, hidden: Tensor) -> Tensor:
        """float32 [hidden, experts], a draw of the frozen random router of a site; the same on every device."""
        key = (index, draw, hidden.device)
        if key not in self._on_device:
            site, width = self.sites[index], hidden.shape[-1]
            generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + site.layer + draw * DRAW_STRIDE)
            matrix = torch.randn(site.num_experts, width, generator=generator) * router_std(site, width)
            self._on_device[key] = matrix.T.contiguous().to(hidden.device)
        return self._on_device[key]

    def forget_random_routers(self, index: int) -> None:
        """Give back the memory of a site's random routers; they are drawn again when they are asked for."""
        for key in [key for key in self._on_device if key[0] == index]:
            del self._on_device[key]

    def inputs(self, windows: Sequence[Window]) -> tuple[dict[str, Tensor], np.ndarray]:
        """The model's inputs, padded on the right, and the flat rows that are text (neither padding nor special tokens)."""
        first = len(self.before)
        padding = padding_id(self.loaded.tokenizer, embedding_rows(self.loaded.model))
        ids, mask = padded([np.asarray([*self.before, *window.token_ids, *self.after]) for window in windows], padding=padding)
        rows = [place * ids.shape[1] + first + np.arange(len(window)) for place, window in enumerate(windows)]
        device = input_device(self.loaded.model)
        inputs = {"input_ids": torch.from_numpy(ids).to(device)}
        if not mask.all():
            inputs["attention_mask"] = torch.from_numpy(mask).to(device)
        return inputs, np.concatenate(rows)


def automatic_budget(loaded: LoadedModel, sites: Sequence[RoutingSite]) -> int:
    """Tokens per batch when nobody asks for a number; it changes no count."""
    if loaded.device != "cpu":
        return ACCELERATOR_BATCH_TOKENS
    hidden = getattr(loaded.model.config.get_text_config(), "hidden_size", None) or 1024
    fewest, most = CPU_BATCH_TOKENS
    return min(most, max(fewest, ACTIVATION_BYTES // (4 * hidden * max(site.top_k for site in sites))))


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


def record_batch(engine: ForwardEngine, windows: Sequence[Window]) -> Block:
    """Routing of every token of the windows, row after row, at all layers.

    Raises:
        RecordingError: a layer did not fire once, or for another number of tokens.
    """
    inputs, rows = engine.inputs(windows)
    layers = engine.contents.layers
    positions = [np.arange(window.start, window.start + len(window)) for window in windows]
    noise = np.concatenate([noise_rows(window.document_id, at, layers) for window, at in zip(windows, positions, strict=True)], axis=1)
    total = inputs["input_ids"].numel()
    kept_rows = torch.from_numpy(rows)
    columns: dict[str, dict[int, Tensor]] = {}
    fired = [0] * len(layers)

    def observe(index: int, decision: Decision) -> None:
        site = engine.sites[index]
        fired[index] += 1
        if len(decision.ids) != total:
            raise RecordingError(
                f"layer {site.layer}: {len(decision.ids)} tokens were routed, the batch has {total} (padding included); "
                f"dbes cannot tell which token is which in {site.name}"
            )
        found = columns_of(engine, index, decision, kept_rows, noise[index])
        for name, column in found.items():
            columns.setdefault(name, {})[index] = column

    model = engine.loaded.model
    scores = engine.stiffness or any(site.adapter == "embedding" for site in engine.sites)
    stop = not is_offloaded(model)
    with torch.inference_mode(), watching(engine.sites, observe, scores=scores, stop=stop, proven=engine.proven):
        forward(model, whole=stop, **inputs)

    for site, count in zip(engine.sites, fired, strict=True):
        if count != 1:
            raise RecordingError(
                f"layer {site.layer} ({site.name}) routed {count} times in one forward, expected once; was the model compiled "
                "(torch.compile) or wrapped before recording? Give the plain model"
            )
    return block_of(windows, layers, {name: stacked(by_site, len(layers)) for name, by_site in columns.items()})


def block_of(windows: Sequence[Window], layers: tuple[int, ...], arrays: Mapping[str, np.ndarray]) -> Block:
    """Arrays [tokens, layers, ...] of the windows' tokens, row after row; names of the random router's begin with ``control_``."""
    lengths = [len(window) for window in windows]
    return Block(
        document=np.repeat([window.document for window in windows], lengths),
        positions=np.concatenate([np.arange(window.start, window.start + len(window)) for window in windows]),
        token_ids=np.concatenate([window.token_ids for window in windows]),
        phase=np.full(sum(lengths), PROMPT, np.uint8),
        layers=layers,
        routes={name: array for name, array in arrays.items() if not name.startswith("control_")},
        control={name.removeprefix("control_"): array for name, array in arrays.items() if name.startswith("control_")},
    )


def record_within_memory(engine: ForwardEngine, batch: Sequence[Window]) -> Iterator[Block]:
    """The batch's routes; halves of the batch, one after the other, where memory does not suffice for all of it."""
    try:
        yield record_batch(engine, batch)
        return
    except RuntimeError as problem:
        if out_of_memory(problem) is None:
            raise
    if len(batch) == 1:
        raise RecordingError(f"one window of {len(batch[0])} tokens does not fit in memory; choose a smaller window or dtype")
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        yield from record_within_memory(engine, half)


def find_batching(engine: ForwardEngine, texts: Sequence[np.ndarray]) -> Batching:
    """What may share a batch, found by trying on the beginnings of two texts.

    Rows may differ in numerical noise: at most 1 % of expert sets in float32, 10 % in a 16-bit dtype.

    Raises:
        RecordingError: routing differs from one forward to the next.
    """
    quiet = replace(engine, control=0, stiffness=False)
    long = Window(0, "one", 0, texts[0][: min(engine.window, 48)])
    source = texts[1] if len(texts) > 1 else texts[0][::-1]
    other = Window(1, "other", 0, source[: max(1, min(len(long), len(source)) * 2 // 3)])
    allowed = 0.01 if engine.loaded.dtype == "float32" else 0.1

    def routed(*windows: Window) -> np.ndarray:
        work = Work(windows[0].document, [window.document_id for window in windows], [window.token_ids for window in windows])
        assembly = Assembly(quiet.contents, work, where=engine.loaded.name, error=RecordingError)
        assembly.add(record_batch(quiet, windows))
        return np.sort(assembly.finish()[0].ids, axis=-1)

    def agree(one: Window, two: Window) -> bool:
        alone, together = np.concatenate([routed(one), routed(two)]), routed(one, two)
        return float((alone != together).any(axis=-1).mean()) <= allowed

    if agree(long, other):
        return "padded"
    if agree(replace(long, token_ids=long.token_ids[: len(other)]), other):
        return "equal lengths"
    if float((routed(long) != routed(long)).any(axis=-1).mean()) > allowed:
        raise RecordingError(
            f"{engine.loaded.name}: the same text is routed to other experts every time it is read, so the router draws random numbers "
            "outside training too; dbes records routing that can be repeated: switch the noise of the gate off"
        )
    return "one at a time"


def columns_of(engine: ForwardEngine, index: int, decision: Decision, kept_rows: Tensor, noise_at: np.ndarray) -> dict[str, Tensor]:
    """What is kept of one site's decision, on the device where it was made."""
    site = engine.sites[index]
    device = decision.ids.device
    rows = kept_rows.to(device, non_blocking=True)
    ids, weights = decision.ids[rows], decision.weights[rows]
    wide = (0, engine.slots - site.top_k)
    found = {
        "ids": torch.nn.functional.pad(ids.masked_fill(weights == 0, SKIPPED), wide, value=SKIPPED).to(torch.int32),
        "weights": torch.nn.functional.pad(weights, wide).to(torch.float16),
    }
    if engine.control and decision.hidden is not None:
        hidden = decision.hidden[rows].float()
        drawn = [hidden @ engine.random_router(index, draw, decision.hidden) for draw in range(engine.control)]
        values, picked = torch.stack(drawn, dim=1).softmax(dim=-1).topk(site.top_k, dim=-1)
        found["control_ids"] = torch.nn.functional.pad(picked, wide, value=SKIPPED).to(torch.int32)
        found["control_weights"] = torch.nn.functional.pad(values, wide).to(torch.float16)
    if engine.stiffness:
        found |= _stiffness_columns(engine, site, decision, rows, torch.from_numpy(noise_at).to(device))
    return found


def _stiffness_columns(engine: ForwardEngine, site: RoutingSite, decision: Decision, rows: Tensor, noise_at: Tensor) -> dict[str, Tensor]:
    count, device = len(rows), rows.device
    noise = engine.noise_on(device)
    found = {
        "logit_margins": torch.full((count,), torch.nan, device=device),
        "logit_stable": torch.zeros(count, dtype=torch.uint8, device=device),
        "selection_margins": torch.full((count,), torch.nan, device=device),
        "scaled_margins": torch.full((count,), torch.nan, device=device),
        "kept": torch.full((count, len(NOISE_SCALES)), 255, dtype=torch.uint8, device=device),
    }
    choice, classes = decision.choice[rows], site.num_experts + site.zero_experts
    matched = None
    if decision.scores is not None and decision.matched is not None:
        classes, matched = decision.scores.shape[-1], decision.matched[rows]
        blocked = None if decision.blocked is None else decision.blocked[rows]
        margin, scaled, kept = selection_stiffness(decision.scores[rows], choice, noise.normal[noise_at], blocked)
        found["selection_margins"] = torch.where(matched, margin, torch.nan)
        found["scaled_margins"] = torch.where(matched, scaled, torch.nan)
        found["kept"] = torch.where(matched[:, None], kept, 255)
    if decision.logits is not None and decision.logits.shape[-1] >= classes:
        margin, stable = logit_stiffness(decision.logits[rows, :classes], choice, noise.uniform[noise_at])
        if matched is not None:
            margin, stable = torch.where(matched, margin, torch.nan), torch.where(matched, stable, 0)
        found["logit_margins"], found["logit_stable"] = margin, stable
    for name in ("logit_margins", "scaled_margins"):
        found[name] = found[name].to(torch.float16)
    return found


def stacked(by_site: dict[int, Tensor], layers: int) -> np.ndarray:
    """[tokens, layers, ...] of one column; one copy off the device. A layer that could not give it holds what means missing."""
    device = next(iter(by_site.values())).device
    sample = next(iter(by_site.values()))
    empty = torch.full_like(sample, SKIPPED) if sample.dtype == torch.int32 else torch.zeros_like(sample)
    parts = [by_site[index].to(device, non_blocking=True) if index in by_site else empty for index in range(layers)]
    return torch.stack(parts, dim=1).cpu().numpy()
