"""The section of a model card that reports a result."""

from __future__ import annotations

from dbes.comparison.compare import model_score
from dbes.reporting.charts import HEADLINE, METRICS
from dbes.reporting.commands import command, program
from dbes.reporting.export import markdown_cell, markdown_table
from dbes.reporting.meaning import meaning_rows
from dbes.results import Result
from dbes.scoring.resolution import DOUBTFUL, cannot_tell, why_not
from dbes.scoring.verdict import current_verdict
from dbes.wording import p_cell, share, shares, task_words

STRONGEST = 8


def card_section(result: Result) -> str:
    """Markdown for a model's README: verdict, scores with interval and chance, strongest specialists, how to repeat it."""
    if result.status == "error":
        return f"## Expert specialization (dbes)\n\nThe evaluation failed: {markdown_cell(result.error, 2000)}\n"
    lines = ["## Expert specialization (dbes)", "", markdown_cell(current_verdict(result), 2000), ""]
    lines += ["| Metric | Score | 95 % interval | p | Random router |", "| --- | --- | --- | --- | --- |"]
    for metric in HEADLINE:
        if model_score(result, metric) is None:
            lines.append(f"| {METRICS[metric][0]} | – | – | – | – |")
            continue
        record = result.record(metric)
        lines.append(
            f"| {METRICS[metric][0]} | {share(record.score)} | {shares(record.score_low, record.score_high)} | "
            f"{p_cell(record.p)} | {share(record.control)} |"
        )
    lines += ["", "0 % is a router that says nothing about the domain, 100 % one that gives each domain experts of its own.", ""]
    if meaning := meaning_rows(result):
        lines += [*markdown_table(("What the specialization means", ""), meaning), ""]
    if cannot_tell(result):
        lines += [f"The p-values say nothing here: {why_not(result)}.", ""]
    if result.specialists:
        lines += [f"Specialists. {DOUBTFUL}.", ""] if cannot_tell(result) else []
        lines += ["| Domain | Layer | Expert | Lift | 95 % interval | q |", "| --- | --- | --- | --- | --- | --- |"]
        for each in result.specialists[:STRONGEST]:
            interval = f"{each.lift_low:.2f} to {each.lift_high:.2f}"
            q = p_cell(each.q)
            lines.append(f"| {markdown_cell(each.domain)} | {each.layer} | {each.expert} | {each.lift:.2f} | {interval} | {q} |")
        lines.append("")
    task = result.task
    lines += [
        f"Task {markdown_cell(task_words(task.name, task.version, task.fingerprint), 400)}; dtype {markdown_cell(result.model.dtype)}; "
        f"dbes {markdown_cell(result.environment.get('dbes'))}; {markdown_cell(result.created[:10])}.",
        "",
        "```",
        command(result, start=program(shared=True)).replace("```", "'''"),
        "```",
    ]
    return "\n".join(lines) + "\n"
