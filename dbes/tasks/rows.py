"""Values of rows as text, and rows as others write them: chat turns, ShareGPT's conversations, Alpaca's instructions, prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from dbes.errors import DbesError, TaskError
from dbes.text import clipped, lone_surrogate

ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of who speaks, where they are not those of chat templates."""

KNOWN = "messages, conversations, instruction and output, or prompt and completion"


def plain_text(value: Any, name: str, where: str, *, lists: bool = False, error: type[DbesError] = TaskError) -> str:
    """A text as it is, a number as it is written; with ``lists``, one line for each part of a list of these.

    Args:
        name: of the field, for messages.

    Raises:
        error: anything else, or half a surrogate pair (scraped JSON has them), which has no UTF-8.
    """
    if isinstance(value, str):
        place = lone_surrogate(value)
        if place is not None:
            raise error(
                f"{where}: field {name!r} holds half of a surrogate pair (\\u{ord(value[place]):04x} at character {place}), "
                "which is no character; repair the text or remove the row"
            )
        return value
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if lists and isinstance(value, list | tuple):
        return "\n".join(plain_text(part, f"{name}[{place}]", where, error=error) for place, part in enumerate(value))
    raise error(f"{where}: field {name!r} is {kind_of(value)}, expected text or a number")


def kind_of(value: Any) -> str:
    """What a value of a row is, in the words of JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    names = {type(None): "null", str: "text", dict: "an object", list: "a list", tuple: "a list"}
    return names.get(type(value), type(value).__name__)


def turns(row: Mapping[str, Any], where: str, *, error: type[DbesError]) -> tuple[dict[str, Any], ...] | None:
    """The messages of a row, each with role and content as a chat template takes them; None where the row is no conversation.

    Args:
        where: file and row, for messages.

    Raises:
        error: a turn without role and text.
    """
    if isinstance(row.get("messages"), list):
        return tuple(_message(turn, f"messages[{place}]", where, error) for place, turn in enumerate(row["messages"]))
    if isinstance(row.get("conversations"), list):
        return tuple(_shared_turn(turn, f"conversations[{place}]", where, error) for place, turn in enumerate(row["conversations"]))
    return None


def prompt_and_completion(row: Mapping[str, Any], where: str, *, error: type[DbesError]) -> tuple[str, str] | None:
    """What is asked and what is answered in a row that holds both as text; None where it does not.

    Alpaca's instruction and input are one prompt, with an empty line between them and before the answer.
    """
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return plain_text(row["prompt"], "prompt", where, error=error), plain_text(row["completion"], "completion", where, error=error)
    if not (isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)):
        return None
    given = [row["instruction"], row.get("input") or ""]
    asked = [plain_text(part, name, where, error=error).strip() for name, part in zip(("instruction", "input"), given, strict=True)]
    return "".join(f"{part}\n\n" for part in asked if part), plain_text(row["output"], "output", where, error=error).strip()


def whole_text(row: Mapping[str, Any], where: str, *, error: type[DbesError]) -> str | None:
    """All text of such a row as a model reads it without a chat template, its turns parted by empty lines; None for other rows."""
    if (found := turns(row, where, error=error)) is not None:
        return "\n\n".join(turn["content"].strip() for turn in found if turn["content"].strip())
    pair = prompt_and_completion(row, where, error=error)
    return None if pair is None else "".join(pair).strip()


def content_text(content: Any, name: str, where: str, error: type[DbesError]) -> str:
    """The text of a message's content; of text in parts, the parts one after the other.

    Raises:
        error: anything else than text, or a list of parts of type text.
    """
    parts = content if isinstance(content, Sequence) and not isinstance(content, str) else [{"type": "text", "text": content}]
    if not all(isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise error(f"{where}: field {name!r} is {kind_of(content)}, expected text (or a list of parts of type text)")
    return "".join(plain_text(part["text"], name, where, error=error) for part in parts)


def _message(turn: Any, name: str, where: str, error: type[DbesError]) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
        raise error(f"{where}: every message has role and content, not {clipped(turn)!r}")
    plain_text(turn["role"], f"{name}.role", where, error=error)
    # a turn that only calls a tool says nothing
    content = "" if turn["content"] is None and turn.get("tool_calls") else turn["content"]
    return {**turn, "content": content_text(content, f"{name}.content", where, error)}


def _shared_turn(turn: Any, name: str, where: str, error: type[DbesError]) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str) or "value" not in turn:
        raise error(f"{where}: every turn of conversations has from and value, not {clipped(turn)!r}")
    role = plain_text(turn["from"], f"{name}.from", where, error=error)
    return {"role": ROLES.get(role, role), "content": content_text(turn["value"], f"{name}.value", where, error)}
