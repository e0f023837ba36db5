"""What responses of inference servers share: token ids, lengths, and how many rows of routing a request must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dbes.errors import SourceError
from dbes.importing.reading import integers
from dbes.text import clipped

FIELD_LENGTH = 500


def about(record: Mapping[str, Any]) -> dict[str, Any]:
    """The short values of a record, and of its ``metadata``, from which a domain map can read the domain."""
    found: dict[str, Any] = {}
    for part in (record.get("metadata"), record):
        if isinstance(part, dict):
            found |= {key: value for key, value in part.items() if isinstance(value, str | int) and len(str(value)) <= FIELD_LENGTH}
    return found


def optional_ids(value: Any, *, where: str) -> np.ndarray | None:
    """Token ids, int32, where there are any."""
    if value is None:
        return None
    found = value if isinstance(value, np.ndarray) else integers(value, where=where, axes=1)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found.size and (found.min() < 0 or found.max() >= 2**31)):
        raise SourceError(f"{where}: expected token ids from 0 on")
    return found.astype(np.int32)


def length_of(
    usage: Any, prompt: np.ndarray | None, output: np.ndarray | None, *, where: str
) -> tuple[int | None, int | None]:
    """Tokens of prompt and output, from the token ids or else from what the response says of its usage; None where unknown."""
    known = usage if isinstance(usage, dict) else {}
    found: list[int | None] = []
    for ids, name in zip((prompt, output), ("prompt_tokens", "completion_tokens"), strict=True):
        count = known.get(name)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**31):
            raise SourceError(f"{where}: {name} is {clipped(count)}, expected a whole number")
        found.append(count if ids is None else len(ids))
    return found[0], found[1]


def on_tokens(rows: int, start: int, before: int | None, after: int | None, *, where: str, fewer: int = 0) -> None:
    """Refuse rows of routing that are not those of the tokens that ran: all from ``start`` on but the last.

    Args:
        before, after: tokens of prompt and output, None where unknown.
        fewer: rows that may be lacking at the end.
    """
    if before is None or after is None:
        return
    wanted = before + after - 1 - start
    if not wanted - fewer <= rows <= wanted:
        raise SourceError(
            f"{where}: {rows} rows of routing, expected {wanted}: {before} tokens of prompt + {after} of output - 1"
            + (f" - {start} before the start" if start else "")
        )
