"""The loop that trains chosen cells: one update on a global batch a step, over micro-batches and processes, resumed after a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dbes.capture import Decision, watching
from dbes.errors import FinetuneError
from dbes.execution import forward
from dbes.files import keep_log_before
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.encoding import Batch, Sample, collate
from dbes.finetuning.evaluation import DomainScore, token_losses, tracked_scores
from dbes.finetuning.settings import FinetuneSettings, learning_rate
from dbes.finetuning.state import LOG, STATE, append_log, load_state, save_state
from dbes.sites import find_sites

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")
"""What accelerate calls ways to spread one model over processes."""

MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run.

    Attributes:
        log: one record per step.
        seconds: of the whole run, over all its interruptions.
        parameters: numbers that were trained; chosen_bytes, optimizer_bytes: of the leaves, of AdamW's two moments.
    """

    log: list[dict[str, Any]]
    steps: int
    seconds: float
    parameters: int
    chosen_bytes: int
    optimizer_bytes: int


def train(
    model: PreTrainedModel,
    cells: TrainableCells,
    samples: Sequence[Sample],
    settings: FinetuneSettings,
    *,
    padding: int,
    accelerator: Any,
    folder: Path | None = None,
    identity: str = "",
    evaluate: Callable[[], dict[str, DomainScore]] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    checkpoint_seconds: float = 120.0,
) -> Trained:
    """Train the cells, whose block is open, on the samples. Equal settings give equal weights, interrupted or not.

    The loss is the mean over all counted tokens of a global batch, so that neither micro-batches nor processes change it. The
    router's balancing loss is never added.

    Args:
        accelerator: an ``accelerate.Accelerator``; its processes take consecutive shares of each batch, and its trackers get the
            numbers of every record and every evaluation.
        folder: where log and state are kept; None keeps neither.
        evaluate: called every ``eval_every`` steps.
        progress: called with every record of the log.

    Raises:
        FinetuneError: no token of the data is routed to the cells; the loss or a gradient is no number (a state on disk is from
            before that, and stays); out of memory; the folder holds another run; the batch cannot be shared by the processes.
    """
    refuse_sharding(accelerator)
    steps, main = settings.total_steps(len(samples)), accelerator.is_main_process
    if settings.batch_size % accelerator.num_processes:
        raise FinetuneError(f"--batch-size {settings.batch_size} cannot be shared evenly by {accelerator.num_processes} processes")
    leaves = dict(cells.named_parameters())
    optimizer = make_optimizer(list(leaves.values()), settings)
    start, before = load_state(folder, identity, leaves, optimizer) if folder else (0, 0.0)
    log = keep_log_before(folder / LOG, start) if folder and main else []
    if not start:
        _check_reach(model, cells, samples, settings, padding)
    began = saved = time.monotonic()
    moved = bool(start)
    with _training_mode(model, settings), memory_explained():
        for step in range(start, steps):
            clock = time.monotonic()
            rate = learning_rate(settings, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # dropout, where a model has it, is the same after a resume
            torch.manual_seed((settings.seed << 32) + step * accelerator.num_processes + accelerator.process_index)
            members = [samples[place] for place in batch_places(step, settings.batch_size, len(samples), settings.seed)]
            loss = _gradients(model, members, settings, list(leaves.values()), padding=padding, accelerator=accelerator)
            active = cells.drop_empty_gradients()
            norm = _clip(leaves.values(), settings.clip)
            tokens = sum(int(sample.counted.sum()) for sample in members)
            seconds = time.monotonic() - clock
            record: dict[str, Any] = {"step": step, "loss": loss, "lr": rate, "gradient_norm": norm, "tokens": tokens, "active": active}
            record |= {"tensors": len(leaves), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
            failed = not math.isfinite(loss) or not math.isfinite(norm)
            if not failed and folder and main and time.monotonic() - saved > checkpoint_seconds:
                # before the update: these weights have just given a loss and gradients that are numbers
                save_state(folder, identity, step, before + time.monotonic() - began, leaves, optimizer)
                saved = time.monotonic()
            if not failed:
                optimizer.step()
                moved = moved or active > 0
            optimizer.zero_grad()
            scores = None
            if evaluate is not None and settings.eval_every and (step + 1) % settings.eval_every == 0 and step + 1 < steps:
                scores = evaluate()
                record["bits_per_byte"] = {name: score.bits_per_byte for name, score in scores.items()}
            log.append(record)
            if folder and main:
                append_log(folder, record)
            # the step is the trackers' own axis, and a name that some of them reserve
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
            accelerator.log(numbers, step=step)
            if scores is not None:
                accelerator.log(tracked_scores(scores), step=step + 1)  # measured after so many updates
            if progress:
                progress(record)
            if failed:
                raise FinetuneError(_failure(step, loss, norm, folder))
    if not moved:
        raise FinetuneError("no chosen expert had a gradient in any step: the tokens it saw count for nothing in the loss")
    if not all(bool(leaf.isfinite().all()) for leaf in leaves.values()):
        raise FinetuneError(_failure(steps - 1, math.nan, math.nan, folder))
    seconds = before + time.monotonic() - began
    if folder and main:
        save_state(folder, identity, steps, seconds, leaves, optimizer)
    return Trained(
        log=log,
        steps=steps,
        seconds=seconds,
        parameters=sum(leaf.numel() for leaf in leaves.values()),
        chosen_bytes=cells.chosen_bytes,
        optimizer_bytes=cells.optimizer_bytes(optimizer),
    )


def make_optimizer(leaves: Sequence[nn.Parameter], settings: FinetuneSettings) -> torch.optim.AdamW:
    """AdamW over the leaves with its moments in place from the start: a state is complete, and memory known, before any token is seen.

    A leaf without a gradient in a step is skipped: no decay, no momentum, and its own step counter waits.
    """
    fused = all(leaf.device.type in ("cpu", "cuda") for leaf in leaves)
    optimizer = torch.optim.AdamW(leaves, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    for leaf in leaves:
        step = torch.zeros((), dtype=torch.float32, device=leaf.device if fused else None)
        optimizer.state[leaf] = {"step": step, "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}
    return optimizer


def batch_places(step: int, size: int, samples: int, seed: int) -> list[int]:
    """Places of the samples of a step: every epoch takes each sample once, in an order of its own."""
    places = range(step * size, (step + 1) * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(samples) for epoch in {place // samples for place in places}}
    return [int(orders[place // samples][place % samples]) for place in places]


def refuse_sharding(accelerator: Any = None) -> None:
    """Raises FinetuneError under FSDP, DeepSpeed and the like: they cut the fused tensors whose rows are trained.

    Without an accelerator, by what `accelerate launch` put into the environment: making one would start the sharding already.
    """
    kind = next((name for name in SHARDING if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true")), None)
    if accelerator is not None and kind is None:
        given = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        kind = given if given in SHARDING else None
    if kind is not None:
        raise FinetuneError(
            f"{kind} cuts the fused tensors of the experts into shards, and single experts cannot be trained in shards; "
            "use accelerate's plain multi-process mode, in which every process holds the model"
        )


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turns running out of memory into a FinetuneError that names the remedies."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        text = str(problem).lower()
        if (
            isinstance(problem, RuntimeError)
            and not isinstance(problem, torch.OutOfMemoryError)
            and not any(said in text for said in MEMORY)
        ):
            raise
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise FinetuneError(
            f"out of memory ({first}). In this order: --micro-batch-size 1, --gradient-checkpointing, a shorter --seq-len, --bf16, "
            "--lora-rank, or a path with a smaller budget; the same command then goes on where the last state was saved"
        ) from problem


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
            losses = token_losses(model, collate(mine[first : first + size], padding=padding))
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


def _check_reach(
    model: PreTrainedModel, cells: TrainableCells, samples: Sequence[Sample], settings: FinetuneSettings, padding: int
) -> None:
    """Raises FinetuneError when no token of the data is routed to any of the cells; looks no further than the first that is."""
    wanted = {layer: torch.tensor([cell.expert for cell in cells.cells if cell.layer == layer]) for layer, _ in cells.cells}
    sites = [site for site in find_sites(model) if site.layer in wanted]
    found: list[bool] = []

    def observe(index: int, decision: Decision) -> None:
        chosen = torch.isin(decision.ids, wanted[sites[index].layer].to(decision.ids.device)) & (decision.weights != 0)
        found.append(bool((chosen.any(-1) & real.to(chosen.device)).any()))

    size = settings.micro_batch_size or settings.batch_size
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


@contextmanager
def _training_mode(model: PreTrainedModel, settings: FinetuneSettings) -> Iterator[None]:
    """Dropout on, and activations recomputed where asked for; the model is left as it was."""
    was_training = model.training
    model.train()
    try:
        if settings.gradient_checkpointing:
            try:
                model.activation_checkpointing_enable()
            except ValueError as problem:
                raise FinetuneError(f"--gradient-checkpointing: {problem}") from None
        yield
    finally:
        if settings.gradient_checkpointing and model.supports_gradient_checkpointing:
            model.activation_checkpointing_disable()
        model.train(was_training)


def _failure(step: int, loss: float, norm: float, folder: Path | None) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    kept = f"; the last good state is kept in {folder / STATE}" if folder is not None and (folder / STATE).is_file() else ""
    return f"{what} at step {step}: training stopped{kept}. Lower --lr and choose another --out folder"
