"""Nats of every token from one pass of the model and one of its head, of whose logits only a piece is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dbes.errors import RecordingError
from dbes.models.execution import base_of, logits_of

LOGITS = 1 << 25
"""Logits that are in memory at a time, at most."""


def next_token_nats(model: nn.Module, inputs: Mapping[str, Tensor], rows: Tensor, *, most: int = LOGITS) -> Tensor:
    """Nats of chosen tokens given what stands before them in their sequence, [tokens], at least float32; 0 for a first token.

    The model's own forward is called once, and what its base gives it is handed on a piece at a time: so whatever the model does with
    its logits (scales, caps) is done, and no more than ``most`` logits are in memory.

    Args:
        inputs: of the model, ``input_ids`` int64 [sequences, length] among them.
        rows: int64 [tokens], of the sequences laid end to end, padding included.

    Raises:
        RecordingError: a model whose head cannot be told from its base, or that calls its base otherwise than once.
    """
    whole: Any = model
    base = base_of(model)
    base = getattr(model, "model", model) if base is model else base  # as Llama 4, whose class names another part as its base
    if base is model:
        raise RecordingError(f"loss: the head of {type(model).__name__} cannot be told from the rest of it; record it without the loss")
    length = inputs["input_ids"].shape[1]
    rows = rows.to(inputs["input_ids"].device)
    predicted = rows[rows % length > 0]
    labels = inputs["input_ids"].reshape(-1)[predicted]
    step = max(1, most // whole.config.get_text_config().vocab_size)
    pieces = (predicted - 1).split(step) if len(predicted) else ((rows[:1]),)
    given: list[Any] = []

    def keep(_: nn.Module, __: tuple, output: Any) -> Any:
        given.append(output)
        return _piece(output, pieces[0])

    handle = base.register_forward_hook(keep)
    try:
        logits = logits_of(model, **inputs)
    finally:
        handle.remove()
    if len(given) != 1 or logits.shape[1] != len(pieces[0]):
        raise RecordingError(f"loss: {type(model).__name__} ran its layers {len(given)} times, expected once; record it without the loss")
    found = [_nats(logits, labels[:step])]
    for place, piece in enumerate(pieces[1:], 1):
        with _standing_in(base, _piece(given[0], piece)):
            found.append(_nats(logits_of(model, **inputs), labels[place * step : (place + 1) * step]))
    nats = torch.zeros(len(rows), dtype=found[0].dtype, device=found[0].device)
    nats[(rows % length > 0).to(nats.device)] = torch.cat(found)
    return nats


def _piece(output: Any, rows: Tensor) -> Any:
    """What a base gave, of some tokens only, as one sequence."""
    states = output[0]
    states = states.reshape(-1, states.shape[-1])[rows.to(states.device)][None]
    if isinstance(output, tuple):
        return states, *output[1:]
    return type(output)(**{**output, "last_hidden_state": states})


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits[0, : len(labels)]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")


@contextmanager
def _standing_in(base: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block a call of the base gives this and runs nothing."""
    own = vars(base).get("forward")
    base.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del base.forward
        if own is not None:
            base.forward = own
