"""Run a model: where its inputs must lie, and what of it must be called. Every forward of dbes goes through here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def base_of(model: nn.Module) -> nn.Module:
    """The model without its language-model head."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "-", model)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids must lie: the device of the input embedding (offloaded weights lie on meta between calls)."""
    devices = getattr(model, "hf_device_map", None)
    if devices:
        first = next(iter(devices.values()))
        offloaded = first in ("cpu", "disk")
        return torch.device(0 if offloaded and torch.accelerator.is_available() else "cpu" if offloaded else first)
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights come and go during the forward (kept in memory or on disk beside the device that computes)."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return True
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return "disk" in places or ("cpu" in places and len(places) > 1)


def forward(model: nn.Module, *, whole: bool = False, **inputs: Tensor) -> None:
    """One forward for the sake of hooks inside the model; inputs may lie anywhere.

    Args:
        whole: call the model itself, head included, as its user would: what its own forward prepares for its base is prepared.
            Where a hook ends the forward before the head (`dbes.models.hooks.watching` with ``stop``), this costs nothing. Without
            it the head is left out, unless the model has hooks of its own or a forward that was put in place of its class's:
            they may do what the rest depends on (compressed-tensors decompresses the weights before the first forward of the
            whole model).
    """
    # accelerate puts a forward of its own in place, which moves inputs and outputs between devices and does nothing else
    patched = "forward" in vars(model) and not hasattr(model, "_hf_hook")
    whole = whole or patched or bool(model._forward_pre_hooks or model._forward_hooks)
    _call(model if whole else base_of(model), input_device(model), inputs)


def logits_of(model: nn.Module, **inputs: Tensor) -> Tensor:
    """[sequences, length, vocabulary], the logits, on the device of the model's head; inputs may lie anywhere."""
    return _call(model, input_device(model), inputs).logits


def _call(module: nn.Module, device: torch.device, inputs: dict[str, Tensor]) -> Any:
    return module(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside the block the model trains (dropout on) or does not; it is left as it was, part by part."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block only parameters that are told to again ask for gradients; at its end all ask for them as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
