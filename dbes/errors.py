"""The errors users meet: each says what was given, what was expected and what to do."""

from __future__ import annotations

import os
import re


class DbesError(Exception):
    """Base of every error that dbes raises on bad input; its message is meant for the user."""


class FileError(DbesError):
    """A file cannot be read or written, or another run has the folder; the message names it."""


class SettingError(DbesError):
    """An argument or option has a value that cannot be used; nothing was done yet."""


class TaskError(DbesError):
    """A task file or one of its data files cannot be used; the message names file and field."""


class ModelError(DbesError):
    """A checkpoint cannot be loaded or is not a Mixture-of-Experts model dbes can record."""


class RecordingError(DbesError):
    """A recording broke its own checks (counts, layers that did not fire, NaN in the router)."""


class TraceError(DbesError):
    """A trace on disk or in memory is incomplete, altered or inconsistent."""


class SourceError(DbesError):
    """A file of routing that was recorded elsewhere cannot be imported; the message names it, and the line or field."""


class ResultError(DbesError):
    """A result file cannot be read or written."""


class MixError(DbesError):
    """A testbed mix or training configuration cannot be used."""


class PathError(DbesError):
    """An expert path cannot be found, read or applied to this model."""


class FinetuneError(DbesError):
    """Chosen experts cannot be trained: the path, the data, the settings or the model do not fit, or training went wrong."""


class InterventionError(DbesError):
    """An intervention experiment cannot be set up, resumed or read."""


OUT_OF_MEMORY = (
    "enough memory",
    "t allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "start new thread",
    "failed to map segment",
)
"""What libraries say in other errors than a MemoryError."""


def refusal(problem: BaseException) -> str | None:
    """Why the system refused something (disk full, no permission, out of memory, ...), whatever library tells it; None for anything else.

    Libraries written in Rust tell it as an error of their own whose text ends with ``(os error N)``.
    """
    if isinstance(problem, OSError):
        return problem.strerror or str(problem) or type(problem).__name__
    if not isinstance(problem, Exception) or isinstance(problem, DbesError):
        return None
    if found := re.search(r"\(os error (\d+)\)", str(problem)):
        return os.strerror(int(found[1]))
    return out_of_memory(problem)


def out_of_memory(problem: BaseException) -> str | None:
    """That memory ran out, in a line, whatever library tells it; None for anything else."""
    told = str(problem).strip()
    # torch's own error is known by its name, so that nobody need import torch for it
    if (
        isinstance(problem, MemoryError)
        or type(problem).__name__ == "OutOfMemoryError"
        or (isinstance(problem, RuntimeError | ImportError) and any(words in told.lower() for words in OUT_OF_MEMORY))
    ):
        return f"out of memory: {told.splitlines()[0][:200]}" if told else "out of memory"
    return None
