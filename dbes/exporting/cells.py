"""The cells of an expert path as other tools name them: adapters, experts to keep, experts to replace by a constant."""

from __future__ import annotations

from typing import Any

from dbes.errors import PathError
from dbes.paths.types import ExpertPath

FUSED = ("gate_up_proj", "down_proj")
"""Parameters of all experts of a layer in transformers 5, each [experts, ...]."""

SINGLE = ("gate_proj", "up_proj", "down_proj")
"""Linear modules of an expert where experts are modules of their own, as code beside a checkpoint has them."""

WHOLE_LAYERS = (
    "target_parameters adapts a whole parameter, so that all experts of the named layers get an adapter, not those of `experts` alone; "
    "PEFT allows one such adapter a model. `dbes finetune` trains exactly these experts."
)
SINGLE_EXPERTS = "target_modules is for models whose experts are modules of their own: a pattern of exactly these experts."
NAMES = "Names are those of models that keep their experts in `model.layers.N.mlp.experts`; compare them with the names of your model."
CONSTANTS = (
    "approximate_experts goes into config.json; vLLM also needs a vector `<experts prefix>.<expert>.approx_value` [hidden_size] in the "
    "checkpoint for every expert listed (its mean output), which routing does not tell."
)


def by_layer(path: ExpertPath, *, chosen: bool) -> dict[int, list[int]]:
    """Experts of every MoE layer that the path holds, or those that it does not."""
    held = set(path.cells)
    return {
        layer: [expert for expert in range(experts) if ((layer, expert) in held) is chosen]
        for layer, experts in zip(path.layers, path.experts, strict=True)
    }


def peft(path: ExpertPath) -> dict[str, Any]:
    """``experts`` by layer, and the arguments of PEFT's ``LoraConfig`` that come closest to them, for both kinds of models."""
    experts = {layer: chosen for layer, chosen in by_layer(path, chosen=True).items() if chosen}
    layers = "|".join(rf"{layer}\.mlp\.experts\.({'|'.join(map(str, chosen))})" for layer, chosen in experts.items())
    return {
        "experts": _named(experts),
        "fused_experts": {
            # without the empty list PEFT adds the modules it has in mind for a model's type
            "lora_config": {
                "target_parameters": [f"model.layers.{layer}.mlp.experts.{name}" for layer in experts for name in FUSED],
                "target_modules": [],
            },
            "adapted_experts": sum(dict(zip(path.layers, path.experts, strict=True))[layer] for layer in experts),
            "chosen_experts": len(path.cells),
            "cannot_express": WHOLE_LAYERS,
        },
        "experts_as_modules": {
            "lora_config": {"target_modules": rf".*\.layers\.({layers})\.({'|'.join(SINGLE)})"},
            "note": SINGLE_EXPERTS,
        },
        "note": NAMES,
    }


def prune_list(path: ExpertPath) -> dict[str, Any]:
    """The path's experts as those to keep, all others as those to drop, by decoder layer.

    ``fewest_kept`` is the smallest number of experts that a layer keeps: a model cannot run with a top-k above it.
    """
    keep = by_layer(path, chosen=True)
    return {
        "keep": _named(keep),
        "drop": _named(by_layer(path, chosen=False)),
        "experts": {str(layer): count for layer, count in zip(path.layers, path.experts, strict=True)},
        "fewest_kept": min(map(len, keep.values())),
    }


def substitution(path: ExpertPath) -> dict[str, Any]:
    """``approximate_experts`` of vLLM: by decoder layer the experts that a constant stands for, all that the path does not hold.

    Raises:
        PathError: a layer would keep no expert, which vLLM refuses.
    """
    keep = by_layer(path, chosen=True)
    if empty := [layer for layer, chosen in keep.items() if not chosen]:
        raise PathError(
            f"the path holds no expert of layer {empty[0]}, and vLLM must keep at least one in every layer; find a path with more of them"
        )
    return {"approximate_experts": _named({layer: chosen for layer, chosen in by_layer(path, chosen=False).items() if chosen})}


def _named(experts: dict[int, list[int]]) -> dict[str, list[int]]:
    return {str(layer): chosen for layer, chosen in experts.items()}
