"""What transformers, peft and the hub raise, as a ModelError of one line that says what to do."""

from __future__ import annotations

from types import TracebackType

import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dbes.errors import DbesError, ModelError, out_of_memory
from dbes.text import clipped


def needs_code(where: str) -> str:
    return (
        f"{where}: this model comes with its own Python code, which dbes does not run unless you say so; "
        "read that code, then pass trust_remote_code=True (--trust-remote-code)"
    )


class explained:
    """Around one call of somebody else's code: any exception of it becomes a ModelError, with the exception as its cause.

    Nothing of dbes belongs inside. What dbes raised itself passes as it is.

    Args:
        where: folder or hub id, the beginning of the message.
        part: what is being loaded.
        problem: what is said of an exception that is not recognised.
    """

    def __init__(self, where: str, *, part: str = "model", problem: str | None = None) -> None:
        self.where, self.part, self.problem = where, part, problem or f"the {part} cannot be loaded"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(problem, Exception) or isinstance(problem, DbesError):
            return
        text = str(problem)
        raise ModelError(f"{self.where}: {self._reason(problem, text)}") from problem

    def _reason(self, problem: Exception, text: str) -> str:
        said = clipped(" ".join(text.split()), 300) if text.strip() else type(problem).__name__
        if out_of_memory(problem):
            return f"the {self.part} does not fit in memory ({said}); `dbes plan --model {self.where}` says what it needs"
        if "trust_remote_code" in text:
            return needs_code(self.where).removeprefix(f"{self.where}: ")
        if isinstance(problem, OSError | HfHubHTTPError | HFValidationError):
            if isinstance(problem, ConnectionError) or "couldn't connect" in text or "outgoing traffic has been disabled" in text:
                return (
                    f"the Hugging Face hub cannot be reached and this {self.part} is not in the local cache; "
                    "check the connection, or give a folder"
                )
            if "not a valid model identifier" in text or any(word in text for word in ("404", "401", "403", "gated")):
                return f"neither a folder nor a repository you can read on the Hugging Face hub ({said})"
            if "does not appear to have a file named" in text or "safetensors" in text:
                return f"no usable {self.part} ({said}); dbes reads safetensors only"
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            return f"transformers {transformers.__version__} does not know this architecture ({said})"
        return f"{self.problem} ({type(problem).__name__}: {said})"
