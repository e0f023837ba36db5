"""What a result holds beside specialization: loss, accuracy, and what masking a domain's specialists does."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, Field

from dbes.schema import Number, Strict, Whole


class _Record(Strict):
    model_config = ConfigDict(ser_json_inf_nan="null")


class Measured(_Record):
    """A value with its 95 % interval over documents; ``p``: two-sided, that it is 0, ``p_holm`` corrected over the domains."""

    value: Number
    low: Number
    high: Number
    p: Number = math.nan
    p_holm: Number = math.nan


class DomainLoss(_Record):
    """Bits per byte of a domain's texts; ``sources``: source texts, the units of the interval; bytes: of what is predicted."""

    sources: Whole
    text_bytes: Whole
    bits_per_byte: Measured


class DomainAccuracy(_Record):
    """Share of a domain's items whose right choice is the likeliest, and the likeliest per byte of the choice, with Wilson's intervals.

    ``chance``: the mean of 1 over the number of choices.
    """

    items: Whole
    chance: Number
    accuracy: Measured
    accuracy_per_byte: Measured


class DomainAblation(_Record):
    """A domain's specialists masked, and other cells of the same layers that carry as much of the domain.

    Attributes:
        cells, control_cells: masked, of each half of the source texts; each half is measured with the cells that the other half chose.
        load, control_load: share of the domain's slots that these cells carry (on the texts that chose them), and their controls.
        sources: source texts of the domain that were measured.
        inside, outside, control_inside, control_outside: bits per byte added in the domain, and in the others (their mean).
        beyond: inside - control_inside, paired by source text. selectivity: beyond - (outside - control_outside).
        finding: ``drives``, ``not alone``, ``unmatched`` (no other cells carry as much), ``no effect``, ``worse`` (the control adds more),
            or ``no specialists``.
    """

    cells: tuple[Whole, Whole]
    control_cells: tuple[Whole, Whole] = (0, 0)
    load: Number = math.nan
    control_load: Number = math.nan
    sources: Whole = 0
    inside: Measured | None = None
    outside: Measured | None = None
    control_inside: Measured | None = None
    control_outside: Measured | None = None
    beyond: Measured | None = None
    selectivity: Measured | None = None
    finding: Literal["drives", "not alone", "unmatched", "no effect", "worse", "no specialists"] = "no specialists"


class Measures(_Record):
    """What was measured beside specialization, by domain; empty where it was not asked for, or a domain has nothing to measure.

    ``accuracy_by``: ``own``, or ``lm-eval``; None where accuracy was not asked for.
    """

    loss: dict[str, DomainLoss] = Field(default_factory=dict)
    accuracy: dict[str, DomainAccuracy] = Field(default_factory=dict)
    accuracy_by: Literal["own", "lm-eval"] | None = None
    ablation: dict[str, DomainAblation] = Field(default_factory=dict)

    @property
    def domains(self) -> set[str]:
        """All domains that are named."""
        return {*self.loss, *self.accuracy, *self.ablation}

    @property
    def mean_loss(self) -> float | None:
        """Mean of the domains' bits per byte; None without."""
        return _mean([each.bits_per_byte.value for each in self.loss.values()])

    @property
    def mean_accuracy(self) -> float | None:
        """Mean of the accuracies of the domains that have items; None without."""
        return _mean([each.accuracy.value for each in self.accuracy.values()])


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
