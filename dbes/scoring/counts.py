"""Counts: per document and layer, the sums that all scores are computed from, with one layer of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dbes.scoring.given import given_documents, given_domains
from dbes.scoring.layer_counts import (
    LayerCounts,
    NgramSums,
    StiffnessSums,
    joined_layers,
    shape_by_unit,
    shape_of,
    side_by_side,
    units_of,
)
from dbes.scoring.merging import merged
from dbes.scoring.sampling import TokenSample
from dbes.scoring.stored import COUNTS, save_counts, stored
from dbes.scoring.texts import Texts
from dbes.showing import Shown, sizes
from dbes.trace.store import CONTROL
from dbes.trace.types import RoutingShape
from dbes.trace.vocabulary import TokenText

__all__ = ["Counts", "LayerCounts", "NgramSums", "StiffnessSums"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Counts(Shown):
    """Per document and layer everything that the metrics need; one layer of it is in memory at a time.

    Attributes:
        shape: sizes and domains, of all layers.
        tokens: int64 [documents].
        read: gives the sums of one layer.
        phase: only tokens of this phase were counted; None: all.
        phase_tokens: tokens of given text and of text that the model wrote, whatever was counted.
        provenance, vocabulary: as of the trace.
        texts: what is known of the texts that were read.
        sample_of: gives the tokens that were kept; None where none were.
        control: the counts of the random-router control, if it was recorded; those of further draws are its control.
        grouped: windows inside the expert groups were counted.
        by_documents: false where the counts of whole domains are all that is known: each stands as one document then.
        seal: sha256 that the manifest of the trace has of itself.
        notes: why something in them is unknown, for the warnings of a result.
    """

    shape: RoutingShape
    tokens: np.ndarray
    read: Callable[[int], LayerCounts] = field(repr=False, compare=False)
    phase: int | None = None
    phase_tokens: tuple[int, int] = (0, 0)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Mapping[int, TokenText] = field(default_factory=dict, repr=False)
    texts: Texts = field(default_factory=Texts, repr=False)
    sample_of: Callable[[], TokenSample | None] = field(default=lambda: None, repr=False, compare=False)
    control: Counts | None = None
    grouped: bool = True
    by_documents: bool = True
    seal: str | None = None
    notes: tuple[str, ...] = ()

    def about(self) -> tuple[str, dict[str, str]]:
        shape = self.shape
        texts = f"{len(self.tokens):,} documents of " if self.by_documents else ""
        return "Counts", {
            "model": str(self.provenance.get("model") or ""),
            "router": sizes(len(shape.layers), shape.experts, shape.top_k),
            "texts": f"{texts}{len(shape.domains)} domains, {int(self.tokens.sum()):,} tokens",
            "random routers": str(len(self.controls)) if self.controls else "none",
        }

    @classmethod
    def of(cls, sums: LayerCounts, **about: Any) -> Counts:
        """Counts whose sums are in memory, of all layers side by side."""
        return cls(shape=sums.shape, tokens=sums.tokens, read=sums.column, **about)

    @classmethod
    def from_arrays(
        cls,
        hits: np.ndarray,
        *,
        domains: Sequence[str],
        document_domain: np.ndarray | Sequence[int],
        top_k: int | Sequence[int],
        layers: Sequence[int] | None = None,
        experts: int | Sequence[int] | None = None,
        mass: np.ndarray | None = None,
        tokens: np.ndarray | Sequence[int] | None = None,
        active: np.ndarray | None = None,
        document_ids: Sequence[str] | None = None,
        document_source: Sequence[str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Counts:
        """Counts that were made elsewhere, per document.

        Args:
            hits: whole numbers [documents, layers, experts], (token, slot) pairs that chose the expert; 0 beyond a layer's last expert.
            domains: names of the domains.
            document_domain: int [documents], index of each document's domain.
            top_k, experts: one number for all layers or one per layer; by default as many experts as the last axis of hits.
            layers: the model's own layer numbers, ascending; by default 0, 1, 2, ...
            mass: [documents, layers, experts], gate weight, normalised to 1 per token.
            tokens: [documents]; by default as many as the hits need.
            active: [documents, layers], tokens with at least one slot that ran; by default tokens, or hits where these are fewer.
            document_ids: names of the documents; mere numbers by default.
            document_source: the source text each document was cut from.
            provenance: as of a trace.

        Raises:
            TraceError: shapes disagree; a number is not finite, below 0 or not whole; more hits than tokens x top_k.
        """
        return cls(
            **given_documents(
                hits,
                domains=domains,
                document_domain=document_domain,
                layers=layers,
                experts=experts,
                top_k=top_k,
                mass=mass,
                tokens=tokens,
                active=active,
                document_ids=document_ids,
                document_source=document_source,
                provenance=provenance,
            )
        )

    @classmethod
    def from_domains(
        cls,
        hits: np.ndarray,
        *,
        domains: Sequence[str],
        top_k: int | Sequence[int],
        layers: Sequence[int] | None = None,
        experts: int | Sequence[int] | None = None,
        mass: np.ndarray | None = None,
        tokens: np.ndarray | Sequence[int] | None = None,
        active: np.ndarray | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Counts:
        """Counts of whole domains, where nothing is known of documents: no interval and no test can be made of them.

        Args:
            hits: whole numbers [domains, layers, experts].
            domains, top_k, layers, experts, mass, tokens, active, provenance: as in ``from_arrays``, with domains for documents.

        Raises:
            TraceError: as ``from_arrays``.
        """
        return cls(
            **given_domains(
                hits,
                domains=domains,
                layers=layers,
                experts=experts,
                top_k=top_k,
                mass=mass,
                tokens=tokens,
                active=active,
                provenance=provenance,
            )
        )

    @classmethod
    def merge(cls, parts: Sequence[Counts]) -> Counts:
        """The counts of several recordings of one model as one.

        Documents are told apart by their ids. Documents of equal id are parts of one document, so that their counts are added up;
        windows and neighbours across such a cut are not counted. Windows inside expert groups are unknown where a part has other
        groups than the whole, which the notes then say.

        Raises:
            TraceError: other layers, experts, top_k, domains, phase or model; a control in some only; a document with two domains;
                documents that have only numbers.
        """
        fields = merged(parts)
        controls = [part.control for part in parts if part.control is not None]
        return cls(**fields, control=cls.merge(controls) if controls else None)

    @classmethod
    def load(cls, folder: str | Path) -> Counts:
        """The counts that ``save`` wrote; a trace keeps its own in ``counts/all``. A layer is read when it is asked for.

        Raises:
            TraceError: there are none, they are damaged, or of another schema version.
        """
        folder = Path(folder)
        control = folder / CONTROL
        return cls(**stored(folder), control=cls.load(control) if (control / COUNTS).is_file() else None)

    def save(self, folder: str | Path) -> Counts:
        """Write the counts as a folder and return those that read it.

        Raises:
            FileError: it cannot be written.
        """
        save_counts(self, Path(folder))
        return self.load(folder)

    def layer(self, column: int) -> LayerCounts:
        """The sums of one layer (by its place, not its number in the model): every array has a layers axis of length 1."""
        return self.read(column)

    def layers(self) -> Iterator[LayerCounts]:
        """The sums of one layer after the other."""
        return map(self.layer, range(len(self.shape.layers)))

    def take(self, documents: np.ndarray) -> Counts:
        """The counts of chosen documents, distinct and ascending (the expert groups stay those of all)."""
        if len(documents) == len(self.tokens):
            return self
        return replace(
            self,
            shape=shape_of(self.shape, documents),
            tokens=self.tokens[documents],
            read=lambda column: self.read(column).take(documents),
            control=None if self.control is None else self.control.take(documents),
        )

    def by_unit(self) -> Counts:
        """The counts with documents cut from one source text added up into one, in order of first appearance."""
        first, order, starts = units_of(self.shape)
        if len(first) == len(order):
            return self
        return replace(
            self,
            shape=shape_by_unit(self.shape),
            tokens=np.add.reduceat(self.tokens[order], starts),
            read=lambda column: self.read(column).by_unit(),
            control=None if self.control is None else self.control.by_unit(),
        )

    @property
    def controls(self) -> tuple[Counts, ...]:
        """The counts of the recorded draws of the random router."""
        return () if self.control is None else (self.control, *self.control.controls)

    @property
    def sample(self) -> TokenSample | None:
        """The tokens that were kept, with the documents that these counts had before any were chosen or added up."""
        return self.sample_of()

    def by_domain(self, chosen: Callable[[LayerCounts], np.ndarray]) -> np.ndarray:
        """Sums over the documents of each domain of an array of every layer: float64 [domains, layers, ...].

        Args:
            chosen: the array [documents, 1, ...] of one layer; layers with fewer experts than others are filled up with zeros.
        """
        return side_by_side([sums.by_domain(chosen(sums)) for sums in self.layers()])

    def totals(self) -> LayerCounts:
        """The sums over the documents of each domain, of all layers side by side, as if each domain were one document."""
        return joined_layers([sums.totals() for sums in self.layers()])

    def whole(self) -> LayerCounts:
        """The sums of all layers side by side: documents x layers x experts in memory."""
        return joined_layers(list(self.layers()))
