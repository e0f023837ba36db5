"""Host work beside the model: one thread that does what it is given, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

WAITING = 2
"""Things that wait for the thread or are being done, at most: each may hold the routes of a batch."""


class Background:
    """One thread. What fails there is raised where the next thing is given to it, or at the end; nothing after it is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dbes-host-work")
        self._given: deque[Future[None]] = deque()
        self._failed = False

    def do(self, work: Callable[..., object], *given: Any) -> None:
        """Give the thread something to do; waits while it has enough.

        Raises:
            BaseException: what something given earlier raised.
        """
        while self._given and (len(self._given) >= WAITING or self._given[0].done()):
            self._given.popleft().result()
        self._given.append(self._thread.submit(self._done, work, given))

    def finish(self) -> None:
        """Wait until all is done; raises as `do`."""
        while self._given:
            self._given.popleft().result()

    def _done(self, work: Callable[..., object], given: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            work(*given)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown(cancel_futures=True)
