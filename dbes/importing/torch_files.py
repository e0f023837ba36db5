"""Files of torch (.pt), read without unpickling anything but plain values and tensors."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from dbes.errors import SourceError, out_of_memory
from dbes.files import regular
from dbes.importing.types import Source
from dbes.text import clipped

DEEP = 16
REFUSED = (
    "it cannot be read without running code that it holds (torch.load with weights_only). Where you trust it, load it in Python, put plain "
    "tensors, numbers and lists into a dict, and torch.save that; or write the counts as CSV `layer,expert,count`"
)


def read_torch(source: Source) -> Any:
    """What a .pt file holds, tensors as numpy arrays.

    Raises:
        SourceError: it is damaged, or no file of torch, or holds anything else than tensors and plain values.
    """
    import torch

    regular(source.path, error=SourceError)
    try:
        try:
            content = torch.load(source.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as problem:
            if "mmap" not in str(problem):
                raise
            content = torch.load(source.path, map_location="cpu", weights_only=True)  # the format of before torch 1.6
    except pickle.UnpicklingError:
        raise SourceError(f"{source}: {REFUSED}") from None
    except Exception as problem:  # torch raises what its C++ and the damaged bytes happen to raise
        if out_of_memory(problem) is not None and isinstance(problem, MemoryError):
            raise
        raise SourceError(f"{source}: not a readable file of torch, or cut short ({clipped(str(problem), 200)})") from None
    return _plain(content, str(source), 0)


def _plain(value: Any, where: str, depth: int) -> Any:
    import torch

    if depth > DEEP:
        raise SourceError(f"{where}: nested more than {DEEP} deep")
    if isinstance(value, torch.Tensor):
        return _array(value, where)
    if isinstance(value, dict):
        return {key: _plain(each, f"{where}, {clipped(str(key), 60)}", depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        if all(isinstance(each, int | float) for each in value):
            return list(value)
        return [_plain(each, f"{where}[{number}]", depth + 1) for number, each in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise SourceError(f"{where}: a {type(value).__name__}, expected tensors, numbers, texts, lists and dicts of these")


def _array(tensor: Any, where: str) -> np.ndarray:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.dtype.is_complex:
        raise SourceError(f"{where}: a tensor of layout {tensor.layout} and {tensor.dtype}, expected a plain one")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise SourceError(f"{where}: shape {clipped(tuple(tensor.shape))} is more than the file holds")
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.detach().numpy()
