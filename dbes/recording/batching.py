"""What may share a batch of a model, found by trying, and not found out twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dbes.errors import RecordingError
from dbes.models import LoadedModel
from dbes.recording.batches import Batching, Window
from dbes.recording.forward import ForwardEngine, computing, record_batch
from dbes.trace.blocks import Assembly, Block, Work
from dbes.trace.manifest import MANIFEST, read_manifest

TELLING = 16
"""Tokens that each of the two texts needs for the answer to hold for other texts too."""

Run = Callable[[ForwardEngine, Sequence[Window]], Iterable[Block]]
"""Runs windows in one batch."""

_known: dict[str, Batching] = {}


def _forward(engine: ForwardEngine, windows: Sequence[Window]) -> Iterable[Block]:
    return [record_batch(engine, windows)]


def find_batching(
    engine: ForwardEngine, texts: Sequence[np.ndarray], folder: Path | None = None, *, run: Run = _forward, answer: int = 0
) -> Batching:
    """What may share a batch, found by trying on the beginnings of two texts.

    Rows may differ in numerical noise: at most 1 % of expert sets in float32, none where answers follow, 10 % in a 16-bit dtype. A
    recording that is resumed goes on as it began, and models of one class and config that compute alike are tried once in a process.

    Args:
        folder: of the trace that may be resumed.
        run: what is tried; by default one forward.
        answer: tokens that it adds to every text.

    Raises:
        RecordingError: routing differs from one forward to the next.
    """
    if (begun := _begun(engine, folder)) is not None:
        return begun
    key = f"{_computes(engine.loaded)} {answer}"
    if key not in _known:
        found = _tried(engine, texts, run, answer)
        if min(map(len, [*texts[:2], texts[-1]])) < TELLING:
            return found
        _known[key] = found
    return _known[key]


def _begun(engine: ForwardEngine, folder: Path | None) -> Batching | None:
    """What the unfinished recording of the same model in the folder found."""
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    facts = read_manifest(folder).provenance
    same = all(facts.get(name) == value for name, value in json.loads(json.dumps(engine.identity)).items())
    return facts["batching"] if same and facts.get("batching") in get_args(Batching) else None


def _computes(loaded: LoadedModel) -> str:
    """sha256 of what can change how rows of a batch depend on each other: the code, sizes and settings of a model, not its weights."""
    facts: dict[str, Any] = computing(loaded)
    kind = type(loaded.model)
    facts |= {"class": f"{kind.__module__}.{kind.__qualname__}", "config": loaded.config}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _tried(engine: ForwardEngine, texts: Sequence[np.ndarray], run: Run, answer: int) -> Batching:
    quiet = replace(engine, control=0, stiffness=False, loss=False)
    long = Window(0, "one", 0, texts[0][: min(engine.window, 48)])
    source = texts[1] if len(texts) > 1 else texts[0][::-1]
    other = Window(1, "other", 0, source[: max(1, min(len(long), len(source)) * 2 // 3)])
    exact = engine.loaded.dtype in ("float32", "float64")
    # one other expert can make another token, and then another answer
    allowed = (0.0 if answer else 0.01) if exact else 0.1

    def routed(*windows: Window) -> np.ndarray:
        work = Work(windows[0].document, [window.document_id for window in windows], [window.token_ids for window in windows])
        assembly = Assembly(replace(quiet.contents, answer=answer), work, where=engine.loaded.name, error=RecordingError)
        for block in run(quiet, windows):
            assembly.add(block)
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
