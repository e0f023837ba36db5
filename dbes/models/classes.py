"""Which class of transformers a config is built as: causal language models, and the text part of models that also see or hear."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

from dbes.errors import ModelError

TEXT_PARTS = ("thinker_config",)
"""Parts of a config that are a whole language model; the other parts speak or draw, with experts of their own."""

LM_MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)


def choose_class(config: Any) -> tuple[Any, Any]:
    """(class, config) to load a checkpoint as; the class is AutoModelForCausalLM where that knows the config.

    Else the class that config.json names, else the one that transformers maps the config to with a language-model head, else
    without. Of a model that thinks and talks, the thinker.

    Raises:
        ModelError: transformers has none, or it is an encoder with a decoder.
    """
    for part in TEXT_PARTS:
        if (inner := getattr(config, part, None)) is not None and (found := _mapped(inner)) is not None:
            return found, inner
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(config).__name__}: an encoder with a decoder; dbes records models that read one text, not pairs of input and output"
        )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM, config
    found = _named(config) or _mapped(config) or _text_class(config)
    if found is None:
        raise ModelError(
            f"{type(config).__name__}: transformers {transformers.__version__} has no language model for this config "
            f"(model_type {getattr(config, 'model_type', None)!r}, architectures {getattr(config, 'architectures', None)!r})"
        )
    return found, config


def build(config: Any, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """A model of the config with random weights, of the class that a checkpoint would be loaded as."""
    kind, chosen = choose_class(config)
    if kind is AutoModelForCausalLM:
        return AutoModelForCausalLM.from_config(chosen, trust_remote_code=trust_remote_code, **options)
    return kind._from_config(chosen, **options)


def text_config_of(config: Any) -> Any:
    """The part of a config that describes the layers that read text."""
    for part in TEXT_PARTS:
        config = getattr(config, part, None) or config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _named(config: Any) -> type[PreTrainedModel] | None:
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and kind.config_class is type(config):
            return kind
    return None


def _mapped(config: Any) -> type[PreTrainedModel] | None:
    for mapping in (*LM_MAPPINGS, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def _text_class(config: Any) -> type[PreTrainedModel] | None:
    """Of a text part that has no entry of its own: the class beside the config's that is built from it."""
    found = [kind for kind in _beside(config) if kind.config_class is type(config)]
    found.sort(key=lambda kind: ("ForCausalLM" not in kind.__name__, not kind.__name__.endswith("Model"), kind.__name__))
    return found[0] if found else None


def _beside(config: Any) -> Iterator[type[PreTrainedModel]]:
    home = type(config).__module__
    if not home.startswith("transformers.models."):
        return
    module = importlib.import_module(home.replace(".configuration_", ".modeling_"))
    for kind in list[Any](vars(module).values()):
        if not (inspect.isclass(kind) and issubclass(kind, PreTrainedModel)):
            continue
        # a class without a forward of its own is only a base for others
        if kind.__module__ == module.__name__ and "forward" in vars(kind):
            yield kind
