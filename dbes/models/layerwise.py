"""A model whose decoder layers stay on disk: one is read and filled when it is to run, and given back afterwards.

All else (embeddings, norms, rotary tables) is loaded as ever; the language-model head and the parts for images and sound are not read.
Transformers itself builds, renames, merges and dequantizes, through the same functions that load a whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, convert_and_load_state_dict_in_model, rename_source_key
from transformers.utils import logging

from dbes.errors import ModelError
from dbes.files import refused_by_system
from dbes.models.sites import SENSES, RoutingSite, find_sites

STREAMED = ("fp8", "mxfp4")
"""Quantization methods whose weights are dequantized layer by layer."""


ALIGNMENT = 64
"""Bytes that kernels load at once."""


class Layerwise:
    """Decoder layers of one checkpoint, to be filled and given back one at a time.

    Attributes:
        layers: the decoder layers, in the order in which they run.
        depth: how many of them run; what follows the last router is never read.
        resident: bytes of what stays in memory.
        largest: bytes of the largest layer in memory.
        stored: bytes of each layer's tensors on disk.
        bytes_read: of tensors, since the checkpoint was opened.
        bytes_skipped: of the last layer's experts, which nothing needs once its router has decided.
    """

    def __init__(self, model: PreTrainedModel, files: Sequence[str], load_config: Any) -> None:
        self.model, self.load_config = model, load_config
        self.tensors = {name: tensor for path in files for name, tensor in _stored(Path(path))}
        self._facts = {path: _facts(path) for path in {tensor.path for tensor in self.tensors.values()}}
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self.bytes_read = self.bytes_skipped = 0
        sites = find_sites(model)
        self.path = _list_of(model, sites)
        self.layers: Any = model.get_submodule(self.path)
        self.depth = sites[-1].layer + 1

        self.report = self._tried()
        self.names: list[list[str]] = [[] for _ in self.layers]
        self._unneeded, self._unneeded_bytes = _last_experts(model, sites[-1]), 0
        outside = []
        skipped = _head(model)
        for name, target in self._targets().items():
            layer = _layer_of(target, self.path)
            if self._unneeded is not None and target.startswith(self._unneeded):
                self._unneeded_bytes += self.tensors[name].empty.nbytes
            elif layer is not None:
                self.names[layer].append(name)
            elif not target.startswith(skipped) and not SENSES.search(target):
                outside.append(name)
        self.stored = [sum(self.tensors[name].empty.nbytes for name in names) for names in self.names]
        self._fill(self._read(outside))
        self._empty: list[dict[str, Tensor]] = []
        self.resident = self.largest = 0

    def settle(self) -> None:
        """Remember what of each layer lies on disk; to be called once transformers has built what no file holds."""
        for layer in self.layers:
            held = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
            self._empty.append({name: tensor for name, tensor in held if tensor.is_meta})
        inner = {id(tensor) for empty in self._empty for tensor in empty.values()}
        whole = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers()) if id(tensor) not in inner}
        self.resident = sum(tensor.nbytes for tensor in whole.values() if not tensor.is_meta)
        self.largest = max(sum(tensor.nbytes for tensor in empty.values()) for empty in self._empty[: self.depth])

    def load(self, index: int) -> None:
        """Fill one layer.

        Raises:
            ModelError: a file cannot be read, or is another than before; a tensor of the layer does not lie in it.
        """
        ahead, self._ahead = self._ahead, None
        tensors = ahead[1].result() if ahead is not None and ahead[0] == index else self._read(self.names[index])
        self._fill(tensors)
        layer = self.layers[index]
        unneeded = self._unneeded if index == self.depth - 1 else None
        if unneeded is not None:
            self.bytes_skipped += self._unneeded_bytes
        held = chain(layer.named_parameters(f"{self.path}.{index}"), layer.named_buffers(f"{self.path}.{index}"))
        if empty := [name for name, tensor in held if tensor.is_meta and not (unneeded and name.startswith(unneeded))]:
            raise ModelError(
                f"{type(self.model).__name__}: {empty[0]} is not stored with its layer, so layers cannot be read one "
                "by one; use the memory engine"
            )

    def prefetch(self, index: int) -> None:
        """Begin to read one layer, beside whatever else runs."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "dbes-reader")
        self._ahead = index, self._reader.submit(self._read, self.names[index])

    def free(self, index: int) -> None:
        """Give the memory of one layer back."""
        layer = self.layers[index]
        for name, tensor in self._empty[index].items():
            path, _, own = name.rpartition(".")
            module = layer.get_submodule(path)
            (module._buffers if own in module._buffers else module._parameters)[own] = tensor

    def stop(self) -> None:
        """End the reading ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].cancel()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors, in one piece of memory: it goes back to the system as a whole, which many small pieces do not."""
        tensors, place = {}, 0
        room = torch.empty(sum(self.tensors[name].room for name in names) + ALIGNMENT, dtype=torch.uint8)
        for name in names:
            stored = self.tensors[name]
            if _facts(stored.path) != self._facts[stored.path]:
                raise ModelError(f"{stored.path}: changed since the checkpoint was opened; start again once it is as it should be")
            with refused_by_system(stored.path, doing="read", error=ModelError):
                tensors[name] = stored.read(room[place : place + stored.room + ALIGNMENT])
            place += stored.room
            self.bytes_read += stored.empty.nbytes
        return tensors

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self.load_config)
        for name, problem in sorted(info.conversion_errors.items()):
            said = " ".join(problem.split())[-200:]
            raise ModelError(f"{type(self.model).__name__}: {name} cannot be put together from the weights ({said})")

    def _tried(self) -> Any:
        """What a load of all tensors finds missing, left over, or of another shape: tried on tensors that hold no numbers."""
        empty = {name: tensor.empty for name, tensor in self.tensors.items()}
        mapping = deepcopy(self.load_config.weight_mapping or [])
        for entry in mapping:
            if isinstance(entry, WeightConverter):
                entry.force_cpu = False
        config = replace(self.load_config, device_map={"": "meta"}, weight_mapping=mapping)
        with _quiet():
            return convert_and_load_state_dict_in_model(self.model, empty, config)[0]

    def _targets(self) -> dict[str, str]:
        """Where in the model each tensor of the files goes; those without a place are left out."""
        mapping = self.load_config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        found = {}
        for name in sorted(self.tensors):
            target, _ = rename_source_key(name, renamings, converters, prefix, own)
            if target not in own and name in own:
                target, _ = rename_source_key(name, [], [], prefix, own)
            if target in own:
                found[name] = target
        return found


@contextmanager
def layers_on_disk() -> Iterator[list[Layerwise]]:
    """Inside the block ``from_pretrained`` leaves decoder layers on disk; the list then holds what reads them."""
    found: list[Layerwise] = []
    plain = PreTrainedModel.__dict__["_load_pretrained_model"]

    def load(model: Any, _: Any, files: Any, load_config: Any, expected_keys: Any = None) -> tuple[Any, None]:  # noqa: ARG001
        found.append(Layerwise(model, files, load_config))
        return found[-1].report, None

    PreTrainedModel._load_pretrained_model = staticmethod(load)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
        for layerwise in found:
            layerwise.settle()
    finally:
        PreTrainedModel._load_pretrained_model = plain


@dataclass(frozen=True, eq=False)
class _Stored:
    """Where the bytes of a tensor lie in a file; ``empty`` has its dtype and shape."""

    path: Path
    start: int
    empty: Tensor

    @property
    def room(self) -> int:
        """Bytes of memory that it takes, a multiple of ALIGNMENT, wherever in a vector it begins."""
        return -(-self.empty.nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT

    def read(self, room: Tensor) -> Tensor:
        """The tensor, somewhere in these bytes (``room`` of them and ALIGNMENT), aligned as in a memory-mapped file.

        Kernels take other ways where vectors are aligned otherwise, and round otherwise: thus they give what they give for a model that
        transformers has mapped into memory.
        """
        shift = self.start % ALIGNMENT + -room.data_ptr() % ALIGNMENT
        held = room[shift : shift + self.empty.nbytes]
        content = memoryview(cast(Any, held.numpy()))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while len(content):
                count = file.readinto(content)
                if not count:
                    raise ModelError(f"{self.path}: truncated; copy or download it again")
                content = content[count:]
        if shift % max(1, self.empty.itemsize):
            held = held.clone()
        return held.view(self.empty.dtype).reshape(self.empty.shape)


def _stored(path: Path) -> Iterator[tuple[str, _Stored]]:
    """The tensors of a safetensors file, which was checked before (`dbes.models.folder.read_tensors`)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    with safe_open(path, framework="pt", backend="pread") as content:
        for name in content.keys():  # noqa: SIM118 (no mapping)
            cut = content.get_slice(name)
            shape = cut.get_shape()
            empty = torch.empty(shape, dtype=(cut[:0] if shape else cut[...]).dtype, device="meta")
            yield name, _Stored(path, 8 + size + header[name]["data_offsets"][0], empty)


def _facts(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as problem:
        raise ModelError(f"{path}: cannot be read any more ({problem.strerror or problem})") from None
    return status.st_size, status.st_mtime_ns


def _list_of(model: nn.Module, sites: Sequence[RoutingSite]) -> str:
    """Path of the list that holds the decoder layers."""
    found = set()
    for site in sites:
        parts = site.name.split(".")
        for position, part in enumerate(parts):
            if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:position])), nn.ModuleList):
                found.add(".".join(parts[:position]))
                break
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: its MoE layers lie in {' and '.join(sorted(found))}, not in one list of decoder layers, so they "
            "cannot be read one by one; use the memory engine"
        )
    return found.pop()


def _last_experts(model: nn.Module, site: RoutingSite) -> str | None:
    """Path of the experts of the last MoE layer, where its forward can be ended before they run."""
    if site.adapter != "experts" or (site.router is not None and any(site.router is module for module in site.experts.modules())):
        return None
    return next(f"{name}." for name, module in model.named_modules() if module is site.experts)


def _layer_of(target: str, path: str) -> int | None:
    found = re.match(rf"{re.escape(path)}\.(\d+)\.", target)
    return int(found[1]) if found else None


def _head(model: PreTrainedModel) -> tuple[str, ...]:
    """Path of the language-model head, which no routing needs."""
    head: Any = None
    with suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
    return tuple(f"{name}." for name, module in model.named_modules() if head is not None and module is head)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers: one per layer would be many."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
