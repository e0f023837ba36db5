"""The outcome of an experiment on expert paths (``dbes intervene``), read strictly from its ``intervention.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator

from dbes.errors import ResultError
from dbes.reporting.arms import group_of, named
from dbes.reporting.commands import shell
from dbes.results import RESULT_FILE
from dbes.schema import Finite, Open, Whole, read_json, read_versioned
from dbes.text import label, legible, printable
from dbes.wording import counted, share, whole

OUTCOME_SCHEMA = 1
KIND = "intervention"
OUTCOME_FILE, EXPERIMENT_FILE = "intervention.json", "experiment.json"

SAME_CELLS = "same cells, no contrast"
WIDTH = 80
TEXT_WIDTH = 4000


class ReportedValue(Finite):
    """A value with its 95 % interval and p; None where too little was measured."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None


class CurvePoint(Finite):
    step: int
    gain: float
    forgetting: float


class Matched(Finite):
    """An arm and full finetuning stopped early, both at the same forgetting."""

    forgetting: float
    gain: ReportedValue
    full: ReportedValue
    difference: ReportedValue
    ratio: ReportedValue | None


class EqualCompute(Finite):
    seconds: float
    gain: float
    forgetting: float


class AccuracyPoint(Finite):
    """Change of accuracy after some steps, as shares of items."""

    step: int
    gain: float | None
    elsewhere: float | None
    gain_per_byte: float | None
    elsewhere_per_byte: float | None


class ArmAccuracy(Finite):
    """Change of accuracy in the target (``gain``) and in the other domains that have items (``elsewhere``, their mean).

    Attributes:
        items, items_elsewhere: held-out items of the target and of the others.
        gain_per_byte, elsewhere_per_byte: the same where choices are compared by likelihood per byte.
    """

    items: int
    items_elsewhere: int
    gain: ReportedValue | None
    elsewhere: ReportedValue | None
    gain_per_byte: ReportedValue | None
    elsewhere_per_byte: ReportedValue | None
    curve: tuple[AccuracyPoint, ...]


class DomainAccuracy(Finite):
    """Held-out items of a domain before training; ``chance`` is the mean of 1 over the number of choices."""

    items: int
    chance: float
    base: float
    base_per_byte: float


class ReportedArm(Finite):
    arm: str
    budget: float | None
    kind: str
    rate: float
    cells: float
    coverage: float | None
    gain: ReportedValue
    forgetting: ReportedValue
    worst_forgetting: ReportedValue
    trainable_parameters: float | None
    optimizer_bytes: float | None
    peak_added_bytes: float | None
    training_seconds: float | None
    steps_without_gradient: float | None
    curve: tuple[CurvePoint, ...]
    matched: Matched | None = None
    equal_compute: EqualCompute | None = None
    accuracy: ArmAccuracy | None = None
    pareto: bool

    @property
    def name(self) -> str:
        """As the verdicts call it."""
        return named(self.arm, self.budget)

    @property
    def group(self) -> str:
        return group_of(self.arm)


class Contrast(Finite):
    """An arm against a control.

    Attributes:
        overlap: cells of both over cells of either, mean over seeds; None where it is not known.
        same_cells: both trained the same cells in the same way, so that nothing was compared.
    """

    arm: str
    budget: float | None
    control: str
    forgetting: float
    gained: float
    control_gain: float
    matched: ReportedValue
    gain: ReportedValue
    matched_holm: float | None = None
    gain_holm: float | None = None
    overlap: float | None = None
    same_cells: bool = False

    @property
    def no_contrast(self) -> bool:
        """As ``same_cells``; outcomes of older versions do not say so but show it: not a single seed or document differs."""
        return self.same_cells or all(one.value == one.low == one.high == 0 and one.p == 1 for one in (self.matched, self.gain))


class Failed(Finite):
    arm: str
    budget: float | None
    seed: int
    error: str | None


class TargetVerdict(Finite):
    text: str
    beats_target_load: tuple[str, ...]
    beats_random_load_matched: tuple[str, ...]
    beats_full: tuple[str, ...]
    beats_full_clearly: tuple[str, ...] = Field(validation_alias=AliasChoices("beats_full_clearly", "prize"))
    """``prize`` in files of earlier versions."""


class Target(Finite):
    is_new: bool
    others: tuple[str, ...]
    base: float
    arms: tuple[ReportedArm, ...]
    contrasts: tuple[Contrast, ...]
    protection: tuple[Contrast, ...] = ()
    replay: tuple[Contrast, ...] = ()
    failed: tuple[Failed, ...]
    accuracy: dict[str, DomainAccuracy] = Field(default_factory=dict)
    verdict: TargetVerdict

    @property
    def pairs(self) -> tuple[Contrast, ...]:
        """Arms against controls, protected arms against the same without protection, paths against full finetuning with replay."""
        return (*self.contrasts, *self.protection, *self.replay)


class Mask(Finite):
    """Loss added by masking cells, and by random cells that carry as much load; in bits per byte."""

    target: str
    rule: str
    budget: float
    cells: int
    control_cells: float
    inside: ReportedValue
    outside: ReportedValue
    control_inside: ReportedValue
    control_outside: ReportedValue
    selectivity: ReportedValue
    control_selectivity: ReportedValue
    difference: ReportedValue


class Skipped(Finite):
    target: str
    arm: str
    budget: float | None
    reason: str


class PathFacts(Finite):
    cells: int
    share: float
    coverage: float
    stability: float | None
    coverage_elsewhere: float | None


class TrainedModel(Finite):
    name: str
    revision: str | None = None
    parameters: int | None = None
    where: str | None = None


class Asked(Open):
    new: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    rules: tuple[str, ...] = ()
    ideas: tuple[str, ...] = ()
    protected: tuple[str, ...] = ()
    seeds: Whole = 0


class Outcome(Finite):
    schema_version: Literal[1]
    kind: Literal["intervention"]
    model: TrainedModel
    texts: str
    given: tuple[str, ...] = ()
    """The targets as they were given; empty in outcomes of earlier versions, which know their names only."""
    domains: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    units: str
    targets: dict[str, Target] = Field(min_length=1)
    masks: tuple[Mask, ...]
    paths: dict[str, PathFacts]
    skipped: tuple[Skipped, ...]
    verdict: str

    @field_validator("settings")
    @classmethod
    def _what_is_read_has_its_type(cls, settings: dict[str, Any]) -> dict[str, Any]:
        Asked.model_validate(settings)
        return settings


def accuracy_facts(target: Target) -> list[tuple[str, str]]:
    """The accuracy of every domain with items before training, as pairs of name and text."""
    return [
        (
            legible(name, WIDTH),
            f"{share(one.base)} ({share(one.base_per_byte)} per byte) of {counted(one.items, 'item')}; chance {share(one.chance)}",
        )
        for name, one in target.accuracy.items()
    ]


def is_outcome(path: str | Path) -> bool:
    """Whether a folder or file is an experiment's, not a result; says nothing about whether it can be read."""
    path = Path(path)
    if path.is_dir():
        return not (path / RESULT_FILE).is_file() and any((path / name).is_file() for name in (OUTCOME_FILE, EXPERIMENT_FILE))
    if path.name == OUTCOME_FILE:
        return True
    try:
        content = read_json(path, error=ResultError)
    except ResultError:
        return False
    return isinstance(content, Mapping) and content.get("kind") == KIND


def load_outcome(path: str | Path) -> Outcome:
    """The outcome in a file, or in a folder that holds ``intervention.json``.

    Raises:
        ResultError: missing, not JSON, not an experiment, another schema version, unknown, missing or wrong fields.
    """
    path = Path(path)
    path = path / OUTCOME_FILE if path.is_dir() else path
    missing = f"{path}: there is no outcome here; run `dbes intervene --out {path.parent}` to its end first"
    content = read_json(path, error=ResultError, missing=missing)
    if not isinstance(content, Mapping) or content.get("kind") != KIND:
        raise ResultError(f"{path}: not the outcome of `dbes intervene` (no kind: {KIND})")
    hint = "`dbes intervene` in the same folder writes it again from the finished runs"
    return read_versioned(path, Outcome, error=ResultError, versions=(OUTCOME_SCHEMA,), missing=missing, hint=hint)


COMMAND_SETTINGS = ("domains", "new", "budgets", "rules", "ideas", "protected", "seeds")
"""Settings with an option of their own; the others come from the file of --config."""


def facts(outcome: Outcome) -> list[tuple[str, str]]:
    """What identifies the experiment, as pairs of name and text."""
    model = outcome.model
    found: list[tuple[str, Any]] = [
        ("Model", model.name), ("Revision", model.revision),
        ("Parameters", None if model.parameters is None else whole(model.parameters)),
        ("Texts", outcome.texts), ("Domains of the texts", ", ".join(outcome.domains)), ("Units", outcome.units),
    ]  # fmt: skip
    found += [(name.replace("_", " ").capitalize(), _value(value)) for name, value in outcome.settings.items()]
    found += list(outcome.versions.items())
    return [(label(name, WIDTH), legible(str(value), 400)) for name, value in found if value not in (None, "")]


def command(outcome: Outcome, *, start: str = "dbes") -> str:
    """Shell lines that run the experiment again: settings.yaml, then `dbes intervene`.

    Args:
        start: how dbes is started, see `commands.program`.
    """
    settings = outcome.settings
    where = outcome.model.where or outcome.model.name
    words = ["intervene", "--out", "OUT", "--config", "settings.yaml", "--model", where, "--texts", outcome.texts]
    for name in outcome.given or outcome.targets:
        words += ["--domain", name]
    options = {"--new": "new", "--budget": "budgets", "--rules": "rules", "--ideas": "ideas", "--protected": "protected"}
    for option, name in options.items():
        if settings.get(name):
            words += [option, ",".join(map(str, settings[name]))]
    words += ["--seeds", str(settings["seeds"])] if "seeds" in settings else []
    return f"cat > settings.yaml <<'END'\n{configuration(outcome)}\nEND\n{start} {shell(words)}"


def configuration(outcome: Outcome) -> str:
    """The settings without an option of their own, as YAML (each value written as JSON, which YAML reads)."""
    rest = {name: value for name, value in outcome.settings.items() if name not in COMMAND_SETTINGS}
    return "\n".join(f"{printable(name)}: {json.dumps(value)}" for name, value in rest.items())


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def limits(outcome: Outcome) -> list[str]:
    """What the outcome does not show."""
    settings = outcome.settings
    measured = "Gain and forgetting are bits per byte of held-out text. Accuracy on tasks is not measured."
    if any(target.accuracy for target in outcome.targets.values()):
        measured = (
            "Gain, forgetting and the verdicts are bits per byte of held-out text. Accuracy is measured beside them, on the held-out "
            "multiple-choice items only: the answer is the likeliest choice, without examples before it. Where there are few items, one "
            "of them is a large step. Its intervals are not corrected for the number of arms."
        )
    told = [
        f"One model ({legible(outcome.model.name, WIDTH)}) and texts of {len(outcome.domains)} domains. Other models, sizes, "
        "domains or longer training are not shown.",
        measured,
        "Forgetting is the mean over the other domains measured here (the worst of them stands beside it); what the model loses "
        "elsewhere is not seen.",
        "Intervals count what seeds and documents share twice and so are on the wide side. p is corrected over the arms of a target "
        "and control (Holm), not over targets.",
        "At matched forgetting both sides stop at the best measured point of their trajectories (straight lines between points). "
        "Full finetuning has a trajectory for each of its rates and more points to choose from, which favours it.",
        "The learning rate of an arm is the best of the few that were tried; seconds and memory are of one machine, one thread a run.",
        "An arm that hardly trains also hardly forgets: a large ratio of two small gains means little. See the gain itself.",
        "Masks tell what the chosen cells do for the loss of the untrained model, not what training them does.",
    ]
    if settings.get("protected"):
        told.append(
            "Protected arms have seen training text of the protected domains, and forgetting is measured on other texts of the same "
            "domains (unless protect_domains says otherwise)."
        )
    seeds = settings.get("seeds")
    if isinstance(seeds, int) and seeds < 3:
        told.insert(1, f"Only {seeds} seed{'s' if seeds > 1 else ''}: the spread between runs is hardly known.")
    return told
