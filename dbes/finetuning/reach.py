"""Whether any token of the data reaches the chosen experts at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from dbes.errors import FinetuneError
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.encoding import Batch, Sample, collate
from dbes.models.execution import forward
from dbes.models.hooks import Decision, watching
from dbes.models.sites import find_sites


def check_reach(model: PreTrainedModel, cells: TrainableCells, samples: Sequence[Sample], *, padding: int, size: int) -> None:
    """Look no further than the first token that is routed to one of the cells.

    Args:
        size: samples per forward.

    Raises:
        FinetuneError: no token of the data is routed to any of them.
    """
    wanted = {layer: torch.tensor([cell.expert for cell in cells.cells if cell.layer == layer]) for layer, _ in cells.cells}
    sites = [site for site in find_sites(model) if site.layer in wanted]
    found: list[bool] = []

    def observe(index: int, decision: Decision) -> None:
        chosen = torch.isin(decision.ids, wanted[sites[index].layer].to(decision.ids.device)) & (decision.weights != 0)
        found.append(bool((chosen.any(-1) & real.to(chosen.device)).any()))

    for first in range(0, len(samples), size):
        batch: Batch = collate(samples[first : first + size], padding=padding)
        real = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"])).flatten().bool()
        with torch.no_grad(), watching(sites, observe, scores=False, stop=True):
            forward(model, whole=True, **batch.inputs)
        if any(found):
            return
    raise FinetuneError(
        f"no token of the data is routed to any of the {len(cells.cells)} chosen experts, so training would change nothing; "
        "choose a path of the data's own domain, or other data"
    )
