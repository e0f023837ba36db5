"""Load a checkpoint and find its routing sites: the only file that knows transformers' names.

Names of classes, of sizes in configs and of arguments change from family to family and from release to release. What does
not change is the contract: some module receives, for every token, the experts to run and their weights. That module is found
by the **signature** of its forward, sizes are read from modules and then checked against the config.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from dbes.errors import ModelError

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "num_moe_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "top_k",
    "topk",
    "moe_router_topk",
    "num_selected_experts",
)
ZERO_EXPERTS = ("zero_expert_num", "num_zero_experts")
_INDEX = re.compile(r"ind(ex|ices)|idx|selected_experts|expert_ids")
_WEIGHT = re.compile(r"weight|score|prob|gates?$")

SENSES = re.compile(
    r"(?:^|\.)(?:(?:\w*_)?(?:vision|visual|image|img|video|audio|speech|sound)(?:_\w*)?"
    r"|mm_projector|multi_?modal_projector|patch_merger|talker|code2wav|token2wav)(?:\.|$)"
)
"""Parts of a model that see, hear or speak: text does not pass through them."""

Adapter = Literal["experts", "scores", "sorted", "embedding", "modules"]
"""How a site's decision is read (`dbes.models.hooks` holds one reader for each):

``experts``: arguments (hidden, ids, weights) of the experts module, as executed. 54 of 57 families.
``scores``: the router returns a [tokens, experts] matrix of gates, zero where an expert is not chosen (llama4).
``sorted``: the router returns slots sorted by expert (jetmoe).
``embedding``: experts are rows of an embedding that is looked up with their ids (doge).
``modules``: experts are modules that the block calls one by one, whatever its gate is (remote-code models; `dbes.models.expert_calls`).
"""


@dataclass(frozen=True, eq=False)
class RoutingSite:
    """One MoE layer: where its routing decision can be read.

    Attributes:
        layer: the model's own decoder-layer number.
        name: path of the MoE block in the model.
        block: the module whose output the experts add to.
        experts: the module (or ModuleList or ModuleDict) that holds the experts' weights.
        router: the module that scores experts, or None when none was recognised.
        probe: the module at which the decision is read; see ``Adapter``.
        num_experts: routed experts, without zero-computation ones.
        top_k: slots per token.
        zero_experts: ids in [num_experts, num_experts + zero_experts) run no computation.
        adapter: how to read the decision at ``probe``.
    """

    layer: int
    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module | None
    probe: nn.Module
    num_experts: int
    top_k: int
    zero_experts: int
    adapter: Adapter


def find_sites(model: nn.Module) -> tuple[RoutingSite, ...]:
    """Every routing site of a causal language model, by layer number.

    Raises:
        ModelError: not a Mixture-of-Experts model; routing bypasses the modules (``use_kernels``, mxfp4); a router whose
            contract is unknown; sizes of modules and config disagree; two routers in one layer.
    """
    _refuse_bypassed(model)
    sites: list[RoutingSite] = []
    config = _text_config(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        found = None if SENSES.search(name) else _classify(name, module, modules)
        if found is None:
            continue
        adapter, block_name, probe = found
        block = modules[block_name]
        experts = module if adapter in ("experts", "embedding", "modules") else getattr(block, "experts", module)
        router = getattr(block, "router_gate", None) if adapter == "embedding" else _router(block, experts)
        layer = _layer_number(block_name, modules)
        zero = _first_int(ZERO_EXPERTS, experts, router, block) or 0
        site = RoutingSite(
            layer=layer,
            name=block_name,
            block=block,
            experts=experts,
            router=router,
            probe=probe,
            num_experts=_number_of_experts(experts, router, block, config, layer, block_name),
            top_k=_top_k(experts, router, block, config, layer, block_name),
            zero_experts=zero,
            adapter=adapter,
        )
        sites.append(_refuse_impossible(site))
    _refuse_unread(model, modules, [site.name for site in sites], _config_values(config, EXPERT_COUNTS))
    sites.sort(key=lambda site: site.layer)
    for one, other in pairwise(sites):
        if one.layer == other.layer:
            raise ModelError(
                f"{type(model).__name__}: two routers in layer {one.layer} ({one.name}, {other.name}); "
                "dbes records one routing decision per layer and cannot tell which of them is meant"
            )
    return tuple(sites)


def max_positions(model: nn.Module) -> int | None:
    """The number of tokens the model has positions for, or None when its config sets no limit."""
    config = _text_config(model)
    for name in ("max_position_embeddings", "max_seq_len", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def router_std(site: RoutingSite, width: int) -> float:
    """Standard deviation of the entries of the router's weight [experts, width].

    1/sqrt(width) where the router has no such matrix (several layers deep, or offloaded): a random router's *choice* does not
    depend on its scale, only its weights do.
    """
    # a few rows more than experts: zero-computation, skip or shared experts that are scored together with the routed ones
    most = site.num_experts + max(site.zero_experts, 4)
    for parameter in site.router.parameters() if site.router is not None else ():
        fits = parameter.ndim == 2 and parameter.shape[1] == width and site.num_experts <= parameter.shape[0] <= most
        if fits and not parameter.is_meta:
            std = float(parameter.detach().float().std())
            return std if std > 0 else width**-0.5
    return width**-0.5


def expert_weights(site: RoutingSite, expert: int) -> list[torch.Tensor]:
    """Views of everything that belongs to one expert alone; writing to them changes the model.

    Raises:
        ModelError: the weights of one expert cannot be told from those of the others.
    """
    return [cut(parameter.data) for parameter, cut in expert_slices(site, expert)]


def expert_slices(site: RoutingSite, expert: int) -> list[tuple[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]]:
    """Where everything that belongs to one expert alone is: parameters, and how to cut the expert's rows out of a tensor shaped as each.

    Raises:
        ModelError: the weights of one expert cannot be told from those of the others.
    """
    if site.adapter == "modules":
        return [(parameter, _whole) for parameter in expert_modules(site)[expert].parameters()]
    children = dict(site.block.named_children())
    owners = {"sorted": ("input_linear", "output_linear"), "embedding": ("down_embed", "up_embed")}.get(site.adapter)
    modules = [site.experts] if owners is None else [children[name] for name in owners]
    found: list[tuple[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]] = []
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        # vectors are shared by the experts (a norm after each expert), even where their length is a multiple of the experts
        rows = parameter.shape[0] if parameter.ndim > 1 else 0
        if rows in (site.num_experts, site.num_experts + site.zero_experts):
            found.append((parameter, partial(_row, expert=expert)))
        elif rows and rows % site.num_experts == 0:
            found.append((parameter, partial(_rows, experts=site.num_experts, expert=expert)))
    if not found:
        raise ModelError(f"{site.name}: no parameter of {type(site.experts).__name__} has one row per expert")
    return found


def expert_modules(site: RoutingSite) -> list[nn.Module]:
    """The experts of a block that calls them one by one, by their number."""
    return list(site.experts.children())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _row(tensor: torch.Tensor, *, expert: int) -> torch.Tensor:
    return tensor[expert]


def _rows(tensor: torch.Tensor, *, experts: int, expert: int) -> torch.Tensor:
    return tensor.view(experts, tensor.shape[0] // experts, *tensor.shape[1:])[expert]


def score_reason(site: RoutingSite, missing: int, tokens: int) -> str:
    """Why a layer has rows without a selection score."""
    if site.adapter == "embedding":
        return "product keys: the top-k is taken on sums of two key scores, not on a score per expert"
    if missing == tokens:
        return "no top-k over one score per expert returned the experts that ran (looked up by token id, or chosen without torch.topk)"
    return f"for {missing} of {tokens} tokens the experts that ran are not those the top-k returned"


def _classify(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> tuple[Adapter, str, nn.Module] | None:
    """(adapter, path of the block, probe) when this module is where a layer's routing can be read."""
    # peft puts what it adapts one level deeper, as the base_layer of its own module
    parent_name, _, own_name = re.sub(r"(\.base_layer)+$", "", name).rpartition(".")
    if _takes_choice(module) and parent_name:
        return "experts", parent_name, module
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        # a list inside a module that takes ids and weights is how that module holds its experts
        if _lists_experts(name, module) and parent_name in modules and not _takes_choice(modules[parent_name]):
            return "modules", parent_name, modules[parent_name]
        return None
    parameters = _signature(module)
    if own_name == "experts" and len(parameters) == 1 and parent_name in modules:
        router = getattr(modules[parent_name], "router", None)
        if router is not None and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            return "scores", parent_name, router
    children = dict(module.named_children())
    # jetmoe routes attention heads too (module `experts` of its attention); its MLP experts are the MoE that is meant
    if own_name == "mlp" and {"router", "input_linear", "output_linear"} <= children.keys():
        return "sorted", name, children["router"]
    if "router_gate" in children and isinstance(children.get("down_embed"), nn.Embedding):
        return "embedding", name, children["down_embed"]
    return None


def _takes_choice(module: nn.Module) -> bool:
    """Whether a module's forward takes (hidden states, expert ids, weights)."""
    parameters = _signature(module)[1:]
    return len(parameters) >= 2 and any(map(_INDEX.search, parameters)) and any(map(_WEIGHT.search, parameters))


def _lists_experts(name: str, module: nn.Module) -> bool:
    """Whether a ModuleList or ModuleDict holds routed experts: named so, and all of one class."""
    return bool(re.search(r"(^|\.)(\w+_)?experts$", name)) and "shared" not in name and len({type(one) for one in module.children()}) == 1


def _signature(module: nn.Module) -> list[str]:
    """Names of the positional arguments of a module's forward (read through accelerate's and transformers' wrappers)."""
    try:
        signature = inspect.signature(type(module).forward)
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in signature.parameters.values() if parameter.kind in kinds and parameter.name != "self"]


def _router(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    children = [(name, child) for name, child in block.named_children() if child is not experts and "shared" not in name]
    for wanted in ("router", "gate"):
        for name, child in children:
            if name == wanted:
                return child
    for _, child in children:
        if re.search(r"Rout|Gate$|Gating", type(child).__name__):
            return child
    return None


def _layer_number(name: str, modules: dict[str, nn.Module]) -> int:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and isinstance(modules.get(".".join(parts[:position])), nn.ModuleList):
            return int(part)
    raise ModelError(f"{name}: this MoE block does not lie in a list of decoder layers, so it has no layer number")


def _first_int(names: tuple[str, ...], *owners: Any) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _config_values(config: Any, names: tuple[str, ...]) -> set[int]:
    values: set[int] = set()
    for part in (config, getattr(config, "ffn_config", None)):
        for name in names:
            value = getattr(part, name, None)
            values.update(item for item in (value if isinstance(value, list | tuple) else [value]) if type(item) is int)
    return values


def _number_of_experts(experts: Any, router: Any, block: Any, config: Any, layer: int, name: str) -> int:
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        count: int | None = len(experts)
    else:
        count = _first_int(EXPERT_COUNTS, experts, block, router)
    if count is None:
        count = next((parameter.shape[0] for parameter in experts.parameters() if parameter.ndim == 3), None)
    expected = _config_values(config, EXPERT_COUNTS)
    if count is None or (expected and count not in expected):
        raise ModelError(
            f"layer {layer} ({name}): its modules hold {count} experts, the config says {sorted(expected)}; "
            "weights and config.json do not belong together, or this layout is new to dbes"
        )
    return count


def _top_k(experts: Any, router: Any, block: Any, config: Any, layer: int, name: str) -> int:
    count = _first_int(TOP_K, router, block, experts)
    expected = _config_values(config, TOP_K)
    if count is None and len(expected) == 1:
        count = next(iter(expected))
    if count is None or (expected and count not in expected):
        raise ModelError(f"layer {layer} ({name}): its router chooses {count} experts per token, the config says {sorted(expected)}")
    return count


def _refuse_impossible(site: RoutingSite) -> RoutingSite:
    if not 1 <= site.top_k <= site.num_experts + site.zero_experts:
        raise ModelError(
            f"layer {site.layer} ({site.name}): {site.top_k} experts per token of {site.num_experts} experts; correct the number of "
            "experts per token (or of experts) in config.json"
        )
    return site


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _refuse_bypassed(model: nn.Module) -> None:
    if getattr(model, "use_kernels", False) or getattr(model, "_use_kernels", False):
        raise ModelError("this model runs with use_kernels=True, which bypasses router and experts modules; load it without kernels")
    method = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "quant_method", None)
    if "mxfp4" in str(method).lower() and any("Mxfp4" in type(module).__name__ for module in model.modules()):
        raise ModelError("mxfp4 experts bypass the router's and experts' modules; load it dequantized (Mxfp4Config(dequantize=True))")


def _refuse_unread(model: nn.Module, modules: dict[str, nn.Module], blocks: Sequence[str], counts: set[int]) -> None:
    """Experts that no site reads are an error, whether or not other layers can be read."""
    name = type(model).__name__
    inside = tuple(f"{block}." for block in blocks)
    for path, module in modules.items():
        # jetmoe's attention heads are experts too; the MLP's are those that are meant
        if path in blocks or path.startswith(inside) or re.search(r"attn|attention", path) or SENSES.search(path):
            continue
        if not _looks_like_experts(path, module, modules, counts):
            continue
        parent = path.rpartition(".")[0]
        block = parent if re.search(r"experts$", path) else path
        seen = {child: type(part).__name__ for child, part in modules[block].named_children()}
        seen |= {child: list(part.shape) for child, part in modules[block].named_parameters(recurse=False)}
        raise ModelError(
            f"{name}: unsupported routing contract: {path} ({type(module).__name__}) looks like experts, but no module takes "
            f"(hidden_states, expert ids, weights) and they are not modules that the block calls one by one; {block or name} "
            f"({type(modules[block]).__name__}) holds {seen}; dbes cannot tell which experts ran"
        )
    if not blocks:
        raise ModelError(
            f"{name} is not a Mixture-of-Experts model: none of its {len(modules)} modules routes tokens to experts. "
            "Give a MoE checkpoint (for example OLMoE, Qwen3-MoE, Mixtral, DeepSeek-V3)"
        )


def _looks_like_experts(path: str, module: nn.Module, modules: dict[str, nn.Module], counts: set[int]) -> bool:
    """Named as experts are, or weights with one matrix per expert beside something that scores as many."""
    if re.search(r"(^|\.)(block_sparse_)?(experts|moe)$", path):
        return True
    if isinstance(module, nn.modules.conv._ConvNd) or not any(
        parameter.ndim == 3 and parameter.shape[0] in counts for parameter in module.parameters(recurse=False)
    ):
        return False
    around = modules[path.rpartition(".")[0]]
    named = [*module.named_parameters(), *around.named_parameters()]
    return any(
        re.match(r"[^.]*(gate|rout)[^.]*(\.[^.]*)?$", name) and parameter.ndim == 2 and counts & set(parameter.shape)
        for name, parameter in named
    )
