"""Tasks in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbes.evaluation.request import Benchmark
from dbes.tasks.task import Task


def render(tasks: Sequence[Task]) -> RenderableType:
    """A row per task."""
    table = Table(header_style="bold")
    for heading in ("Task", "Version", "Domains", "Description"):
        table.add_column(heading, overflow="fold")
    for task in tasks:
        table.add_row(Text(task.name), str(task.version), Text(", ".join(task.domains)), Text(task.description or ""))
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
