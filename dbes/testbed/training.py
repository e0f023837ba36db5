"""The training loop: one global batch a step, and after a kill the run resumes at the step of its last saved state."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbes.errors import DbesError
from dbes.files import keep_log_before, refused_by_system
from dbes.models.losses import next_token_loss
from dbes.models.training import append_log, copy_state, finite, learning_rate, read_state, save_state
from dbes.testbed.balancing import Processes, expert_shares
from dbes.testbed.mix import Batches, DomainBatch, Mix
from dbes.testbed.models import build_model
from dbes.testbed.routers import Routing
from dbes.testbed.settings import OptimizerSettings, TrainSettings

STATE, LOG = "state.safetensors", "log.jsonl"


class TrainingError(DbesError):
    """Training cannot continue: the loss is not a number, or a process was killed."""


class StateError(TrainingError):
    """The state in the folder is of another run, or damaged."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run.

    Attributes:
        model: float32, on the CPU unless an accelerator was given.
        bias: float [layers, experts], the loss-free bias where the architecture has no place for it; zeros otherwise.
        log: one record every ``log_every`` steps and for the last one.
        cpu_seconds: of the whole run, over all its interruptions.
    """

    model: PreTrainedModel
    bias: Tensor
    log: list[dict[str, Any]]
    cpu_seconds: float


def train(
    settings: TrainSettings,
    mix: Mix,
    *,
    folder: Path | None = None,
    initial: Mapping[str, Tensor] | None = None,
    checkpoint_seconds: float = 120.0,
    log_every: int = 10,
    accelerator: Any = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Train one model by its settings; the same settings and mix give the same model, interrupted or not.

    Args:
        folder: where the log and the resumable state are kept; None keeps nothing.
        initial: weights to begin with, by parameter name; by default drawn from the seed.
        accelerator: an ``accelerate.Accelerator``; every process takes its share of each global batch, and gradients and the
            frequencies of global scope are averaged over processes.
        progress: called with every record of the log.

    Raises:
        MixError: the mix has not the domains, or not enough tokens; the reference router has too few experts.
        TrainingError: the loss is NaN or infinite (the log is kept).
        StateError: the folder holds another run, or a damaged state.
        FileError: log or state cannot be written.
    """
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    steps = settings.optimizer.steps
    batches = Batches(mix, settings.mix, steps=steps, seed=settings.data_seed)
    model = build_model(settings.model, seed=settings.seed).train()
    if initial is not None:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(initial[name])
    processes = None
    if accelerator is not None:
        model = model.to(accelerator.device)
        processes = _processes(accelerator)
    with Routing(model, settings.routing, domains=len(batches.mix.domains), seed=settings.seed, processes=processes) as routing:
        optimizer = optimizer_of(model, settings.optimizer)
        identity = settings.identity(mix.digest)
        start, spent = _restore(folder, identity, model, optimizer, routing) if folder else (0, 0.0)
        spent -= time.process_time()
        log = keep_log_before(folder / LOG, start) if folder else []
        saved = time.monotonic()
        for step in range(start, steps):
            began = time.monotonic()
            batch = _share_of_process(batches(step), accelerator)
            loss, nats, balance, norm = train_step(model, optimizer, routing, batch, step=step, settings=settings, processes=processes)
            failed = not math.isfinite(loss)
            if step % log_every == 0 or step == steps - 1 or failed:
                record = _record(routing, batch, loss, nats, balance, norm, names=batches.mix.domains, processes=processes)
                record = {"step": step, **record, "learning_rate": round(_rate(settings.optimizer, step), 7)}
                elapsed = time.monotonic() - began
                record["tokens_per_second"] = round(settings.mix.tokens_per_step / elapsed)
                log.append(finite(record))
                if folder and (accelerator is None or accelerator.is_main_process):
                    append_log(folder / LOG, log[-1])
                if progress:
                    progress(log[-1])
            if failed:
                raise TrainingError(f"the loss is {loss} at step {step}: training stopped; lower the learning rate (log kept)")
            if folder and (step == steps - 1 or time.monotonic() - saved > checkpoint_seconds):
                if accelerator is None or accelerator.is_main_process:
                    _save_state(folder, identity, step + 1, spent + time.process_time(), model, optimizer, routing)
                saved = time.monotonic()
    return Trained(model=model.eval(), bias=routing.bias, log=log, cpu_seconds=spent + time.process_time())


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed blocks back to the system: at these sizes page faults cost a third of the time. Elsewhere: nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)


def _rate(settings: OptimizerSettings, step: int) -> float:
    last = settings.steps - 1
    return learning_rate(step, peak=settings.learning_rate, warmup=settings.warmup, last=last, floor=settings.final_share)


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    routing: Routing,
    batch: DomainBatch,
    *,
    step: int,
    settings: TrainSettings,
    processes: Processes | None = None,
) -> tuple[float, Tensor, Tensor, Tensor]:
    """One step on one batch: the loss over all processes, this one's nats per token, the balancing loss, the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = _rate(settings.optimizer, step)
    device = next(model.parameters()).device
    tokens, domain = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.domain).to(device)
    routing.begin(tokens, domain, step=step)
    loss, nats = next_token_loss(model, tokens)
    balance = routing.balancing_loss()
    (loss + settings.routing.coefficient * balance).backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    loss = loss.detach()
    if processes is not None:
        for parameter in parameters:
            parameter.grad = processes.mean(parameter.grad)  # pyright: ignore[reportArgumentType]
        loss = processes.mean(loss)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.optimizer.clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss), nats, balance.detach(), norm


def _record(
    routing: Routing,
    batch: DomainBatch,
    loss: float,
    nats: Tensor,
    balance: Tensor,
    norm: Tensor,
    *,
    names: tuple[str, ...],
    processes: Processes | None,
) -> dict[str, Any]:
    """What the log keeps of a step."""
    shares = torch.stack([expert_shares(made.ids, routing.experts)[0] for made in routing.decisions])
    if processes is not None:
        shares, balance = processes.mean(shares), processes.mean(balance)
    entropy = torch.special.entr(shares).sum(-1) / math.log(routing.experts)
    by_sequence = nats.mean(1).cpu().numpy()
    by_domain = {
        name: round(float(by_sequence[batch.domain == index].mean()), 4)
        for index, name in enumerate(names)
        if (batch.domain == index).any()
    }
    return {
        "loss": round(loss, 5),
        "loss_by_domain": by_domain,
        "balancing_loss": round(float(balance) / len(routing.decisions), 5),
        "load_entropy": [round(float(value), 4) for value in entropy],
        "dropped": round(float(np.mean([made.dropped for made in routing.decisions])), 5),
        "gradient_norm": round(float(norm), 4),
    }


def optimizer_of(model: PreTrainedModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)


def _processes(accelerator: Any) -> Processes | None:
    if accelerator.num_processes == 1:
        return None
    return Processes(
        mean=lambda values: accelerator.reduce(values, "mean"),
        gather=accelerator.gather,
        index=accelerator.process_index,
        count=accelerator.num_processes,
    )


def _share_of_process(batch: DomainBatch, accelerator: Any) -> DomainBatch:
    """Consecutive sequences of the global batch, so that a micro-batch lies within one process."""
    if accelerator is None or accelerator.num_processes == 1:
        return batch
    processes = accelerator.num_processes
    if len(batch.domain) % processes:
        raise TrainingError(f"a batch of {len(batch.domain)} sequences cannot be shared by {processes} processes")
    share = len(batch.domain) // processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    return DomainBatch(tokens=batch.tokens[rows], domain=batch.domain[rows])


def _save_state(
    folder: Path,
    identity: str,
    step: int,
    cpu_seconds: float,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    routing: Routing,
) -> None:
    state = {"routing.bias": routing.bias, **_model_tensors(model)}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    facts = {"step": str(step), "cpu_seconds": str(round(cpu_seconds, 1))}
    save_state(folder / STATE, state, identity=identity, **facts)


def _restore(folder: Path, identity: str, model: PreTrainedModel, optimizer: torch.optim.Optimizer, routing: Routing) -> tuple[int, float]:
    """Load the state of this very run, if there is one, and return the step to resume at and the CPU time spent so far."""
    with refused_by_system(folder):
        folder.mkdir(parents=True, exist_ok=True)
    read = read_state(folder / STATE, identity=identity, error=StateError)
    if read is None:
        return 0, 0.0
    facts, tensors = read
    moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    copy_state(folder / STATE, tensors, {"routing.bias": routing.bias, **_model_tensors(model)}, StateError)
    for name, parameter in model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in moments]
        if keys:
            optimizer.state[parameter] = {key: moments[f"optimizer.{key}.{name}"] for key in keys}
    return int(facts["step"]), float(facts["cpu_seconds"])


def _model_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters, and buffers that are part of a checkpoint (the loss-free bias of architectures that have one)."""
    kept = model.state_dict()
    found = (*model.named_parameters(), *((name, value) for name, value in model.named_buffers() if name in kept))
    return {f"model.{name}": value.detach() for name, value in found}
