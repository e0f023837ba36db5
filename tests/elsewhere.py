"""A device that is not the CPU, on any machine: tensors that compute on the CPU, and refuse to be mixed with the CPU's.

Every operation between a tensor of this device and one of the CPU fails as it does on an accelerator, except with tensors
without dimensions, and so do ``numpy`` and copies in between that are not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    """What torch asks of a device: one of it, whose random numbers are the CPU's."""

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, _: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _: Any = None) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("elsewhere", backend_module=_Backend())
DEVICE = torch.device("elsewhere", 0)
CPU = torch.device("cpu")


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``inner`` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE,
            requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        """Torch refuses it of subclasses; of a device's own tensors it does not."""
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Placed(TorchDispatchMode):
    """Makes and moves tensors: ``.to(DEVICE)`` and factories with ``device=DEVICE`` begin with tensors of the CPU, or with none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside the block the device can be used."""
    with _Placed():
        yield DEVICE


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights on the device, in place."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:  # tied weights stay tied
                made[parameter] = torch.nn.Parameter(Elsewhere(parameter.detach()), requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer)
    return model


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    here = [value for value in given if not isinstance(value, Elsewhere)]
    moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.to)
    if len(here) < len(given) and not moves:
        strangers = [value for value in here if value.ndim]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, found one of shape {tuple(strangers[0].shape)} on the CPU")
    wanted = next((value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.device)), None)
    out = wanted if wanted is not None else DEVICE if len(here) < len(given) else CPU
    if func.overloadpacket is torch.ops.aten.copy_:
        out = args[0].device
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if out.type != DEVICE.type:
        return result
    wrapped = tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, result)
    if len(here) == len(given) or moves:
        return args[0] if func.overloadpacket is torch.ops.aten.copy_ else wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else CPU if isinstance(value, torch.device) else value
