"""Chosen cells of a model as parameters for an optimizer, and the model as it was when the block ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.finetuning.bank import banks_installed, uses_interface
from dbes.finetuning.protection import Share, shape_updates
from dbes.finetuning.tensors import ExpertTensor, find_tensors
from dbes.models.execution import frozen
from dbes.models.sites import RoutingSite, find_sites
from dbes.paths.types import Cell

Method = Literal["auto", "split_bank", "view_leaves"]


class TrainableCells:
    """Inside the block only the chosen experts can be trained; all other tensors and slices never change.

    ``split_bank``: slots routed to chosen experts compute with tensors of their own (`dbes.finetuning.bank`). Needs an experts
    module with transformers' experts interface.
    ``view_leaves``: the leaves share storage with the experts' rows, and a hook cuts their gradient out of that of the whole
    parameter, which is dropped at once. For every family; needs the whole gradient of one parameter at a time.
    ``auto``: the first where the model allows it.

    The model's values are put back when the block ends, unless ``merge`` was called. Values trained by ``view_leaves`` or low
    rank are visible in the parameters inside the block, those of ``split_bank`` only to the forward.

    Args:
        model: a causal language model whose routing dbes reads (`dbes.models.sites.find_sites`).
        cells: (layer, expert), true decoder-layer numbers.
        rank: train updates of this rank (LoRA) in place of the experts' matrices; their biases stay.
        train_router: train the routers of the chosen layers too, whole.
        seed: of the low-rank factors.

    Raises:
        FinetuneError: no cells, a cell twice, cells that the model does not have, weights that cannot be trained, a method that
            does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        cells: Iterable[tuple[int, int]],
        *,
        method: Method = "auto",
        rank: int | None = None,
        train_router: bool = False,
        seed: int = 0,
    ) -> None:
        self.model = model
        sites = find_sites(model)
        self.cells = checked_cells(sites, cells)
        layers = {cell.layer for cell in self.cells}
        self._sites = [site for site in sites if site.layer in layers]
        if rank is not None and rank < 1:
            raise FinetuneError(f"the rank is {rank}; it must be at least 1")
        self.method: Literal["split_bank", "view_leaves"] = _method(self._sites, method)
        self._rank, self._seed, self._train_router = rank, seed, train_router
        self._tensors: list[ExpertTensor] = []
        self._routers: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._merged = False
        self._stack: ExitStack | None = None

    def __enter__(self) -> TrainableCells:
        if self._stack is not None:
            raise FinetuneError("these cells are in training already; a second block needs a TrainableCells of its own")
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            in_place = self.method == "view_leaves"
            self._tensors = find_tensors(self.model, self._sites, self.cells, rank=self._rank, in_place=in_place, seed=self._seed)
            self._merged = False
            stack.callback(self._leave)
            if in_place:
                self._watch(stack)
            else:
                stack.enter_context(banks_installed(self.model, self._tensors))
            if self._train_router:
                self._routers = self._trainable_routers()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.close()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every leaf with a name that is the same in every run: parameter, expert, and ``.up`` or ``.down`` at low rank."""
        for tensor in self._tensors:
            for suffix, leaf in tensor.leaves.items():
                yield f"{tensor.name}[{tensor.cell.expert}]{suffix}", leaf
        for name, (parameter, _) in self._routers.items():
            yield name, parameter

    @property
    def labels(self) -> frozenset[str]:
        """What is trained of the experts, as ``parameter[expert]``."""
        return frozenset(f"{tensor.name}[{tensor.cell.expert}]" for tensor in self._tensors)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is to train."""
        return [leaf for _, leaf in self.named_parameters()]

    def by_layer(self) -> dict[int, list[nn.Parameter]]:
        """The experts' leaves by decoder layer."""
        found: dict[int, list[nn.Parameter]] = {}
        for tensor in self._tensors:
            found.setdefault(tensor.cell.layer, []).extend(tensor.leaves.values())
        return found

    @property
    def chosen_bytes(self) -> int:
        """Bytes of what is trained. Sixteen-bit weights are trained through float32 copies and count 4 bytes each."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.parameters())

    def optimizer_bytes(self, optimizer: torch.optim.Optimizer) -> int:
        """Bytes of an optimizer's state, without its scalar step counters: for AdamW the two moments."""
        return sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and name != "step"
        )

    def protect(self, texts: Mapping[str, Sequence[Tensor]], *, floor: float, share: Share | None = None) -> None:
        """Shape the updates so that texts of other domains hardly feel them; see `dbes.finetuning.protection`.

        Call it before an optimizer is made: the leaves are new ones.

        Args:
            texts: token ids by domain, int64 [sequences, length] each, without padding.
            share: broadcasts a matrix from the first of several processes.
            floor: share of the mean input energy below which a direction is trained freely; smaller protects more.

        Raises:
            FinetuneError: low rank or view leaves, which have no place for it; no text; a floor not above 0.
        """
        if self.method != "split_bank" or self._rank is not None:
            what = "low-rank updates" if self._rank is not None else "experts without transformers' experts interface (view_leaves)"
            raise FinetuneError(f"protection is not made for {what}")
        shape_updates(self.model, self._tensors, texts, floor=floor, share=share)

    @property
    def protection_bytes(self) -> int:
        """Bytes of the matrices that shape protected updates; they are kept, not trained."""
        return sum(tensor.shaping.numel() * tensor.shaping.element_size() for tensor in self._tensors if tensor.shaping is not None)

    def drop_empty_gradients(self) -> int:
        """Take the gradients away that are zero throughout, so that the optimizer skips their expert, and return how many are left.

        An expert that only saw padding, or tokens whose prediction counts for nothing, has such a gradient: AdamW would still
        move it by its momentum and decay it.
        """
        leaves = [leaf for leaf in self.parameters() if leaf.grad is not None]
        if not leaves:
            return 0
        seen = torch.stack([leaf.grad.any() for leaf in leaves if leaf.grad is not None]).tolist()
        for leaf, any_value in zip(leaves, seen, strict=True):
            if not any_value:
                leaf.grad = None
        return sum(seen)

    def merge(self) -> None:
        """Write the trained values into the model's own tensors, where they stay; training may continue."""
        for tensor in self._tensors:
            tensor.write()
        self._merged = True

    def trained_routers(self) -> dict[str, Tensor]:
        """The routers' parameters, where they are trained too; copies."""
        return {name: parameter.detach().clone() for name, (parameter, _) in self._routers.items()}

    def _leave(self) -> None:
        if not self._merged:
            for tensor in self._tensors:
                tensor.restore()
            for parameter, before in self._routers.values():
                parameter.data.copy_(before)
        for parameter, _ in self._routers.values():
            parameter.grad = None
        self._tensors, self._routers = [], {}

    def _watch(self, stack: ExitStack) -> None:
        """Hooks that hand gradients to the leaves, and write leaves that do not share storage before each forward."""
        by_parameter: dict[int, list[ExpertTensor]] = {}
        for tensor in self._tensors:
            by_parameter.setdefault(id(tensor.parameter), []).append(tensor)
        for tensors in by_parameter.values():
            parameter = tensors[0].parameter
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(_collect, tensors)).remove)
        for site in self._sites:
            written = [tensor for tensor in self._tensors if tensor.cell.layer == site.layer and not tensor.shared]
            if written:
                stack.callback(site.block.register_forward_pre_hook(partial(_write, written)).remove)

    def _trainable_routers(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for site in self._sites:
            if site.router is None:
                raise FinetuneError(f"{site.name}: no router module was recognised here, so the router cannot be trained")
            for parameter in site.router.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
                    found[names[id(parameter)]] = (parameter, parameter.detach().clone())
        return found


def checked_cells(sites: Iterable[RoutingSite], cells: Iterable[tuple[int, int]]) -> tuple[Cell, ...]:
    """The cells, sorted by layer and expert.

    Raises:
        FinetuneError: none, one twice, or one that the model does not have.
    """
    experts = {site.layer: site.num_experts for site in sites}
    found = sorted(Cell(int(layer), int(expert)) for layer, expert in cells)
    if not found:
        raise FinetuneError("the expert path is empty: it has no cells, so there is nothing to train")
    for cell in found:
        if cell.layer not in experts:
            layers = ", ".join(map(str, sorted(experts)))
            raise FinetuneError(
                f"layer {cell.layer} routes to no experts; this model's MoE layers are {layers}: is it the path of another model?"
            )
        if not 0 <= cell.expert < experts[cell.layer]:
            raise FinetuneError(
                f"layer {cell.layer} has experts 0 to {experts[cell.layer] - 1}, not {cell.expert}: is it the path of another model?"
            )
    twice = next((one for one, other in pairwise(found) if one == other), None)
    if twice is not None:
        raise FinetuneError(f"the expert path names expert {twice.expert} of layer {twice.layer} twice")
    return tuple(found)


def _method(sites: Iterable[RoutingSite], wanted: Method) -> Literal["split_bank", "view_leaves"]:
    missing = [site for site in sites if not uses_interface(site.experts)]
    if wanted == "view_leaves" or (wanted == "auto" and missing):
        return "view_leaves"
    if wanted not in ("auto", "split_bank"):
        raise FinetuneError(f"method {wanted!r}: expected auto, split_bank or view_leaves")
    if missing:
        raise FinetuneError(
            f"{missing[0].name}: {type(missing[0].experts).__name__} has no experts interface, which split_bank needs; use view_leaves"
        )
    return "split_bank"


def _collect(tensors: Iterable[ExpertTensor], parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:
        return
    for tensor in tensors:
        tensor.collect(gradient)
    parameter.grad = None


def _write(tensors: Iterable[ExpertTensor], *_: Any) -> None:
    for tensor in tensors:
        tensor.write()
