"""What can be said of a checkpoint folder before anything is loaded: its files, its index, the names in its weights."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open

from dbes.errors import ModelError
from dbes.files import refused_by_system
from dbes.models.explained import needs_code
from dbes.schema import read_json
from dbes.text import clipped

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "tokenization_*.py")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
EIGHT_BITS = re.compile(r"F8_|F4|F6_")
"""Names that safetensors gives to floats of 8 bits and fewer."""

WHOLE = re.compile(r"[IU]\d+")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it; dtype by safetensors' names (``F32``, ``BF16``, ``F8_E4M3``, ``U8``)."""

    dtype: str
    shape: tuple[int, ...]


def find_folder(model: str | Path) -> Path | None:
    """The folder that is meant, or None when it can only be a hub id.

    Raises:
        ModelError: a file, or a path where nothing is.
    """
    path = Path(model)
    with refused_by_system(path, doing="read", error=ModelError):
        if path.is_dir():
            return path
        if path.exists():
            raise ModelError(f"{path}: {_instead_of(path)}")
    where = str(model)
    local = where.startswith((".", "/", "~")) or where.count("/") > 1 or path.suffix in (".gguf", ".safetensors", ".json")
    if local or isinstance(model, Path):
        raise ModelError(f"{where}: no such folder; give a checkpoint folder or a hub id (organization/name)")
    return None


def _instead_of(path: Path) -> str:
    if path.suffix == ".gguf":
        return (
            "a GGUF file; dbes reads routing in transformers, from safetensors: give the folder or the hub id of the checkpoint "
            "that it was converted from"
        )
    if path.suffix in PICKLES:
        return "a pickle, which is not loaded; convert it to safetensors and give the folder with its config.json"
    return f"expected a folder, this is a file; give the folder that holds the checkpoint ({path.parent})"


def has_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_WEIGHTS).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as an object.

    Raises:
        ModelError: there is none, or it is not one.
    """
    hint = ""
    if any(folder.glob("*.gguf")):
        hint = "; a GGUF file is not read: give the checkpoint that it was converted from"
    missing = f"{folder}: no config.json here, so this is not a checkpoint folder{hint}"
    content = read_json(folder / CONFIG, error=ModelError, missing=missing)
    if not isinstance(content, dict):
        raise ModelError(f"{folder / CONFIG}: expected a JSON object, found {type(content).__name__}")
    kind = content.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ModelError(f"{folder / CONFIG}: model_type {clipped(kind)}, expected a name such as olmoe")
    return content


def check_folder(folder: Path, *, trust_remote_code: bool, tokenizer: bool = True) -> None:
    """Everything about a folder that can be found wrong without loading it.

    Args:
        tokenizer: whether there must be one.

    Raises:
        ModelError: no or unusable config, index, weights or tokenizer; a part is missing, corrupt or truncated.
    """
    with refused_by_system(folder, doing="read", error=ModelError):
        for path in sorted(folder.iterdir()):
            mode = path.stat().st_mode if path.exists() else 0
            if mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ModelError(f"{path}: expected a file, this is a pipe, socket or device")
    check_code(folder, read_config(folder), trust_remote_code=trust_remote_code)
    read_tensors(folder)
    if tokenizer and not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise ModelError(f"{folder}: no tokenizer here (expected tokenizer.json or a vocabulary); save the model's tokenizer here")


def check_code(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    kind = config.get("model_type")
    if kind in transformers.CONFIG_MAPPING or trust_remote_code:
        return
    if "auto_map" in config:
        raise ModelError(needs_code(str(folder)))
    raise ModelError(
        f"{folder / CONFIG}: transformers {transformers.__version__} does not know this architecture "
        f"({'no model_type' if kind is None else f'model_type {clipped(kind)}'}); is it a config.json of transformers, or of a newer one?"
    )


def refuse_contradictions(where: str, content: Mapping[str, Any], config: Any) -> None:
    """One setting under two names (``num_experts``, ``num_local_experts``) with two values, of which transformers takes one.

    Args:
        content: config.json.
        config: what transformers made of it.

    Raises:
        ModelError: names both.
    """
    for alias, name in (getattr(config, "attribute_map", None) or {}).items():
        if alias in content and name in content and content[alias] != content[name]:
            raise ModelError(
                f"{where}: config.json says {alias} {clipped(content[alias])} and {name} {clipped(content[name])}, which are one setting; "
                "correct the one that is wrong"
            )
    for name, part in content.items():
        if isinstance(part, dict) and name.endswith("_config"):
            refuse_contradictions(where, part, getattr(config, name, None))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that transformers will read, by the rules it has: model.safetensors, else the files of the index.

    Raises:
        ModelError: there are none; the index is no index, or names files outside the folder or missing ones.
    """
    named = _index_files(folder) if (folder / INDEX).exists() else ()
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    if not named:
        raise ModelError(f"{folder}: {_without_weights(folder)}")
    return named


def _index_files(folder: Path) -> tuple[Path, ...]:
    content = read_json(folder / INDEX, error=ModelError)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{folder / INDEX}: expected a weight_map from tensors to files, found {_kind(content)}; copy it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name or PurePosixPath(name).name != name or "\\" in name or name in (".", ".."):
            raise ModelError(
                f"{folder / INDEX}: {clipped(tensor)} is said to be in {clipped(name)}, expected the name of a file of this folder"
            )
        if not name.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX}: {clipped(name)} is not a safetensors file; dbes reads safetensors only")
    files = tuple(folder / name for name in sorted(set(names.values())))
    for path in files:
        if not path.exists():
            raise ModelError(f"{path}: this part of the weights is missing ({INDEX} names it); copy it again")
    return files


def _kind(content: Any) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return "none" if "weight_map" not in content else "an empty one" if content["weight_map"] == {} else clipped(content["weight_map"])


def _without_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
    if found:
        many = f", {found[0]} and {len(found) - 1} more" if len(found) > 1 else f", {found[0]}"
        return f"neither {WEIGHTS} nor {INDEX} here{many}; the index is missing, or this is a layout that transformers does not read"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (*PICKLES, ".gguf"))
    if not others:
        return "no *.safetensors here, so the folder has no weights"
    what = "is a GGUF file" if others[0].endswith(".gguf") else "is a pickle"
    return f"no *.safetensors here, so the folder has no weights; {others[0]} {what} and is not loaded: convert it to safetensors"


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the files that transformers will read, from their headers; the numbers themselves are not read.

    Raises:
        ModelError: as `weight_files`; a file is corrupt or truncated, two files hold one tensor, a tensor lacks its scale, an expert
            is missing between others.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise ModelError(f"{path}: expected a safetensors file, this is a folder, pipe or device")
        try:
            with safe_open(path, "pt") as content:
                for name in content.keys():  # noqa: SIM118 (no mapping)
                    if name in tensors:
                        raise ModelError(f"{path}: holds {clipped(name)}, as another file here does; copy the weights again")
                    cut = content.get_slice(name)
                    tensors[name] = StoredTensor(str(cut.get_dtype()), tuple(cut.get_shape()))
        except (SafetensorError, OSError, ValueError) as problem:
            said = clipped(" ".join(str(problem).split()), 200)
            raise ModelError(f"{path}: corrupt or truncated safetensors ({said}); copy or download it again") from None
    if not tensors:
        raise ModelError(f"{folder}: the safetensors here hold no tensors; copy or download them again")
    _refuse_lost_scales(folder, tensors)
    _refuse_lost_experts(folder, tensors)
    _refuse_twice(folder, tensors)
    return tensors


def unread_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors that are no part of what is loaded (the original layout beside the converted one, left-over shards)."""
    read = {path.name for path in weight_files(folder)}
    return tuple(sorted(path.name for path in folder.glob("*.safetensors") if path.name not in read | {ADAPTER_WEIGHTS}))


def _refuse_lost_scales(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Floats of 8 bits mean nothing without the scale they were divided by; transformers loads them as they are."""
    owners = set()
    for name in tensors:
        prefix, found, _ = name.rpartition("scale")
        if found:
            owners.add(prefix.rstrip("._").removesuffix("weight").rstrip("._"))
    narrow = [name for name, tensor in tensors.items() if EIGHT_BITS.match(tensor.dtype) and "scale" not in name.rpartition(".")[2]]
    lost = [name for name in narrow if name.removesuffix(".weight") not in owners]
    if lost:
        raise ModelError(
            f"{folder}: {listed(lost)} {tensors[lost[0]].dtype} without a scale, so their true values are unknown; "
            "the checkpoint is incomplete: download it again, or give one in bfloat16"
        )


def _refuse_lost_experts(folder: Path, tensors: Iterable[str]) -> None:
    """Experts that are stored one by one are stacked in order: with one missing, all after it would get another's number."""
    seen: dict[str, set[int]] = {}
    for name in tensors:
        if found := re.match(r"(.*\.experts)\.(\d+)\.(.*)", name):
            seen.setdefault(f"{found[1]}.*.{found[3]}", set()).add(int(found[2]))
    for pattern, numbers in seen.items():
        if lost := sorted(set(range(max(numbers) + 1)) - numbers):
            raise ModelError(
                f"{folder}: {clipped(pattern, 120)} is there for {len(numbers)} experts up to number {max(numbers)}, but not for "
                f"{', '.join(map(str, lost[:5]))}{', ...' if len(lost) > 5 else ''}; the checkpoint is incomplete: download it again"
            )


def _refuse_twice(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Two tensors for one place in the model: with and without the prefix ``model.``, or an expert by itself and in a stack of all."""
    twice = [f"{name} and model.{name}" for name in tensors if f"model.{name}" in tensors]
    alone = {found[1] for name in tensors if (found := re.match(r"(.*\.experts)\.\d+\.", name))}
    for name, tensor in tensors.items():
        block, _, own = name.rpartition(".experts.")
        if len(tensor.shape) == 3 and not own[:1].isdigit() and f"{block}.experts" in alone:
            twice.append(f"{block}.experts.0... and {name}")
    if twice:
        raise ModelError(f"{folder}: {clipped(twice[0], 200)} are both in the weights, for one place in the model; copy the weights again")


def listed(names: Iterable[str], most: int = 3) -> str:
    """``a, b and 7 more tensors are`` ... of a list of names, for a message."""
    ordered = list(names)
    shown = ", ".join(clipped(name, 120) for name in ordered[:most])
    return f"{shown}{f' and {len(ordered) - most} more tensors' if len(ordered) > most else ''} {'is' if len(ordered) == 1 else 'are'}"
