"""import_routing(): routing that was recorded elsewhere becomes a trace, or counts where nothing is known of single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from dbes.errors import SourceError
from dbes.files import LOCK, discard, locked, refused_by_system
from dbes.importing.detection import AUTO, detected, format_of, of_format
from dbes.importing.domain_map import DomainMap, read_domain_map
from dbes.importing.routes import write_routes
from dbes.importing.sizes import ModelSizes, model_sizes
from dbes.importing.sources import sources_of
from dbes.importing.tables import counts_of_tables
from dbes.importing.types import CountTable, Document, Item, Notes
from dbes.scoring.counts import Counts
from dbes.scoring.stored import COUNTS
from dbes.trace.manifest import MANIFEST
from dbes.trace.store import Trace
from dbes.wording import counted

UNDER_WAY = "import.part"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import made.

    Attributes:
        format: what the sources were read as.
        routes: the trace, or the counts where the sources have no routes of tokens; lies in the folder that was asked for.
        told: what was left out or taken for granted, a sentence each.
    """

    format: str
    routes: Trace | Counts
    told: tuple[str, ...]

    @property
    def summary(self) -> str:
        """What came out, in a line."""
        shape, routes = self.routes.shape, self.routes
        layers, domains = counted(len(shape.layers), "layer"), counted(len(shape.domains), "domain")
        sizes = f"{layers} x {shape.width} experts, top {shape.slots}, {domains}"
        if isinstance(routes, Trace):
            documents = counted(len(shape.document_ids), "document")
            return f"trace of {routes.tokens:,} tokens in {documents}, {sizes}, from {self.format}"
        known = counted(len(shape.document_ids), "document") if routes.by_documents else "no documents"
        return f"counts of {int(routes.tokens.sum()):,} tokens, {known}, {sizes}, from {self.format}"


def import_routing(
    sources: str | Path | Sequence[str | Path],
    *,
    output_path: str | Path,
    format: str = AUTO,
    domain_map: str | Path | Mapping[str, Any] | None = None,
    model_config: str | Path | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
) -> Imported:
    """Routing recorded elsewhere as a trace (or counts), to be scored and reported as one of dbes; see docs/formats.md.

    Args:
        sources: files, and folders of files.
        output_path: folder of the trace or the counts.
        format: one of ``detection.FORMATS``, or ``auto``.
        domain_map: which documents are of which domain: globs over source paths to domains, or the rules of ``domain_map.Rules``; a
            mapping, or a YAML or JSON file with one. Without it the domain is what the files say, or else all are of one.
        model_config: config.json of the model, by which dense layers are told and sizes checked.
        experts, top_k: sizes of the model that neither the files nor the config tell.
        overwrite: replace a trace or counts in that folder.

    Raises:
        SettingError: an argument that cannot be used, or a size that nobody told.
        SourceError: a file is damaged, is of another format, or holds what no router can have chosen; ``output_path`` is not empty.
        FileError: it cannot be written, or another import is writing there.
    """
    target = Path(output_path)
    sizes = model_sizes(model_config, experts=experts, top_k=top_k)
    domains, notes = read_domain_map(domain_map), Notes()
    _free(target, overwrite=overwrite)
    found = sources_of([sources] if isinstance(sources, str | Path) else sources)
    found = tuple(source for source in found if target.resolve() not in source.path.resolve().parents)  # what an import before wrote
    given = frozenset(source.name for source in found if source.name == source.path.as_posix())
    chosen = format_of(detected(found, notes) if format == AUTO else format)
    used = of_format(found, chosen, given, notes)
    about = {"format": chosen.name, "files": len(used), "bytes": sum(source.path.stat().st_size for source in used)}
    provenance: dict[str, Any] = {"import": about}
    if sizes.name is not None:
        provenance["model"] = sizes.name
    folder = target.with_name(f".{target.name}.{UNDER_WAY}")
    with locked(folder):
        for left in folder.iterdir():
            if left.name != LOCK:  # of an import that was killed
                discard(left)
        try:
            _write(chosen.read(used, sizes, notes), folder, domains, sizes, notes, provenance)
        except BaseException:
            discard(folder)
            raise
    with refused_by_system(target):
        if target.exists():
            discard(target)
        folder.replace(target)
    routes = Counts.load(target) if (target / COUNTS).is_file() else Trace.load(target)
    return Imported(format=chosen.name, routes=routes, told=notes.told())


def _free(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, but for a trace or counts that may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SourceError(f"{target}: is a file; choose a folder that does not exist yet")
    known = (target / MANIFEST).is_file() or (target / COUNTS).is_file()
    if known and not overwrite:
        raise SourceError(f"{target}: holds a trace or counts already; choose another folder, or --overwrite")
    if not known and any(target.iterdir()):
        raise SourceError(f"{target}: is not empty; choose a folder that does not exist yet")


def _write(items: Iterator[Item], folder: Path, domains: DomainMap, sizes: ModelSizes, notes: Notes, provenance: dict[str, Any]) -> None:
    first = next(items, None)
    if first is None:
        raise SourceError("nothing was imported: the files hold no routing")
    every = chain([first], items)
    if isinstance(first, Document):
        write_routes(cast(Iterator[Document], every), folder, domains, sizes, notes, provenance)
    else:
        counts_of_tables(cast(Iterator[CountTable], every), domains, sizes, notes, provenance).save(folder)
