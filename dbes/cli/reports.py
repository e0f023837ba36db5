"""`dbes report` and `dbes compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbes.cli.common import FAILED, one_of, say, stdout
from dbes.files import check_writable


def report(
    result: Annotated[Path, typer.Argument(help="Folder of a result or of `dbes intervene`, or its result.json or intervention.json.")],
    format: Annotated[
        str,
        one_of(
            "format",
            ("html", "card", "hub", "record"),
            "html page; card: Markdown (section of a model card, or findings of an experiment); hub metadata; leaderboard record.",
        ),
    ] = "html",
    trace: Annotated[Path | None, typer.Option(help="Folder of the recorded routes, where they are not beside the result.")] = None,
    output: Annotated[Path | None, typer.Option(help="Page to write; report.html beside the result by default.")] = None,
    dataset: Annotated[str | None, typer.Option(help="With --format hub: hub id of the benchmark's dataset, owner/name.")] = None,
) -> None:
    """Write the page of one result or experiment, a single HTML file that needs no network; the other formats go to stdout."""
    from dbes.reporting.report import report as run

    if format == "html":
        say(run(result, trace=trace, output=output))
        return
    text = str(run(result, format=format, trace=trace, dataset=dataset))
    say(text, nl=not text.endswith("\n"))


def compare(
    results: Annotated[list[Path], typer.Argument(help="Results, or folders with results below them.")],
    by: Annotated[str, typer.Option(help="Metric that ranks the models; excess or score: of specialization.")] = "specialization",
    format: Annotated[
        str, one_of("format", ("table", "csv", "json", "markdown", "html"), "How to show the comparison; html is the leaderboard page.")
    ] = "table",
    output: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Show the published, uncalibrated values instead.")] = False,
    accuracy: Annotated[
        list[Path] | None, typer.Option(help="Accuracies of the models: CSV `model,accuracy`, or results of lm-eval (may be repeated).")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check that the results may be published.")] = False,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Of two recordings (traces, or results that kept theirs): do they choose the same experts?")
    ] = False,
) -> None:
    """Put results side by side; of two, the paired difference for every metric and layer depth."""
    from dbes.comparison.check import check_all
    from dbes.comparison.compare import compare as run
    from dbes.comparison.compare import paired_of
    from dbes.comparison.entries import told_apart
    from dbes.errors import ResultError
    from dbes.reporting import export, leaderboard
    from dbes.reporting.report import as_text

    if check:
        problems = check_all(results)
        for line in problems or ["every result may be published"]:
            say(line)
        raise typer.Exit(FAILED if problems else 0)
    if output is not None:
        check_writable(output)
    if agreement:
        compare_recordings(results, format=format, output=output)
        return
    found = run(results, by=by, accuracy=accuracy or ())
    if not found.entries:
        raise ResultError(told_apart(found.apart))
    if format == "table" and output is None:
        stdout().print(leaderboard.render_terminal(found, paired_of(found), published=published))
        return
    text = as_text(found, "markdown" if format == "table" else format, published=published)
    if output is not None:
        export.write(text, output)
        say(output)
    elif format == "html":
        typer.echo(text, nl=False)  # as it is: its scripts run by their hash, and its text is harmless already
    else:
        say(text, nl=False)


def compare_recordings(recordings: list[Path], *, format: str, output: Path | None) -> None:
    """`dbes compare --agreement`."""
    from dbes.comparison.agreement import agreement as run
    from dbes.errors import SettingError
    from dbes.reporting import agreement, export

    if len(recordings) != 2:
        raise SettingError(f"--agreement is of two recordings, {len(recordings)} were given")
    found = run(recordings[0], recordings[1])
    if format == "table" and output is None:
        stdout().print(agreement.render_terminal(found))
        return
    text = agreement.as_text(found, "markdown" if format == "table" else format)
    if output is not None:
        export.write(text, output)
        say(output)
    elif format == "html":
        typer.echo(text, nl=False)
    else:
        say(text, nl=False)
