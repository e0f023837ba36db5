"""Runs the jobs of a grid, several at a time; what is finished is kept by the jobs themselves, so that the same call resumes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import transformers

from dbes.errors import DbesError


def run_jobs(
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    *,
    processes: int,
    tell: Callable[[int, int, Any], None],
    error: type[DbesError],
    begin: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
) -> None:
    """Call ``work(*job)`` for every job, in fresh processes, which are ended on an error or Ctrl-C.

    Args:
        tell: called with the number of finished jobs, and with the place and result of the last of them.
        begin: called with what is ``given`` at the beginning of every process.

    Raises:
        error: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker, initargs=(begin, given)) as pool:
        try:
            places = {pool.submit(work, *job): place for place, job in enumerate(jobs)}
            for done, finished in enumerate(as_completed(places), 1):
                tell(done, places[finished], finished.result())
        except BaseException as problem:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(problem, BrokenProcessPool):
                raise error("a process was killed (out of memory?); the same command resumes") from None
            raise


def _begin_worker(begin: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    end_with_parent()
    transformers.utils.logging.disable_progress_bar()
    if begin is not None:
        begin(*given)


def end_with_parent() -> None:
    """End this worker when the process that started it is killed: it would write where the run started in its place does.

    Ctrl-C is left to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
