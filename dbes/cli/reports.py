"""`dbes report` and `dbes compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dbes.cli.common import FAILED, errors, say, say_json, stdout
from dbes.files import check_writable
from dbes.text import json_text


class ReportFormat(StrEnum):
    html = "html"
    card = "card"
    hub = "hub"
    record = "record"


class CompareFormat(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    html = "html"


def report(
    result: Annotated[Path, typer.Argument(help="Folder of a result or of `dbes intervene`, or its result.json or intervention.json.")],
    format: Annotated[
        ReportFormat,
        typer.Option(
            help="html page; card: Markdown (section of a model card, or findings of an experiment); hub metadata; leaderboard record."
        ),
    ] = ReportFormat.html,
    trace: Annotated[Path | None, typer.Option(help="Folder of the recorded routes, where they are not beside the result.")] = None,
    output: Annotated[Path | None, typer.Option(help="Page to write; report.html beside the result by default.")] = None,
    dataset: Annotated[str | None, typer.Option(help="With --format hub: hub id of the benchmark's dataset, owner/name.")] = None,
) -> None:
    """Write the page of one result or experiment, a single HTML file that needs no network; the other formats go to stdout."""
    from dbes.reporting.outcome import is_outcome

    if is_outcome(result):
        _report_outcome(result, format, trace=trace, output=output)
        return
    from dbes.reporting.card import card_section
    from dbes.reporting.export import hub_entries, open_record
    from dbes.reporting.page import write_page
    from dbes.results import load_result

    with errors():
        if format is ReportFormat.html:
            say(write_page(result, trace=trace, output=output))
        elif format is ReportFormat.card:
            say(card_section(load_result(result)))
        elif format is ReportFormat.hub:
            if dataset is None:
                message = "with --format hub the id of the benchmark's dataset on the hub is needed: --dataset OWNER/NAME"
                raise typer.BadParameter(message, param_hint="--dataset")
            say(hub_entries(load_result(result), dataset=dataset))
        else:
            say_json(open_record(load_result(result)))


def _report_outcome(path: Path, format: ReportFormat, *, trace: Path | None, output: Path | None) -> None:
    from dbes.reporting.outcome import load_outcome
    from dbes.reporting.outcome_card import outcome_card
    from dbes.reporting.outcome_page import write_outcome_page

    if format not in (ReportFormat.html, ReportFormat.card):
        raise typer.BadParameter("an experiment has html and card only", param_hint="--format")
    if trace is not None:
        raise typer.BadParameter("an experiment has no recorded routes", param_hint="--trace")
    with errors():
        if format is ReportFormat.html:
            say(write_outcome_page(path, output=output))
        else:
            say(outcome_card(load_outcome(path)), nl=False)


def compare(
    results: Annotated[list[Path], typer.Argument(help="Results, or folders with results below them.")],
    by: Annotated[str, typer.Option(help="Metric the models are ranked by.")] = "specialization",
    format: Annotated[CompareFormat, typer.Option(help="How to show the comparison; html is the leaderboard page.")] = CompareFormat.table,
    output: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Show the published, uncalibrated values instead.")] = False,
    accuracy: Annotated[
        list[Path] | None, typer.Option(help="Accuracies of the models: CSV `model,accuracy`, or results of lm-eval (may be repeated).")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check that the results may be published.")] = False,
) -> None:
    """Put results side by side; of two, the paired difference for every metric and layer depth."""
    from dbes.comparison.check import check_all
    from dbes.comparison.compare import compare as run
    from dbes.comparison.compare import paired_of
    from dbes.comparison.entries import told_apart
    from dbes.errors import ResultError
    from dbes.reporting import export, leaderboard

    with errors():
        if check:
            problems = check_all(results)
            for line in problems or ["every result may be published"]:
                say(line)
            raise typer.Exit(FAILED if problems else 0)
        if output is not None:
            check_writable(output)
        found = run(results, metric=by, accuracy=accuracy or ())
        if not found.entries:
            raise ResultError(told_apart(found.apart))
        paired = paired_of(found)
        if format is CompareFormat.table and output is None:
            stdout().print(leaderboard.render_terminal(found, paired, published=published))
            return
        if format is CompareFormat.csv:
            text = export.as_csv(found, published=published)
        elif format is CompareFormat.json:
            text = json_text(export.as_json(found, paired)) + "\n"
        elif format is CompareFormat.html:
            text = leaderboard.render_leaderboard(found)
        else:
            text = export.as_markdown(found, paired, published=published)
        if output is None and format is CompareFormat.html:
            typer.echo(text, nl=False)  # as it is: its scripts run by their hash, and its text is harmless already
        elif output is None:
            say(text, nl=False)
        else:
            export.write(text, output)
            say(output)
