"""Where the elements of a loaded model's parameters lie in the files of its checkpoint.

transformers renames, fuses, splits and transposes tensors as it loads them: it moves elements and computes nothing. The same
rules are applied here to the elements' own numbers, so that what comes out says for each element of a parameter which element of
which tensor on disk it was. Rows can then be read from the files and written back to them whatever the family's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from dbes.errors import FinetuneError

CHUNK = 2**22


@dataclass(eq=False)
class _Group:
    """Tensors on disk that become one parameter, or several.

    Attributes:
        first: the parameter by whose name transformers keeps the group.
        converter: how the tensors become parameters; None where the tensor is the parameter.
        sources: keys on disk by pattern of the converter, in the order in which they are put together.
    """

    first: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]


@dataclass(frozen=True, eq=False)
class Places:
    """Where the elements of some rows of a parameter lie on disk.

    Attributes:
        keys: the tensors on disk; starts: their first elements in all of them, one after the other, int64 [keys].
        elements: int64, of the rows' shape: the place of each element in all of them.
    """

    keys: Sequence[str]
    starts: Tensor
    elements: Tensor

    def by_key(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(key, elements of the flat rows, elements of the flat tensor), for every tensor that holds some of the rows."""
        flat = self.elements.flatten()
        owners = torch.searchsorted(self.starts, flat, right=True) - 1
        for owner in owners.unique():
            rows, index = (owners == owner).nonzero().flatten(), int(owner)
            yield self.keys[index], rows, flat[rows] - self.starts[index]


class Layout:
    """The tensors on disk behind every parameter of a model.

    Args:
        model: of the class that loads these files; its weights may be on the meta device.
        shapes: of all tensors in the files, by key.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> None:
        self._model, self._shapes = model, shapes
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._parameters: dict[str, Any] = model.state_dict()
        names, prefix = self._parameters, model.base_model_prefix
        groups: dict[str, _Group] = {}
        # order and both attempts are those of transformers.core_model_loading.convert_and_load_state_dict_in_model
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if name not in names and key in names:
                name, pattern = rename_source_key(key, [], [], prefix, names)
            if name in names:
                group = groups.setdefault(name, _Group(name, by_pattern[pattern] if pattern is not None else None))
                group.sources.setdefault(pattern or key, []).append(key)
        self._groups = {name: group for group in groups.values() for name in _targets(group)}

    def keys(self, name: str) -> list[str]:
        """The tensors on disk that become this parameter (and perhaps others beside it).

        Raises:
            FinetuneError: there are none, or the parameter is there more than once.
        """
        group = self._groups.get(name)
        if group is None:
            raise FinetuneError(f"{name}: no tensor in the checkpoint's files becomes this parameter, so it could not be saved")
        if group.converter is None and len(group.keys) > 1:
            raise FinetuneError(f"{name}: the checkpoint's files hold this parameter more than once ({', '.join(group.keys[:3])})")
        return group.keys

    def places(self, name: str, cuts: Sequence[Callable[[Tensor], Tensor]]) -> list[Places]:
        """Where the rows lie that each cut takes from a parameter.

        The numbers of the elements go through the conversion byte by byte, so that it takes no more memory than one-byte weights.

        Raises:
            FinetuneError: see `keys`; the files' tensors do not give a parameter of this shape.
        """
        keys, group = self.keys(name), self._groups[name]
        sizes = [prod(self._shapes[key]) for key in keys]
        starts = [0, *accumulate(sizes)]
        found: list[Tensor] = []
        for byte in range(max(1, (starts[-1].bit_length() + 7) // 8)):
            numbers = {key: _numbers(start, self._shapes[key], byte) for key, start in zip(keys, starts, strict=False)}
            made = self._converted(group, numbers).get(name)
            if made is None or made.shape != self._parameters[name].shape:
                shape = None if made is None else tuple(made.shape)
                raise FinetuneError(
                    f"{name}: the checkpoint's files give it the shape {shape}, the model has {tuple(self._parameters[name].shape)}"
                )
            parts = [cut(made).long() << 8 * byte for cut in cuts]
            found = [one + other for one, other in zip(found, parts, strict=True)] if found else parts
        return [Places(keys, torch.tensor(starts[:-1]), elements) for elements in found]

    def _converted(self, group: _Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {group.first: tensors[group.keys[0]]}
        converter: Any = deepcopy(group.converter)
        for pattern, keys in group.sources.items():
            for key in keys:
                converter.add_tensor(group.first, key, pattern, tensors.pop(key))
        try:
            made = converter.convert(group.first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as problem:
            raise FinetuneError(f"{group.first}: its tensors in the checkpoint's files cannot be put together ({problem})") from problem
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _numbers(start: int, shape: Sequence[int], byte: int) -> Tensor:
    """One byte of start, start + 1, ... in a tensor of this shape."""
    found = torch.empty(prod(shape), dtype=torch.uint8)
    for first in range(0, len(found), CHUNK):
        part = found[first : first + CHUNK]
        part.copy_((torch.arange(start + first, start + first + len(part)) >> 8 * byte) & 255)
    return found.view(tuple(shape))


def _targets(group: _Group) -> list[str]:
    if group.converter is None:
        return [group.first]
    head = group.converter.target_patterns[0]
    return [group.first.replace(head, pattern) for pattern in group.converter.target_patterns]
