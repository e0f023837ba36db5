"""The section of a model card that reports a result."""

from __future__ import annotations

import math

from dbes.reporting.charts import HEADLINE, METRICS
from dbes.reporting.compare import model_score
from dbes.reporting.export import markdown_cell
from dbes.reporting.page import command
from dbes.results import Result

STRONGEST = 8


def card_section(result: Result) -> str:
    """Markdown for a model's README: verdict, scores with interval and chance, strongest specialists, how to repeat it."""
    if result.status == "error":
        return f"## Expert specialization (dbes)\n\nThe evaluation failed: {markdown_cell(result.error, 2000)}\n"
    lines = ["## Expert specialization (dbes)", "", markdown_cell(result.verdict, 2000), ""]
    lines += ["| Metric | Score | 95 % interval | p | Random router |", "| --- | --- | --- | --- | --- |"]
    for metric in HEADLINE:
        if model_score(result, metric) is None:
            lines.append(f"| {METRICS[metric][0]} | – | – | – | – |")
            continue
        record = result.record(metric)
        interval = "–" if math.isnan(record.score_low) else f"{record.score_low:.1%} to {record.score_high:.1%}"
        p = "–" if math.isnan(record.p) else "< 0.001" if record.p < 0.001 else f"{record.p:.3f}"
        control = "–" if math.isnan(record.control) else f"{record.control:.1%}"
        lines.append(f"| {METRICS[metric][0]} | {record.score:.1%} | {interval} | {p} | {control} |")
    lines += ["", "0 % is what shuffling the documents' domain labels gives, 100 % a router that gives each domain experts of its own.", ""]
    if result.specialists:
        lines += ["| Domain | Layer | Expert | Lift | 95 % interval | q |", "| --- | --- | --- | --- | --- | --- |"]
        for each in result.specialists[:STRONGEST]:
            interval = f"{each.lift_low:.2f} to {each.lift_high:.2f}"
            lines.append(f"| {markdown_cell(each.domain)} | {each.layer} | {each.expert} | {each.lift:.2f} | {interval} | {each.q:.2g} |")
        lines.append("")
    task = result.task
    lines += [
        f"Task {markdown_cell(task.name)}, version {task.version}, fingerprint {markdown_cell(task.fingerprint)}; "
        f"dtype {markdown_cell(result.model.dtype)}; "
        f"dbes {markdown_cell(result.environment.get('dbes'))}; {result.created[:10]}.",
        "",
        "```",
        command(result).replace("```", "'''"),
        "```",
    ]
    return "\n".join(lines) + "\n"
