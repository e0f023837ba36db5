"""What a run measures to choose by, validation text of the target and texts of the protected domains; and whether it reaches its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dbes.errors import FinetuneError
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.choice import Choice, Found, Rise
from dbes.finetuning.guard import Guard
from dbes.finetuning.settings import FinetuneSettings
from dbes.finetuning.validation import best_step, bytes_per_token, check_every, stalled, validation_loss
from dbes.models.encoding import Sample, collate
from dbes.models.execution import forward
from dbes.models.hooks import Decision, watching
from dbes.models.sites import find_sites


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The checks of a run.

    Attributes:
        guard: texts of protected domains; None where nothing is protected.
        steps: of the run, at most.
        found: what the run has found so far; checks add to it.
    """

    model: PreTrainedModel
    validation: Sequence[Sample]
    guard: Guard | None
    settings: FinetuneSettings
    padding: int
    accelerator: Any
    steps: int
    found: Found

    @property
    def every(self) -> int:
        """Updates between two checks; 0 where there are none."""
        if not self.settings.early_stopping or not self.validation:
            return 0
        more = math.ceil(self.guard.tokens / self.settings.seq_len) if self.guard else 0
        return check_every(self.steps, sequences=len(self.validation) + more, batch_size=self.settings.batch_size)

    @property
    def stalled(self) -> bool:
        return bool(self.every) and stalled(self.found.losses, self.settings.patience, self.found.exceeded)

    def measure(self) -> tuple[float, Rise | None]:
        """Validation loss in nats per token, and the worst protected domain since before training (None without a guard)."""
        loss = validation_loss(self.model, self.validation, padding=self.padding, accelerator=self.accelerator)
        if self.guard is None:
            return loss, None
        now = self.guard.measure(self.model, padding=self.padding, accelerator=self.accelerator)
        if not self.found.losses:
            self.found.guarded = now
        fall = self.found.losses[0][1] - loss if self.found.losses else 0.0
        bits = fall / math.log(2) / bytes_per_token(self.validation)
        return loss, self.guard.rise(self.found.guarded, now, fall=bits if math.isfinite(bits) else 0.0)

    def check(self, step: int) -> tuple[float, Rise | None]:
        """Measure after so many updates, and add it to what was found."""
        loss, rise = self.measure()
        if not math.isfinite(loss):
            raise FinetuneError(f"the loss on validation text is {loss} after {step} updates; lower --lr, or look at the weights")
        if rise is not None and rise.change is None:
            raise FinetuneError(
                f"the loss on texts of {rise.domain} is not a number after {step} updates; lower --lr, or look at the weights"
            )
        self.found.losses.append((step, loss))
        if rise is not None and step:
            self.found.rises.append((step, rise))
        return loss, rise

    @property
    def is_best(self) -> bool:
        """Whether the last check is the one to keep so far."""
        return best_step(self.found.losses, self.found.exceeded) == self.found.losses[-1][0]

    def choice(self, steps: int) -> Choice:
        """The choice of a run that ended after so many steps."""
        return self.found.choice(
            self.steps, steps, check_every=self.every, sequences=len(self.validation), patience=self.settings.patience,
            guard_texts=self.guard.texts if self.guard else 0,
        )  # fmt: skip


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
        batch = collate(samples[first : first + size], padding=padding)
        real = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"])).flatten().bool()
        with torch.no_grad(), watching(sites, observe, scores=False, stop=True):
            forward(model, whole=True, **batch.inputs)
        if any(found):
            return
    raise FinetuneError(
        f"no token of the data is routed to any of the {len(cells.cells)} chosen experts, so training would change nothing; "
        "choose a path of the data's own domain, or other data"
    )
