"""Counts of one import: tables of the same domain (or document) are added up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dbes.errors import SourceError, TraceError
from dbes.importing.domain_map import DomainMap
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import CountTable, Notes
from dbes.scoring.counts import Counts

Key = tuple[str, str | None]


def counts_of_tables(
    tables: Iterator[CountTable], domains: DomainMap, sizes: ModelSizes, notes: Notes, provenance: Mapping[str, Any]
) -> Counts:
    """The counts of all tables.

    Raises:
        SourceError: tables of other layers, experts or top-k; layers with unequal slots; counts of documents and of domains in one
            import; nothing that the domain map knows.
        SettingError: nobody says how many experts a token takes.
    """
    hits: dict[Key, np.ndarray] = {}
    tokens: dict[Key, int | None] = {}
    texts: dict[Key, str | None] = {}
    first: CountTable | None = None
    top_k = 0
    for table in tables:
        place = domains.place(table.source, table.id, table.fields, otherwise=None if table.by_document else table.id)
        if place is None:
            notes.add("{n} tables of counts fit no entry of the domain map and were left out")
            continue
        if first is None:
            first, top_k = table, sizes.agreed("top_k", table.top_k, where=table.where, option="--top-k")
        _alike(first, table, top_k)
        key = (place.domain, table.id if table.by_document else None)
        texts[key] = place.document
        if key in hits:
            notes.add(f"counts of {{n}} more tables were added to those of their {'document' if table.by_document else 'domain'}")
            known = tokens[key]
            tokens[key] = None if known is None or table.tokens is None else known + table.tokens
            hits[key] += table.hits
        else:
            hits[key], tokens[key] = table.hits.copy(), table.tokens
    if first is None:
        raise SourceError("nothing was imported: no table of counts fits an entry of the domain map")
    domains.tell(notes)
    told = {"told": list(notes.told())}
    return _counts(first, top_k, hits, tokens, texts, {**provenance, "import": {**provenance["import"], **told}})


def _alike(first: CountTable, table: CountTable, top_k: int) -> None:
    """Refuse a table that cannot be of the same model, or of which layers were counted over unequal slots."""
    if table.layers != first.layers or table.hits.shape != first.hits.shape:
        raise SourceError(
            f"{table.where}: {table.hits.shape[1]} experts at layers {list(table.layers)}, but {first.where} has {first.hits.shape[1]} at "
            f"{list(first.layers)}: of another model?"
        )
    if table.top_k is not None and table.top_k != top_k:
        raise SourceError(f"{table.where}: {table.top_k} experts a token, but {first.where} has {top_k}: of another model?")
    if table.by_document != first.by_document:
        raise SourceError(f"{table.where}: counts of whole domains and of documents in one import; import them apart")
    slots = table.hits.sum(axis=1)
    if (slots != slots[0]).any() and (table.tokens is not None or table.hits.max() < 2**24):
        other = int(np.argmax(slots != slots[0]))
        raise SourceError(
            f"{table.where}: {slots[0]:,} slots at layer {table.layers[0]}, but {slots[other]:,} at layer {table.layers[other]}; every "
            "token takes as many experts at each layer, so that some were not counted"
        )
    if slots[0] % top_k and table.hits.max() < 2**24:
        raise SourceError(f"{table.where}: {slots[0]:,} slots are no multiple of top_k = {top_k}")


def _counts(
    first: CountTable, top_k: int, hits: Mapping[Key, np.ndarray], tokens: Mapping[Key, int | None], texts: Mapping[Key, str | None],
    provenance: Mapping[str, Any],
) -> Counts:  # fmt: skip
    names = tuple(dict.fromkeys(domain for domain, _ in hits))
    sizes: dict[str, Any] = {"domains": names, "top_k": top_k, "layers": first.layers, "experts": first.hits.shape[1]}
    known = list(tokens.values())
    sizes["tokens"] = None if any(count is None for count in known) else known
    stacked = np.stack(list(hits.values()))
    try:
        if not first.by_document:
            return Counts.from_domains(stacked, **sizes, provenance=provenance)
        ids = [str(document) for _, document in hits]
        source = [text or name for text, name in zip(texts.values(), ids, strict=True)]
        return Counts.from_arrays(
            stacked,
            **sizes,
            document_domain=[names.index(domain) for domain, _ in hits],
            document_ids=ids,
            document_source=None if source == ids else source,
            provenance=provenance,
        )
    except TraceError as problem:
        raise SourceError(f"{first.where}: {problem}") from None
