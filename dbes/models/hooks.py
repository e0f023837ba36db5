"""Watch a model route: what was executed, and where possible what the router scored it on.

The decision is read where it is executed: at the input of the experts module (see `dbes.models.sites` for the exceptions).
The score the top-k was really taken on is not returned by any family, and every family computes it differently. So the
``topk`` call itself is observed while the router runs; the observed call counts only for rows where the experts it returned
are the experts that were executed. Nothing is recomputed, and where no call fits there is no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dbes.errors import RecordingError
from dbes.models.expert_calls import ExpertCalls, Proven
from dbes.models.scorekeeper import Scorekeeper, copied
from dbes.models.sites import RoutingSite


@dataclass(frozen=True)
class Decision:
    """What one site decided for one batch; rows are all tokens of the batch, padding included, in [batch, position] order.

    Attributes:
        ids: int64 [tokens, slots], as executed; ids >= num_experts are zero-computation experts.
        weights: float [tokens, slots], as executed; 0 marks a slot that added nothing.
        hidden: [tokens, hidden], the router's own input, or None.
        scores: float [tokens, classes], the input of the top-k that chose ``choice``; None when no such call was seen.
            ``classes`` counts zero-computation and skip experts.
        choice: int64 [tokens, slots], what that top-k returned (a skipped slot has an id here, but no weight above).
        matched: bool [tokens], rows where ``choice`` is what was executed; elsewhere ``scores`` says nothing.
        blocked: bool [tokens, classes], experts a group limit took out before the top-k, or None.
        logits: float [tokens, at least classes], output of the router's last linear map, or None.
    """

    ids: Tensor
    weights: Tensor
    hidden: Tensor | None
    scores: Tensor | None
    choice: Tensor
    matched: Tensor | None
    blocked: Tensor | None
    logits: Tensor | None


EXPECTED = {"modules": "dbes records only what it can show to have run"}

Observe = Callable[[int, Decision], None]


@contextmanager
def watching(
    sites: Sequence[RoutingSite], observe: Observe, *, scores: bool = True, stop: bool = False, proven: Proven | None = None
) -> Iterator[None]:
    """Report every routing decision made inside the block as ``observe(index of the site, decision)``; leave no hook behind.

    The model's own computation is untouched; what was compiled with torch.compile runs eagerly, because compiled code does not
    call hooks. A forward that is repeated by gradient checkpointing is reported once. Decisions are copies: what the model does
    later in place does not change them.

    Args:
        scores: observe the router's arithmetic too; without it ``scores``, ``blocked`` and ``logits`` are None.
        stop: end the block silently once the last site has decided: the rest of the forward cannot change any routing.
        proven: give the same empty dict to every block about the same sites, so that experts that are modules are proven once.

    Raises:
        RecordingError: a site handed its experts something that is not (ids, weights), or runs experts in a way that was not seen.
    """
    keeper = Scorekeeper()
    proven = {} if proven is None else proven
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for index, site in enumerate(sites):
            last = stop and index == len(sites) - 1
            if site.adapter == "modules":
                handles = _attach_modules(index, site, keeper, observe, scores, last, proven)
            else:
                handles = _attach(index, site, keeper, observe, scores, last)
            for handle in handles:
                stack.callback(handle.remove)
        # whatever ends the block, the keeper no longer listens
        stack.callback(keeper.stop)
        with suppress(_LastRouterReached):
            yield


class _LastRouterReached(Exception):
    """Leaves a forward that has nothing more to tell."""


def _attach(index: int, site: RoutingSite, keeper: Scorekeeper, observe: Observe, scores: bool, last: bool) -> Iterator[RemovableHandle]:
    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _recomputed():
            keeper.reset(site)
            keeper.hidden = copied(_first_tensor(args, kwargs))
            if scores:
                keeper.start()

    def leave(*_: Any) -> None:
        keeper.in_router = False

    def decide(given: Any, kwargs: dict | None = None) -> None:
        if _recomputed():
            return
        keeper.stop()
        keeper.site = None  # what follows is not the router's arithmetic
        with _explained(site):
            ids, weights = READERS[site.adapter](site, given, kwargs or {}, keeper)
        if keeper.hidden is None and site.adapter == "experts":
            keeper.hidden = copied(_first_tensor(given, kwargs or {}))
        _report(index, site, ids, weights, keeper, observe, scores, last)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        decide(args, kwargs)

    def after(_: nn.Module, __: tuple, output: Any) -> None:
        decide(output)

    watched = site.router if site.router is not None else site.block
    yield watched.register_forward_pre_hook(enter, with_kwargs=True)
    if site.adapter in ("experts", "embedding"):
        if site.router is not None:
            yield site.router.register_forward_hook(leave)
        yield site.probe.register_forward_pre_hook(before, with_kwargs=True)
    else:
        yield site.probe.register_forward_hook(after)


def _attach_modules(
    index: int, site: RoutingSite, keeper: Scorekeeper, observe: Observe, scores: bool, last: bool, proven: Proven
) -> Iterator[RemovableHandle]:
    """Hooks of a block that calls its experts one by one: see `dbes.models.expert_calls`."""
    calls = ExpertCalls(site)

    def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _recomputed():
            keeper.reset(site, whole_block=True)
            calls.begin(args, kwargs)
            look(args, kwargs)
            keeper.start()

    def look(args: tuple, kwargs: dict) -> None:
        hidden = _first_tensor(args, kwargs)
        calls.add_source(hidden)
        keeper.hidden = copied(hidden)

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not calls.again and not _recomputed():
            keeper.in_router = True
            look(args, kwargs)

    def leave(*_: Any) -> None:
        keeper.in_router = False

    def end(*_: Any) -> None:
        if _recomputed():
            return
        keeper.stop()
        keeper.site = None
        with _explained(site):
            ids = calls.executed(keeper.tables)
            weights = calls.weights(ids, keeper.tables, proven, index)
        _report(index, site, ids, weights, keeper, observe, scores, last)

    yield site.block.register_forward_pre_hook(begin, with_kwargs=True)
    if site.router is not None:
        yield site.router.register_forward_pre_hook(enter, with_kwargs=True)
        yield site.router.register_forward_hook(leave)
    yield from calls.attach(keeper.stop)
    yield site.block.register_forward_hook(end)


def _report(
    index: int, site: RoutingSite, ids: Tensor, weights: Tensor, keeper: Scorekeeper, observe: Observe, scores: bool, last: bool
) -> None:
    observe(index, _decision(site, ids, weights, keeper if scores else None, keeper.hidden))
    keeper.reset()
    keeper.hidden = None
    if last:
        raise _LastRouterReached


@contextmanager
def _explained(site: RoutingSite) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, IndexError, KeyError, StopIteration) as problem:
        seen = [type(part).__name__ for part in (site.block, site.router, site.experts) if part is not None]
        raise RecordingError(
            f"layer {site.layer} ({site.name}: {', '.join(seen)}): unsupported routing contract: {problem}; "
            f"{EXPECTED.get(site.adapter, 'expected expert ids and weights of shape [tokens, top_k]')}"
        ) from None


def _decision(site: RoutingSite, ids: Tensor, weights: Tensor, keeper: Scorekeeper | None, hidden: Tensor | None) -> Decision:
    scores = choice = matched = blocked = logits = None
    if keeper is not None and site.adapter != "embedding":
        skipped = ids.masked_fill(weights == 0, -1)
        for seen in reversed(keeper.choices):
            flat = seen.scores.reshape(-1, seen.scores.shape[-1])
            picked = flat.topk(site.top_k, dim=-1)[1] if seen.ids is None else seen.ids.reshape(-1, site.top_k)
            if len(flat) != len(ids):
                continue
            scores, choice = flat, picked
            matched = same_sets(picked, ids) | same_sets(picked.masked_fill(picked >= site.num_experts, -1), skipped)
            blocked = seen.blocked.expand_as(seen.scores).reshape(flat.shape) if seen.blocked is not None else None
            break
        if keeper.logits is not None and keeper.logits.numel() == len(ids) * keeper.logits.shape[-1]:
            logits = keeper.logits.reshape(len(ids), -1)
    if hidden is not None:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        hidden = hidden if len(hidden) == len(ids) else None
    return Decision(
        ids=ids,
        weights=weights,
        hidden=hidden,
        scores=scores,
        choice=ids if choice is None else choice,
        matched=matched,
        blocked=blocked,
        logits=logits,
    )


def same_sets(one: Tensor, other: Tensor) -> Tensor:
    """bool [tokens]: whether two rows of ids hold the same experts, in any order."""
    equal = (one == other).all(dim=-1)
    if equal.device.type == "cpu" and bool(equal.all()):  # the common case, and cheaper than sorting
        return equal
    return (one.sort(dim=-1)[0] == other.sort(dim=-1)[0]).all(dim=-1)


def _read_experts(site: RoutingSite, args: tuple, kwargs: dict, _: Scorekeeper) -> tuple[Tensor, Tensor]:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    ids = next(value for value in tensors[1:] if not value.is_floating_point())
    weights = next(value for value in tensors[1:] if value.is_floating_point())
    return _checked(site, ids, weights)


def _read_scores(site: RoutingSite, output: Any, _: dict, __: Scorekeeper) -> tuple[Tensor, Tensor]:
    gates = output[0].detach()
    weights, ids = gates.reshape(-1, site.num_experts).topk(site.top_k, dim=-1)
    return ids, weights


def _read_sorted(site: RoutingSite, output: Any, _: dict, __: Scorekeeper) -> tuple[Tensor, Tensor]:
    order, _, gates, sizes, _ = output
    experts = torch.arange(site.num_experts, device=order.device).repeat_interleave(torch.as_tensor(sizes, device=order.device))
    ids, weights = torch.empty_like(order), torch.empty_like(gates)
    ids[order], weights[order] = experts, gates
    return ids.reshape(-1, site.top_k), weights.detach().reshape(-1, site.top_k)


def _read_embedding(site: RoutingSite, args: tuple, kwargs: dict, keeper: Scorekeeper) -> tuple[Tensor, Tensor]:
    ids = _first_tensor(args, kwargs)
    # the block multiplies its experts by the softmax it took last (and may have normalised in place); without the
    # keeper no weight can be had, and every slot counts alike
    weights = keeper.softmax if keeper.softmax is not None else torch.ones(ids.shape, device=ids.device)
    return _checked(site, ids, weights)


READERS: dict[str, Callable[[RoutingSite, Any, dict, Scorekeeper], tuple[Tensor, Tensor]]] = {
    "experts": _read_experts,
    "scores": _read_scores,
    "sorted": _read_sorted,
    "embedding": _read_embedding,
}


def _checked(site: RoutingSite, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if ids.shape[-1] != site.top_k:
        raise ValueError(f"{ids.shape[-1]} slots per token, the router is said to choose {site.top_k}")
    ids = copied(ids).reshape(-1, site.top_k).long()
    weights = copied(weights).reshape(-1, weights.shape[-1])
    if weights.shape != ids.shape:
        if weights.shape != (len(ids), site.num_experts):
            raise ValueError(f"ids of shape {tuple(ids.shape)}, weights of shape {tuple(weights.shape)}")
        weights = weights.gather(1, ids)
    return ids, weights


def _first_tensor(args: tuple, kwargs: dict) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _recomputed() -> bool:
    """Whether this forward is gradient checkpointing running a second time, inside backward."""
    return torch._C._current_graph_task_id() != -1
