"""What is asked of a model that answers each text: how many tokens, and how each of them is chosen. Needs no torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from dbes.errors import SettingError


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    An answer ends with the model's end-of-sequence token, or after so many tokens. The last token of an answer that did not end itself
    is never fed to the model: it has no routing, so ``tokens`` of them give one row less.

    Attributes:
        tokens: of an answer, at most.
        temperature: 0 takes the most probable token.
        top_p: samples from the most probable tokens that together have this probability.
        seed: of sampling. What is drawn for a token depends on the seed, the document's id and the token's place alone.

    Raises:
        SettingError: a value that nothing can be generated with.
    """

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("generate", self.tokens, 1), ("generation_seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"{name} {value!r}: expected a whole number of at least {least}")
        if not _number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise SettingError(f"temperature {self.temperature!r}: expected 0 (the most probable token) or more")
        if not _number(self.top_p) or not 0 < self.top_p <= 1:
            raise SettingError(f"top_p {self.top_p!r}: expected more than 0 and at most 1")

    def draw(self, document_id: str, place: int) -> float:
        """A uniform number in [0, 1) for a token of an answer; the same whatever shares the batch, on every machine."""
        digest = hashlib.sha256(f"{self.seed}\0{place}\0{document_id}".encode("utf-8", "backslashreplace")).digest()
        return int.from_bytes(digest[:7], "little") / (1 << 56)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
