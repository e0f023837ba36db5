"""The causal check: without training, how much loss is added in and outside the domain when the chosen cells give nothing?"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dbes.errors import PathError
from dbes.intervention.arms import Plan
from dbes.intervention.data import ExperimentData
from dbes.intervention.runs import RUN_SCHEMA, measure
from dbes.intervention.settings import InterventionSettings
from dbes.models.masking import masked
from dbes.paths.evidence import Evidence
from dbes.paths.selection import cells_of, mask_of, random_load_matched
from dbes.paths.types import Cell
from dbes.schema import Finite
from dbes.testbed.prescribed import Prescribed

MASKED_RULES = ("specialization", "target-load", "gradient", "causal", "lift")


class MaskJob(Finite):
    """One set of cells to mask, and the sets it is compared with.

    Attributes:
        controls: random sets outside the cells that carry the same share of the target's slots; there are more of these cells.
    """

    target: str
    rule: str
    budget: float
    cells: tuple[Cell, ...]
    controls: tuple[tuple[Cell, ...], ...]

    def identity(self, experiment: str) -> str:
        content = json.dumps([experiment, "mask", self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:20]


def plan_masks(evidence: Evidence, plan: Plan, settings: InterventionSettings) -> list[MaskJob]:
    """A job for every path of ``MASKED_RULES`` that random cells outside it can match."""
    jobs = []
    for (target, rule, budget), path in plan.paths.items():
        if rule not in MASKED_RULES:
            continue
        load, chosen = evidence.load[evidence.domain(target)], mask_of(path.cells, evidence.shape)
        try:
            drawn = [random_load_matched(chosen, load, evidence.exists, seed=seed) for seed in range(settings.masks)]
        except PathError:
            continue  # the cells carry more than all others together: there is nothing like them to compare with
        controls = tuple(cells_of(cells, evidence.shape) for cells in drawn)
        jobs.append(MaskJob(target=target, rule=rule, budget=budget, cells=path.cells, controls=controls))
    return jobs


def execute_masks(model: Any, job: MaskJob, data: ExperimentData, *, prescribed: Prescribed | None = None) -> dict[str, Any]:
    """Nats of every held-out document with the cells masked, and with each control."""
    parts = {name: data.parts[name, "heldout"] for name in data.domains}
    with masked(model, job.cells):
        own = measure(model, parts, prescribed)
    controls = []
    for cells in job.controls:
        with masked(model, cells):
            controls.append(measure(model, parts, prescribed))
    return {"schema_version": RUN_SCHEMA, "job": job.model_dump(mode="json"), "nats": own, "controls": controls}
