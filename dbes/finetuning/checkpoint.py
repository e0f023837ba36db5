"""The files of a checkpoint: which of them hold the weights, what is in them, and a copy of them with some tensors replaced."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from dbes.errors import FinetuneError, ModelError
from dbes.files import PART, refused_by_system
from dbes.models.folder import ADAPTER_CONFIG, CONFIG, INDEX, WEIGHTS, weight_files
from dbes.schema import parse_json, read_json

OTHER_COPIES = (
    "pytorch_model*.bin*", "tf_model*.h5", "flax_model*.msgpack", "model*.ckpt*", "consolidated*", "*.gguf", "*.onnx", "*.onnx_data",
    "original/*", "metal/*", "onnx/*", "checkpoint-*/*", "optimizer.*", "scheduler.pt", "rng_state*.pth", "trainer_state.json",
    "training_args.bin",
)  # fmt: skip
"""Names of the same weights in other formats, which would stay untrained, and of what an earlier training left."""

OWN = ("finetune.json", "train.jsonl", "training.safetensors", "delta.json", "delta.safetensors", "dbes/*")
"""What a run of dbes wrote into the base, when that is itself the output of one."""

TRAINABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OTHER_PLAIN = {"F64", "I64", "I32", "I16", "U64", "U32", "U16", "BOOL", "C64"}
BYTES_ONLY = {"I8", "U8"}
QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
QUANTIZED_NAMES = (
    ".qweight", ".qzeros", ".scales", ".g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale",
    ".absmax", ".quant_map", ".SCB", "_blocks", "_scales", "weight_shape", "weight_zero_point",
)  # fmt: skip
HEADER_BYTES = 100 * 2**20
BLOCK = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: dtype as the format names it, and its bytes [start, end) in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of weights.

    Attributes:
        tensors: in the files that transformers loads, by key.
        files: relative names of all files that belong to it, config.json last.
        left_out: of the weights in other formats, and other leftovers (`OTHER_COPIES`).
    """

    folder: Path
    tensors: Mapping[str, Stored]
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)

    def read(self, key: str, folder: Mapping[str, Path] | None = None) -> Tensor:
        """A tensor; ``folder`` says where else its file lies."""
        stored = self.tensors[key]
        path = folder[stored.file] if folder is not None else self.folder / stored.file
        with refused_by_system(path, doing="read", error=FinetuneError), path.open("rb") as content:
            content.seek(stored.start)
            data = bytearray(content.read(stored.end - stored.start))
        if len(data) != stored.end - stored.start:
            raise FinetuneError(f"{path}: cut short while it was read")
        flat = torch.frombuffer(data, dtype=TRAINABLE[stored.dtype]) if data else torch.empty(0, dtype=TRAINABLE[stored.dtype])
        return flat.view(stored.shape)

    def trained_dtype(self, keys: Iterable[str]) -> torch.dtype:
        """The one dtype of tensors whose rows are trained.

        Raises:
            FinetuneError: several, or not float32, bfloat16 or float16.
        """
        found = sorted({self.tensors[key].dtype for key in keys})
        if len(found) != 1 or found[0] not in TRAINABLE:
            raise FinetuneError(
                f"{self.folder}: the tensors of its experts are stored as {', '.join(found)}; expected one of "
                f"{', '.join(TRAINABLE)} for all of them: load the model in one dtype, save it, and give that folder"
            )
        return TRAINABLE[found[0]]


def local_folder(where: str, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: itself, or of the snapshot of a hub repository, complete where the hub can be reached.

    Raises:
        ModelError: the repository is neither on the hub nor in the local cache.
    """
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, revision=revision, ignore_patterns=list(OTHER_COPIES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as problem:
        first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise ModelError(f"{where}: neither a folder nor a repository that can be downloaded or is in the local cache ({first})") from None


def read_checkpoint(folder: Path, *, besides: Path | None = None) -> Checkpoint:
    """What is in a checkpoint folder.

    Args:
        besides: a folder that may lie in it and does not belong to it.

    Raises:
        FinetuneError: a file is missing, damaged or no regular file; the weights are quantized.
        ModelError: there are no weights, or their index is none.
    """
    config = read_json(folder / CONFIG, error=FinetuneError, missing=f"{folder}: no config.json here, so this is not a checkpoint folder")
    refuse_quantized(folder)
    weights = _weight_files(folder, config)
    tensors: dict[str, Stored] = {}
    for name in weights:
        for key, stored in _header(folder, name).items():
            if key in tensors:
                raise FinetuneError(f"{folder}: {key} is in both {tensors[key].file} and {name}, and only one of them can be meant")
            tensors[key] = stored
    kept, left_out = [], []
    for name in _walk(folder, besides):
        wanted = name in weights or not (_matches(name, OTHER_COPIES) or _another_copy(folder, name, weights, tensors))
        if not _matches(name, OWN):
            (kept if wanted else left_out).append(name)
    kept.sort(key=lambda name: (name == CONFIG, name))
    return Checkpoint(folder, tensors, tuple(kept), tuple(left_out))


def refuse_quantized(folder: Path) -> None:
    """Raises FinetuneError where config.json, a file beside it or the tensors say that the weights are quantized.

    A folder that is no checkpoint is left to those who load it.
    """
    if (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise FinetuneError(f"{folder}: an adapter without the model's weights; merge it into its model, save that, and give that folder")
    if not (folder / CONFIG).is_file():
        return
    config = read_json(folder / CONFIG, error=FinetuneError)
    refuse_quantized_config(str(folder), config)
    for name in QUANTIZED_FILES:
        if (folder / name).is_file():
            raise FinetuneError(_quantized(str(folder), f"{name} is beside them"))
    try:
        headers = [_header(folder, name) for name in _weight_files(folder, config)]
    except (FinetuneError, ModelError):
        return  # damaged files are named by those who load them
    for why in filter(None, map(_quantized_tensor, headers)):
        raise FinetuneError(_quantized(str(folder), why))


def refuse_quantized_config(where: str, config: Any) -> None:
    """Raises FinetuneError where the config (of a wrapper: any part of it) names a quantization."""
    for part in _parts(config):
        for key in QUANTIZED_KEYS:
            if found := part.get(key):
                method = found.get("quant_method") or found.get("quant_algo") if isinstance(found, dict) else None
                raise FinetuneError(_quantized(where, f"{key} of config.json{f' says {method}' if method else ''}"))


@contextmanager
def copied(base: Checkpoint, out: Path) -> Iterator[dict[str, Path]]:
    """Copies of all files of the base under temporary names in ``out``, which take their own names when the block ends well.

    config.json takes its name last: without it there is no checkpoint.

    Raises:
        FileError: a file cannot be written.
    """
    places: dict[str, Path] = {}
    try:
        for number, name in enumerate(base.files):
            temporary = out / f".{number}-{PurePosixPath(name).name}{PART}"
            places[name] = temporary
            with refused_by_system(out / name):
                shutil.copyfile(base.folder / name, temporary)
        yield places
        for name, temporary in places.items():
            with refused_by_system(out / name):
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(out / name)
    finally:
        for temporary in places.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def replace_tensor(base: Checkpoint, key: str, value: Tensor, places: Mapping[str, Path]) -> None:
    """Write a tensor over the one in the copy; dtype and shape are the base's."""
    stored = base.tensors[key]
    path = places[stored.file]
    with refused_by_system(path.parent / stored.file), path.open("r+b") as content:
        content.seek(stored.start)
        content.write(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def compare_files(base: Checkpoint, places: Mapping[str, Path], changed: Iterable[str]) -> dict[str, tuple[int, str]]:
    """(bytes, sha256) of every file of a copy, all of whose bytes outside the changed tensors are the base's.

    Raises:
        FinetuneError: a file differs elsewhere.
    """
    holes: dict[str, list[tuple[int, int]]] = {}
    for key in changed:
        holes.setdefault(base.tensors[key].file, []).append((base.tensors[key].start, base.tensors[key].end))
    found = {}
    for name in base.files:
        digest, size = hashlib.sha256(), (base.folder / name).stat().st_size
        path = places[name]
        with refused_by_system(path, doing="read"), path.open("rb") as ours, (base.folder / name).open("rb") as theirs:
            edges = [0, *(edge for hole in sorted(holes.get(name, ())) for edge in hole), size]
            for number, (start, end) in enumerate(pairwise(edges)):
                ours.seek(start)
                theirs.seek(start)
                for first in range(start, end, BLOCK):
                    block = ours.read(min(BLOCK, end - first))
                    digest.update(block)
                    if number % 2 == 0 and block != theirs.read(min(BLOCK, end - first)):
                        raise FinetuneError(f"{path}: differs from {base.folder / name} in what was not trained")
            if ours.read(1):
                raise FinetuneError(f"{path}: is longer than {base.folder / name}")
        found[name] = (size, digest.hexdigest())
    return found


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raises FinetuneError when the disk of a folder has no room for so many bytes in place of the weights that are there."""
    with refused_by_system(out):
        free = shutil.disk_usage(out).free + sum(path.stat().st_size for path in out.glob("*.safetensors") if path.name not in OWN)
    if free < needed:
        raise FinetuneError(
            f"{out}: the checkpoint needs {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB of this disk are free; "
            "make room, choose another --out folder, or keep the trained experts alone (--save delta)"
        )


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from _parts(value)


def _quantized(where: str, why: str) -> str:
    return (
        f"{where}: its weights are quantized ({why}), and experts can only be trained and written in float32, bfloat16 or float16; "
        "give the original model, or load it dequantized, save it in bfloat16 and give that folder"
    )


def _quantized_tensor(tensors: Mapping[str, Stored]) -> str | None:
    for key, stored in tensors.items():
        plain = stored.dtype in TRAINABLE or stored.dtype in OTHER_PLAIN or (stored.dtype in BYTES_ONLY and len(stored.shape) < 2)
        if not plain or key.endswith(QUANTIZED_NAMES):
            return f"{key} is stored as {stored.dtype}"
    return None


def _weight_files(folder: Path, config: Any) -> tuple[str, ...]:
    """Names of the safetensors files that are loaded."""
    if isinstance(config, dict) and config.get("transformers_weights"):
        raise FinetuneError(f"{folder / CONFIG}: transformers_weights names other files than {WEIGHTS}, which dbes does not write to")
    return tuple(path.name for path in weight_files(folder))


def _header(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of a safetensors file, whose sizes are checked against it."""
    path = folder / name
    if not path.is_file():
        raise FinetuneError(f"{path}: this part of the weights is missing, or no regular file; copy it again")
    with refused_by_system(path, doing="read", error=FinetuneError), path.open("rb") as content:
        size = os.fstat(content.fileno()).st_size
        start = content.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise FinetuneError(f"{path}: corrupt or truncated safetensors; copy or download it again")
        header = parse_json(content.read(length), where=path, error=FinetuneError)
    found = {}
    for key, facts in header.items() if isinstance(header, dict) else ():
        if key == "__metadata__":
            continue
        try:
            shape, (first, last) = tuple(map(int, facts["shape"])), map(int, facts["data_offsets"])
            stored = Stored(name, str(facts["dtype"]), shape, 8 + length + first, 8 + length + last)
        except (TypeError, ValueError, KeyError):
            raise FinetuneError(f"{path}: corrupt safetensors ({key}); copy or download it again") from None
        width = TRAINABLE[stored.dtype].itemsize if stored.dtype in TRAINABLE else None
        if not 0 <= first <= last <= size - 8 - length or (width and last - first != prod(shape) * width):
            raise FinetuneError(f"{path}: corrupt or truncated safetensors ({key}); copy or download it again")
        found[key] = stored
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _another_copy(folder: Path, name: str, weights: tuple[str, ...], tensors: Mapping[str, Stored]) -> bool:
    """Whether a file that is not loaded holds, or lists, the same tensors as those that are."""
    if name.endswith(".index.json"):
        index = read_json(folder / name, error=FinetuneError)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        return isinstance(shards, dict) and not set(map(str, shards.values())) <= set(weights)
    if name.endswith(".safetensors"):
        with suppress(FinetuneError):
            return not tensors.keys().isdisjoint(_header(folder, name))
    return False


def _walk(folder: Path, besides: Path | None) -> list[str]:
    """Relative names of the regular files below a folder (links count as what they lead to), hidden ones left out.

    Raises:
        FinetuneError: a link that leads nowhere, a pipe or a device.
    """
    found: list[str] = []
    left, seen = [folder], set()
    while left:
        here = left.pop()
        seen.add(here.resolve())
        with refused_by_system(here, doing="read", error=FinetuneError):
            inside = sorted(here.iterdir())
        for path in inside:
            if path.name.startswith(".") or path.name == "__pycache__":
                continue
            if path.is_dir():
                if path.resolve() not in seen and (besides is None or path.resolve() != besides.resolve()):
                    left.append(path)
            elif path.is_file():
                found.append(path.relative_to(folder).as_posix())
            else:
                raise FinetuneError(f"{path}: a link that leads nowhere, a pipe or a device, which cannot be copied")
    return sorted(found)
