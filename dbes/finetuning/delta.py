"""The trained rows alone, as files: ``delta.safetensors`` with the tensors, ``delta.json`` with what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dbes.errors import FinetuneError
from dbes.files import read_bytes, sha256_of, write_bytes, write_json
from dbes.paths.types import Cell
from dbes.schema import Strict, read_versioned

DELTA, DELTA_FACTS = "delta.safetensors", "delta.json"
DELTA_FILES = (DELTA, DELTA_FACTS)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class DeltaFacts(Strict):
    """What a delta belongs to.

    Attributes:
        dtype: of the experts' rows in the base's files; every tensor here has the dtype of its own in them.
        base_rows_sha256: of the trained rows as they were before training: a base with other rows is another model, wherever it lies.
        sha256: of the file with the tensors.
    """

    schema_version: Literal[1] = 1
    model: str
    revision: str
    cells: Annotated[tuple[Cell, ...], Field(min_length=1)]
    routers: tuple[str, ...]
    dtype: str
    base_rows_sha256: Sha256
    sha256: Sha256
    dbes: str


def save_delta(
    rows: Mapping[str, Tensor],
    folder: Path,
    *,
    cells: tuple[Cell, ...],
    routers: tuple[str, ...],
    model: str,
    revision: str,
    dtype: str,
    base_digest: str,
) -> None:
    """Write the rows as ``parameter[expert]`` (and whole routers, where trained) with the facts they belong to.

    Raises:
        FileError: a file cannot be written.
    """
    write_bytes(folder / DELTA, save({name: value.contiguous() for name, value in rows.items()}))
    facts = DeltaFacts(
        model=model,
        revision=revision,
        cells=cells,
        routers=routers,
        dtype=dtype,
        base_rows_sha256=base_digest,
        sha256=sha256_of(folder / DELTA),
        dbes=version("dbes"),
    )
    write_json(folder / DELTA_FACTS, facts.model_dump(mode="json"))


def read_delta(folder: Path) -> tuple[DeltaFacts, dict[str, Tensor]]:
    """The facts and tensors of a delta; whether they fit a base is for `dbes.finetuning.output.checked_tensors` to say.

    Raises:
        FinetuneError: no delta there, or one that was altered or cut short.
    """
    missing = "{}: no delta here ({} is missing); dbes finetune --save delta writes one".format
    facts = read_versioned(folder / DELTA_FACTS, DeltaFacts, error=FinetuneError, missing=missing(folder, DELTA_FACTS))
    content = read_bytes(folder / DELTA, error=FinetuneError, missing=missing(folder, DELTA))
    if hashlib.sha256(content).hexdigest() != facts.sha256:
        raise FinetuneError(f"{folder / DELTA}: the file was altered or cut short; copy it again")
    try:
        return facts, load(content)
    except (SafetensorError, ValueError, KeyError) as problem:
        raise FinetuneError(f"{folder / DELTA}: not a readable safetensors file ({problem}); write the delta again") from None
