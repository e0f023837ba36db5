"""The engine that runs a transformers model in this process: documents cut into windows, batches of them, one forward each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbes.errors import RecordingError, out_of_memory
from dbes.models import LoadedModel
from dbes.models.execution import forward, input_device, is_offloaded
from dbes.models.head import next_token_nats
from dbes.models.hooks import Decision, watching
from dbes.models.sites import RoutingSite, router_std, score_reason
from dbes.models.windows import embedding_rows, padded, padding_id
from dbes.recording.batches import Batching, Window, automatic_budget, first_batch, longest_first
from dbes.recording.stiffness import Noise, logit_stiffness, noise_keys, noise_rows, selection_stiffness
from dbes.trace.blocks import SKIPPED, STORED, Block, Contents, Work
from dbes.trace.types import NOISE_SCALES, PROMPT

DRAW_STRIDE = (1 << 32) // 3
"""Between the seeds of draws of the random router, far from those of any layer; torch uses the low 32 bits of a seed only."""


@dataclass(frozen=True)
class ForwardEngine:
    """A model, and all that stays the same from batch to batch of one recording.

    Attributes:
        before, after: special tokens the tokenizer puts around a text; fed to the model, never recorded.
        control: draws of the random router to record too.
        stiffness: record margins and flips too.
        window: tokens of a document that the model sees at once.
        batch_size: windows per batch; None fills a budget of tokens.
        loss: run the head too, and tell the loss of every token.
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
    loss: bool = False

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
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "notes": list(loaded.notes),
            "special_tokens_excluded": {"before": list(self.before), "after": list(self.after)},
            **computing(loaded),
        }

    @property
    def settings(self) -> dict[str, Any]:
        told = {"window": self.window, "seed": self.seed, "control": self.control, "stiffness": self.stiffness, "batching": self.batching}
        return told | ({"loss": True} if self.loss else {})

    def blocks(self, work: Work) -> Iterator[Block]:
        yield from _recorded(self, self.windows(work))

    def windows(self, work: Work) -> list[Window]:
        """The windows of the texts, longest first."""
        windows = [
            Window(work.first + place, work.document_ids[place], start, ids[start : start + self.window])
            for place, ids in enumerate(work.texts)
            for start in range(0, len(ids), self.window)
        ]
        return longest_first(windows)

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:
        return score_reason(next(site for site in self.sites if site.layer == layer), missing, tokens)

    @property
    def budget(self) -> int:
        """Of a batch: windows where ``batch_size`` is given, else tokens."""
        return automatic_budget(self.loaded, self.sites) if self.batch_size is None else self.batch_size

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
        inputs = {"input_ids": sent(ids, device)}
        if not mask.all():
            inputs["attention_mask"] = sent(mask, device)
        return inputs, np.concatenate(rows)


def computing(loaded: LoadedModel) -> dict[str, Any]:
    """How a model computes: all that can flip close choices beside its weights."""
    return {
        "dtype": loaded.dtype,
        **({} if loaded.quantization is None else {"quantization": loaded.quantization}),
        "attention": loaded.attention,
        "experts_implementation": loaded.experts_implementation,
        "device": loaded.device,
        "versions": {"dbes": version("dbes"), "torch": torch.__version__, "transformers": version("transformers")},
    }


def _recorded(engine: ForwardEngine, windows: Sequence[Window]) -> Iterator[Block]:
    """The routes of the windows, which are longest first; the next batch runs while those of the last come off the device.

    Where memory does not suffice for a batch, the budget is halved for the rest of the windows, and the blocks say so.
    """
    by_count, budget = engine.batch_size is not None, engine.budget
    reduced: int | None = None
    coming: Coming | None = None
    while windows:
        count = first_batch(windows, budget, by_count=by_count, batching=engine.batching, extra=engine.extra)
        try:
            following = begin_batch(engine, windows[:count])
        except RuntimeError as problem:
            if out_of_memory(problem) is None:
                raise
            if count == 1:
                raise RecordingError(
                    f"one window of {len(windows[0])} tokens does not fit in memory; choose a smaller window or dtype"
                ) from problem
            budget = reduced = (count if by_count else min(budget, count * (len(windows[0]) + engine.extra))) // 2
            following = None
        if following is None:
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            continue
        if coming is not None:
            yield coming.block()
        coming, windows = replace(following, reduced=reduced), windows[count:]
    if coming is not None:
        yield coming.block()


@dataclass(frozen=True)
class Coming:
    """The routes of a batch, on their way off the device.

    Attributes:
        copies: [tokens, layers, ...] of each column, on the CPU; they hold what they should once ``arrived`` says so.
        reduced: see `Block`.
    """

    windows: Sequence[Window]
    layers: tuple[int, ...]
    copies: Mapping[str, Tensor]
    arrived: Sequence[torch.Event]
    reduced: int | None = None

    def block(self) -> Block:
        """The routes of every token of the windows, row after row, at all layers."""
        for event in self.arrived:
            event.synchronize()
        arrays = {name: copy.numpy() for name, copy in self.copies.items()}
        lengths = [len(window) for window in self.windows]
        return Block(
            document=np.repeat([window.document for window in self.windows], lengths),
            positions=np.concatenate([_positions(window) for window in self.windows]),
            token_ids=np.concatenate([window.token_ids for window in self.windows]),
            phase=np.full(sum(lengths), PROMPT, np.uint8),
            layers=self.layers,
            routes={name: array for name, array in arrays.items() if name != "nats" and not name.startswith("control_")},
            control={name.removeprefix("control_"): array for name, array in arrays.items() if name.startswith("control_")},
            nats=arrays.get("nats"),
            reduced=self.reduced,
        )


def record_batch(engine: ForwardEngine, windows: Sequence[Window]) -> Block:
    """Routing of every token of the windows, row after row, at all layers; raises as `begin_batch`."""
    return begin_batch(engine, windows).block()


def begin_batch(engine: ForwardEngine, windows: Sequence[Window]) -> Coming:
    """Run the windows; nothing waits for the device, unless it shares its memory with the CPU.

    Raises:
        RecordingError: a layer did not fire once, or for another number of tokens.
    """
    inputs, rows = engine.inputs(windows)
    layers = engine.contents.layers
    keys = keys_of(windows)
    total = inputs["input_ids"].numel()
    placed: dict[torch.device, tuple[Tensor, Tensor]] = {}
    columns: dict[str, dict[int, Tensor]] = {}
    fired = [0] * len(layers)

    def observe(index: int, decision: Decision) -> None:
        site, device = engine.sites[index], decision.ids.device
        fired[index] += 1
        if len(decision.ids) != total:
            raise RecordingError(
                f"layer {site.layer}: {len(decision.ids)} tokens were routed, the batch has {total} (padding included); "
                f"dbes cannot tell which token is which in {site.name}"
            )
        if device not in placed:  # once a batch, not once a layer
            placed[device] = sent(rows, device), sent(keys, device)
        for name, column in columns_of(engine, index, decision, *placed[device]).items():
            columns.setdefault(name, {})[index] = column

    model = engine.loaded.model
    scores = engine.stiffness or any(site.adapter == "embedding" for site in engine.sites)
    whole = not is_offloaded(model)
    stop, nats = whole and not engine.loss, None
    with torch.inference_mode(), watching(engine.sites, observe, scores=scores, stop=stop, proven=engine.proven):
        if engine.loss:
            nats = next_token_nats(model, inputs, torch.from_numpy(rows))
        else:
            forward(model, whole=whole, **inputs)

    for site, count in zip(engine.sites, fired, strict=True):
        if count != 1:
            raise RecordingError(
                f"layer {site.layer} ({site.name}) routed {count} times in one forward, expected once; was the model compiled "
                "(torch.compile) or wrapped before recording? Give the plain model"
            )
    told = {} if nats is None else {"nats": nats}
    copies, arrived = fetched({name: stacked(by_site, len(layers)) for name, by_site in columns.items()} | told)
    return Coming(windows, layers, copies, arrived)


def keys_of(windows: Sequence[Window]) -> np.ndarray:
    """int64 [tokens], the `noise_keys` of the windows' tokens, row after row."""
    return np.concatenate([noise_keys(window.document_id, _positions(window)) for window in windows])


def _positions(window: Window) -> np.ndarray:
    return np.arange(window.start, window.start + len(window))


def columns_of(engine: ForwardEngine, index: int, decision: Decision, rows: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """What is kept of one site's decision, on the device where it was made, as are the rows that are kept and their `noise_keys`."""
    site = engine.sites[index]
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
        found |= _stiffness_columns(engine, site, decision, rows, noise_rows(keys, site.layer))
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


def stacked(by_site: dict[int, Tensor], layers: int) -> Tensor:
    """[tokens, layers, ...] of one column. A layer that could not give it holds what means missing."""
    sample = next(iter(by_site.values()))
    empty = torch.full_like(sample, SKIPPED) if sample.dtype == torch.int32 else torch.zeros_like(sample)
    parts = [by_site[index].to(sample.device, non_blocking=True) if index in by_site else empty for index in range(layers)]
    return torch.stack(parts, dim=1)


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device; nothing waits for the copy where it can be made from page-locked memory."""
    given = torch.from_numpy(array)
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given.to(device)


def fetched(columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[torch.Event]]:
    """Copies on the CPU, and what tells that they hold what they should: nothing where that is so already."""
    copies: dict[str, Tensor] = {}
    devices: set[torch.device] = set()
    for name, column in columns.items():
        if column.device.type != "cuda":
            copies[name] = column.cpu()
            continue
        copies[name] = torch.empty(column.shape, dtype=column.dtype, pin_memory=True).copy_(column, non_blocking=True)
        devices.add(column.device)
    return copies, [torch.cuda.current_stream(device).record_event() for device in sorted(devices, key=str)]
