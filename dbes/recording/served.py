"""Routing as a server returns it: texts go out as token ids, the experts of every token come back, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dbes.errors import RecordingError
from dbes.recording.batches import Window
from dbes.recording.forward import ForwardEngine, computing
from dbes.trace.blocks import Block, Contents, Work
from dbes.trace.types import PROMPT

AT_A_TIME = 64
"""Windows that a server is given at a time, so that what it returns is soon checked and written."""

ELSEWHERE = ("dtype", "attention", "experts_implementation", "device", "quantization")
"""Of how a model computes: what a server knows of itself, and not what the config says."""


class Server(Protocol):
    """Runs prompts somewhere else."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Engine, its version, and what else tells it from another, as JSON values."""
        ...

    def routed(self, prompts: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[np.ndarray]:
        """Experts of each prompt's tokens, integers [tokens and perhaps more, layers, slots], in order.

        Args:
            prompts: int [tokens] each. names: of them, for errors.

        Raises:
            RecordingError: the server cannot be reached, refuses, or does not return the routing of every token.
        """
        ...


@dataclass(frozen=True)
class ServedEngine:
    """The windows of texts, routed by a server.

    Attributes:
        base: cuts texts into windows; its model has no weights.
    """

    base: ForwardEngine
    server: Server

    @property
    def contents(self) -> Contents:
        return replace(self.base.contents, gives=frozenset(), control=0)

    @property
    def identity(self) -> dict[str, Any]:
        about = {name: value for name, value in self.base.identity.items() if name not in ELSEWHERE}
        return about | {"served_by": dict(self.server.identity), "versions": computing(self.base.loaded)["versions"]}

    @property
    def settings(self) -> dict[str, Any]:
        return {"window": self.base.window, "seed": self.base.seed, "control": 0, "stiffness": False}

    def blocks(self, work: Work) -> Iterator[Block]:
        windows, before, after = self.base.windows(work), np.asarray(self.base.before, int), np.asarray(self.base.after, int)
        chosen = np.zeros(len(self.contents.layers), bool)
        for start in range(0, len(windows), AT_A_TIME):
            some = windows[start : start + AT_A_TIME]
            prompts = [np.concatenate([before, window.token_ids, after]).astype(np.int32) for window in some]
            for window, prompt, ids in zip(some, prompts, self.server.routed(prompts, [_name(each) for each in some]), strict=True):
                yield self._block(window, ids, len(prompt))
                chosen |= (ids != 0).any(axis=(0, 2))
        if self.contents.slots == 1 and windows and not chosen.all():
            layer = self.contents.layers[int(np.argmin(chosen))]
            raise RecordingError(f"{self._where}: only expert 0 at layer {layer} in all texts: that layer's routing was not recorded")

    def _block(self, window: Window, ids: np.ndarray, tokens: int) -> Block:
        layers = self.contents.layers
        if ids.ndim != 3 or ids.shape[1:] != (len(layers), self.contents.slots):
            raise RecordingError(
                f"{self._where}, {_name(window)}: routing {ids.shape}, expected [tokens, {len(layers)} layers, top-{self.contents.slots}]"
            )
        if len(ids) < tokens:
            raise RecordingError(f"{self._where}, {_name(window)}: {len(ids)} rows of routing for {tokens} tokens of the prompt")
        first, many = len(self.base.before), len(window)
        return Block(
            document=np.full(many, window.document, np.int32),
            positions=np.arange(window.start, window.start + many, dtype=np.int32),
            token_ids=window.token_ids,
            phase=np.full(many, PROMPT, np.uint8),
            layers=layers,
            routes={"ids": np.ascontiguousarray(ids[first : first + many]).astype(np.int32)},
        )

    @property
    def _where(self) -> str:
        return str(self.server.identity.get("engine"))

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:  # noqa: ARG002 (as of other engines)
        return "a server returns the experts of a token, and no scores"


def _name(window: Window) -> str:
    return f"document {window.document_id!r}"
