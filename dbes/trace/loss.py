"""How well the model predicts each document: bits and bytes, beside the routes of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dbes.errors import TraceError
from dbes.files import read_bytes, sha256_of, write_bytes

LOSS_FILE = "loss.safetensors"
DIGEST = "loss_sha256"
"""Of the file, in the provenance of a trace."""


@dataclass(frozen=True, eq=False)
class DocumentLoss:
    """Sums of every document of a trace.

    Attributes:
        bits: to predict its tokens with, float64 [documents]; the first token of a window counts where a special token stands before it.
        text_bytes: UTF-8 bytes of what is predicted, int64 [documents].
    """

    bits: np.ndarray
    text_bytes: np.ndarray


def save_loss(loss: DocumentLoss, folder: Path) -> str:
    """Write the file and return its sha256.

    Raises:
        FileError: it cannot be written.
    """
    write_bytes(folder / LOSS_FILE, save({"bits": loss.bits, "text_bytes": loss.text_bytes}))
    return sha256_of(folder / LOSS_FILE)


def read_loss(folder: Path, provenance: Any, *, documents: int) -> DocumentLoss | None:
    """The loss beside a trace; None where it was recorded without.

    Raises:
        TraceError: the file is missing or not as it was written.
    """
    if (digest := provenance.get(DIGEST)) is None:
        return None
    path = folder / LOSS_FILE
    content = read_bytes(path, error=TraceError)
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError) as problem:
        raise TraceError(f"{path}: cannot be read as safetensors ({problem}); record it again with --overwrite") from None
    if sha256_of(path) != digest or {name: array.shape for name, array in arrays.items()} != {
        "bits": (documents,), "text_bytes": (documents,)
    }:  # fmt: skip
        raise TraceError(f"{path}: is not as it was written; record it again with --overwrite")
    return DocumentLoss(arrays["bits"], arrays["text_bytes"])
