"""The engine for checkpoints that are larger than memory: every layer is read once for all texts of a work unit.

Each batch's forward is the family's own, and pauses where it calls a decoder layer. When all batches stand before a layer, the layer
is read, all pass it one after the other, and its memory is given back; meanwhile the next is read. What a forward has prepared (masks,
rotary tables, whatever layers share) waits with it. The last layer ends with its router.
"""

from __future__ import annotations

import contextvars
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from greenlet import GreenletExit, getcurrent, greenlet

from dbes.errors import ModelError, RecordingError, out_of_memory
from dbes.models.execution import forward
from dbes.models.hooks import Decision, watching
from dbes.models.layerwise import Layerwise
from dbes.models.memory import available_memory
from dbes.models.miniature import miniature
from dbes.models.sites import RoutingSite, find_sites
from dbes.models.windows import embedding_rows
from dbes.recording.batches import Batching, Window, batches
from dbes.recording.batching import find_batching
from dbes.recording.forward import Coming, ForwardEngine, columns_of, fetched, keys_of, sent, stacked
from dbes.recording.parking import Parked, Parking, hidden_states
from dbes.trace.blocks import Block, Work
from dbes.wording import byte_count

HELD = 2
"""Hidden states that the forward of a batch holds at a time: what its layer works on, and what the embedding gave."""

WORKING = 16
"""Memory that a batch needs while it passes a layer, in hidden states."""

CONVERTING = 3
"""Memory that a layer needs while it is put together from its tensors on disk, in layers: tensors, stacked experts, joined projections."""


@dataclass(frozen=True)
class StreamingEngine(ForwardEngine):
    """A model of which one decoder layer is in memory at a time; it yields a block for every layer and batch.

    Attributes:
        max_memory: bytes that the process may use; None: what this machine has free.
        folder: where hidden states wait that do not fit in it; None: the folder for temporary files.
    """

    max_memory: int | None = None
    folder: Path | None = None

    @property
    def layerwise(self) -> Layerwise:
        assert self.loaded.layerwise is not None
        return self.loaded.layerwise

    def blocks(self, work: Work) -> Iterator[Block]:
        return self.blocks_of([work])

    def blocks_of(self, works: Sequence[Work]) -> Iterator[Block]:
        layerwise = self.layerwise
        by_count = self.batch_size is not None
        # batches of each unit for itself, as the engine in memory has them: else close choices could fall otherwise
        planned = [
            batches(self.windows(work), self.budget, by_count=by_count, batching=self.batching, extra=self.extra) for work in works
        ]
        runs = [_Run(self, windows) for own in planned for windows in own]
        room = self._room(runs)
        with ExitStack() as stack:
            stack.callback(layerwise.stop)
            stack.callback(lambda: [run.end() for run in runs])
            stack.enter_context(_pausing(layerwise.layers))
            waiting = sum(run.size for run in runs) * HELD
            if waiting > room.states:
                parking = stack.enter_context(Parking(self.folder or Path(tempfile.gettempdir()), waiting - room.states))
                free = room.states
                for run in runs:
                    free -= run.size * HELD
                    run.parking = None if free >= 0 else parking
            for index in range(layerwise.depth):
                layerwise.load(index)
                stack.callback(layerwise.free, index)
                if room.ahead and index + 1 < layerwise.depth:
                    layerwise.prefetch(index + 1)
                yield from self._layer(index, runs)
                layerwise.free(index)

    def _layer(self, index: int, runs: Sequence[_Run]) -> Iterator[Block]:
        """All batches through one layer."""
        sites = tuple(site for site in self.sites if site.layer == index)
        proven: dict = {}
        for run in runs:
            columns = run.advance(index, sites, proven, last=index == self.layerwise.depth - 1)
            if sites:
                yield Coming(run.windows, (index,), *fetched(columns)).block()
        if sites:
            self.forget_random_routers(self.sites.index(sites[0]))

    def _room(self, runs: Sequence[_Run]) -> _Room:
        """What of the memory is whose.

        Raises:
            ModelError: it does not suffice for one layer and one batch.
        """
        layerwise = self.layerwise
        process = psutil.Process().memory_info().rss
        most = self.max_memory or process + available_memory().bytes
        largest = max(layerwise.stored[: layerwise.depth])
        layer = max(CONVERTING * layerwise.largest, layerwise.largest + largest)
        batch = max(run.size for run in runs) * WORKING
        free = most - process - layer - batch
        if free < 0:
            raise ModelError(
                f"{self.loaded.name}: streaming needs {byte_count(most - free)} ({byte_count(process)} in use, {byte_count(layer)} to "
                f"put one layer together, {byte_count(batch)} for one batch), and may use {byte_count(most)}; give more --max-memory, a "
                "smaller --batch-size, or a 16-bit --dtype"
            )
        ahead = free >= largest
        return _Room(states=free - largest * ahead, ahead=ahead)


@dataclass(frozen=True)
class _Room:
    """Bytes for hidden states, and whether the next layer may be read while this one runs."""

    states: int
    ahead: bool


class _Run:
    """The forward of one batch, paused before a decoder layer."""

    def __init__(self, engine: StreamingEngine, windows: list[Window]) -> None:
        self.engine, self.windows = engine, windows
        config: Any = engine.loaded.model.config.get_text_config()
        width = getattr(config, "hidden_size", None) or 1024
        self.tokens = len(windows) * (max(map(len, windows)) + engine.extra)
        self.size = self.tokens * width * engine.loaded.model.dtype.itemsize
        self.parking: Parking | None = None
        self._parked: Parked | None = None
        self._greenlet: greenlet | None = None
        self._at: int | None = None
        self._rows = self._keys = torch.zeros(0, dtype=torch.int64)

    def advance(self, index: int, sites: tuple[RoutingSite, ...], proven: dict, *, last: bool) -> dict[str, torch.Tensor]:
        """Pass one layer; what its router decided, [tokens, 1, ...] each, where it was decided."""
        place = None if self._parked is None else self._parked.place
        columns: dict[str, dict[int, torch.Tensor]] = {}
        fired = 0

        def observe(_: int, decision: Decision) -> None:
            nonlocal fired
            fired += 1
            if len(decision.ids) != self.tokens:
                raise RecordingError(
                    f"layer {index}: {len(decision.ids)} tokens were routed, the batch has {self.tokens} (padding included); "
                    f"dbes cannot tell which token is which in {sites[0].name}"
                )
            site = self.engine.sites.index(sites[0])
            for name, column in columns_of(self.engine, site, decision, self._rows, self._keys).items():
                columns[name] = {0: column}

        scores = self.engine.stiffness or any(site.adapter == "embedding" for site in sites)
        with torch.inference_mode():
            if self._greenlet is None:
                self._begin()
            if self._at != index:
                raise ModelError(
                    f"{self.engine.loaded.name}: its forward calls decoder layer {self._at} where {index} was to come, so its layers "
                    "cannot be run one by one; use the memory engine"
                )
            if self._parked is not None:
                self._parked.back()
                self._parked = None
            with watching(sites, observe, scores=scores, stop=last, proven=proven):
                self._go_on()
            if not last and self._at is not None and self.parking is not None and self._states is not None:
                self._parked = self.parking.park(self._states, place)
        if sites and fired != 1:
            raise RecordingError(
                f"layer {index} ({sites[0].name}) routed {fired} times in one forward, expected once; was the model compiled "
                "(torch.compile) or wrapped before recording? Give the plain model"
            )
        return {name: stacked(by_site, 1) for name, by_site in columns.items()}

    def end(self) -> None:
        """Leave the forward where it stands."""
        if self._greenlet is not None and not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)

    def _begin(self) -> None:
        inputs, rows = self.engine.inputs(self.windows)
        device = inputs["input_ids"].device
        self._rows, self._keys = sent(rows, device), sent(keys_of(self.windows), device)
        self._greenlet = greenlet(lambda: forward(self.engine.loaded.model, whole=True, **inputs))
        self._greenlet.gr_context = contextvars.copy_context()
        self._go_on()

    def _go_on(self) -> None:
        """Run until the next call of a decoder layer, or the end."""
        assert self._greenlet is not None
        self._at = self._states = None
        try:
            paused = self._greenlet.switch()
        except (NotImplementedError, RuntimeError) as problem:
            if out_of_memory(problem) is not None:
                raise RecordingError(
                    f"{len(self.windows)} windows of {max(map(len, self.windows))} tokens do not fit in memory beside a layer; choose a "
                    "smaller --batch-size or --window"
                ) from problem
            if "meta" in str(problem):
                raise ModelError(
                    f"{self.engine.loaded.name}: its forward uses weights of a decoder layer outside that layer, so layers cannot be run "
                    "one by one; use the memory engine"
                ) from problem
            raise
        if isinstance(paused, _Paused):
            self._at, self._states = paused.layer, paused.states


@dataclass(frozen=True, eq=False)
class _Paused:
    """A forward stands before a decoder layer, with what the layer is to work on."""

    layer: int
    states: torch.Tensor | None


@contextmanager
def _pausing(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside the block a greenlet that calls one of the layers first gives way to the one that started it."""

    def paused(index: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def wait(*args: Any, **kwargs: Any) -> Any:
            above = getcurrent().parent
            assert above is not None
            above.switch(_Paused(index, hidden_states(args, kwargs)))
            return plain(*args, **kwargs)

        return wait

    for index, layer in enumerate(layers):
        layer.forward = paused(index, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def streaming(engine: ForwardEngine, texts: Sequence[np.ndarray], *, max_memory: int | None, folder: Path | None) -> StreamingEngine:
    """The engine that gives the same trace as ``engine``, with layers read one at a time.

    Args:
        texts: token ids of the documents, on which is tried what may share a batch.

    Raises:
        RecordingError: routing differs from one forward to the next.
    """
    same = {field.name: getattr(engine, field.name) for field in fields(ForwardEngine)}
    found = StreamingEngine(**same, max_memory=max_memory, folder=folder)
    return replace(found, batching=_find_batching(found, texts))


def _find_batching(engine: StreamingEngine, texts: Sequence[np.ndarray]) -> Batching:
    """What may share a batch, tried on a small model of the same architecture: on the checkpoint itself it would be read once more.

    Where there is no small model of it, every window is run alone.
    """
    model = engine.loaded.model
    try:
        small = miniature(model.config, trust_remote_code=model.is_custom_code())
    except ModelError:
        return "one at a time"
    loaded = replace(engine.loaded, model=small, dtype="float32", device="cpu", layerwise=None)
    rows = embedding_rows(small)
    quiet = ForwardEngine(loaded, find_sites(small), (), (), seed=0, control=0, stiffness=False, window=engine.window)
    return find_batching(quiet, [text % rows for text in texts[:2]])
