"""Fingerprints: what tells one checkpoint, one model in memory, one tokenizer from another. Every byte of the weights counts."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dbes.errors import DbesError, ModelError
from dbes.files import refused_by_system, sha256_of, write_json
from dbes.models.folder import ADAPTER_CONFIG, CONFIG
from dbes.schema import read_json

WHOLE_FILE = 64 * 2**20
"""Files up to this many bytes are read again each time; the digests of larger ones are kept."""

SETTLED = 2.0
"""Seconds since the last change before a digest is kept: within the clock of a file system a file can change unseen."""


def folder_fingerprint(folder: Path) -> str:
    """``sha256:`` over everything in a folder that can change its routing: config.json, weights, adapter, Python code.

    All bytes are read. Digests of files above 64 MiB are kept in the user's cache (``$XDG_CACHE_HOME/dbes``, by default
    ``~/.cache/dbes``) and used again while path, size, inode and times of the file are the same.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    settings = [path for path in (folder / CONFIG, folder / ADAPTER_CONFIG) if path.is_file()]
    for path in [*settings, *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.py"))]:
        if not path.is_file():
            raise ModelError(f"{path}: expected a file, this is a folder, pipe or device")
        with refused_by_system(path, doing="read", error=ModelError):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(path.read_bytes() if size <= WHOLE_FILE else _file_digest(path).encode())
    return f"sha256:{digest.hexdigest()}"


def joined(*revisions: str) -> str:
    """One revision of several, in this order (an adapter and its base)."""
    return f"sha256:{hashlib.sha256(chr(0).join(revisions).encode()).hexdigest()}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what turns text into ids: the whole Rust tokenizer, or class and vocabulary of a Python one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """``sha256:`` over the config, the adapters' settings, and every byte of the weights and buffers of a model in memory.

    Raises:
        ModelError: weights that are kept elsewhere cannot be read.
    """
    about = [model.config.to_dict(), {name: _plain(config) for name, config in (getattr(model, "peft_config", None) or {}).items()}]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's own extra state
            digest.update(f"{name}\0{tensor!r}".encode())
            continue
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        whole = _offloaded(model, name) if tensor.is_meta else tensor
        for part in _parts(whole.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of one; several where a quantization library keeps numbers and scales in a subclass."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
        yield from _parts(getattr(tensor, name))


def _plain(config: Any) -> Any:
    return config.to_dict() if hasattr(config, "to_dict") else str(config)


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A tensor that accelerate keeps in memory or on disk while its module does not run."""
    path, _, own = name.rpartition(".")
    hooks: list[Any] = [getattr(model.get_submodule(path), "_hf_hook", None)]
    for hook in hooks:
        hooks.extend(getattr(hook, "hooks", ()))
        if getattr(hook, "weights_map", None) is not None:
            with suppress(KeyError):
                return torch.as_tensor(hook.weights_map[own])
    raise ModelError(f"{name}: on the meta device, with no weights kept elsewhere; give a model whose weights are loaded")


def _file_digest(path: Path) -> str:
    """sha256 of a file, from the cache where the file is the same as then."""
    where = _cache() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    before = _facts(path)
    with suppress(DbesError):
        kept = read_json(where, error=DbesError, most=4096)
        if isinstance(kept, dict) and kept.get("file") == before and isinstance(kept.get("sha256"), str) and len(kept["sha256"]) == 64:
            return kept["sha256"]
    digest = sha256_of(path)
    if _facts(path) != before:
        raise ModelError(f"{path}: changed while it was read; wait until it is written")
    status = path.stat()
    if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED:
        with suppress(DbesError):  # a cache that cannot be written costs time only
            write_json(where, {"file": before, "sha256": digest})
    return digest


def _facts(path: Path) -> list[str]:
    status = path.stat()
    return [str(number) for number in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)]


def _cache() -> Path:
    """The user's folder for kept digests; a relative XDG_CACHE_HOME is to be ignored, as its specification says."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # no home
        return (Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache") / "dbes" / "digests"
    return Path(".cache") / "dbes" / "digests"
