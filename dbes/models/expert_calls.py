"""Experts that a block calls one by one (a ModuleList, as code beside a checkpoint writes it): what ran, and proof of it.

Nothing tells which experts such a block runs for a token: its gate is a plain linear map, the top-k stands in the block's own
forward. So the block is listened to until its first expert runs, and what was seen there counts only where it is what ran:

* the ids are the table [tokens, slots] seen last whose rows are, expert by expert, the very rows that the experts were given;
* the weights are the table seen last with which the experts' outputs add up to what they give to the block's output. That is
  found by running the block again on the same input with every expert's output enlarged, once for every site of a recording.

Where nothing fits, the block is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dbes.models.sites import RoutingSite, expert_modules

COLUMNS = 64
"""Columns of a row that tell it from others, and on which outputs are compared; spread evenly."""

_LABEL = 0x9E3779B97F4A7C15 - 2**64
_FACTOR = 0x5851F42D4C957F2D


Proven = MutableMapping[tuple[int, int], int]
"""By site and number of tables seen: the place of the table that was proven to hold the weights."""


class ExpertCalls:
    """What the experts of one site were given in one forward of its block.

    Attributes:
        again: while the block runs again for the proof; nothing else is to be watched then.
    """

    def __init__(self, site: RoutingSite) -> None:
        self.site = site
        self.again = False
        self._enlarge = False
        self.begin((), {})

    def begin(self, args: tuple, kwargs: dict) -> None:
        """A forward of the block begins with these arguments."""
        self._sources: list[Tensor] = []
        self._given: list[tuple[int, Tensor]] = []
        self._outputs: list[Tensor] = []
        # copies: the block may work in place on what it is given
        self._arguments = tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}
        self._random = _random_states(next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu")))

    def add_source(self, hidden: Tensor) -> None:
        """Hidden states that the experts' rows can come from."""
        self._sources.append(row_keys(hidden))

    def attach(self, on_first: Any) -> Iterator[RemovableHandle]:
        """Hooks on every expert; ``on_first`` is called before each of them runs."""
        for expert, module in enumerate(expert_modules(self.site)):
            yield module.register_forward_pre_hook(self._before(expert, on_first), with_kwargs=True)
            yield module.register_forward_hook(self._after)

    def _before(self, expert: int, on_first: Any) -> Any:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.again and torch._C._current_graph_task_id() == -1:
                on_first()
                rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self._given.append((expert, row_keys(rows)))

        return before

    def _after(self, _: nn.Module, __: tuple, output: Any) -> Any:
        if not self.again or not isinstance(output, Tensor):
            return None
        if self._enlarge:
            return output * _scale(output)
        self._outputs.append(_columns(output).float())
        return None

    def executed(self, tables: Sequence[Tensor]) -> Tensor:
        """int64 [tokens, slots], the ids that are exactly what ran.

        Raises:
            ValueError: there are none; says what was seen.
        """
        counts = torch.zeros(self.site.num_experts, dtype=torch.long)
        for expert, keys in self._given:
            counts[expert] += len(keys)
        if not self._given:
            raise ValueError("none of its experts was called as a module")
        ran = self._ran().sort()[0]
        candidates = [table for table in tables if not table.is_floating_point() and table.dtype != torch.bool]
        candidates = [table.long() for table in candidates if table.shape[-1] == self.site.top_k]
        for ids in reversed(candidates):
            for source in self._sources:
                if ids.numel() == len(ran) and len(ids) == len(source) and torch.equal(_expected(ids, source).sort()[0], ran):
                    self._order = _expected(ids, source).argsort(), self._ran().argsort()
                    return ids
        tokens = len(self._sources[0])
        told = f"its experts were given {int(counts.sum())} rows of {tokens} tokens ({_span(counts)} each)"
        if not candidates:
            raise ValueError(f"{told}, and no top-{self.site.top_k} over {self.site.num_experts} experts was seen before they ran")
        last = candidates[-1].flatten().clamp(0, self.site.num_experts - 1).bincount(minlength=self.site.num_experts).cpu()
        raise ValueError(f"{told}, which is not what the choice seen last gives them ({_span(last)})")

    def _ran(self) -> Tensor:
        return torch.cat([_labelled(keys, torch.full_like(keys, expert)) for expert, keys in self._given])

    def weights(self, ids: Tensor, tables: Sequence[Tensor], proven: Proven, index: int) -> Tensor:
        """float [tokens, slots], the weights that the experts' outputs are added up with.

        Args:
            proven: filled here.

        Raises:
            ValueError: none of the tables holds them.
        """
        place = proven.get((index, len(tables)))
        if place is not None:
            return _gathered(tables[place], ids)
        added, parts = self._run_again(ids)
        for place in reversed(range(len(tables))):
            table = tables[place]
            if not table.is_floating_point() or len(table) != len(ids):
                continue
            weights = _gathered(table, ids)
            sums = (weights.float()[..., None] * parts).sum(dim=1)
            if not bool(sums.isfinite().all()):  # NaN in the gate is told by those who check the weights
                return weights
            if float((added - sums).norm()) <= self._allowed * float(sums.norm()):
                proven[index, len(tables)] = place
                return weights
        raise ValueError(
            "its experts ran for the tokens that were seen, but no weights that were seen before they ran "
            "add their outputs up to the block's output"
        )

    @torch.no_grad()
    def _run_again(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [tokens, columns], what the experts add to the block's output; and [tokens, slots, columns], their outputs."""
        plain = self._output(enlarge=False)
        enlarged = self._output(enlarge=True)
        self._allowed = torch.finfo(plain.dtype).eps ** 0.5
        outputs = torch.cat(self._outputs)
        expected, ran = self._order
        if len(outputs) != len(ran):
            raise ValueError(f"its experts were given {len(ran)} rows and gave {len(outputs)}")
        parts = torch.empty_like(outputs)
        parts[expected] = outputs[ran]
        return (_columns(enlarged).float() - _columns(plain).float()) / (_scale(plain) - 1), parts.reshape(*ids.shape, -1)

    def _output(self, *, enlarge: bool) -> Tensor:
        args, kwargs = (tuple(map(_copy, self._arguments[0])), {name: _copy(value) for name, value in self._arguments[1].items()})
        self.again, self._enlarge = True, enlarge
        try:
            with _random_of(self._random):  # a gate may add noise
                output = self.site.block.forward(*args, **kwargs)
        finally:
            self.again = self._enlarge = False
        return output if isinstance(output, Tensor) else next(value for value in output if isinstance(value, Tensor))


def _scale(output: Tensor) -> int:
    # far above 1, so that rounding of whatever else is added to the output does not matter; float16 has little room
    return 4 if output.dtype == torch.float16 else 32


def _random_states(device: torch.device) -> dict[str, Any]:
    here = {} if device.type == "cpu" else {"device": device, "state": torch.get_device_module(device).get_rng_state(device)}
    return {"cpu": torch.get_rng_state(), **here}


@contextmanager
def _random_of(states: dict[str, Any]) -> Iterator[None]:
    """Inside the block random numbers are drawn as after these states; afterwards, as if none had been drawn."""
    device = states.get("device")
    with torch.random.fork_rng([] if device is None else [device], device_type="cuda" if device is None else device.type):
        torch.set_rng_state(states["cpu"])
        if device is not None:
            torch.get_device_module(device).set_rng_state(states["state"], device)
        yield


def row_keys(rows: Tensor) -> Tensor:
    """int64 [rows], equal for rows that are equal bit by bit (and by chance with probability 2**-64)."""
    part = _columns(rows.detach()).contiguous()
    bits = part.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]).long()
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (bits * factors.to(bits.device)).sum(dim=-1)


def _columns(rows: Tensor) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    return flat[:, :: max(1, flat.shape[1] // COLUMNS)]


def _expected(ids: Tensor, source: Tensor) -> Tensor:
    """int64 [tokens * slots], the keys of rows and experts of a choice."""
    return _labelled(source[:, None], ids).flatten()


def _labelled(keys: Tensor, experts: Tensor) -> Tensor:
    return keys * _FACTOR + (experts + 1) * _LABEL


def _gathered(table: Tensor, ids: Tensor) -> Tensor:
    return table if table.shape == ids.shape else table.gather(1, ids)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _span(counts: Tensor) -> str:
    return f"{int(counts.min())} to {int(counts.max())}"
