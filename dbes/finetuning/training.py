"""The loop that trains chosen cells: one update on a global batch a step, over micro-batches and processes, resumed after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dbes.errors import FinetuneError
from dbes.files import keep_log_before
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.checks import Checks, check_reach
from dbes.finetuning.choice import ENOUGH, FALLBACK, Choice, Rise, Trial, find_rate, read_found, risen, trial_steps
from dbes.finetuning.evaluation import DomainScore, tracked_scores
from dbes.finetuning.guard import Guard
from dbes.finetuning.machine import memory_explained
from dbes.finetuning.settings import FinetuneSettings
from dbes.finetuning.state import LOG, STATE, load_state, state_tensors
from dbes.models.encoding import Sample, collate
from dbes.models.execution import mode
from dbes.models.losses import token_nats
from dbes.models.training import append_log, learning_rate, save_state


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run.

    Attributes:
        log: one record per step.
        steps: updates that were made; kept are the leaves after ``choice.best_step`` of them.
        seconds: of the whole run, over all its interruptions.
        parameters: numbers that were trained; chosen_bytes, optimizer_bytes: of the leaves, of AdamW's two moments.
    """

    log: list[dict[str, Any]]
    steps: int
    seconds: float
    choice: Choice
    parameters: int
    chosen_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run trains and on what, and what changes in it: leaves, moments, and what its checks have found.

    Attributes:
        kept: the leaves of the best check so far, on the CPU; none without validation text.
        save: writes the state with which a step begins, if it is due or forced.
    """

    cells: TrainableCells
    samples: Sequence[Sample]
    checks: Checks
    leaves: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    kept: dict[str, Tensor]
    save: Callable[..., None]

    def check(self, step: int) -> dict[str, Any]:
        """Check after so many updates, keep the leaves if they are the best, and return what goes into the log."""
        loss, rise = self.checks.check(step)
        if self.checks.is_best:
            for name, leaf in self.leaves.items():
                self.kept[name].copy_(leaf.detach())
        if rise is not None and not rise.is_kept and self.checks.settings.lr == "auto":
            self.put_back()
            self.checks.found.retreats += 1
        return {"validation_loss": loss} | ({} if rise is None else {"worst_protected": rise.domain, "worst_rise": rise.change})

    @torch.no_grad()
    def put_back(self) -> None:
        """Set the leaves to the kept ones, and the moments to zero."""
        for name, leaf in self.leaves.items():
            leaf.copy_(self.kept[name])
            for value in self.optimizer.state[leaf].values():
                value.zero_()


def train(
    model: PreTrainedModel,
    cells: TrainableCells,
    samples: Sequence[Sample],
    settings: FinetuneSettings,
    *,
    padding: int,
    accelerator: Any,
    validation: Sequence[Sample] = (),
    guard: Guard | None = None,
    folder: Path | None = None,
    identity: str = "",
    evaluate: Callable[[], dict[str, DomainScore]] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    checkpoint_seconds: float = 120.0,
) -> Trained:
    """Train the cells, whose block is open, on the samples. Equal settings give equal weights, interrupted or not.

    The loss is the mean over all counted tokens of a global batch, so that neither micro-batches nor processes change it. The
    router's balancing loss is never added. With early stopping the leaves end as they were at the best check.

    Args:
        accelerator: an ``accelerate.Accelerator``; its processes take consecutive shares of each batch, and its trackers get the
            numbers of every record and every evaluation.
        validation: text by which a learning rate that is not given is found, and the end; without any, the rate is
            ``choice.FALLBACK`` and all steps are made.
        guard: texts of protected domains, which refuse rates and states that do not keep them; not used without validation text.
        folder: where log and state are kept; None keeps neither.
        evaluate: called every ``eval_every`` steps; nothing is chosen by it.
        progress: called with every record of the log.

    Raises:
        FinetuneError: no token of the data is routed to the cells; the loss or a gradient is not a number (a state on disk is from
            before that, and stays); out of memory; the folder holds another run; the batch cannot be shared by the processes.
    """
    main = accelerator.is_main_process
    if settings.batch_size % accelerator.num_processes:
        raise FinetuneError(f"batch_size {settings.batch_size} cannot be shared evenly by {accelerator.num_processes} processes")
    leaves = dict(cells.named_parameters())
    optimizer = make_optimizer(list(leaves.values()), settings)
    kept = {name: leaf.detach().to("cpu", copy=True) for name, leaf in leaves.items()} if validation else {}
    most = settings.total_steps(len(samples))
    tensors = state_tensors(leaves, optimizer, kept)
    start, before, notes = load_state(folder, identity, tensors, steps=most) if folder else (0, 0.0, "")
    found = read_found(notes, where=f"{(folder or Path()) / STATE} (notes)")
    log = keep_log_before(folder / LOG, start) if folder and main else []
    began = saved = time.monotonic()

    def save(step: int, *, forced: bool = False) -> None:
        nonlocal saved
        if folder and main and (forced or time.monotonic() - saved > checkpoint_seconds):
            facts = {"step": str(step), "seconds": str(round(before + time.monotonic() - began, 1)), "notes": found.model_dump_json()}
            save_state(folder / STATE, tensors, identity=identity, **facts)
            saved = time.monotonic()

    checks = Checks(
        model=model, validation=validation, guard=guard if validation else None, settings=settings, padding=padding,
        accelerator=accelerator, steps=most, found=found,
    )  # fmt: skip
    run = _Run(cells=cells, samples=samples, checks=checks, leaves=leaves, optimizer=optimizer, kept=kept, save=save)
    with _training_mode(model, settings), memory_explained():
        if not start:
            check_reach(model, cells, samples, padding=padding, size=settings.micro_batch_size or settings.batch_size)
        _find_rate(run, say)
        steps, failure = _loop(run, start, evaluate, partial(_tell, log, folder if main else None, accelerator, progress))
    if failure is not None:
        raise FinetuneError(_failure(steps - 1, *failure, folder))
    save(steps, forced=True)
    if checks.every:
        run.put_back()
    return Trained(
        log=log,
        steps=steps,
        seconds=before + time.monotonic() - began,
        choice=checks.choice(steps),
        parameters=sum(leaf.numel() for leaf in leaves.values()),
        chosen_bytes=cells.chosen_bytes,
        optimizer_bytes=cells.optimizer_bytes(optimizer),
    )


def _find_rate(run: _Run, say: Callable[[str], None]) -> None:
    """Set the learning rate that the run will use, and the validation loss before any update."""
    found = run.checks.found
    if run.checks.validation and not found.losses:
        run.check(0)
    if found.lr is not None:
        return
    if run.checks.settings.lr != "auto":
        found.lr, found.source = run.checks.settings.lr, "given"
    elif not run.checks.validation:
        found.lr, found.source = FALLBACK, "fallback"
    else:
        found.trial_steps = trial_steps(run.checks.steps)

        def attempt(rate: float) -> float:
            clock = time.monotonic()
            loss, rise = _trial(run, rate, found.trial_steps)
            found.trials.append(Trial(lr=rate, loss=loss if math.isfinite(loss) else None, rise=rise))
            found.search_seconds += time.monotonic() - clock
            told = "" if rise is None else f"; {risen(rise)}"
            before = found.losses[0][1]
            say(f"learning rate {rate:g}: validation loss {loss:.4f} after {found.trial_steps} steps, {before:.4f} before{told}")
            run.save(0)
            return loss

        known = {trial.lr: math.inf if trial.loss is None else trial.loss for trial in found.trials}
        enough = ENOUGH if run.checks.guard is None else 1.0
        found.lr = find_rate(attempt, before=found.losses[0][1], known=known, keeps=found.keeps, enough=enough)
        found.source, found.none_keeps = "range test", not found.keeps(found.lr)
        if found.none_keeps:
            say(f"warning: no learning rate kept the protected domains; the smallest, {found.lr:g}, is used")
    run.save(0)


def _trial(run: _Run, rate: float, steps: int) -> tuple[float, Rise | None]:
    """What `Checks.measure` finds after the first batches at one learning rate; inf where it diverged. Leaves and moments are put back."""
    try:
        for step in range(steps):
            record = _prepare(run, step, rate)
            if not _is_finite(record):
                return math.inf, None
            run.optimizer.step()
            run.optimizer.zero_grad()
        return run.checks.measure()
    finally:
        run.optimizer.zero_grad()
        run.put_back()


def _loop(
    run: _Run,
    start: int,
    evaluate: Callable[[], dict[str, DomainScore]] | None,
    tell: Callable[[dict[str, Any], dict[str, DomainScore] | None], None],
) -> tuple[int, tuple[float, float] | None]:
    """Update from a step on until the last or until the validation loss has stalled.

    Returns:
        The number of updates, and (loss, norm of the gradient) where one of them is not a number.
    """
    step, checks, settings = start, run.checks, run.checks.settings
    warmup = math.ceil(settings.warmup * checks.steps)
    moved = bool(start)
    while step < checks.steps and not checks.stalled:
        record = _prepare(run, step, learning_rate(step, peak=checks.found.peak, warmup=warmup, last=checks.steps, floor=0.1))
        failed = not _is_finite(record)
        if not failed:
            run.save(step)  # before the update: these weights have just given a finite loss and gradients
            run.optimizer.step()
            moved = moved or record["active"] > 0
        run.optimizer.zero_grad()
        step += 1
        scores = None
        if not failed and checks.every and (step % checks.every == 0 or step == checks.steps):
            record |= run.check(step)
        if not failed and evaluate is not None and settings.eval_every and step % settings.eval_every == 0 and step < checks.steps:
            scores = evaluate()
            record["bits_per_byte"] = {name: score.bits_per_byte for name, score in scores.items()}
        tell(record, scores)
        if failed:
            return step, (record["loss"], record["gradient_norm"])
    if not moved:
        raise FinetuneError("no chosen expert had a gradient in any step: the tokens it saw count for nothing in the loss")
    finite = all(bool(leaf.isfinite().all()) for leaf in run.leaves.values())
    return step, None if finite else (math.nan, math.nan)


def _prepare(run: _Run, step: int, rate: float) -> dict[str, Any]:
    """Leave the gradients of a step in the leaves, and return its record; the update is the caller's."""
    checks, settings, accelerator = run.checks, run.checks.settings, run.checks.accelerator
    clock = time.monotonic()
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    # dropout, where a model has it, is the same after a resume
    torch.manual_seed((settings.seed << 32) + step * accelerator.num_processes + accelerator.process_index)
    members = [run.samples[place] for place in batch_places(step, settings.batch_size, len(run.samples), settings.seed)]
    leaves = list(run.leaves.values())
    loss = _gradients(checks.model, members, settings, leaves, padding=checks.padding, accelerator=accelerator)
    active = run.cells.drop_empty_gradients()
    norm = _clip(leaves, settings.clip)
    tokens = sum(int(sample.counted.sum()) for sample in members)
    seconds = time.monotonic() - clock
    record = {"step": step, "loss": loss, "lr": rate, "gradient_norm": norm, "tokens": tokens, "active": active}
    return record | {"tensors": len(leaves), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}


def _tell(
    log: list[dict[str, Any]],
    folder: Path | None,
    accelerator: Any,
    progress: Callable[[dict[str, Any]], None] | None,
    record: dict[str, Any],
    scores: dict[str, DomainScore] | None,
) -> None:
    """Hand the record of a step, and what was measured after it, to the log, the trackers and the caller."""
    log.append(record)
    if folder:
        append_log(folder / LOG, record)
    # the step is the trackers' own axis, and a name that some of them reserve
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    accelerator.log(numbers, step=record["step"])
    if scores is not None:
        accelerator.log(tracked_scores(scores), step=record["step"] + 1)  # measured after so many updates
    if progress:
        progress(record)


def _is_finite(record: dict[str, Any]) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])


def make_optimizer(leaves: Sequence[nn.Parameter], settings: FinetuneSettings) -> torch.optim.AdamW:
    """AdamW over the leaves with its moments in place from the start: a state is complete, and memory known, before any token is seen.

    A leaf without a gradient in a step is skipped: no decay, no momentum, and its own step counter waits.
    """
    fused = all(leaf.device.type in ("cpu", "cuda") for leaf in leaves)
    optimizer = torch.optim.AdamW(leaves, lr=0.0, weight_decay=settings.weight_decay, fused=fused)
    for leaf in leaves:
        step = torch.zeros((), dtype=torch.float32, device=leaf.device if fused else None)
        optimizer.state[leaf] = {"step": step, "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}
    return optimizer


def batch_places(step: int, size: int, samples: int, seed: int) -> list[int]:
    """Places of the samples of a step: every epoch takes each sample once, in an order of its own."""
    places = range(step * size, (step + 1) * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(samples) for epoch in {place // samples for place in places}}
    return [int(orders[place // samples][place % samples]) for place in places]


def _gradients(
    model: PreTrainedModel, members: list[Sample], settings: FinetuneSettings, leaves: list[nn.Parameter], *, padding: int, accelerator: Any
) -> float:
    """Leave the gradients of a global batch in the leaves, and return its loss in nats per counted token."""
    total = sum(int(sample.counted.sum()) for sample in members)
    share = len(members) // accelerator.num_processes
    mine = members[accelerator.process_index * share :][:share]
    size = settings.micro_batch_size or share
    nats = torch.zeros((), dtype=torch.float64)
    for first in range(0, share, size):
        with accelerator.autocast():
            batch = collate(mine[first : first + size], padding=padding)
            losses = token_nats(model, batch.inputs, batch.counted)
            loss = losses.sum() / total
        nats += losses.detach().double().sum().cpu()
        if loss.requires_grad:  # not when no token of this part was routed to a chosen expert
            accelerator.backward(loss)
    if accelerator.num_processes > 1:
        nats = _sum_over_processes(accelerator, leaves, nats)
    return float(nats) / total


def _sum_over_processes(accelerator: Any, leaves: list[nn.Parameter], nats: Tensor) -> Tensor:
    """Sum gradients and nats; a leaf without a gradient in every process stays without."""
    device = accelerator.device
    facts = torch.tensor([float(leaf.grad is not None) for leaf in leaves] + [float(nats)], dtype=torch.float64, device=device)
    *seen, total = accelerator.reduce(facts, "sum").cpu().tolist()
    for leaf, processes in zip(leaves, seen, strict=True):
        if processes:
            leaf.grad = accelerator.reduce(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), "sum")
    return torch.tensor(total, dtype=torch.float64)


def _clip(leaves: Any, most: float) -> float:
    kept = [leaf for leaf in leaves if leaf.grad is not None]
    return float(nn.utils.clip_grad_norm_(kept, most)) if kept else 0.0


@contextmanager
def _training_mode(model: PreTrainedModel, settings: FinetuneSettings) -> Iterator[None]:
    """Dropout on, and activations recomputed where asked for; the model is left as it was."""
    with mode(model, training=True):
        if not settings.gradient_checkpointing:
            yield
            return
        try:
            model.activation_checkpointing_enable()
        except ValueError as problem:
            raise FinetuneError(f"gradient_checkpointing: {problem}") from None
        try:
            yield
        finally:
            model.activation_checkpointing_disable()


def _failure(step: int, loss: float, norm: float, folder: Path | None) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    kept = f"; the last good state is kept in {folder / STATE}" if folder is not None and (folder / STATE).is_file() else ""
    return f"{what} at step {step}: training stopped{kept}. Lower --lr and choose another --out folder"
