"""What training an expert path needs in memory beside the model, from shapes alone; and a run that cannot fit is refused before loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dbes.errors import FinetuneError
from dbes.finetuning.bank import uses_interface
from dbes.finetuning.cells import checked_cells
from dbes.finetuning.settings import FinetuneSettings
from dbes.models.fitting import left, memory_at
from dbes.models.needs import Needs
from dbes.models.sites import expert_slices, find_sites
from dbes.wording import byte_count

LEAST = "bfloat16"
"""The dtype in which the model itself takes least: what does not fit then does not fit at all."""

LEAF = 4
"""Bytes of a number that is trained: sixteen-bit weights are trained through float32 copies."""


@dataclass(frozen=True, kw_only=True)
class PathNeeds:
    """What training needs, in bytes besides ``cells`` and ``parameters``.

    Attributes:
        parameters: numbers that are trained.
        leaves, gradients, moments: the trained copies, their gradients, AdamW's two moments.
        kept: the leaves of the best check so far, with validation text.
        bases: the chosen experts' own values, copied where updates are added to them (protection).
        protection: the matrices that shape protected updates.
    """

    cells: int
    parameters: int
    leaves: int
    gradients: int
    moments: int
    kept: int
    bases: int
    protection: int

    @property
    def training(self) -> int:
        """Leaves, gradients and moments: what every run needs."""
        return self.leaves + self.gradients + self.moments

    def total(self, *, validation: bool, protect: bool) -> int:
        return self.training + validation * self.kept + protect * (self.bases + self.protection)


def needs_of_cells(skeleton: PreTrainedModel, cells: Iterable[tuple[int, int]], *, rank: int | None = None, dtype: str) -> PathNeeds:
    """What training these cells needs.

    Args:
        skeleton: the model without weights.
        rank: of low-rank updates.
        dtype: that the model is loaded in.

    Raises:
        FinetuneError: cells that the model does not have.
    """
    sites = find_sites(skeleton)
    by_layer = {site.layer: site for site in sites}
    chosen = checked_cells(sites, cells)
    counts = {layer: sum(cell.layer == layer for cell in chosen) for layer in by_layer}
    trained = bases = matrices = 0
    for layer, count in counts.items():
        numbers, plain, squares = _of_expert(by_layer[layer], rank)
        trained, bases, matrices = trained + count * numbers, bases + count * plain, matrices + count * squares
    return _path_needs(len(chosen), trained, bases, matrices, dtype)


def needs_of_share(skeleton: PreTrainedModel, share: float, *, dtype: str) -> PathNeeds:
    """What training this share of the routed experts needs, whichever they are.

    Raises:
        FinetuneError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise FinetuneError(f"a share of {share:g}: expected a number above 0, and 1 at most")
    sums = [0.0, 0.0, 0.0, 0.0]
    for site in find_sites(skeleton):
        for place, each in enumerate((1, *_of_expert(site, None))):
            sums[place] += share * site.num_experts * each
    cells, trained, bases, matrices = (round(total) for total in sums)
    return _path_needs(cells, trained, bases, matrices, dtype)


def refuse_unfit(model: str, needs: Needs, path: PathNeeds, settings: FinetuneSettings, *, device_map: Any = None) -> None:
    """Stop before a model is loaded whose training cannot fit; activations, which depend on the texts, are not counted.

    Args:
        needs, path: what model and path need, in ``LEAST``.

    Raises:
        FinetuneError: says what is needed, what is left by which limit, and what to do.
    """
    available = memory_at(device_map, mapped=needs.files or 0)
    protect = settings.protect is not None
    trained = path.total(validation=settings.early_stopping, protect=protect)
    if available is None or needs.weights[LEAST] + trained <= available.bytes:
        return
    shaped = f", {byte_count(path.bases + path.protection)} for protection" if protect else ""
    raise FinetuneError(
        f"{model}: training {path.cells:,} experts does not fit in memory, so nothing was loaded: {byte_count(needs.weights[LEAST])} of "
        f"weights in {LEAST} and {byte_count(trained)} to train {path.parameters:,} parameters (leaves, gradients and moments "
        f"{byte_count(path.training)}{shaped}) are needed at least, {left(available)}; choose a path with a smaller budget, or a lora_rank"
    )


def _path_needs(cells: int, trained: int, bases: int, matrices: int, dtype: str) -> PathNeeds:
    size = 2 if dtype in ("bfloat16", "float16") else LEAF
    return PathNeeds(
        cells=cells,
        parameters=trained,
        leaves=LEAF * trained,
        gradients=LEAF * trained,
        moments=2 * LEAF * trained,
        kept=LEAF * trained,
        bases=size * bases,
        protection=LEAF * matrices,
    )


def _of_expert(site: Any, rank: int | None) -> tuple[int, int, int]:
    """(numbers trained, numbers of the expert, numbers of the matrices that protect it) of one expert of a layer."""
    trained = plain = squares = 0
    inputs_first = uses_interface(site.experts) and site.experts.is_transposed
    for parameter, cut in expert_slices(site, 0):
        rows: Tensor = cut(parameter)
        plain += rows.numel()
        if rank is None:
            trained += rows.numel()
        elif rows.ndim == 2:
            trained += rank * sum(rows.shape)
        # a bias has one constant input
        squares += (rows.shape[0] if inputs_first else rows.shape[1]) ** 2 if rows.ndim == 2 else 1
    return trained, plain, squares
