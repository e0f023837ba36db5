"""Dumps of SGLang's expert distribution recorder (.pt), of all ranks together.

``per_token``: records of forward passes with input_ids, positions, extend_seq_lens and topk_ids_of_layer [layers, tokens, 8], -1 where
nothing is set. Ids are of **physical** experts; ``last_physical_to_logical_map`` says which logical expert each holds. Ranks that saw the
same tokens have the same records (kept once) or those of other layers (put together); the rest are other texts.
``stat``: logical_count [steps, layers, experts]; equal counts of several ranks are one sum that all were sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dbes.errors import SourceError
from dbes.importing.counts import LOGICAL, table, whole
from dbes.importing.requests import optional_ids
from dbes.importing.sizes import ModelSizes
from dbes.importing.torch_files import read_torch
from dbes.importing.types import MISSING, CountTable, Document, Notes, Source
from dbes.text import clipped
from dbes.trace.types import PROMPT

SUFFIXES = (".pt",)
MAP, IDS = "last_physical_to_logical_map", "topk_ids_of_layer"
TOGETHER = "all"
"""Domain of counts where no map says another: files of ranks belong together."""


@dataclass
class Pass:
    """A forward pass of one rank: ids are logical, [tokens, layers, slots]."""

    source: Source
    where: str
    number: int
    rank: int
    lengths: list[int] | None
    token_ids: np.ndarray
    positions: np.ndarray
    ids: np.ndarray
    experts: int

    @property
    def tokens(self) -> bytes:
        """What tells passes over the same tokens."""
        return hashlib.sha256(self.token_ids.tobytes() + self.positions.tobytes()).digest()


def read(sources: Sequence[Source], sizes: ModelSizes, notes: Notes) -> Iterator[Document | CountTable]:
    dumps = [(source, _dump(source)) for source in sources]
    kinds = {"records" in dump for _, dump in dumps}
    if len(kinds) > 1:
        raise SourceError(f"{sources[0]}: dumps of modes per_token and stat in one import; import them apart")
    if not kinds.pop():
        yield from _counted(dumps, sizes, notes)
        return
    passes: dict[int, list[Pass]] = {}
    for source, dump in dumps:
        for each in _passes(source, dump, sizes):
            known = passes.setdefault(each.number, [])
            if any(other.rank == each.rank for other in known):
                raise SourceError(f"{each.where}: pass {each.number} of rank {each.rank} came before; import one run of a server at a time")
            known.append(each)
    if passes:
        notes.once("experts were renumbered from physical to logical by the last map of a dump; whether it changed before is not known")
    for number in sorted(passes):
        for each in _together(passes.pop(number), notes):
            yield from _documents(each, sizes, notes)


def _dump(source: Source) -> Mapping[str, Any]:
    content = read_torch(source)
    if not isinstance(content, dict) or not ("records" in content or LOGICAL in content):
        raise SourceError(f"{source}: neither records nor {LOGICAL} in it; is it a dump of SGLang's recorder?")
    return content


def _counted(dumps: Sequence[tuple[Source, Mapping[str, Any]]], sizes: ModelSizes, notes: Notes) -> Iterator[CountTable]:
    seen: dict[bytes, set[Any]] = {}
    for source, dump in dumps:
        hits = whole(dump[LOGICAL], f"{source}, {LOGICAL}", None)
        if hits.ndim not in (2, 3):
            raise SourceError(f"{source}, {LOGICAL}: shape {hits.shape}, expected [steps, layers, experts]")
        rank, content = dump.get("rank"), hashlib.sha256(hits.tobytes()).digest()
        ranks = seen.setdefault(content, set())
        if rank is not None and ranks and rank not in ranks:
            notes.add("{n} dumps repeat the counts of another rank, which are the sum over all ranks: counted once")
            ranks.add(rank)
            continue
        ranks.add(rank)
        summed = hits.sum(axis=0) if hits.ndim == 3 else hits
        yield replace(table(source, f"{source}, {LOGICAL}", summed, range(len(summed)), sizes), id=TOGETHER)


def _passes(source: Source, dump: Mapping[str, Any], sizes: ModelSizes) -> Iterator[Pass]:
    records = dump["records"]
    if not isinstance(records, list):
        raise SourceError(f"{source}, records: expected a list")
    mapping = dump.get(MAP)
    if not isinstance(mapping, np.ndarray) or mapping.ndim != 2 or mapping.dtype.kind not in "iu" or not mapping.size or mapping.min() < 0:
        raise SourceError(
            f"{source}: no {MAP} [layers, physical experts], without which nobody knows which expert its ids mean; they are not imported"
        )
    experts = int(mapping.max()) + 1
    sizes.agreed("experts", experts, where=f"{source}, {MAP}", option="--experts")
    for number, record in enumerate(records):
        where = f"{source}, records[{number}]"
        if not isinstance(record, dict):
            raise SourceError(f"{where}: expected a dict")
        if IDS not in record:
            raise SourceError(f"{where}: no {IDS}; record with --expert-distribution-recorder-mode per_token, or stat for counts")
        yield _pass(source, where, record, mapping, experts)


def _pass(source: Source, where: str, record: Mapping[str, Any], mapping: np.ndarray, experts: int) -> Pass:
    ids = record[IDS]
    if not isinstance(ids, np.ndarray) or ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise SourceError(f"{where}, {IDS}: expected whole numbers [layers, tokens, slots]")
    token_ids, positions = (optional_ids(record.get(name), where=f"{where}, {name}") for name in ("input_ids", "positions"))
    if token_ids is None or positions is None or not len(token_ids) == len(positions) == ids.shape[1]:
        raise SourceError(f"{where}: input_ids and positions are not of the {ids.shape[1]} tokens that {IDS} has")
    lengths = optional_ids(record.get("extend_seq_lens"), where=f"{where}, extend_seq_lens")
    if lengths is not None and lengths.sum() != len(token_ids):
        raise SourceError(f"{where}: extend_seq_lens sum to {lengths.sum()}, but there are {len(token_ids)} input_ids")
    if len(mapping) != len(ids):
        raise SourceError(f"{where}, {IDS}: {len(ids)} layers, but {MAP} has {len(mapping)}")
    if ids.size and (ids.max() >= mapping.shape[1] or ids.min() < MISSING):
        wrong = ids[(ids >= mapping.shape[1]) | (ids < MISSING)][0]
        raise SourceError(f"{where}, {IDS}: physical expert {wrong}, but {MAP} has {mapping.shape[1]}")
    logical = np.stack([np.where(layer < 0, MISSING, own[np.maximum(layer, 0)]) for layer, own in zip(ids, mapping, strict=True)], axis=1)
    numbers = [record.get(name, 0) for name in ("forward_pass_id", "rank")]
    if not all(isinstance(value, int) for value in numbers):
        raise SourceError(f"{where}: forward_pass_id {clipped(numbers[0])}, rank {clipped(numbers[1])}, expected whole numbers")
    return Pass(
        source, where, numbers[0], numbers[1], None if lengths is None else lengths.tolist(), token_ids, positions,
        logical.astype(np.int32), experts,
    )  # fmt: skip


def _together(passes: list[Pass], notes: Notes) -> Iterator[Pass]:
    """The passes of one number over all ranks, with what several ranks have of the same tokens as one."""
    found: dict[bytes, list[Pass]] = {}
    for each in passes:
        alike = found.setdefault(each.tokens, [])
        for place, other in enumerate(alike):
            mine, theirs = ((one.ids != MISSING).any(axis=(0, 2)) for one in (each, other))
            if np.array_equal(each.ids, other.ids):
                notes.add("{n} records of passes that another rank has too were kept once")
                break
            if each.ids.shape == other.ids.shape and not (mine & theirs).any():
                notes.add("{n} records of a pass were put together with other layers of another rank")
                alike[place] = replace(other, ids=np.where(other.ids != MISSING, other.ids, each.ids))
                break
        else:
            alike.append(each)
    for alike in found.values():
        yield from alike


def _documents(each: Pass, sizes: ModelSizes, notes: Notes) -> Iterator[Document]:
    """The texts that a pass read; what it generated continues texts that the dump does not name."""
    if each.lengths is None:
        notes.add("{n} generated tokens were left out: a dump does not say which text they continue", len(each.token_ids))
        return
    slots = sizes.top_k or _slots(each)
    if slots > each.ids.shape[2] or (each.ids[:, :, slots:] != MISSING).any():
        raise SourceError(f"{each.where}, {IDS}: {_slots(each)} of {each.ids.shape[2]} columns are in use, expected top-k {slots}")
    columns, layers = sizes.columns(each.ids.shape[1], notes, where=each.where)
    begin = 0
    for number, length in enumerate(each.lengths):
        rows = slice(begin, begin + length)
        begin += length
        if not length:
            continue
        notes.add(
            "{n} texts begin after their first token (a cached prefix, or a prompt read in chunks): each stands as a document of its own",
            int(each.positions[rows][0] > 0),
        )
        yield Document(
            source=each.source,
            where=f"{each.where}, sequence {number}",
            id=f"pass-{each.number}/rank-{each.rank}/{number}",
            layers=layers,
            ids=each.ids[rows, :, :slots],
            columns=columns,
            experts=each.experts,
            token_ids=each.token_ids[rows],
            positions=each.positions[rows],
            phase=np.full(length, PROMPT, np.uint8),
        )


def _slots(each: Pass) -> int:
    """Columns in use: they are filled from the first on."""
    used = np.flatnonzero((each.ids != MISSING).any(axis=(0, 1)))
    return int(used[-1]) + 1 if len(used) else 1
