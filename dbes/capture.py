"""Watch a model route: what was executed, and where possible what the router scored it on.

The decision is read where it is executed: at the input of the experts module (see `dbes.sites` for the four exceptions).
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
from torch.overrides import TorchFunctionMode

from dbes.errors import RecordingError
from dbes.sites import RoutingSite


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


Observe = Callable[[int, Decision], None]


@contextmanager
def watching(sites: Sequence[RoutingSite], observe: Observe, *, scores: bool = True, stop: bool = False) -> Iterator[None]:
    """Report every routing decision made inside the block as ``observe(index of the site, decision)``; leave no hook behind.

    The model's own computation is untouched. A forward that is repeated by gradient checkpointing is reported once.

    Args:
        scores: observe the router's arithmetic too; without it ``scores``, ``blocked`` and ``logits`` are None.
        stop: end the block silently once the last site has decided: the rest of the forward cannot change any routing.

    Raises:
        RecordingError: a site handed its experts something that is not (ids, weights).
    """
    keeper = _Scorekeeper()
    with ExitStack() as stack:
        for index, site in enumerate(sites):
            last = stop and index == len(sites) - 1
            for handle in _attach(index, site, keeper, observe, scores, last):
                stack.callback(handle.remove)
        # whatever ends the block, the keeper does not go on listening
        stack.callback(keeper.stop)
        with suppress(_LastRouterReached):
            yield


class _LastRouterReached(Exception):
    """Leaves a forward that has nothing more to tell."""


class _Scorekeeper(TorchFunctionMode):
    """Sees every torch call while a router runs, and remembers those its decision can have come from.

    It listens only then, from ``start`` to ``stop``: hearing the whole forward would cost a tenth of a small model's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.listening = False
        self.reset()

    def start(self) -> None:
        if not self.listening:
            self.listening = True
            self.__enter__()

    def stop(self) -> None:
        if self.listening:
            self.listening = False
            self.__exit__(None, None, None)

    def reset(self, site: RoutingSite | None = None) -> None:
        self.site = site
        self.in_router = site is not None and site.router is not None
        self.logits: Tensor | None = None
        self.softmax: Tensor | None = None
        self.calls: list[tuple[Tensor, Tensor | None]] = []
        self.masks: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.site is not None:
            note = self._NOTES.get(getattr(func, "__name__", ""))
            if note is not None:
                note(self, self.site, result, *args, **kwargs)
        return result

    def _linear(self, site: RoutingSite, result: Tensor, *_: Any, **__: Any) -> None:
        if self.in_router and result.ndim and result.shape[-1] >= site.num_experts:
            self.logits = result

    def _topk(self, site: RoutingSite, result: Any, scores: Tensor, *_: Any, **__: Any) -> None:
        if scores.ndim and scores.shape[-1] >= site.num_experts and result[1].shape[-1] == site.top_k:
            self.calls.append((scores, result[1]))

    def _max(self, site: RoutingSite, result: Any, scores: Tensor, *_: Any, **__: Any) -> None:
        # phimoe takes one maximum after another; its first maximum is over the score itself
        if not isinstance(result, Tensor) and scores.ndim and scores.shape[-1] == site.num_experts and not self.calls:
            self.calls.append((scores, None))

    def _masked_fill(self, _: RoutingSite, result: Tensor, __: Tensor, mask: Any = None, *___: Any, **____: Any) -> None:
        if isinstance(mask, Tensor):
            self.masks.append((result, mask))

    def _softmax(self, site: RoutingSite, result: Tensor, *_: Any, **__: Any) -> None:
        if result.ndim and result.shape[-1] == site.top_k:
            self.softmax = result

    _NOTES = {  # noqa: RUF012
        "linear": _linear,
        "matmul": _linear,
        "__matmul__": _linear,
        "topk": _topk,
        "max": _max,
        "masked_fill": _masked_fill,
        "softmax": _softmax,
    }


def _attach(
    index: int, site: RoutingSite, keeper: _Scorekeeper, observe: Observe, scores: bool, last: bool
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _recomputed():
            keeper.reset(site)
            keeper.hidden = _first_tensor(args, kwargs)
            if scores:
                keeper.start()

    def leave(*_: Any) -> None:
        keeper.in_router = False

    def decide(given: Any, kwargs: dict | None = None) -> None:
        if _recomputed():
            return
        keeper.stop()
        keeper.site = None  # what follows is not the router's arithmetic
        try:
            ids, weights = READERS[site.adapter](site, given, kwargs or {}, keeper)
        except (TypeError, ValueError, IndexError, KeyError) as problem:
            raise RecordingError(
                f"layer {site.layer} ({site.name}): unsupported routing contract ({problem}); "
                "expected expert ids and weights of shape [tokens, top_k]"
            ) from None
        hidden = keeper.hidden
        if hidden is None and site.adapter == "experts":
            hidden = _first_tensor(given, kwargs or {})
        observe(index, _decision(site, ids, weights, hidden, keeper if scores else None))
        keeper.reset()
        keeper.hidden = None
        if last:
            raise _LastRouterReached

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


def _decision(site: RoutingSite, ids: Tensor, weights: Tensor, hidden: Tensor | None, keeper: _Scorekeeper | None) -> Decision:
    scores = choice = matched = blocked = logits = None
    if keeper is not None and site.adapter != "embedding":
        skipped = ids.masked_fill(weights == 0, -1)
        for candidate, returned in reversed(keeper.calls):
            flat = candidate.detach().reshape(-1, candidate.shape[-1])
            picked = flat.topk(site.top_k, dim=-1)[1] if returned is None else returned.reshape(-1, site.top_k)
            if len(flat) != len(ids):
                continue
            scores, choice = flat, picked
            matched = same_sets(picked, ids) | same_sets(picked.masked_fill(picked >= site.num_experts, -1), skipped)
            masks = (mask for result, mask in keeper.masks if result is candidate and mask.numel() == flat.numel())
            blocked = next((mask.reshape(flat.shape) for mask in masks), None)
            break
        if keeper.logits is not None and keeper.logits.numel() == len(ids) * keeper.logits.shape[-1]:
            logits = keeper.logits.detach().reshape(len(ids), -1)
    if hidden is not None:
        hidden = hidden.detach().reshape(-1, hidden.shape[-1])
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


def _read_experts(site: RoutingSite, args: tuple, kwargs: dict, _: _Scorekeeper) -> tuple[Tensor, Tensor]:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    ids = next(value for value in tensors[1:] if not value.is_floating_point())
    weights = next(value for value in tensors[1:] if value.is_floating_point())
    return _checked(site, ids, weights)


def _read_scores(site: RoutingSite, output: Any, _: dict, __: _Scorekeeper) -> tuple[Tensor, Tensor]:
    gates = output[0].detach()
    weights, ids = gates.reshape(-1, site.num_experts).topk(site.top_k, dim=-1)
    return ids, weights


def _read_sorted(site: RoutingSite, output: Any, _: dict, __: _Scorekeeper) -> tuple[Tensor, Tensor]:
    order, _, gates, sizes, _ = output
    experts = torch.arange(site.num_experts, device=order.device).repeat_interleave(torch.as_tensor(sizes, device=order.device))
    ids, weights = torch.empty_like(order), torch.empty_like(gates)
    ids[order], weights[order] = experts, gates
    return ids.reshape(-1, site.top_k), weights.detach().reshape(-1, site.top_k)


def _read_embedding(site: RoutingSite, args: tuple, kwargs: dict, keeper: _Scorekeeper) -> tuple[Tensor, Tensor]:
    ids = _first_tensor(args, kwargs)
    # the block multiplies its experts by the softmax it took last (and may have normalised in place); without the
    # keeper no weight can be had, and every slot counts alike
    weights = keeper.softmax if keeper.softmax is not None else torch.ones(ids.shape, device=ids.device)
    return _checked(site, ids, weights)


def _read_gate(site: RoutingSite, output: Any, _: dict, __: _Scorekeeper) -> tuple[Tensor, Tensor]:
    tensors = [value for value in output if isinstance(value, Tensor)]
    ids = next((value for value in tensors if not value.is_floating_point() and value.shape[-1] == site.top_k), None)
    if ids is None:
        raise ValueError(f"{type(site.router).__name__} returns no expert ids")
    weights = next((value for value in tensors if value.is_floating_point() and value.shape == ids.shape), None)
    if weights is None:
        raise ValueError(f"{type(site.router).__name__} returns no weight per expert id")
    return _checked(site, ids, weights)


READERS: dict[str, Callable[[RoutingSite, Any, dict, _Scorekeeper], tuple[Tensor, Tensor]]] = {
    "experts": _read_experts,
    "scores": _read_scores,
    "sorted": _read_sorted,
    "embedding": _read_embedding,
    "gate": _read_gate,
}


def _checked(site: RoutingSite, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if ids.shape[-1] != site.top_k:
        raise ValueError(f"{ids.shape[-1]} slots per token, the router is said to choose {site.top_k}")
    ids = ids.detach().reshape(-1, site.top_k).long()
    weights = weights.detach().reshape(-1, weights.shape[-1])
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
