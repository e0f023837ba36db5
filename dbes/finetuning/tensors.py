"""One trainable tensor of one chosen expert: where it lies in the model, and what is trained in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.models.sites import RoutingSite, expert_slices
from dbes.paths.types import Cell


class ExpertTensor:
    """A tensor of one expert that is trained.

    Attributes:
        name: of the parameter it is a slice of, as in ``model.named_parameters()``.
        parameter: that parameter; its rows of other experts are never written.
        cell: layer and expert.
        leaves: what the optimizer trains, by suffix: ``{"": rows}``, or ``{".up": [a, r], ".down": [r, b]}`` of the low-rank update
            ``up @ down`` that is added to the rows [a, b].
        shared: the leaf is the rows themselves (same storage), so a step of the optimizer changes the model at once.
        shaping: S of a protected tensor (`dbes.finetuning.protection`): the value is the base plus ``leaf @ S``.
    """

    def __init__(
        self,
        *,
        name: str,
        parameter: nn.Parameter,
        cut: Callable[[Tensor], Tensor],
        cell: Cell,
        rank: int | None,
        in_place: bool,
        generator: torch.Generator,
    ) -> None:
        self.name, self.parameter, self.cell, self._cut = name, parameter, cell, cut
        rows = self.rows
        # sixteen-bit weights are trained through a float32 copy: AdamW's small updates would be lost in their rounding
        trained = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
        self.shared = in_place and rank is None and trained == rows.dtype
        self._base = rows.clone() if in_place or rank is not None else None
        self.shaping: Tensor | None = None
        self._inputs_first = False
        self._measuring = False
        self._domain: Tensor | None = None
        self._moment: Tensor | None = None
        if rank is None:
            self.leaves = {"": nn.Parameter(rows if self.shared else rows.to(trained, copy=True))}
            return
        # as in LoRA (arXiv 2106.09685): one factor zero, so that nothing changes before the first step; alpha equals the rank
        down = torch.empty(rank, rows.shape[1], dtype=trained).uniform_(-1, 1, generator=generator) * (3 / rows.shape[1]) ** 0.5
        up = torch.zeros(rows.shape[0], rank, dtype=trained, device=rows.device)
        self.leaves = {".up": nn.Parameter(up), ".down": nn.Parameter(down.to(rows.device))}

    @property
    def rows(self) -> Tensor:
        """The expert's rows in the model's parameter, as a view that bypasses autograd."""
        return self._cut(self.parameter.data)

    def value(self) -> Tensor:
        """What the rows are by the leaves; differentiable."""
        if self.shaping is not None:
            leaf = self.leaves[""]
            change = self.shaping @ leaf if self._inputs_first else leaf @ self.shaping if leaf.ndim > 1 else leaf * self.shaping[0, 0]
            return cast(Tensor, self._base) + change
        if "" in self.leaves:
            return self.leaves[""]
        assert self._base is not None
        return self._base + self.leaves[".up"] @ self.leaves[".down"]

    def write(self) -> None:
        """Put the trained value into the model's parameter, rounded to its dtype."""
        if not self.shared:
            with torch.no_grad():
                self.rows.copy_(self.value())

    def restore(self) -> None:
        """Put back what the rows were."""
        if self._base is not None:
            self.rows.copy_(self._base)

    @property
    def kind(self) -> str:
        """The parameter's own name, the same in every layer."""
        return self.name.rpartition(".")[2]

    def measure_inputs(self) -> None:
        """Start to add up what enters this tensor."""
        self._measuring, self._domain, self._moment = True, None, None

    def see(self, inputs: Tensor, gates: Tensor, *, inputs_first: bool) -> None:
        """Count inputs [slots, inputs] of this tensor by their gate weights [slots], if inputs are being measured.

        Args:
            inputs_first: the tensor is [inputs, outputs]; otherwise [outputs, inputs].
        """
        if not self._measuring:
            return
        weighted = inputs.detach().float() * gates.detach().float()[:, None]
        added = weighted.T @ weighted
        self._inputs_first = inputs_first and self.parameter.ndim > 2
        self._domain = added if self._domain is None else self._domain + added

    def end_domain(self, divisor: float) -> None:
        """Add what one domain's texts showed, divided by this, to the second moment."""
        if self._domain is not None:
            share = self._domain / divisor
            self._moment = share if self._moment is None else self._moment + share
        self._domain = None

    def take_moment(self) -> Tensor | None:
        """The second moment of the inputs, float32 [inputs, inputs]; None where nothing entered. Measuring ends."""
        moment, self._moment, self._domain, self._measuring = self._moment, None, None, False
        return moment

    def shape_update(self, shaping: Tensor) -> None:
        """Train U in place of the rows: they are the base plus U through this matrix, [inputs, inputs]."""
        (leaf,) = self.leaves.values()
        self._base = self.rows.clone()
        self.leaves = {"": nn.Parameter(torch.zeros_like(leaf))}
        self.shaping = shaping.to(leaf.dtype)

    def collect(self, gradient: Tensor) -> None:
        """Add the expert's rows of the gradient of the whole parameter to the leaves' gradients; none where they are all zero."""
        rows = self._cut(gradient)
        if not rows.any():
            return
        if "" in self.leaves:
            _add(self.leaves[""], rows.clone())
        else:
            up, down = self.leaves[".up"], self.leaves[".down"]
            rows = rows.to(up.dtype)
            _add(up, rows @ down.detach().T)
            _add(down, up.detach().T @ rows)


def find_tensors(
    model: nn.Module, sites: Sequence[RoutingSite], cells: Sequence[Cell], *, rank: int | None, in_place: bool, seed: int
) -> list[ExpertTensor]:
    """The tensors of the cells, in the order of the cells; of low rank only matrices have one, not vectors such as biases.

    Raises:
        FinetuneError: the weights are quantized or offloaded; low rank, and the experts have no matrices.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_layer = {site.layer: site for site in sites}
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors: list[ExpertTensor] = []
    for cell in cells:
        for parameter, cut in expert_slices(by_layer[cell.layer], cell.expert):
            name = names[id(parameter)]
            if parameter.is_meta:
                raise FinetuneError(f"{name}: these weights are offloaded, and only weights that stay in memory can be trained")
            if not parameter.is_floating_point() or parameter.element_size() == 1:
                raise FinetuneError(f"{name}: weights of type {parameter.dtype} (quantized) cannot be trained; load the model dequantized")
            if rank is not None and cut(parameter.data).ndim != 2:
                continue
            made = ExpertTensor(name=name, parameter=parameter, cut=cut, cell=cell, rank=rank, in_place=in_place, generator=generator)
            tensors.append(made)
    if not tensors:
        raise FinetuneError("a low-rank update needs experts with matrices, and these have vectors only; train them without a rank")
    return tensors


def _add(leaf: nn.Parameter, gradient: Tensor) -> None:
    leaf.grad = gradient.to(leaf.dtype) if leaf.grad is None else leaf.grad + gradient
