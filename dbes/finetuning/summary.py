"""A run in words: what it gained and forgot beyond noise, how it was trained, what to know about it, and what may be tried next."""

from __future__ import annotations

from dbes.finetuning.choice import Choice, Trial, risen
from dbes.finetuning.guard import FEWEST, Guard
from dbes.finetuning.report import Change, FinetuneReport
from dbes.finetuning.settings import PASSES, FinetuneSettings
from dbes.finetuning.validation import SEQUENCES, Split

ENDS = {
    "stalled": "the loss no longer fell",
    "forgetting": "protected domains rose too far",
    "all steps made": "all steps made",
}


def warnings_before(split: Split, settings: FinetuneSettings, guard: Guard | None = None) -> tuple[str, ...]:
    """What should be known before a run begins."""
    steps = settings.total_steps(len(split.training))
    return _few(split, settings) + _shared(guard) + _repeated(split, settings, steps, f"{steps} steps are")


def warnings_after(
    split: Split, settings: FinetuneSettings, steps: int, guard: Guard | None = None, choice: Choice | None = None
) -> tuple[str, ...]:
    """What should be known about a run that made so many steps."""
    found = _few(split, settings) + _shared(guard)
    if choice is not None and choice.none_keeps:
        found += (f"no learning rate kept the protected domains; the smallest, {choice.lr:g}, was used",)
    return found + _repeated(split, settings, steps, f"the {steps} steps made were")


def _shared(guard: Guard | None) -> tuple[str, ...]:
    if guard is None or not guard.shared:
        return ()
    few = f"fewer than {FEWEST} training texts: {', '.join(guard.shared)}"
    return (f"protected domains with {few}; the texts that guard them are those that protection is made of",)


def _few(split: Split, settings: FinetuneSettings) -> tuple[str, ...]:
    asked = {"early stopping": settings.early_stopping, "test of learning rates": settings.lr == "auto"}
    missing = [what for what, wanted in asked.items() if wanted]
    if split.validation or not missing:
        return ()
    few = f"{len(split.training)} sequences are too few to set some apart to choose by (at least {SEQUENCES})"
    return (f"{few}: no {' and no '.join(missing)}",)


def _repeated(split: Split, settings: FinetuneSettings, steps: int, what: str) -> tuple[str, ...]:
    sequences = len(split.training)
    passes = settings.passes(steps, sequences)
    if passes < PASSES + settings.batch_size / sequences:  # the last batch of the last pass may begin another
        return ()
    return (f"{what} {passes:.1f} passes over {sequences} sequences; beyond about {PASSES} a model learns its texts by heart",)


def findings(report: FinetuneReport) -> list[str]:
    """One line each: the target, the other domains, the learning rate, and the end of training."""
    return [line for line in (_target(report), _others(report), *_training(report)) if line]


def advice(report: FinetuneReport) -> list[str]:
    """What the measured numbers suggest to change; nothing where they suggest nothing."""
    settings, choice = report.settings, report.choice
    found = []
    if forgotten(report) and settings.protect is not None:
        rate = f", or a smaller --lr than {choice.lr:g}," if choice is not None else ""
        found.append(f"a smaller --protect than {settings.protect:g}{rate} keeps other domains better, at some cost of the gain")
    elif forgotten(report) and not report.can_protect:
        found.append("other domains can be protected (--protect) where whole experts are trained in the split bank, routers frozen")
    if choice is not None and choice.source == "given" and _within_noise(report):
        found.append(f"the learning rate {choice.lr:g} was given; without --lr one is found for this model and this text")
    if choice is not None and choice.check_every and choice.best_step == report.steps and choice.stopped == "all steps made":
        found.append("the validation loss was at its lowest after the last step: more --steps may gain more")
    return found


def forgotten(report: FinetuneReport) -> dict[str, Change]:
    """Other domains whose texts are predicted worse than before, beyond noise; worst first."""
    worse = {name: one for name, one in _of_others(report).items() if one.low is not None and one.low > 0}
    return dict(sorted(worse.items(), key=lambda item: -item[1].change))


def protects_next(report: FinetuneReport) -> bool:
    """Whether the run forgot, and the same run with protection is possible and was not made."""
    return bool(forgotten(report)) and report.can_protect and report.settings.protect is None


def _of_others(report: FinetuneReport) -> dict[str, Change]:
    return {name: one for name, one in report.changes.items() if name != report.target}


def _within_noise(report: FinetuneReport) -> bool:
    change = report.changes.get(report.target)
    return change is None or change.low is None or change.high is None or change.low <= 0 <= change.high


def _target(report: FinetuneReport) -> str:
    name, change = report.target, report.changes.get(report.target)
    if change is None:
        return f"{name}: {_amount(report.gain)}"
    amount = f"gain of {_amount(-change.change)}" if change.change <= 0 else f"loss of {change.change:.4f} bits per byte"
    gain = f"{name}: the {amount} is"
    if change.low is None or change.high is None:
        return f"{gain} from one held-out text, so that noise cannot be told"
    span = _span(-change.high, -change.low)
    if _within_noise(report):
        of_gain = "" if change.change <= 0 else " of the gain"
        return f"{gain} within noise (95 % interval{of_gain} {span})"
    if change.change > 0:
        return f"{name}: lost {change.change:.4f} bits per byte (95 % interval of the gain {span}): its held-out texts are predicted worse"
    return f"{name}: gained {-change.change:.4f} bits per byte (95 % interval {span})"


def _others(report: FinetuneReport) -> str:
    mean, worst = report.forgetting_mean, report.forgetting_worst
    if mean is None or worst is None:
        return ""
    others, worse = _of_others(report), forgotten(report)
    if not others:
        return f"other domains: {_amount(mean)} on average, {_signed(worst)} at worst"
    untold = {name: one for name, one in others.items() if one.low is None}
    calm = {name: one for name, one in others.items() if name not in worse and name not in untold}
    told = f"; one text is held out of {_each(untold)}, too few to tell" if untold else ""
    if worse:
        each = ", ".join(f"{name} {_signed(one.change)} ({interval_of(report, name)})" for name, one in worse.items())
        rest = f"; not beyond noise: {', '.join(calm)}" if calm else ""
        return f"forgotten: {each} bits per byte{rest}{told}"
    if not calm:
        return told.removeprefix("; ")
    changed = f"other domains changed by {_signed(mean)} on average, {_signed(worst)} at worst"
    if untold:
        changed = ", ".join(f"{name} {_signed(one.change)}" for name, one in calm.items())
    return f"nothing was forgotten beyond noise: {changed}{told}"


def _each(changes: dict[str, Change]) -> str:
    return ", ".join(f"{name} ({_signed(one.change)})" for name, one in changes.items())


def _training(report: FinetuneReport) -> list[str]:
    choice = report.choice
    if choice is None:
        return []
    passes = f"{report.passes:.1f} passes over {report.sequences} sequences" if report.passes is not None else ""
    if not choice.check_every:
        return [_rate(report, choice), f"{report.steps} steps, {passes}; no early stopping"]
    why = ENDS[choice.stopped]
    kept = f"kept step {choice.best_step} of {report.steps} ({passes})"
    if choice.best_step == 0:
        kept = f"kept none of {report.steps} steps: none was better than the model before, which is what was saved"
    unit = "of texts set apart" if report.validation_unit == "texts" else "of the training texts, set apart"
    found = [_rate(report, choice), f"{kept}, by the loss on {choice.validation_sequences} sequences {unit}; ended: {why}"]
    refused = [rise for _, rise in choice.rises if not rise.is_kept]
    if refused:
        found.append(f"{len(refused)} of {len(choice.rises)} checks refused for protected domains, the last such: {risen(refused[-1])}")
    if choice.retreats:
        found.append(f"after each of these training went on from the best state at a third of the rate, {choice.peak:.2g} at last")
    return found


def _rate(report: FinetuneReport, choice: Choice) -> str:
    rate = f"learning rate {choice.lr:g}, "
    if choice.source == "given":
        return rate + "as given"
    if choice.source == "fallback":
        return rate + "the default where there is too little text to find one"
    tried = ", ".join(f"{trial.lr:g}: {_tried(trial)}" for trial in choice.trials)
    share = choice.search_seconds / max(report.seconds, 1e-9)
    if choice.none_keeps:
        rate += f"the smallest, because none kept the protected domains in {choice.trial_steps} steps "
    elif choice.guard_texts:
        rate += f"of the largest fall in {choice.trial_steps} steps among rates that kept the protected domains "
    else:
        rate += f"the smallest with two thirds of the best fall in {choice.trial_steps} steps "
    return rate + f"(validation loss before {choice.losses[0][1]:.4f}; {tried}), {100 * share:.0f} % of the time"


def _tried(trial: Trial) -> str:
    if trial.loss is None:
        return "diverged"
    return f"{trial.loss:.4f}" + ("" if trial.rise is None or trial.rise.is_kept else f" refused ({risen(trial.rise)})")


def interval_of(report: FinetuneReport, domain: str) -> str:
    """The interval of a domain's change; empty where there is none."""
    change = report.changes.get(domain)
    return "" if change is None or change.low is None or change.high is None else _span(change.low, change.high)


def _amount(change: float) -> str:
    return f"{_signed(change)} bits per byte"


def _span(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _signed(number: float) -> str:
    """Four digits and the sign, which zero has none of before rounding or after."""
    return f"{round(number, 4) + 0.0:+.4f}"
