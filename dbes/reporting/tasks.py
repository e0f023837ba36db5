"""Tasks in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbes.evaluation.request import Benchmark
from dbes.tasks.prepare import NOT_SAID, origin
from dbes.tasks.sources import DatasetSource
from dbes.tasks.task import Task


def render(tasks: Sequence[Task]) -> RenderableType:
    """A row per task, and one per data set of the hub that any of them reads, with what its licence and the hub ask."""
    table = _table("Task", "Version", "Domains", "Description")
    sources = _table("Task", "Domain", "Source", "Data set", "Licence", "Gate")
    for task in tasks:
        table.add_row(Text(task.name), str(task.version), Text(", ".join(task.domains)), Text(task.description or ""))
        for domain, part in task.parts():
            if isinstance(part, DatasetSource):
                gate = "log in" if part.gated else "open"
                cells = (task.name, domain, part.source or "", origin(part), part.licence or NOT_SAID)
                sources.add_row(*map(Text, cells), gate + (", do not pass on" if part.local_only else ""))
    return Group(table, sources) if sources.rows else table


def _table(*headings: str) -> Table:
    table = Table(header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def render_documents(benchmark: Benchmark) -> RenderableType:
    """A row per domain of a task whose documents could all be read."""
    facts = benchmark.facts
    words = f"bag-of-words accuracy {facts['separability']:.0%}" if "separability" in facts else "too few texts for a bag-of-words accuracy"
    title = f"{facts['name']} version {facts['version']}, {facts['fingerprint'][:12]}, {words}"
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("Domain", "Documents", "Characters", "Median"):
        table.add_column(heading, justify="left" if heading == "Domain" else "right")
    for domain in benchmark.domains:
        lengths = sorted(len(document.text) for document in benchmark.documents if document.domain == domain)
        table.add_row(Text(domain), f"{len(lengths):,}", f"{sum(lengths):,}", f"{lengths[len(lengths) // 2]:,}")
    return Group(table, Text(f"Note: {facts['note']}")) if "note" in facts else table
