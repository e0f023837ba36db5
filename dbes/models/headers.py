"""The headers of a checkpoint's files, wherever it lies: in a folder, in the cache of the hub, or on the hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache

from dbes.errors import ModelError
from dbes.models.explained import explained
from dbes.models.folder import INDEX, WEIGHTS, StoredTensor, find_folder, read_tensors


def stored_tensors(where: str, *, revision: str | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, from the headers of its files; of a repository on the hub only these are downloaded.

    Raises:
        ModelError: there are no safetensors, they are damaged, or the hub cannot be reached.
    """
    folder = find_folder(where)
    if folder is not None:
        return read_tensors(folder)
    for name in (INDEX, WEIGHTS):
        cached = try_to_load_from_cache(where, name, revision=revision)
        if isinstance(cached, str):
            with suppress(ModelError):  # only part of it may be in the cache
                return read_tensors(Path(cached).parent)
    with explained(where, part="headers of its weights"):
        files = get_safetensors_metadata(where, revision=revision).files_metadata
    found = {name: StoredTensor(str(info.dtype), tuple(info.shape)) for file in files.values() for name, info in file.tensors.items()}
    if not found:
        raise ModelError(f"{where}: no safetensors on the hub; dbes reads safetensors only")
    return found
