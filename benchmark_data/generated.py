"""Generated items: finance problems, legal rules applied to facts, medical calculations and vignettes. Answers are computed.

A family draws its facts and one of several wordings of every sentence from the random state it is given. The statutes are
invented and stated in the item; the medical items are exercises, not advice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Family = Callable[[random.Random], tuple[str, str, str]]
"""A family gives (question, working, answer)."""


@dataclass(frozen=True)
class Item:
    template: str
    question: str
    working: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question}\n{self.working}"


def items(families: dict[str, Family], *, each: int, shortest: int, longest: int) -> list[Item]:
    """``each`` items of every family whose text fits the length range; the same for the same arguments."""
    made = []
    for name, family in families.items():
        found: dict[str, Item] = {}
        for attempt in range(400):
            item = Item(name, *family(random.Random(f"{name}/{attempt}")))
            if shortest <= len(item.text) <= longest:
                found.setdefault(item.question, item)
            if len(found) == each:
                break
        made += found.values()
    return made


FIRMS = ("Aldgate Tools", "Birchwood Foods", "Cormorant Shipping", "Delmar Textiles", "Eastlake Paper", "Fenwick Optics", "Garnet Mills",
         "Harrow Pumps", "Ivory Coast Cocoa", "Juniper Labs", "Kestrel Air", "Larkspur Media", "Mistral Energy", "Northgate Homes")
PEOPLE = ("Amara", "Bastien", "Chidi", "Dagny", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Keiko", "Lucia", "Mateo", "Nadia",
          "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tove", "Ulrich", "Vera", "Wanda", "Yusuf", "Zora")


def two(draw: random.Random, names: tuple[str, ...] = PEOPLE) -> tuple[str, str]:
    first, second = draw.sample(names, 2)
    return first, second
