"""A checkpoint of the reference router, routed as it was trained: each forward by the expert block of the domain it is said to be of.

prescription = read_prescription(folder)
with Prescribed(model, prescription.routing, prescription.domains) as prescribed, prescribed.domain("python"):
    model(input_ids=tokens)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from dbes.errors import MixError
from dbes.models.execution import base_of
from dbes.schema import Strict, read_json
from dbes.testbed.checkpoint import PRESCRIBED_ROUTERS, TRAINING
from dbes.testbed.routers import Routing
from dbes.testbed.settings import RoutingSettings, parse_settings
from dbes.text import clipped


class Prescription(Strict):
    """How a checkpoint of ``dbes testbed train --prescribed`` is routed.

    Attributes:
        domains: domain i has the i-th block of experts of `dbes.trace.baselines.expert_blocks`.
    """

    routing: RoutingSettings
    domains: tuple[str, ...]


def read_prescription(folder: Path) -> Prescription:
    """What the ``training.json`` of a checkpoint folder says of its routing.

    Raises:
        MixError: there is none, it cannot be read, or it is not of ``dbes testbed train --prescribed``.
    """
    path = folder / TRAINING
    hint = "expected a checkpoint folder of `dbes testbed train --prescribed`"
    try:
        content = read_json(path, error=MixError, missing=f"{path}: not there")
    except MixError as problem:
        raise MixError(f"{problem}; {hint}") from None
    prescribed = content.get("prescribed") if isinstance(content, dict) else None
    if not isinstance(prescribed, dict):
        raise MixError(f"{path}: this checkpoint routes by its own router, nothing is prescribed; {hint}")
    settings = parse_settings(content.get("settings"), where=f"{path}: settings")
    domains = prescribed.get("domains")
    if settings.routing.router not in PRESCRIBED_ROUTERS or not _names(domains):
        raise MixError(f"{path}: router {settings.routing.router}, domains {clipped(domains)}; {hint}")
    return Prescription(routing=settings.routing, domains=tuple(domains))


def _names(found: Any) -> TypeGuard[list[str]]:
    """Whether this is a list of distinct names."""
    return isinstance(found, list) and bool(found) and all(isinstance(name, str) for name in found) and len(set(found)) == len(found)


class Prescribed:
    """Inside the block every forward of the model is routed by the domain it runs under; a forward under none is an error.

    The domain is never guessed from the tokens. Nothing is balanced or dropped. Gradients flow as in training: through the logits
    of the domain's experts only. Gradient checkpointing, which routes again during backward, is not supported.

    Attributes:
        domains: those with a block of experts.

    Raises:
        MixError: the router of the settings is not prescribed, the model has no router that the testbed knows, or its experts are
            too few for the domains.
    """

    def __init__(self, model: nn.Module, settings: RoutingSettings, domains: Sequence[str]) -> None:
        if settings.router not in PRESCRIBED_ROUTERS:
            raise MixError(f"a {settings.router} router prescribes nothing by domain; expected {' or '.join(PRESCRIBED_ROUTERS)}")
        self.domains = tuple(domains)
        # the head does no routing, and recording calls the model without it
        self._base = base_of(model)
        self._routing = Routing(model, settings, domains=len(self.domains), seed=0, training=False)
        self._current: int | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._routing.__enter__()
        self._handles = [
            self._base.register_forward_pre_hook(self._begin, with_kwargs=True),
            # also after a forward that was ended early, as recording does at the last router
            self._base.register_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(self, *problem: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._routing.__exit__(*problem)

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Inside the block every sequence of every forward is of this domain.

        Raises:
            MixError: the model has no block of experts for it.
        """
        if name not in self.domains:
            raise MixError(
                f"domain {name!r}: the model has no block of experts for it, so nothing prescribes its routing; "
                f"its blocks are those of {', '.join(self.domains)}"
            )
        before, self._current = self._current, self.domains.index(name)
        try:
            yield
        finally:
            self._current = before

    def _begin(self, _: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        if self._current is None:
            raise MixError("this model is routed by the domain of its text, and no domain was given: call it inside `with domain(NAME):`")
        tokens = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        # of embedded inputs only the first two sizes, [sequences, length], matter
        ids = tokens.new_zeros(tokens.shape[:2], dtype=torch.long)
        domain = torch.full((len(ids),), self._current, dtype=torch.long, device=tokens.device)
        self._routing.begin(ids, domain, step=0)

    def _end(self, *_: Any) -> None:
        # what was decided holds the graph of the forward, and a stale domain must not route a layer that is called by itself
        self._routing.begin(torch.zeros(0, 0, dtype=torch.long), None, step=0)
