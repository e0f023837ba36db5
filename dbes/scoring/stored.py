"""Counts as a folder: ``counts.json`` (what was counted, with the sha256 of every file) and one safetensors file a layer.

Beside them lie ``sample.safetensors`` (tokens that were kept), ``vocabulary.json`` and, where a control was recorded, ``control/``. A
trace keeps its counts in its own folder, below ``counts/``; they are used again as long as its manifest is the one they were made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as encode_safetensors

from dbes.errors import TraceError
from dbes.files import discard, read_bytes, write_bytes, write_json, write_text
from dbes.schema import Strict, Whole, read_versioned
from dbes.scoring.layer_counts import WIDE, LayerCounts, arrays_of, layer_of, one_layer, shapes_of
from dbes.scoring.sampling import TokenSample
from dbes.scoring.texts import Texts
from dbes.text import clipped
from dbes.trace.manifest import SEAL, Experts, Facts, Index, digest, shape_of, shape_problems, unsealed
from dbes.trace.shards import validate_routes
from dbes.trace.store import CONTROL, read_vocabulary
from dbes.trace.types import PHASES, RoutingShape, TokenRoutes
from dbes.trace.vocabulary import as_json

if TYPE_CHECKING:
    from dbes.scoring.counts import Counts
from dbes.trace.writer import VOCABULARY

COUNTS_SCHEMA = 1
COUNTS, SAMPLE = "counts.json", "sample.safetensors"
COUNTS_FOLDER = "counts"
"""Where a trace keeps its counts: a folder in it, with one folder a phase."""

HINT = "remove the folder, the counts are made again from the trace"

Sha = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class CountsFile(Strict):
    """What a folder of counts says of itself; ``trace`` is the sha256 that the manifest of the trace has of itself."""

    schema_version: int
    trace: str | None
    phase: Literal["all", "prompt", "generated"]
    grouped: bool
    by_documents: bool
    layers: tuple[Index, ...]
    experts: tuple[Experts, ...]
    top_k: tuple[Experts, ...]
    domains: tuple[str, ...]
    document_domain: tuple[Index, ...]
    document_ids: tuple[str, ...]
    document_source: tuple[str, ...] | None = None
    tokens: tuple[Whole, ...]
    phase_tokens: tuple[Whole, Whole]
    provenance: Facts
    fingerprint: str | None
    digests: dict[str, tuple[str, ...]]
    sample_whole: bool
    notes: tuple[str, ...] = ()
    files: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+\.safetensors$")], Sha]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> CountsFile:
        for problem in shape_problems(self):
            raise ValueError(problem)
        if len(self.tokens) != len(self.document_ids):
            raise ValueError(f"tokens has {len(self.tokens)} entries, document_ids {len(self.document_ids)}")
        if missing := {_layer_name(column) for column in range(len(self.layers))} - set(self.files):
            raise ValueError(f"files: {min(missing)} is missing")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _as_written(cls, content: Any, handler: ModelWrapValidatorHandler[CountsFile]) -> CountsFile:
        return unsealed(content, handler, hint=HINT)

    @property
    def shape(self) -> RoutingShape:
        return shape_of(self)


def save_counts(counts: Counts, folder: Path) -> None:
    """Write counts as a folder; ``counts.json`` last, so that what was interrupted is no folder of counts.

    Raises:
        FileError: it cannot be written.
    """
    discard(folder / COUNTS)
    files: dict[str, str] = {}

    def write(name: str, arrays: Mapping[str, np.ndarray]) -> None:
        content = encode_safetensors({key: np.ascontiguousarray(array) for key, array in arrays.items()})
        write_bytes(folder / name, content)
        files[name] = hashlib.sha256(content).hexdigest()

    for column, sums in enumerate(counts.layers()):
        write(_layer_name(column), {name: _compact(array) for name, array in arrays_of(sums).items()})
    sample = counts.sample
    if sample is not None:
        more = {name: array for name in ("primary", "weighted", "weights") if (array := getattr(sample, name)) is not None}
        write(SAMPLE, sample.routes.arrays() | more)
    if counts.vocabulary:
        write_text(folder / VOCABULARY, json.dumps(as_json(counts.vocabulary), ensure_ascii=False))
    if counts.control is not None:
        save_counts(counts.control, folder / CONTROL)
    elif (folder / CONTROL).exists():
        discard(folder / CONTROL)
    shape = counts.shape
    about = CountsFile(
        schema_version=COUNTS_SCHEMA,
        trace=counts.seal,
        phase=PHASES[counts.phase],  # pyright: ignore[reportArgumentType]
        grouped=counts.grouped,
        by_documents=counts.by_documents,
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        domains=shape.domains,
        document_domain=tuple(shape.document_domain.tolist()),
        document_ids=shape.document_ids,
        document_source=shape.document_source,
        tokens=tuple(counts.tokens.tolist()),
        phase_tokens=counts.phase_tokens,
        provenance=json.loads(json.dumps(dict(counts.provenance))),
        fingerprint=counts.texts.fingerprint,
        digests={domain: tuple(sorted(found)) for domain, found in counts.texts.digests.items()},
        sample_whole=sample is not None and sample.whole,
        notes=counts.notes,
        files=files,
    )
    content = about.model_dump(mode="json")
    write_json(folder / COUNTS, {**content, SEAL: digest(content)})


def stored(folder: Path) -> dict[str, Any]:
    """The fields of the counts in a folder, but their control; a layer is read, and its sha256 checked, when it is asked for.

    Raises:
        TraceError: there are none, they are damaged, or of another schema version.
    """
    missing = f"{folder}: no {COUNTS} here, so these are no counts"
    about = read_versioned(folder / COUNTS, CountsFile, error=TraceError, versions=(COUNTS_SCHEMA,), missing=missing, hint=HINT)
    for name in about.files:
        if not (folder / name).is_file():
            raise TraceError(f"{folder / name}: this file of the counts is missing; {HINT}")
    shape, tokens = about.shape, np.asarray(about.tokens, np.int64)

    def read(column: int) -> LayerCounts:
        return _read_layer(folder, about.files, one_layer(shape, column), tokens, column)

    def sample() -> TokenSample | None:
        return _read_sample(folder, about.files, shape, whole=about.sample_whole) if SAMPLE in about.files else None

    return {
        "shape": shape,
        "tokens": tokens,
        "read": read,
        "phase": {name: code for code, name in PHASES.items()}[about.phase],
        "phase_tokens": about.phase_tokens,
        "provenance": about.provenance,
        "vocabulary": read_vocabulary(folder / VOCABULARY),
        "texts": Texts(fingerprint=about.fingerprint, digests={name: frozenset(found) for name, found in about.digests.items()}),
        "sample_of": sample,
        "grouped": about.grouped,
        "by_documents": about.by_documents,
        "seal": about.trace,
        "notes": about.notes,
    }


def _layer_name(column: int) -> str:
    return f"layer-{column:03d}.safetensors"


def _compact(array: np.ndarray) -> np.ndarray:
    """Whole numbers in as few bytes as hold them."""
    if array.dtype.kind != "f":
        return array
    least, most = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)  # NaN where there is one
    for kind in (np.uint8, np.uint16, np.uint32):
        if least >= 0 and most <= np.iinfo(kind).max:
            whole = array.astype(kind)
            return whole if np.array_equal(whole, array) else array
    return array


def _checked(path: Path, files: Mapping[str, str]) -> dict[str, np.ndarray]:
    content = read_bytes(path, error=TraceError, missing=f"{path}: this file of the counts is missing; {HINT}")
    if hashlib.sha256(content).hexdigest() != files[path.name]:
        raise TraceError(f"{path}: sha256 differs from {COUNTS}: the file is truncated or was altered; {HINT}")
    try:
        return parse_safetensors(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise TraceError(f"{path}: not a file of counts ({clipped(str(problem))}); {HINT}") from None


def _read_layer(folder: Path, files: Mapping[str, str], shape: RoutingShape, tokens: np.ndarray, column: int) -> LayerCounts:
    path = folder / _layer_name(column)
    arrays, expected = {}, shapes_of(shape, len(tokens))
    for name, array in _checked(path, files).items():
        if array.shape != expected.get(name) or array.dtype.kind not in "buf":
            raise TraceError(f"{path}: {clipped(name)} is {array.dtype} {array.shape}, expected {expected.get(name)}; {HINT}")
        wide = name in WIDE and array.max(initial=0) < 2**24
        arrays[name] = array.astype(bool if name == "groups" else np.float32 if wide else np.float64)
    if "hits" not in arrays:
        raise TraceError(f"{path}: hits are missing; {HINT}")
    return layer_of(shape, tokens, arrays)


def _read_sample(folder: Path, files: Mapping[str, str], shape: RoutingShape, *, whole: bool) -> TokenSample:
    path = folder / SAMPLE
    arrays = _checked(path, files)
    more = {name: arrays.pop(name, None) for name in ("primary", "weighted", "weights")}
    try:
        routes = TokenRoutes(**arrays)
    except TypeError as problem:
        raise TraceError(f"{path}: {clipped(str(problem))}; {HINT}") from None
    validate_routes(routes, shape, where=str(path))
    rows = 0 if more["weighted"] is None else len(more["weighted"])
    sizes = {"primary": routes.ids.shape[:2], "weighted": (rows,), "weights": (rows, *routes.ids.shape[1:])}
    for name, array in more.items():
        if array is not None and array.shape != sizes[name]:
            raise TraceError(f"{path}: {name} has shape {array.shape}, expected {sizes[name]}; {HINT}")
    return TokenSample(routes=routes, whole=whole, **more)
