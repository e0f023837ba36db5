"""Sizes of the model that was routed: from its config.json or from the caller, compared with what the files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbes.errors import SettingError, SourceError
from dbes.importing.types import Notes
from dbes.schema import read_json
from dbes.text import clipped

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "num_moe_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_selected_experts")
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What is known of the model beside the files.

    Attributes:
        experts, top_k: of every MoE layer; None where unknown.
        hidden_layers: all decoder layers, dense ones included.
        moe_layers: numbers of those with experts.
        where: the config that says so.
        name: of the model, where the config has one.
    """

    experts: int | None = None
    top_k: int | None = None
    hidden_layers: int | None = None
    moe_layers: tuple[int, ...] | None = None
    where: str = "--model-config"
    name: str | None = None

    def columns(self, found: int, notes: Notes, *, where: str) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        """Which columns of an array of ``found`` layers are MoE layers (None: all), and the numbers of these.

        Without a config all are taken for MoE layers, numbered from 0: a dense one then breaks the check of its ids.

        Raises:
            SourceError: neither as many as the model's layers nor as its MoE layers.
        """
        if self.moe_layers is None:
            return None, tuple(range(found))
        if found == len(self.moe_layers):
            return None, self.moe_layers
        if found == self.hidden_layers:
            notes.once(f"{found - len(self.moe_layers)} dense layers were dropped, by {self.where}")
            return self.moe_layers, self.moe_layers
        raise SourceError(
            f"{where}: {found} layers, but {self.where} has {self.hidden_layers}, of which {len(self.moe_layers)} have experts; "
            "is it the config of this model?"
        )

    def numbered(self, layers: Sequence[int], empty: Sequence[bool], *, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which of the layers that a file numbers itself are MoE layers, and their numbers in the model.

        Args:
            empty: whether nothing was counted at a layer.

        Raises:
            SourceError: an empty layer without a config that says it is dense; other layers than the model's MoE layers.
        """
        if self.moe_layers is None:
            if any(empty):
                layer = layers[list(empty).index(True)]
                raise SourceError(
                    f"{where}: nothing was counted at layer {layer}; if it is a dense layer, give the model's config.json "
                    "(--model-config), by which dense layers are dropped"
                )
            return tuple(range(len(layers))), tuple(layers)
        for shift in (0, 1):
            places = {layer - shift: column for column, layer in enumerate(layers)}
            dense = places.keys() - set(self.moe_layers)
            if places.keys() >= set(self.moe_layers) and all(empty[places[layer]] for layer in dense):
                if shift and (min(places) != 0 or len(places) != self.hidden_layers):
                    continue  # numbered from 1 only where the numbers cover the whole model
                return tuple(places[layer] for layer in self.moe_layers), self.moe_layers
        raise SourceError(
            f"{where}: counts at layers {clipped(list(layers))}, but by {self.where} the layers with experts are "
            f"{clipped(list(self.moe_layers))}"
        )

    def agreed(self, name: str, found: int | None, *, where: str, option: str) -> int:
        """One of the sizes, as the files and the caller have it.

        Raises:
            SourceError: they differ.
            SettingError: neither has it.
        """
        known: int | None = getattr(self, name)
        if known is not None and found is not None and known != found:
            raise SourceError(f"{where}: {found} {name}, but {known} were given ({option} or {self.where})")
        value = found if known is None else known
        if value is None:
            raise SettingError(f"{where}: does not say how many {name} the model has; give {option} or --model-config config.json")
        return value


def model_sizes(config: str | Path | None, *, experts: int | None, top_k: int | None) -> ModelSizes:
    """Sizes from a config.json of transformers, where one is given, and from the caller.

    Raises:
        SettingError: they contradict each other, or the config is none of an MoE model.
    """
    for name, given in (("experts", experts), ("top_k", top_k)):
        if given is not None and not 1 <= given < 2**16:
            raise SettingError(f"{name}: {given}, expected 1 to {2**16 - 1}")
    if config is None:
        return ModelSizes(experts=experts, top_k=top_k)
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    content = read_json(path, error=SettingError, most=2**24)
    found = _of_config(content, str(path))
    for name, given in (("experts", experts), ("top_k", top_k)):
        known = getattr(found, name)
        if given is not None and known is not None and given != known:
            raise SettingError(f"{name}: {given} was given, but {path} says {known}")
    return replace(found, experts=found.experts or experts, top_k=found.top_k or top_k)


def _of_config(content: Any, where: str) -> ModelSizes:
    if not isinstance(content, dict):
        raise SettingError(f"{where}: expected a JSON object, the config.json of a model")
    name = content.get("_name_or_path")
    for part in ("text_config", "language_config", "llm_config"):
        if isinstance(content.get(part), dict):
            content = content[part]
    hidden = _number(content, LAYERS, where, 1)
    if hidden is None:
        raise SettingError(f"{where}: no {LAYERS[0]} in it; is it the config.json of a model?")
    layers = tuple(_moe_layers(content, hidden, where))
    if not layers:
        raise SettingError(f"{where}: no layer has experts; is it the config of a Mixture-of-Experts model?")
    return ModelSizes(
        experts=_number(content, EXPERTS, where, 1),
        top_k=_number(content, TOP_K, where, 1),
        hidden_layers=hidden,
        moe_layers=layers,
        where=where,
        name=name if isinstance(name, str) and name else None,
    )


def _number(content: Mapping[str, Any], names: Sequence[str], where: str, least: int = 0) -> int | None:
    for name in names:
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**16:
            raise SettingError(f"{where}: {name} is {clipped(value)}, expected one whole number for all layers")
        if names is LAYERS and value > MOST_LAYERS:
            raise SettingError(f"{where}: {name} is {value}, expected at most {MOST_LAYERS}")
        return value
    return None


def _moe_layers(content: Mapping[str, Any], hidden: int, where: str) -> list[int]:
    """Numbers of the layers with experts, by the ways that configs of transformers say it."""
    for name in ("mlp_layer_types", "moe_layers", "mlp_only_layers", "moe_layer_freq"):
        value = content.get(name)
        if value is not None and not isinstance(value, list | int):
            raise SettingError(f"{where}: {name} is {clipped(value)}, which is not understood")
    kinds = content.get("mlp_layer_types")
    if isinstance(kinds, list) and len(kinds) == hidden:
        return [layer for layer, kind in enumerate(kinds) if kind != "dense"]
    if isinstance(named := content.get("moe_layers"), list):
        return sorted(layer for layer in set(named) if isinstance(layer, int) and 0 <= layer < hidden)
    freq = content.get("moe_layer_freq")
    if isinstance(freq, list):
        if len(freq) != hidden:
            raise SettingError(f"{where}: moe_layer_freq has {len(freq)} entries for {hidden} layers")
        return [layer for layer, on in enumerate(freq) if on]
    if (period := _number(content, ("expert_layer_period",), where, 1)) is not None:
        offset = _number(content, ("expert_layer_offset",), where) or 0
        return [layer for layer in range(hidden) if layer % period == offset]
    first = _number(content, ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), where) or 0
    last = _number({} if content.get("moe_layer_end_index") in (-1, None) else content, ("moe_layer_end_index",), where)
    step = _number(content, ("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"), where, 1) or 1
    # the two families count differently: layer % freq == 0, or (layer + 1) % step == 0
    ahead = 0 if content.get("moe_layer_freq") is not None else 1
    dense = set(content.get("mlp_only_layers") or ())
    end = hidden if last is None else min(hidden, last + 1)
    return [layer for layer in range(first, end) if (layer + ahead) % step == 0 and layer not in dense]
