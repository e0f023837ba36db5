"""What a router computes while it runs: the scores of its top-k, its logits, its masks; copied at the moment they are seen.

A router may change any of these in place afterwards (scale its scores, clamp its ids): a copy keeps what the top-k saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbes.models.sites import RoutingSite


@dataclass(frozen=True, eq=False)
class Choice:
    """One call that chose experts.

    Attributes:
        scores: [..., classes], a copy of what it was taken on.
        ids: [..., slots], a copy of what it returned; None where it returned one slot of several.
        blocked: bool, shaped as scores: what was masked out of them before, or None.
    """

    scores: Tensor
    ids: Tensor | None
    blocked: Tensor | None


class Scorekeeper(TorchFunctionMode):
    """Sees every torch call while a router runs, and remembers those its decision can have come from.

    It listens only then, from ``start`` to ``stop``: hearing the whole forward would cost a tenth of a small model's time.

    Attributes:
        hidden: a copy of the router's input.
        logits: a copy of the output of the router's last linear map.
        softmax: the last softmax over as many values as there are slots; not a copy.
        choices: calls of top-k, maximum and sort, in order.
        tables: copies of everything shaped [tokens, slots] or [tokens, experts], in order, where the block is listened to.
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

    def reset(self, site: RoutingSite | None = None, *, whole_block: bool = False) -> None:
        """Forget everything; listen to the router of a site, or to its whole block."""
        self.site = site
        self.in_router = site is not None and site.router is not None and not whole_block
        self.whole_block = whole_block
        self.logits: Tensor | None = None
        self.softmax: Tensor | None = None
        self.choices: list[Choice] = []
        self.tables: list[Tensor] = []
        self._masks: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.site is not None:
            name = getattr(func, "__name__", "")
            note = self._NOTES.get(name)
            if note is not None:
                note(self, self.site, result, *args, **kwargs)
            if self.whole_block:
                self._tabulate(self.site, args[0] if name == "__setitem__" else result)
        return result

    def _linear(self, site: RoutingSite, result: Tensor, *_: Any, **__: Any) -> None:
        width = result.shape[-1] if result.ndim else 0
        if (self.in_router and width >= site.num_experts) or (self.whole_block and width == site.num_experts and not self.choices):
            self.logits = copied(result)

    def _topk(self, site: RoutingSite, result: Any, scores: Tensor, *_: Any, **__: Any) -> None:
        if scores.ndim and scores.shape[-1] >= site.num_experts and result[1].shape[-1] == site.top_k:
            self._choose(scores, result[1])

    def _max(self, site: RoutingSite, result: Any, scores: Tensor, *_: Any, **__: Any) -> None:
        # phimoe takes one maximum after another; its first maximum is over the score itself
        if not isinstance(result, Tensor) and scores.ndim and scores.shape[-1] == site.num_experts and not self.choices:
            self._choose(scores, result[1].reshape(-1, 1) if site.top_k == 1 else None)

    def _argmax(self, site: RoutingSite, result: Tensor, scores: Tensor, *_: Any, **__: Any) -> None:
        if site.top_k == 1 and scores.ndim and scores.shape[-1] == site.num_experts and result.numel() * site.num_experts == scores.numel():
            self._choose(scores, result.reshape(-1, 1))

    def _sort(self, site: RoutingSite, result: Any, scores: Tensor, *_: Any, **__: Any) -> None:
        order = result if isinstance(result, Tensor) else result[1]
        if self.whole_block and scores.ndim and scores.shape[-1] == site.num_experts:
            self._choose(scores, order[..., : site.top_k])
            self.tables.append(copied(order[..., : site.top_k]))

    def _masked_fill(self, _: RoutingSite, result: Tensor, given: Tensor, mask: Any = None, *__: Any, **___: Any) -> None:
        if isinstance(mask, Tensor):
            before = self._blocked(given)
            self._masks.append((result, copied(mask) if before is None or before.shape != mask.shape else before | mask))

    def _softmax(self, site: RoutingSite, result: Tensor, *_: Any, **__: Any) -> None:
        if result.ndim and result.shape[-1] == site.top_k:
            self.softmax = result

    _NOTES = {  # noqa: RUF012
        "linear": _linear,
        "matmul": _linear,
        "__matmul__": _linear,
        "topk": _topk,
        "max": _max,
        "argmax": _argmax,
        "sort": _sort,
        "argsort": _sort,
        "masked_fill": _masked_fill,
        "masked_fill_": _masked_fill,
        "softmax": _softmax,
    }

    def _choose(self, scores: Tensor, ids: Tensor | None) -> None:
        self.choices.append(Choice(copied(scores), None if ids is None else copied(ids), self._blocked(scores)))

    def _blocked(self, scores: Tensor) -> Tensor | None:
        return next((mask for result, mask in reversed(self._masks) if result is scores), None)

    def _tabulate(self, site: RoutingSite, result: Any) -> None:
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor) or not value.ndim or value.dtype.is_complex:
                continue
            flat = value.reshape(-1, 1) if site.top_k == 1 and value.ndim == 1 else value
            if flat.shape[-1] == site.top_k or (value.is_floating_point() and flat.shape[-1] == site.num_experts):
                self.tables.append(copied(flat).reshape(-1, flat.shape[-1]))


def copied(tensor: Tensor) -> Tensor:
    """The tensor's values of now."""
    return tensor.detach().clone()
