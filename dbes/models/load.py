"""Load a checkpoint for recording, or say plainly why it cannot be loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import Mxfp4Config

from dbes.errors import ModelError
from dbes.models.adapters import Adapter, find_adapter, inner_model, merge_adapter
from dbes.models.classes import choose_class
from dbes.models.execution import input_device
from dbes.models.explained import explained
from dbes.models.fitting import TooLargeError, choose_dtype, notes
from dbes.models.folder import (
    ADAPTER_CONFIG,
    CONFIG,
    check_code,
    check_folder,
    find_folder,
    read_config,
    read_tensors,
    refuse_contradictions,
    unread_files,
)
from dbes.models.headers import stored_tensors
from dbes.models.identity import folder_fingerprint, joined, model_fingerprint, tokenizer_fingerprint
from dbes.models.layerwise import STREAMED, Layerwise, layers_on_disk
from dbes.models.leftovers import account, refuse_unfit, watched_loading
from dbes.models.needs import measure, quantization_of, skeleton_of, stays_quantized, stored_as
from dbes.shipped import located
from dbes.text import clipped

NOT_A_FOLDER = "no-adapter-here"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to record, and what identifies it.

    Attributes:
        name: hub id, name of the folder, or class of a model built in memory.
        revision: commit of the hub repository, or ``sha256:...`` of a folder's config and weights (`folder_fingerprint`),
            or of the weights of a model in memory.
        tokenizer_sha256: of everything that turns text into ids.
        dtype, attention, experts_implementation, device: how it computes; all of them can flip close choices.
        notes: what a reader of the result should know: tensors of the checkpoint that were not loaded, an adapter that was merged.
        quantization: how the weights are stored, where that is not their dtype (method and block size).
        layerwise: reads the decoder layers, where these were left on disk.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str
    parameters: int
    config: dict[str, Any]
    tokenizer_sha256: str
    dtype: str
    attention: str
    experts_implementation: str
    device: str
    notes: tuple[str, ...] = ()
    quantization: str | None = None
    layerwise: Layerwise | None = None


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
    layerwise: bool | None = False,
) -> LoadedModel:
    """The checkpoint in a folder or on the Hugging Face hub, in eval mode; or a model that is already built, with its tokenizer.

    Args:
        model: hub id, folder, ``"embedded"`` for the checkpoint that ships with dbes, or a model of transformers or peft in memory,
            which is put into eval mode.
        tokenizer: of a model in memory.
        name: what the result calls it; by default hub id, name of the folder, or class.
        revision: branch, tag or commit on the hub.
        dtype: "auto" is float32 on a CPU, where bfloat16 is slow and changes the experts of 2-3 % of tokens with the shape of
            the batch (bfloat16 where only that fits in memory, which the notes say), and the checkpoint's own dtype on an
            accelerator. Or a name such as "bfloat16".
        device_map: as in transformers; by default the accelerator when there is one.
        trust_remote_code: run model code that comes with the checkpoint. Off by default. Pickled weights are never loaded.
        layerwise: leave the decoder layers on disk, to be read one at a time (`dbes.models.layerwise`); None: where it does not fit.

    Raises:
        ModelError: the folder lacks config, tokenizer or weights; weights are corrupt, truncated or incomplete; the hub cannot
            be reached; the model needs its own code; it is not a Mixture-of-Experts model; it does not fit in memory, which is
            found before any weight is read.
    """
    if not isinstance(model, str | Path):
        if layerwise:
            raise ModelError("a model built in memory is in memory: only a checkpoint's layers can be left on disk")
        if tokenizer is None:
            raise ModelError("a model built in memory needs its tokenizer: load_model(model, tokenizer=...)")
        model = transformers_model(model)
        given = name or model.config.name_or_path or type(model).__name__
        given = Path(given).name if Path(given).exists() else given
        held = _Checkpoint(model.eval(), model_fingerprint(model), quantization=stored_as(model.config))
        return _described(held, tokenizer, name=given)

    where, called = located(model)
    name, folder = name or called, find_folder(model if called is None else where)
    if tokenizer is None and folder is not None and (folder / CONFIG).exists():
        check_folder(folder, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    try:
        loaded = _load_layerwise(where, folder, revision, **options) if layerwise else _load(where, revision=revision, **options)
    except TooLargeError as problem:
        if layerwise is not None:
            raise
        notes.warning("%s; its layers are read one at a time", problem)
        loaded = _load_layerwise(where, folder, revision, **options)
    if tokenizer is None:
        tokenizer = load_tokenizer(loaded.texts_by or where, revision=revision, trust_remote_code=trust_remote_code)
    return _described(loaded, tokenizer, name=name or (folder.resolve().name if folder is not None else where))


def load_tokenizer(where: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: there is none, it cannot be read, or it needs its own code.
    """
    with explained(where, part="tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    return tokenizer


def load_description(
    model: str | Path, *, name: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """The model of a folder or hub id without its weights, with its tokenizer: what is to be known of one that a server runs.

    Raises:
        ModelError: config or tokenizer cannot be read; it is not a Mixture-of-Experts model, or cannot be built without weights.
    """
    where, called = located(model)
    folder = find_folder(model if called is None else where)
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = skeleton_of(where, config, trust_remote_code=trust_remote_code)
    if skeleton is None:
        raise ModelError(f"{where}: its own code cannot build it without weights, so its routers are not known")
    commit = folder_fingerprint(folder) if folder is not None else find_commit(where, revision=revision)
    tokenizer = load_tokenizer(where, revision=revision, trust_remote_code=trust_remote_code)
    named = name or called or (folder.resolve().name if folder is not None else where)
    return _described(_Checkpoint(skeleton, commit), tokenizer, name=named)


def load_weights(
    where: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint alone, in eval mode; arguments and errors as of `load_model`."""
    return _load(where, revision=revision, dtype=dtype, device_map=None, trust_remote_code=trust_remote_code).model


def load_config(where: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint folder or hub repository.

    Raises:
        ModelError: there is none, it cannot be read, it needs its own code, or the hub cannot be reached.
    """
    folder = find_folder(where)
    if folder is not None:
        check_code(folder, read_config(folder), trust_remote_code=trust_remote_code)
    with explained(where, part=CONFIG):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    refuse_contradictions(where, read_config(folder or _snapshot(where, revision)), config)
    return config


def find_commit(where: str, *, revision: str | None = None) -> str:
    """The commit of a hub repository that a branch, tag or commit names; only its config.json is read.

    Raises:
        ModelError: there is none, or the hub cannot be reached.
    """
    return _snapshot(where, revision).name


def transformers_model(model: Any) -> PreTrainedModel:
    """A model built in memory as dbes reads it, see `inner_model`.

    Raises:
        ModelError: not a model of transformers.
    """
    inner = inner_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(model).__name__}: expected a model of transformers (or of peft), a folder, or a hub id")
    return inner


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """A loaded model, what identifies it, what is to be told of it, and where its tokenizer is when not beside it."""

    model: PreTrainedModel
    revision: str
    notes: tuple[str, ...] = ()
    texts_by: str | None = None
    quantization: str | None = None
    layerwise: Layerwise | None = None


def _load(where: str, *, revision: str | None, dtype: str, device_map: str | dict | None, trust_remote_code: bool) -> _Checkpoint:
    """A folder or a repository with its adapter, if it has one."""
    folder = find_folder(where)
    adapter = find_adapter(where, folder, revision=revision)
    if adapter is None:
        return _load_base(where, folder, revision, dtype, device_map, trust_remote_code=trust_remote_code)
    if not _has_config(where, folder, revision):
        return _load_beneath(adapter, folder, revision, dtype, device_map, trust_remote_code=trust_remote_code)
    base = _load_base(where, folder, revision, dtype, device_map, trust_remote_code=trust_remote_code)
    note = "the adapter beside the weights was merged into them"
    return replace(base, model=merge_adapter(base.model, adapter, revision=revision), notes=(*base.notes, note))


def _load_beneath(
    adapter: Adapter, folder: Path | None, revision: str | None, dtype: str, device_map: str | dict | None, *, trust_remote_code: bool
) -> _Checkpoint:
    """An adapter without weights, on the base that it names."""
    if adapter.base is None:
        raise ModelError(f"{adapter.source}: an adapter whose config names no base (base_model_name_or_path); merge it, or add the name")
    below = find_folder(Path(adapter.base)) if Path(adapter.base).exists() else find_folder(adapter.base)
    if below is not None and find_adapter(adapter.base, below, revision=None) is not None:
        raise ModelError(f"{adapter.source}: its base {adapter.base} has an adapter of its own; merge that one first")
    base = _load_base(adapter.base, below, None, dtype, device_map, trust_remote_code=trust_remote_code)
    own = folder_fingerprint(folder) if folder is not None else _snapshot(adapter.source, revision, ADAPTER_CONFIG).name
    tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    return _Checkpoint(
        merge_adapter(base.model, adapter, revision=revision),
        joined(own, base.revision),
        (*base.notes, f"an adapter, merged into {adapter.base}"),
        None if tokenizer else adapter.base,
        base.quantization,
    )


def _load_layerwise(
    where: str, folder: Path | None, revision: str | None, *, dtype: str, device_map: str | dict | None, trust_remote_code: bool
) -> _Checkpoint:
    """A checkpoint with its decoder layers left on disk."""
    if (adapter := find_adapter(where, folder, revision=revision)) is not None:
        raise ModelError(f"{adapter.source}: an adapter cannot be merged into layers that are read one by one; merge it first and save")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = "cpu" if accelerator is None else accelerator.type
    chosen = device if device_map in (None, "auto") else device_map
    if not isinstance(chosen, str) or chosen.partition(":")[0] not in ("cpu", device):
        raise ModelError(f"device_map {device_map!r}: layers that are read one by one run on one device; leave it out, or give cpu")
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    method = quantization_of(config)
    if method is not None and method not in STREAMED:
        raise ModelError(
            f"{where}: quantized by {clipped(method)}; layers are read one by one of plain checkpoints and of {' and '.join(STREAMED)}"
        )
    with layers_on_disk() as found:
        loaded = _load_base(where, folder, revision, dtype, {"": chosen}, trust_remote_code=trust_remote_code, layerwise=True)
    return replace(loaded, layerwise=found[0])


def _load_base(
    where: str,
    folder: Path | None,
    revision: str | None,
    dtype: str,
    device_map: str | dict | None,
    *,
    trust_remote_code: bool,
    layerwise: bool = False,
) -> _Checkpoint:
    """A folder or a repository without regard to adapters, checked against its config."""
    if folder is not None:
        check_folder(folder, trust_remote_code=trust_remote_code, tokenizer=False)
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    with explained(where):
        kind, chosen = choose_class(config)
    accelerated, method = torch.accelerator.is_available(), quantization_of(config)
    _dtype(dtype, accelerated)
    skeleton, taken = skeleton_of(where, config, trust_remote_code=trust_remote_code), ()
    if skeleton is not None:
        tensors = stored_tensors(where, revision=revision) if folder is not None or stays_quantized(method) else None
        dtype, taken = choose_dtype(where, measure(skeleton, config, tensors), asked=dtype, device_map=device_map, layerwise=layerwise)
    options: dict[str, Any] = {
        "dtype": _dtype(dtype, accelerated),
        "device_map": device_map if device_map is not None else "auto" if accelerated else None,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "revision": revision,
        # else transformers puts an adapter in by itself where peft is installed, and where it is not ignores it
        "adapter_kwargs": {"subfolder": NOT_A_FOLDER},
    }
    if kind is not AutoModelForCausalLM:
        options |= {"config": chosen}
    if method == "mxfp4":
        # mxfp4 kernels bypass the modules whose routing is read
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    with watched_loading() as report:
        try:
            with explained(where):
                model: Any = kind.from_pretrained(where, **options)
        except ModelError:
            refuse_unfit(where, report)
            raise
    snapshot = folder or _snapshot(where, revision)
    tensors = read_tensors(snapshot)
    notes = (*taken, *account(where, model, report, tensors, skeleton=skeleton, quantized=method in AUTO_QUANTIZER_MAPPING))
    if unread := unread_files(snapshot):
        notes = (*notes, f"files beside the weights that were not read: {', '.join(unread)}")
    revision = folder_fingerprint(folder) if folder is not None else snapshot.name
    return _Checkpoint(model.eval(), revision, notes, quantization=stored_as(config))


def _has_config(where: str, folder: Path | None, revision: str | None) -> bool:
    if folder is not None:
        return (folder / CONFIG).exists()
    with explained(where, part=CONFIG):
        return cached_file(where, CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def _snapshot(where: str, revision: str | None, file: str = CONFIG) -> Path:
    """The folder of the cache that holds the files of one commit, which is its name."""
    with explained(where, part=file):
        found = cached_file(where, file, revision=revision)
    assert found is not None
    return Path(found).parent


def _described(loaded: _Checkpoint, tokenizer: PreTrainedTokenizerBase, *, name: str) -> LoadedModel:
    model = loaded.model
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=loaded.revision,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        config=json.loads(json.dumps(model.config.to_dict(), default=str)),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(model.config, "_attn_implementation", None)),
        experts_implementation=str(getattr(model.config, "_experts_implementation", None)),
        device=input_device(model).type,
        notes=loaded.notes,
        quantization=loaded.quantization,
        layerwise=loaded.layerwise,
    )


def _dtype(dtype: str, accelerated: bool) -> torch.dtype | str:
    if dtype == "auto":
        return "auto" if accelerated else torch.float32
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return chosen
