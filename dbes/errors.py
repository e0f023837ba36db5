"""The errors users meet: each says what was given, what was expected and what to do."""


class DbesError(Exception):
    """Base of every error that dbes raises on bad input; its message is meant for the user."""


class FileError(DbesError):
    """A file cannot be read or written, or another run has the folder; the message names it."""


class TaskError(DbesError):
    """A task file or one of its data files cannot be used; the message names file and field."""


class ModelError(DbesError):
    """A checkpoint cannot be loaded or is not a Mixture-of-Experts model dbes can record."""


class RecordingError(DbesError):
    """A recording broke its own checks (counts, layers that did not fire, NaN in the router)."""


class TraceError(DbesError):
    """A trace on disk or in memory is incomplete, altered or inconsistent."""


class ResultError(DbesError):
    """A result file cannot be read or written."""


class MixError(DbesError):
    """A testbed mix or training configuration cannot be used."""


class PathError(DbesError):
    """An expert path cannot be found, read or applied to this model."""


class FinetuneError(DbesError):
    """Chosen experts cannot be trained: the path, the data, the settings or the model do not fit, or training went wrong."""


class InterventionError(DbesError):
    """An intervention experiment cannot be set up, gone on with or read."""
