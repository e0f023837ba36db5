"""Work on one layer after the other, several at a time: numpy lets go of the interpreter in most of it, and nothing has to be copied."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

WORKERS = min(os.cpu_count() or 1, 8)

SMALL = 1 << 16
"""Numbers of a layer (rows x experts) from which on threads are quicker than one: what python does between them takes turns."""


def in_order(function: Callable[[Item], Found], items: Iterable[Item], *, size: int) -> Iterator[Found]:
    """What a function makes of each item, in the order of the items, and at most ``WORKERS`` items ahead of what was taken.

    Args:
        size: numbers in an item; one thread works on small ones.
    """
    if size < SMALL or WORKERS < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        ahead: deque[Future[Found]] = deque()
        for item in items:
            ahead.append(pool.submit(copy_context().run, function, item))  # numpy keeps what it does about errors in the context
            if len(ahead) >= WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
