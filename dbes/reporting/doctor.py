"""An examination of a model in the terminal or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbes.models.doctor import ARCHITECTURE, Diagnosis
from dbes.text import printable


def render(diagnosis: Diagnosis) -> RenderableType:
    """What was found per layer, and whether the model can be recorded."""
    rows = diagnosis.rows()
    heading = Text.assemble((diagnosis.model, "bold"), f"  {diagnosis.architecture}, {diagnosis.parameters:,} parameters")
    heading.append(f", {diagnosis.weights}")
    if diagnosis.dense_layers:
        heading.append(f"\ndense layers, not recorded: {', '.join(map(str, diagnosis.dense_layers))}")
    table = Table(header_style="bold")
    for name in rows[0]:
        if name != "problem" or any(row["problem"] for row in rows):
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(text) for name, text in row.items() if name != "problem" or any(each["problem"] for each in rows)))
    for note in diagnosis.notes:
        heading.append(f"\nnote: {printable(note)}")
    whole = diagnosis.weights != ARCHITECTURE
    fine = "every layer is recorded as executed" if whole else "every layer of this architecture can be recorded"
    says = fine if diagnosis.ok else "dbes cannot vouch for a recording of this model"
    style = "green" if diagnosis.ok else "bold red"
    verdict = Text(f"{'OK' if diagnosis.ok else 'PROBLEM'}: {says} ({diagnosis.seconds:.1f} s)", style=style)
    return Group(heading, table, verdict)


def as_json(diagnosis: Diagnosis) -> str:
    """The examination as strict JSON."""
    return json.dumps({**asdict(diagnosis), "ok": diagnosis.ok}, indent=1, allow_nan=False)
