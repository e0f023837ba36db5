"""Counts of several recordings of one model as one: other documents stand side by side, parts of one document are added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dbes.errors import TraceError
from dbes.scoring.layer_counts import OPTIONAL_WINDOWS, LayerCounts, arrays_of, domain_sums, layer_of, one_layer
from dbes.scoring.metrics import expert_group
from dbes.scoring.sampling import KEPT_CELLS, KEPT_TOKENS, SAMPLE_TOKENS, TokenSample, even_documents, joined_sample
from dbes.scoring.texts import combined
from dbes.trace.joining import same_router
from dbes.trace.types import PHASES, RoutingShape
from dbes.trace.vocabulary import joined_vocabularies

if TYPE_CHECKING:
    from dbes.scoring.counts import Counts

OTHER_GROUPS = "merged parts have other expert groups than the whole: windows inside these groups are unknown where they differ, and NaN"

WHOLE_ONLY = ("mass", "primaries", *OPTIONAL_WINDOWS)
"""Arrays that are unknown for all as soon as one part has none."""


def merged(parts: Sequence[Counts]) -> dict[str, Any]:
    """The fields of the counts but their control, see ``Counts.merge``."""
    if not parts:
        raise TraceError("nothing to merge: no counts were given")
    first = parts[0]
    same_router([part.shape for part in parts], [part.provenance for part in parts])
    for name, word in (("phase", lambda part: PHASES[part.phase]), ("by_documents", lambda part: f"by_documents {part.by_documents}")):
        if len(told := {word(part) for part in parts}) > 1:
            raise TraceError(f"counts of different kinds cannot be merged ({name}: {' and '.join(sorted(told))})")
    shape, places = _documents(parts)
    tokens = np.zeros(len(shape.document_domain), np.int64)
    for part, place in zip(parts, places, strict=True):
        tokens[place] += part.tokens
    controls = sum(part.control is not None for part in parts)
    if 0 < controls < len(parts):
        raise TraceError(f"{controls} of {len(parts)} counts have a random-router control: all of them must, or none")

    def read(column: int) -> LayerCounts:
        return _merged_layer([part.layer(column) for part in parts], places, one_layer(shape, column), tokens)

    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    grouped = all(part.grouped for part in parts)
    if grouped and any(_unknown_windows(read(column)) for column in range(len(shape.layers))):
        notes = (*notes, OTHER_GROUPS)
    apart = len(np.unique(np.concatenate(places))) == sum(map(len, places))
    return {
        "shape": shape,
        "tokens": tokens,
        "read": read,
        "phase": first.phase,
        "phase_tokens": (sum(part.phase_tokens[0] for part in parts), sum(part.phase_tokens[1] for part in parts)),
        "provenance": first.provenance,
        "vocabulary": joined_vocabularies([part.vocabulary for part in parts], error=TraceError),
        "texts": combined([part.texts for part in parts], apart=apart),
        "sample_of": lambda: _merged_sample(parts, places, shape, tokens),
        "grouped": grouped,
        "by_documents": first.by_documents,
        "notes": notes,
    }


def _documents(parts: Sequence[Counts]) -> tuple[RoutingShape, list[np.ndarray]]:
    """The documents of all parts, each once, and where those of each part stand among them."""
    found: dict[str, tuple[int, int, str | None]] = {}
    places = []
    sourced = any(part.shape.document_source is not None for part in parts)
    numbered = 0
    for part in parts:
        shape = part.shape
        numbered += shape.numbered
        place = []
        sources: Sequence[str | None] = shape.document_source or ((*shape.document_ids,) if sourced else (None,) * len(shape.document_ids))
        for name, domain, source in zip(shape.document_ids, shape.document_domain.tolist(), sources, strict=True):
            at, known_domain, known_source = found.setdefault(name, (len(found), domain, source))
            if (known_domain, known_source) != (domain, source):
                raise TraceError(f"document {name!r} has another domain or source in another part: documents of equal id are the same")
            place.append(at)
        places.append(np.asarray(place, np.int64))
    if numbered > 1:
        raise TraceError(
            "documents that have only numbers cannot be told apart: give document_ids, then documents of equal id are added up"
        )
    shape = replace(
        parts[0].shape,
        document_domain=np.asarray([domain for _, domain, _ in found.values()], np.int32),
        document_ids=tuple(found),
        document_source=tuple(str(source) for _, _, source in found.values()) if sourced else None,
    )
    return shape, places


def _merged_layer(layers: Sequence[LayerCounts], places: Sequence[np.ndarray], shape: RoutingShape, tokens: np.ndarray) -> LayerCounts:
    parts = [arrays_of(sums) for sums in layers]
    names = {name for part in parts for name in part} - {"groups"}
    names -= {name for name in WHOLE_ONLY if any(name not in part for part in parts)}
    merged: dict[str, np.ndarray] = {}
    for name in names:
        like = parts[0][name]
        merged[name] = np.zeros((len(tokens), *like.shape[1:]), like.dtype)
        for part, place in zip(parts, places, strict=True):
            merged[name][place] += part[name].astype(like.dtype)
    if "mass" in merged and "in_group" in merged:
        merged["groups"] = expert_group(domain_sums(merged["mass"], shape))
        for part, place in zip(parts, places, strict=True):
            for domain, (own, whole) in enumerate(zip(part["groups"], merged["groups"], strict=True)):
                if own.any() and not np.array_equal(own, whole):
                    rows = place[shape.document_domain[place] == domain]
                    merged["in_group"][rows] = merged["grouped"][rows] = np.nan
    return layer_of(shape, tokens, merged)


def _unknown_windows(sums: LayerCounts) -> bool:
    return sums.ngrams is not None and sums.ngrams.in_group is not None and bool(np.isnan(sums.ngrams.in_group).any())


def _merged_sample(parts: Sequence[Counts], places: Sequence[np.ndarray], shape: RoutingShape, tokens: np.ndarray) -> TokenSample | None:
    """The samples of all parts; of more tokens than are kept whole the documents that one recording would keep of these."""
    samples = []
    for part, place in zip(parts, places, strict=True):
        if (sample := part.sample) is not None:
            samples.append(replace(sample, routes=replace(sample.routes, document=place[sample.routes.document].astype(np.int32))))
    if not samples:
        return None
    sample = joined_sample(samples, whole=all(each.whole for each in samples)).in_order()
    limit = KEPT_TOKENS if sample.whole else SAMPLE_TOKENS
    if sample.tokens <= limit and sample.tokens * len(shape.layers) * shape.slots <= KEPT_CELLS:
        return sample
    return sample.of(even_documents(shape, np.bincount(sample.routes.document, minlength=len(tokens))))
