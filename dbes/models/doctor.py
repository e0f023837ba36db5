"""Examine a model before it is recorded: what was found in each layer, and proof that it is what runs.

The proof needs no formula: change the weights of one expert, and exactly the tokens recorded for it come out of the layer's
block differently.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dbes.errors import ModelError, RecordingError
from dbes.models import check_folder, has_adapter, load_config, load_model, load_tokenizer, transformers_model
from dbes.models.execution import base_of, forward, input_device, mode
from dbes.models.explained import explained
from dbes.models.folder import INDEX, PICKLES, find_folder
from dbes.models.hooks import Decision, watching
from dbes.models.miniature import miniature
from dbes.models.sites import RoutingSite, expert_weights, find_sites, score_reason
from dbes.shipped import located

ARCHITECTURE = "random, scaled down"
"""The weights of a model that was built from a config: its architecture was judged, nothing else."""

WEIGHTS_LIMIT = 4 * 2**30
TOKENS = (2, 24)
"""Documents and tokens of the text, of random ids, that the examination runs on."""


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """What was found in one MoE layer.

    Attributes:
        source: where the executed experts are read: the module's class.
        scores: "exact" when every row's selection score was seen, else why not.
        logits: whether the router's logits were seen.
        control: whether the router's input was seen, so that the random-router control can be recorded.
        slots_counted, slots_expected: the count check.
        ablation: changing one expert changed exactly the rows recorded for it; None when not tried (weights elsewhere, or quantized).
        problem: what is wrong, in words, or None.
    """

    layer: int
    name: str
    experts: int
    top_k: int
    zero_experts: int
    router: str
    source: str
    scores: str
    logits: bool
    control: bool
    slots_counted: int
    slots_expected: int
    ablation: bool | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The examination of one model; ``ok`` when it can be recorded.

    Attributes:
        weights: "given", "from the folder", or "random, scaled down", when only the architecture was judged.
        notes: what was not examined, and what loading told.
    """

    model: str
    architecture: str
    weights: str
    parameters: int
    dense_layers: tuple[int, ...]
    layers: tuple[LayerDiagnosis, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(layer.problem is None for layer in self.layers)

    def rows(self) -> tuple[dict[str, str], ...]:
        """One row per MoE layer, as text, for a table."""
        words = {True: "yes", False: "NO", None: "not tried"}
        return tuple(
            {
                "layer": str(layer.layer),
                "experts": str(layer.experts) + (f" + {layer.zero_experts} zero" if layer.zero_experts else ""),
                "top-k": str(layer.top_k),
                "router": layer.router,
                "read at": layer.source,
                "selection score": layer.scores,
                "logits": words[layer.logits],
                "control": words[layer.control],
                "slots": f"{layer.slots_counted}/{layer.slots_expected}",
                "ablation": words[layer.ablation],
                "problem": layer.problem or "",
            }
            for layer in self.layers
        )


def examine(
    model: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    ablated_layers: int = 4,
) -> Diagnosis:
    """Run hooks, count check and ablation on a model for a few seconds.

    A folder with weights of at most 4 GiB is loaded as for a recording, with its tokenizer. Of a larger one the files are
    checked, the tokenizer is loaded, and the architecture is judged on a miniature with random weights: the same code, the same
    experts and top-k, narrow and few layers. So it is for a hub id and for a folder that holds only config.json, of which
    nothing but the config is read; ``notes`` says so.

    Args:
        model: folder, hub id, ``"embedded"``, or a model of transformers or peft, which is left as it was.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run model code that comes with the checkpoint.
        ablated_layers: how many layers to ablate, spread evenly; weights are put back.

    Raises:
        ModelError: what a recording would stop at: no config, damaged or unfit weights, no tokenizer, not a Mixture-of-Experts
            model, a routing contract dbes cannot read, a model that does not run.
    """
    started = time.perf_counter()
    if isinstance(model, str | Path):
        where, called = located(model)
        name = called or where
        weights, subject, notes = _subject(model if called is None else where, revision=revision, trust_remote_code=trust_remote_code)
    else:
        name, weights, subject, notes = type(model).__name__, "given", transformers_model(model), ()
    sites = find_sites(subject)
    chosen = {sites[round(place * (len(sites) - 1) / max(1, ablated_layers - 1))].layer for place in range(ablated_layers)}
    with mode(subject, training=False):
        layers = _examined(name, subject, sites, _random_ids(subject), chosen)
    return Diagnosis(
        model=name,
        architecture=type(subject).__name__,
        weights=weights,
        parameters=sum(parameter.numel() for parameter in subject.parameters()),
        dense_layers=_dense_layers(subject, sites),
        layers=layers,
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def ablation_agrees(model: nn.Module, site: RoutingSite, input_ids: Tensor, *, expert: int | None = None) -> bool:
    """Whether changing one expert's weights changes exactly the rows of the block's output that recorded it (weight != 0).

    The block is run twice on the same input, so nothing else can differ. The weights are put back.

    Args:
        expert: by default the one that is used by the number of tokens nearest to half.
    """
    with torch.inference_mode():
        decision, arguments = _observed(model, site, input_ids)
        uses = (decision.ids == torch.arange(site.num_experts, device=decision.ids.device)[:, None, None]) & (decision.weights != 0)
        used_by = uses.any(dim=-1)
        if expert is None:
            expert = int((used_by.sum(dim=-1) - len(decision.ids) / 2).abs().argmin())
        before = _run(site, arguments)
        with _perturbed(expert_weights(site, expert)):
            after = _run(site, arguments)
        changed = (before != after).any(dim=-1)
        return bool((changed == used_by[expert]).all())


def _subject(model: str | Path, *, revision: str | None, trust_remote_code: bool) -> tuple[str, PreTrainedModel, tuple[str, ...]]:
    """(what its weights are, the model to examine, notes)."""
    where, folder = str(model), find_folder(model)
    note = "nothing but the config was read: this judges the architecture, not weights or tokenizer"
    if folder is not None and (_holds_weights(folder) or has_adapter(folder)):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if size <= WEIGHTS_LIMIT:
            loaded = load_model(folder, trust_remote_code=trust_remote_code)
            return "from the folder", loaded.model, loaded.notes
        check_folder(folder, trust_remote_code=trust_remote_code)
        load_tokenizer(where, trust_remote_code=trust_remote_code)
        note = f"the weights ({size / 2**30:.1f} GiB) were not loaded: only their names, shapes and files were checked"
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    return ARCHITECTURE, miniature(config, trust_remote_code=trust_remote_code), (note,)


def _holds_weights(folder: Path) -> bool:
    """Whether there is anything that is, or names, weights, readable or not."""
    return (folder / INDEX).exists() or any(path.suffix in (".safetensors", ".gguf", *PICKLES) for path in folder.iterdir())


def _random_ids(model: nn.Module) -> Tensor:
    config: Any = base_of(model).config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(min(3, vocabulary - 1), vocabulary, TOKENS, generator=generator).to(input_device(model))


def _examined(name: str, model: nn.Module, sites: Sequence[RoutingSite], ids: Tensor, chosen: set[int]) -> tuple[LayerDiagnosis, ...]:
    decisions: dict[int, list[Decision]] = {}
    seen = watching(sites, lambda index, decision: decisions.setdefault(index, []).append(decision))
    with torch.inference_mode(), seen, explained(name, problem="the model cannot be run"):
        forward(model, whole=True, input_ids=ids)
    return tuple(_diagnosed(model, site, decisions.get(index, []), ids, site.layer in chosen) for index, site in enumerate(sites))


def _diagnosed(model: nn.Module, site: RoutingSite, decisions: list[Decision], ids: Tensor, ablate: bool) -> LayerDiagnosis:
    problems: list[str] = []
    expected = ids.numel() * site.top_k
    counted, scores, ablation = 0, "not seen", None
    decision = decisions[0] if decisions else None
    if len(decisions) != 1 or decision is None:
        problems.append(f"routed {len(decisions)} times in one forward, expected once")
    else:
        inside = (decision.ids >= 0) & (decision.ids < site.num_experts + site.zero_experts)
        counted = int(inside.sum())
        if counted != expected:
            problems.append(f"{counted} slots counted, expected {expected}")
        ordered = decision.ids.masked_fill(decision.weights == 0, -1).sort(dim=-1)[0]
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            problems.append("an expert stands twice in one row")
        if not bool(decision.weights.isfinite().all()):
            problems.append("NaN or infinity in the gate weights")
        unmatched = decision.ids.shape[0] if decision.matched is None else int((~decision.matched).sum())
        scores = "exact" if not unmatched else score_reason(site, unmatched, decision.ids.shape[0])
        if ablate and all(_can_be_changed(weight) for weight in site.experts.parameters()):
            try:
                ablation = ablation_agrees(model, site, ids)
            except ModelError as problem:
                problems.append(str(problem))
            if ablation is False:
                problems.append(
                    "changing one expert did not change exactly the rows recorded for it"
                    if _repeats(model, site, ids)
                    else "the same tokens are routed to other experts every time: the router draws random numbers outside training too"
                )
    return LayerDiagnosis(
        layer=site.layer,
        name=site.name,
        experts=site.num_experts,
        top_k=site.top_k,
        zero_experts=site.zero_experts,
        router=type(site.router).__name__ if site.router is not None else "none found",
        source=type(site.probe).__name__,
        scores=scores,
        logits=decision is not None and decision.logits is not None,
        control=decision is not None and decision.hidden is not None,
        slots_counted=counted,
        slots_expected=expected,
        ablation=ablation,
        problem="; ".join(problems) or None,
    )


def _repeats(model: nn.Module, site: RoutingSite, ids: Tensor) -> bool:
    """Whether two forwards of the same tokens choose the same experts."""
    with torch.inference_mode():
        return bool(torch.equal(_observed(model, site, ids)[0].ids, _observed(model, site, ids)[0].ids))


def _can_be_changed(weight: Tensor) -> bool:
    """Whether noise can be added to a weight: it is here, and neither an integer nor of 8 bits (quantized)."""
    return not weight.is_meta and weight.is_floating_point() and weight.element_size() > 1


def _dense_layers(model: nn.Module, sites: Sequence[RoutingSite]) -> tuple[int, ...]:
    """Numbers of the decoder layers that have no experts, from the list of layers the first site lies in."""
    path = sites[0].name.split(".")
    stack = model.get_submodule(".".join(path[: path.index(str(sites[0].layer))]))
    return tuple(sorted(set(range(len(list(stack.children())))) - {site.layer for site in sites}))


def _observed(model: nn.Module, site: RoutingSite, input_ids: Tensor) -> tuple[Decision, tuple[tuple, dict]]:
    """The site's decision and the arguments of its block in one forward."""
    seen: list[Decision] = []
    arguments: list[tuple[tuple, dict]] = []

    def remember(_: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments.append((args, kwargs))

    handle = site.block.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with watching([site], lambda _, decision: seen.append(decision), stop=True):
            forward(model, whole=True, input_ids=input_ids)
    finally:
        handle.remove()
    if not seen or not arguments:
        raise RecordingError(f"layer {site.layer} ({site.name}) did not route")
    return seen[0], arguments[0]


def _run(site: RoutingSite, arguments: tuple[tuple, dict]) -> Tensor:
    """float [tokens, hidden], what the block makes of its input."""
    args, kwargs = arguments
    output = site.block(*args, **kwargs)
    first = output if isinstance(output, Tensor) else next(value for value in output if isinstance(value, Tensor))
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), first)
    return first.reshape(-1, given.shape[-1])  # some blocks return all rows in one


@contextmanager
def _perturbed(weights: list[Tensor]) -> Iterator[None]:
    kept = [weight.clone() for weight in weights]
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
            # both signs and away from zero, so that no activation function can hide the change
            weight.mul_(-1.5).add_(noise)
        yield
    finally:
        for weight, original in zip(weights, kept, strict=True):
            weight.copy_(original)
