"""Texts as a model's chat template puts them: the text is the user's message, everything around it is the template's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbes.errors import RecordingError
from dbes.models.windows import asked

MARK = "dbes8f3a1cmark"
"""A message that no template changes, which shows what a template puts before and after one."""


@dataclass(frozen=True)
class Template:
    """A chat template and the system message that goes with it; ``system`` None: none is given."""

    tokenizer: Any
    system: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies it, for a trace's provenance."""
        text = str(getattr(self.tokenizer, "chat_template", None))
        return {"system": self.system, "sha256": hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()}

    def render(self, texts: Sequence[str], *, names: Callable[[int], str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of every text inside the template, up to where the answer begins, int32 [tokens] each; and bool [tokens],
        which of them are the template's.

        A token is the text's where it lies wholly inside the text. Of a text at whose ends the template takes blanks away, what is left
        is the text.

        Raises:
            RecordingError: no template, or a tokenizer that does not tell where tokens lie; a template that fails or changes a text
                (the message names it).
        """
        kind = type(self.tokenizer).__name__
        if not getattr(self.tokenizer, "chat_template", None):
            raise RecordingError(f"{kind}: has no chat template; leave --apply-chat-template out, or give a tokenizer that has one")
        if not getattr(self.tokenizer, "is_fast", False):
            raise RecordingError(f"{kind}: tells not where its tokens lie (no fast tokenizer); leave --apply-chat-template out")
        ids, template = [], []
        for place, text in enumerate(texts):
            found, problem = asked(lambda text=text: self._rendered(text))
            if found is None:
                raise RecordingError(f"{names(place)}: the chat template cannot be applied ({problem})")
            ids.append(found[0])
            template.append(found[1])
        return ids, template

    def _rendered(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        before, mark, after = self._whole(MARK).partition(MARK)
        if not mark or MARK in after:
            raise ValueError("it does not show the user's message once, as it is")
        whole = self._whole(text)
        kept = next((each for each in (text, text.strip(), text.lstrip(), text.rstrip()) if whole == f"{before}{each}{after}"), None)
        if kept is None:
            raise ValueError("it changes the text, so that text and template cannot be told apart")
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        start, end = len(before), len(before) + len(kept)
        spans = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        inside = (spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > spans[:, 0])
        return np.asarray(encoded["input_ids"], np.int32), ~inside

    def _whole(self, text: str) -> str:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
