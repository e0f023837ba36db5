"""One batch of windows through the model: its routing as arrays, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dbes.errors import RecordingError
from dbes.models import LoadedModel
from dbes.models.execution import forward, input_device, is_offloaded
from dbes.models.hooks import Decision, watching
from dbes.models.sites import RoutingSite, router_std
from dbes.models.windows import embedding_rows, padded, padding_id
from dbes.recording.stiffness import Noise, logit_stiffness, noise_rows, selection_stiffness
from dbes.trace.types import NOISE_SCALES, storage_dtype

SKIPPED = -1
"""In ids that were not checked yet: a slot of weight 0, or none."""

Batching = Literal["padded", "equal lengths", "one at a time"]
"""What may share a batch without changing the routing: any windows, windows of one length, or none."""


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
class Recorder:
    """All that stays the same from batch to batch of one recording.

    Attributes:
        before, after: special tokens the tokenizer puts around a text; fed to the model, never recorded.
        control: record the random router too.
        stiffness: record margins and flips too.
    """

    loaded: LoadedModel
    sites: tuple[RoutingSite, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    seed: int
    control: bool
    stiffness: bool

    @property
    def extra(self) -> int:
        """Special tokens of every window."""
        return len(self.before) + len(self.after)

    @cached_property
    def slots(self) -> int:
        return max(site.top_k for site in self.sites)

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

    def random_router(self, index: int, hidden: Tensor) -> Tensor:
        """float32 [hidden, experts], the frozen random router of a site; the same on every device."""
        key = (index, hidden.device)
        if key not in self._on_device:
            site, width = self.sites[index], hidden.shape[-1]
            generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + site.layer)
            matrix = torch.randn(site.num_experts, width, generator=generator) * router_std(site, width)
            self._on_device[key] = matrix.T.contiguous().to(hidden.device)
        return self._on_device[key]

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


def record_batch(recorder: Recorder, windows: Sequence[Window]) -> dict[str, np.ndarray]:
    """Routing of every token of the windows, row after row; names as in ``TokenRoutes``, the control's with ``control_`` before.

    A slot that was skipped, had weight 0 or went to a zero-computation expert is missing, as in ``TokenRoutes``.

    Raises:
        RecordingError: a layer did not fire once; rows, ids or the number of slots are wrong; NaN in the router's output.
    """
    inputs, rows = recorder.inputs(windows)
    layers = tuple(site.layer for site in recorder.sites)
    positions = [np.arange(window.start, window.start + len(window)) for window in windows]
    noise = np.concatenate([noise_rows(window.document_id, at, layers) for window, at in zip(windows, positions, strict=True)], axis=1)
    total = inputs["input_ids"].numel()
    kept_rows = torch.from_numpy(rows)
    columns: dict[str, dict[int, Tensor]] = {}
    fired = [0] * len(layers)

    def observe(index: int, decision: Decision) -> None:
        site = recorder.sites[index]
        fired[index] += 1
        if len(decision.ids) != total:
            raise RecordingError(
                f"layer {site.layer}: {len(decision.ids)} tokens were routed, the batch has {total} (padding included); "
                f"dbes cannot tell which token is which in {site.name}"
            )
        found = _columns(recorder, index, decision, kept_rows, noise[index])
        for name, column in found.items():
            columns.setdefault(name, {})[index] = column

    model = recorder.loaded.model
    scores = recorder.stiffness or any(site.adapter == "embedding" for site in recorder.sites)
    stop = not is_offloaded(model)
    with torch.inference_mode(), watching(recorder.sites, observe, scores=scores, stop=stop, proven=recorder.proven):
        forward(model, whole=stop, **inputs)

    for site, count in zip(recorder.sites, fired, strict=True):
        if count != 1:
            raise RecordingError(
                f"layer {site.layer} ({site.name}) routed {count} times in one forward, expected once; was the model compiled "
                "(torch.compile) or wrapped before recording? Give the plain model"
            )
    arrays = {name: _stacked(by_site, len(layers)) for name, by_site in columns.items()}
    _check(recorder, windows, arrays)
    for name in ("ids", "control_ids"):
        if name in arrays:
            arrays[name] = _stored(recorder, arrays[name])
    arrays["weights"][arrays["ids"] == np.iinfo(arrays["ids"].dtype).max] = 0  # zero-computation experts have one
    arrays["document"] = np.repeat([window.document for window in windows], [len(window) for window in windows]).astype(np.int32)
    arrays["positions"] = np.concatenate(positions).astype(np.int32)
    arrays["token_ids"] = np.concatenate([window.token_ids for window in windows])
    return arrays


def record_within_memory(recorder: Recorder, batch: Sequence[Window]) -> Iterator[dict[str, np.ndarray]]:
    """The batch's arrays; halves of the batch, one after the other, where memory does not suffice for all of it."""
    try:
        yield record_batch(recorder, batch)
        return
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and "allocate memory" not in str(problem):
            raise
    if len(batch) == 1:
        raise RecordingError(f"one window of {len(batch[0])} tokens does not fit in memory; choose a smaller window or dtype")
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        yield from record_within_memory(recorder, half)


def find_batching(recorder: Recorder, texts: Sequence[np.ndarray], window: int) -> Batching:
    """What may share a batch, found by trying on the beginnings of two texts.

    Rows may differ in numerical noise: at most 1 % of expert sets in float32, 10 % in a 16-bit dtype.

    Raises:
        RecordingError: routing differs from one forward to the next.
    """
    quiet = replace(recorder, control=False, stiffness=False)
    long = Window(0, "one", 0, texts[0][: min(window, 48)])
    source = texts[1] if len(texts) > 1 else texts[0][::-1]
    other = Window(1, "other", 0, source[: max(1, min(len(long), len(source)) * 2 // 3)])
    allowed = 0.01 if recorder.loaded.dtype == "float32" else 0.1

    def routed(*windows: Window) -> np.ndarray:
        return np.sort(record_batch(quiet, windows)["ids"], axis=-1)

    def agree(one: Window, two: Window) -> bool:
        alone, together = np.concatenate([routed(one), routed(two)]), routed(one, two)
        return float((alone != together).any(axis=-1).mean()) <= allowed

    if agree(long, other):
        return "padded"
    if agree(replace(long, token_ids=long.token_ids[: len(other)]), other):
        return "equal lengths"
    if float((routed(long) != routed(long)).any(axis=-1).mean()) > allowed:
        raise RecordingError(
            f"{recorder.loaded.name}: the same text is routed to other experts every time it is read, so the router draws random numbers "
            "outside training too; dbes records routing that can be repeated: switch the noise of the gate off"
        )
    return "one at a time"


def _columns(recorder: Recorder, index: int, decision: Decision, kept_rows: Tensor, noise_at: np.ndarray) -> dict[str, Tensor]:
    """What is kept of one site's decision, on the device where it was made."""
    site = recorder.sites[index]
    device = decision.ids.device
    rows = kept_rows.to(device, non_blocking=True)
    ids, weights = decision.ids[rows], decision.weights[rows]
    wide = (0, recorder.slots - site.top_k)
    found = {
        "ids": torch.nn.functional.pad(ids.masked_fill(weights == 0, SKIPPED), wide, value=SKIPPED).to(torch.int32),
        "weights": torch.nn.functional.pad(weights, wide).to(torch.float16),
    }
    if recorder.control and decision.hidden is not None:
        logits = decision.hidden[rows].float() @ recorder.random_router(index, decision.hidden)
        values, picked = logits.softmax(dim=-1).topk(site.top_k, dim=-1)
        found["control_ids"] = torch.nn.functional.pad(picked, wide, value=SKIPPED).to(torch.int32)
        found["control_weights"] = torch.nn.functional.pad(values, wide).to(torch.float16)
    if recorder.stiffness:
        found |= _stiffness_columns(recorder, site, decision, rows, torch.from_numpy(noise_at).to(device))
    return found


def _stiffness_columns(recorder: Recorder, site: RoutingSite, decision: Decision, rows: Tensor, noise_at: Tensor) -> dict[str, Tensor]:
    count, device = len(rows), rows.device
    noise = recorder.noise_on(device)
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


def _stacked(by_site: dict[int, Tensor], layers: int) -> np.ndarray:
    """[tokens, layers, ...] of one column; one copy off the device. A layer that could not give it holds what means missing."""
    device = next(iter(by_site.values())).device
    sample = next(iter(by_site.values()))
    empty = torch.full_like(sample, SKIPPED) if sample.dtype == torch.int32 else torch.zeros_like(sample)
    parts = [by_site[index].to(device, non_blocking=True) if index in by_site else empty for index in range(layers)]
    return torch.stack(parts, dim=1).cpu().numpy()


def _stored(recorder: Recorder, ids: np.ndarray) -> np.ndarray:
    """The ids in the dtype of a trace, with its mark where no expert ran."""
    dtype = storage_dtype(max(site.num_experts for site in recorder.sites))
    experts = np.asarray([site.num_experts for site in recorder.sites])[None, :, None]
    return np.where((ids == SKIPPED) | (ids >= experts), np.iinfo(dtype).max, ids).astype(dtype)


def _check(recorder: Recorder, windows: Sequence[Window], arrays: dict[str, np.ndarray]) -> None:
    ids, weights = arrays["ids"], arrays["weights"]
    if not np.isfinite(weights).all():
        row, column, _ = np.argwhere(~np.isfinite(weights))[0]
        ends = np.cumsum([len(window) for window in windows])
        window = windows[int(np.searchsorted(ends, row, side="right"))]
        raise RecordingError(
            f"layer {recorder.sites[column].layer}: NaN or infinity in the router's output, in document {window.document_id!r} "
            f"(near token {window.start}); the checkpoint is damaged, or overflows in {recorder.loaded.dtype}: try another dtype"
        )
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != SKIPPED)
    tokens = sum(len(window) for window in windows)
    for column, site in enumerate(recorder.sites):
        routed = ids[:, column, : site.top_k]
        valid = int(((routed >= 0) & (routed < site.num_experts + site.zero_experts)).sum())
        skipped = int((routed == SKIPPED).sum())
        if valid + skipped != tokens * site.top_k or twice[:, column].any():
            raise RecordingError(
                f"layer {site.layer} ({site.name}): {valid} slots hold an expert below {site.num_experts + site.zero_experts} and "
                f"{skipped} were skipped, expected {tokens} tokens x {site.top_k} = {tokens * site.top_k} slots, and no expert twice in "
                f"a row (found in {int(twice[:, column].any(axis=-1).sum())} rows); what this layer reports is not its routing"
            )
