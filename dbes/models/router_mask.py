"""A model whose routers cannot choose some experts: their scores are minus infinity before the top-k, so that k others run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dbes.errors import ModelError
from dbes.models.hooks import READERS
from dbes.models.scorekeeper import Scorekeeper
from dbes.models.sites import RoutingSite, expert_modules, find_sites

SCORES = ("linear", "matmul", "__matmul__")
CHOICES = ("topk", "max", "argmax", "sort", "argsort")
SPARE = 4
"""A router may score so many more classes than experts (a skip, shared experts)."""


@contextmanager
def routing_masked(model: nn.Module, dropped: Mapping[int, Collection[int]]) -> Iterator[None]:
    """Inside the block no token is routed to these experts, by decoder layer; nothing else of the model changes.

    The router's logits of a dropped expert are minus infinity, and so are the values that the top-k is taken on (a bias may have been added
    to the score of minus infinity). So the model itself chooses k of the other experts and normalises their weights as it does: over the
    kept experts where its softmax is over all, over the chosen where it is over these. What ran is looked at in every forward.

    Raises:
        ModelError: a layer or expert that the model does not have; fewer than k experts are left; experts are not chosen by one score each
            (doge), or, once the model runs, by something else than the router's scores (a table of token ids).
    """
    sites = {site.layer: site for site in find_sites(model)}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer, experts in dropped.items():
            if not experts:
                continue
            site = _checked(sites, layer, experts)
            mask = _RouterMask(site, experts)
            stack.callback(mask.stop)
            for handle in mask.attach():
                stack.callback(handle.remove)
        yield


def _checked(sites: Mapping[int, RoutingSite], layer: int, experts: Collection[int]) -> RoutingSite:
    site = sites.get(layer)
    if site is None or not all(0 <= expert < site.num_experts for expert in experts):
        raise ModelError(f"layer {layer} with experts {sorted(experts)} does not exist: the model's MoE layers are {sorted(sites)}")
    if site.num_experts - len(set(experts)) < site.top_k:
        raise ModelError(
            f"layer {layer}: {site.num_experts - len(set(experts))} experts would be left, and every token runs {site.top_k}; keep more"
        )
    if site.adapter == "embedding":
        raise ModelError(f"layer {layer} ({site.name}): experts are chosen by sums of two key scores, so that none has a score to mask")
    return site


class _RouterMask(TorchFunctionMode):
    """Listens from the start of a router to its experts."""

    def __init__(self, site: RoutingSite, dropped: Collection[int]) -> None:
        super().__init__()
        self.site = site
        self._dropped = torch.tensor(sorted(set(dropped)))
        self._classes = range(site.num_experts, site.num_experts + max(site.zero_experts, SPARE) + 1)
        self._listening = self._in_router = self._seen = False

    def start(self) -> None:
        self.stop()
        self._listening, self._in_router, self._seen = True, True, False
        self.__enter__()

    def stop(self) -> None:
        if self._listening:
            self._listening = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in CHOICES:
            args = tuple(self._masked(value) if place == 0 else value for place, value in enumerate(args))
            kwargs = {key: self._masked(value) if key == "input" else value for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        if self._in_router and name in SCORES and (masked := self._masked(result)) is not result:
            self._seen = True
            return masked
        return result

    def _masked(self, scores: Any) -> Any:
        """The scores with minus infinity for dropped experts; what is no score of every expert as it is."""
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or not scores.ndim or scores.shape[-1] not in self._classes:
            return scores
        return scores.index_fill(-1, self._dropped.to(scores.device), -torch.inf)

    def attach(self) -> Iterator[RemovableHandle]:
        site = self.site
        whole = site.router is None or site.adapter == "modules"
        yield (site.block if whole else site.router).register_forward_pre_hook(lambda *_: self.start())  # pyright: ignore[reportOptionalMemberAccess]
        if site.adapter == "modules":
            for expert, module in enumerate(expert_modules(site)):
                yield module.register_forward_pre_hook(self._before_module(expert), with_kwargs=True)
            yield site.block.register_forward_hook(lambda *_: self._prove(torch.empty(0, dtype=torch.long)))
        elif site.adapter == "experts":
            if not whole:
                yield site.router.register_forward_hook(self._leave)  # pyright: ignore[reportOptionalMemberAccess]
            yield site.probe.register_forward_pre_hook(self._before_experts, with_kwargs=True)
        else:
            yield site.probe.register_forward_hook(lambda _, __, output: self._read(output, {}))

    def _leave(self, *_: Any) -> None:
        self._in_router = False

    def _before_experts(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._read(args, kwargs)

    def _read(self, given: Any, kwargs: dict) -> None:
        self.stop()
        self._prove(READERS[self.site.adapter](self.site, given, kwargs, Scorekeeper())[0])

    def _before_module(self, expert: int) -> Any:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.stop()
            rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._prove(torch.full((rows.numel() and 1,), expert))

        return before

    def _prove(self, ran: Tensor) -> None:
        """Refuses what was not masked: experts that ran although they were dropped, or scores that were never seen."""
        self.stop()
        told = f"layer {self.site.layer} ({self.site.name}: {type(self.site.router or self.site.block).__name__})"
        if bool(torch.isin(ran, self._dropped.to(ran.device)).any()):
            raise ModelError(f"{told}: dropped experts ran all the same, because something else than the router's scores chose them")
        if not self._seen:
            raise ModelError(f"{told}: no scores of its router were seen before its experts ran, so that none can be masked")
