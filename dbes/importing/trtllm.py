"""Statistics of TensorRT-LLM (EXPERT_STATISTIC_PATH): meta_info.json with the sizes, and rank<r>.safetensors with counts.

Keys are ``<iteration>_<layer>``, int64 [experts]. Ranks with equal counts saw the same tokens and are counted once; others are added up.
A folder is a domain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import safetensors
from pydantic import Field

from dbes.errors import SourceError
from dbes.files import regular
from dbes.importing.counts import table, whole
from dbes.importing.sizes import MOST_LAYERS, ModelSizes
from dbes.importing.types import CountTable, Notes, Source
from dbes.schema import Open, read_json, validated
from dbes.text import clipped

SUFFIXES = (".safetensors", ".json")
META = "meta_info.json"
RANK, KEY = re.compile(r"rank\d+\.safetensors"), re.compile(r"(\d{1,15})_(\d{1,5})")


class Meta(Open):
    """What meta_info.json says."""

    num_experts: int = Field(ge=1, lt=2**16, strict=True)
    num_experts_per_token: int = Field(ge=1, lt=2**16, strict=True)


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[CountTable]:
    folders: dict[PurePosixPath, list[Source]] = {}
    for source in sources:
        folders.setdefault(PurePosixPath(source.name).parent, []).append(source)
    for folder, files in folders.items():
        ranks = [source for source in files if RANK.fullmatch(PurePosixPath(source.name).name)]
        meta = next((source for source in files if PurePosixPath(source.name).name == META), None)
        notes.add("{n} other files beside the counts of ranks were left out", len(files) - len(ranks) - (meta is not None))
        if not ranks:
            raise SourceError(f"{files[0]}: no rank<r>.safetensors in its folder; give the folder that EXPERT_STATISTIC_PATH named")
        path = ranks[0].path.with_name(META)
        about = validated(Meta, read_json(path, error=SourceError, most=2**20), where=path, error=SourceError)
        yield from _tables(folder, ranks, about, sizes, notes)


def _tables(folder: PurePosixPath, ranks: Sequence[Source], about: Meta, sizes: ModelSizes, notes: Notes) -> Iterator[CountTable]:
    found = [(source, _counts(source, about.num_experts)) for source in ranks]
    first = found[0][1]
    if len(found) > 1 and all(_equal(first, other) for _, other in found):
        notes.add("{n} ranks repeat the counts of another, of the same tokens: counted once", len(found) - 1)
        found = found[:1]
    for source, counts in found:
        each = table(source, str(source), np.stack(list(counts.values())), list(counts), sizes, top_k=about.num_experts_per_token)
        yield replace(each, id=folder.name or "all")


def _equal(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[layer], other[layer]) for layer in one)


def _counts(source: Source, experts: int) -> dict[int, np.ndarray]:
    """Counts of each layer, summed over iterations."""
    regular(source.path, error=SourceError)
    found: dict[int, np.ndarray] = {}
    iterations: dict[int, set[int]] = {}
    try:
        with safetensors.safe_open(source.path, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                where, match = f"{source}, {clipped(key)}", KEY.fullmatch(key)
                if match is None or int(match[2]) >= MOST_LAYERS:
                    raise SourceError(f"{where}: expected keys <iteration>_<layer>")
                counts = whole(tensors.get_tensor(key), where, 1)
                if len(counts) != experts:
                    raise SourceError(f"{where}: {len(counts)} experts, but {META} says {experts}")
                layer = int(match[2])
                found[layer] = found[layer] + counts if layer in found else counts
                iterations.setdefault(layer, set()).add(int(match[1]))
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as problem:
        raise SourceError(f"{source}: not a safetensors file, or cut short ({clipped(str(problem))})") from None
    if not found:
        raise SourceError(f"{source}: no counts in it")
    every = set().union(*iterations.values())
    for layer, own in iterations.items():
        if own != every:
            raise SourceError(f"{source}: layer {layer} has {len(own)} of {len(every)} iterations; the recording was cut short")
    return dict(sorted(found.items()))
