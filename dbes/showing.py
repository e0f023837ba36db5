"""How results, traces and counts show themselves: a few lines in a console, a small table in a notebook."""

from __future__ import annotations

import html
from abc import abstractmethod

from dbes.text import clipped

WIDTH = 600
"""Characters of one fact at most."""


class Shown:
    """What has ``about()``: its kind, and facts by name."""

    @abstractmethod
    def about(self) -> tuple[str, dict[str, str]]:
        """Kind and facts; those without text are not shown."""

    def __repr__(self) -> str:
        kind, facts = self.about()
        width = max(map(len, facts), default=0)
        return "\n".join([kind, *(f"  {name:{width}}  {clipped(text, WIDTH)}" for name, text in facts.items() if text)])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        kind, facts = self.about()
        left = "style='text-align:left'"
        cells = [(html.escape(name), html.escape(clipped(text, WIDTH))) for name, text in facts.items() if text]
        rows = "".join(f"<tr><th {left}>{name}</th><td {left}>{text}</td></tr>" for name, text in cells)
        return f"<table><caption {left}><b>{html.escape(kind)}</b></caption>{rows}</table>"


def sizes(layers: int, experts: tuple[int, ...], top_k: tuple[int, ...]) -> str:
    """The router in words."""
    widths, slots = sorted({*experts}), sorted({*top_k})
    return f"{layers} MoE layers of {'/'.join(map(str, widths))} experts, top-{'/'.join(map(str, slots))}"
