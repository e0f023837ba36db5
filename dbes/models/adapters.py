"""PEFT adapters: applied and merged into the weights, or refused; never ignored."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from dbes.errors import ModelError
from dbes.models.explained import explained
from dbes.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_adapter, listed
from dbes.schema import read_json
from dbes.text import clipped


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder or on the hub.

    Attributes:
        source: folder or hub id.
        base: folder or hub id of the weights it was trained on, as its config names it.
    """

    source: str
    base: str | None


def find_adapter(where: str, folder: Path | None, *, revision: str | None) -> Adapter | None:
    """The adapter of a folder or repository, or None.

    Raises:
        ModelError: a part of it is missing, its config is not readable, or peft is not installed.
    """
    if folder is not None:
        if not has_adapter(folder):
            return None
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                pickled = "; adapter_model.bin is a pickle and is not loaded" if (folder / "adapter_model.bin").exists() else ""
                raise ModelError(f"{folder / name}: missing, though there is an adapter here{pickled}; add it, or take the adapter out")
        path = folder / ADAPTER_CONFIG
    else:
        with explained(where, part=ADAPTER_CONFIG):
            found = find_adapter_config_file(where, revision=revision)
        if found is None:
            return None
        path = Path(found)
    content = read_json(path, error=ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    base = content.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ModelError(f"{path}: base_model_name_or_path {clipped(base)}, expected a folder or a hub id")
    if not is_installed("peft"):
        raise ModelError(
            f"{where}: holds a PEFT adapter ({ADAPTER_CONFIG}), without which it is another model; install peft "
            "(pip install 'dbes[peft]'), or give a folder into whose weights it was merged"
        )
    return Adapter(source=where, base=base or None)


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of that name (W&B leaves one in the working directory) has no origin."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def merge_adapter(model: PreTrainedModel, adapter: Adapter, *, revision: str | None) -> PreTrainedModel:
    """The model with the adapter added to its weights.

    Raises:
        ModelError: it cannot be read or merged, or is not made for this model: tensors that have no place, or were not given.
    """
    from peft import PeftConfig, PeftModel  # pyright: ignore[reportMissingImports]

    hub = {} if Path(adapter.source).is_dir() else {"revision": revision}
    # transformers' own notes on adapters, and peft's, are about things that are checked here
    with explained(adapter.source, part="adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: Any = PeftConfig.from_pretrained(adapter.source, **hub)
        if getattr(config, "is_prompt_learning", False) or not hasattr(config, "target_modules"):
            raise ModelError(f"{adapter.source}: a {config.peft_type} adapter does not change weights, so it cannot be merged; LoRA can")
        config.inference_mode = True
        together = PeftModel(model, config)
        result: Any = together.load_adapter(adapter.source, "default", **hub)
        for names, what in ((result.missing_keys, "not in the adapter"), (result.unexpected_keys, "in the adapter but not in the model")):
            if names:
                raise ModelError(f"{adapter.source}: {listed(sorted(names))} {what}; it was not made for this base")
        merged: Any = together.merge_and_unload(safe_merge=True)
    merged.eval()
    return merged


def inner_model(model: Any) -> Any:
    """The transformers model inside a PeftModel, whose layers then are those with the adapter; the thinker of one that also talks.

    Any other model as it is.

    Raises:
        ModelError: the adapter is not in the layers (a prompt that is put before the text).
    """
    if isinstance(thinker := getattr(model, "thinker", None), PreTrainedModel):
        return thinker
    if not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return model
    for name, config in dict(model.peft_config).items():
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"{type(model).__name__}: adapter {name!r} puts learned tokens before every text ({config.peft_type}), which dbes "
                "does not feed; give a model with an adapter of weights, such as LoRA"
            )
    return model.get_base_model()
