"""The formats by name, and which of them a file is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import PurePosixPath

from dbes.errors import SettingError, SourceError
from dbes.files import opened
from dbes.importing.reading import lines, npz, records
from dbes.importing.types import Notes, Reader, Source
from dbes.text import clipped, unknown

AUTO = "auto"
FORMATS = ("vllm", "sglang", "sglang-recorder", "imatrix", "trtllm", "gptoss-json", "flame", "esft", "dbes-jsonl", "counts", "jsonl")
MODULES = {"sglang-recorder": "recorder", "gptoss-json": "gptoss", "dbes-jsonl": "reference_logs"}
"""Modules of formats that are called otherwise."""

KEYS = (
    ("gptoss-json", ("router_data",)),
    ("sglang", ("meta_info", "sglext")),
    ("vllm", ("routed_experts", "prompt_routed_experts", "choices", "outputs")),
    ("dbes-jsonl", ("token_index", "output_token_id")),
    ("jsonl", ("routes",)),
    ("counts", ("logical_count",)),
)
"""Fields of a JSON record that tell its format, in this order."""

ESFT_LINE = re.compile(rb"\s*\d+(\t\d+)*\t\t[-+.\deE\t]+\s*")


@dataclass(frozen=True)
class Format:
    """How a format is read: its name, ends of its files' names, and its reader."""

    name: str
    suffixes: tuple[str, ...]
    read: Reader


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        SettingError: there is none of that name.
    """
    if name not in FORMATS:
        raise SettingError(unknown("format", name, (AUTO, *FORMATS)))
    module = import_module(f"dbes.importing.{MODULES.get(name, name)}")
    return Format(name, module.SUFFIXES, module.read)


def detected(sources: Sequence[Source], notes: Notes) -> str:
    """The name of the format of the first file that is of any.

    Raises:
        SourceError: no file is of a known format.
    """
    for source in sources:
        if (name := _detect(source)) is not None:
            notes.once(f"taken for {name}, by {source.name}; say --format if that is wrong")
            return name
    tried = ", ".join(clipped(source.name, 40) for source in islice(sources, 3))
    raise SourceError(f"{tried}: of no format that is recognized; say which with --format ({', '.join(FORMATS)})")


def of_format(sources: Sequence[Source], chosen: Format, given: frozenset[str], notes: Notes) -> tuple[Source, ...]:
    """The sources that can be of a format by their names: others in a folder (a README) are left out, others given by name refused.

    Args:
        given: names of the sources that were not found in a folder.

    Raises:
        SourceError: nothing is left, or a file was given that cannot be of the format.
    """
    fits = []
    for source in sources:
        if source.name.lower().endswith(chosen.suffixes):
            fits.append(source)
        elif source.name in given:
            raise SourceError(f"{source}: {chosen.name} files end with {', '.join(chosen.suffixes)}")
        else:
            notes.add(f"{{n}} files of other names than {chosen.name} has were left out")
    if not fits:
        raise SourceError(f"no file ends with {', '.join(chosen.suffixes)}, as {chosen.name} files do")
    return tuple(fits)


def _detect(source: Source) -> str | None:
    name = PurePosixPath(source.name.lower().removesuffix(".gz"))
    with opened(source.path, error=SourceError) as content:
        head = content.read(4)
    if head == b"GGUF" or name.suffix == ".dat":
        return "imatrix"
    if name.name == "meta_info.json" or re.fullmatch(r"rank\d+\.safetensors", name.name):
        return "trtllm"
    if name.suffix in (".csv", ".tsv"):
        return "counts"
    if name.suffix == ".parquet":
        return "flame"
    if name.suffix == ".npy":
        return "vllm"
    if name.suffix == ".npz":
        with npz(source) as arrays:
            return "vllm" if any(arrays[each].ndim == 3 and each not in ("logical_count", "counts") for each in islice(arrays, 1)) or (
                "routed_experts" in arrays or "prompt_routed_experts" in arrays
            ) else "counts"  # fmt: skip
    if name.suffix == ".pt":
        return "sglang-recorder" if "expert_distribution_recorder" in name.name else "counts"
    if name.suffix in (".json", ".jsonl", ".ndjson"):
        return _of_records(source)
    if name.suffix in (".txt", ".log", ".tsv", ""):
        return "esft" if any(ESFT_LINE.fullmatch(line) for _, line in islice(_quietly(source), 1)) else None
    return None


def _of_records(source: Source) -> str | None:
    """By the fields of the first two records: the first can be a head line."""
    try:
        first = [record for _, record in islice(records(source), 2)]
    except SourceError:
        return None
    for record in reversed(first):
        for name, keys in KEYS:
            if any(key in record for key in keys) or (name == "sglang" and _has_sglext(record)):
                return name
        if record and all(re.fullmatch(r"(?:layers?[._-]?)?\d{1,5}", key) for key in record):
            return "counts"
    return None


def _has_sglext(record: dict) -> bool:
    choices = record.get("choices")
    return isinstance(choices, list) and any(isinstance(choice, dict) and "sglext" in choice for choice in choices)


def _quietly(source: Source) -> Iterator[tuple[int, bytes]]:
    try:
        yield from lines(source)
    except SourceError:
        return
