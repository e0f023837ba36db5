"""`dbes paths`."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbes.cli.common import one_of, say, stdout
from dbes.cli.hints import command, option
from dbes.errors import SettingError
from dbes.files import check_writable

if TYPE_CHECKING:
    from dbes.results import Result, TaskFacts


def paths(
    result: Annotated[Path, typer.Argument(help="Folder of a result that kept its trace.")],
    domain: Annotated[str | None, typer.Option(help="Domain to find the experts of; with --for placement all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the path to.")] = None,
    purpose: Annotated[
        str | None,
        one_of(
            "purpose", ("placement", "pruning"),
            "Measure the choice on texts that did not choose: slots covered, or also bits per byte without the other experts.", "--for",
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="specialization, trajectory, lift, esft-token, esft-gate, target-load, load, gradient, gradient-contrast, "
            "gradient-layer, causal, random, random-load-matched, bottom or all."
        ),
    ] = "specialization",
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the routed-expert parameters at most; 0.15, or ESFT's own sets, by default. With --for: share of the "
            "experts, or from 1 on how many of each layer; 0.25, or 0.5 for pruning, where it may be repeated."
        ),
    ] = None,
    allocation: Annotated[
        str, one_of("allocation", ("layer", "global"), "With --for placement: as many of every layer, or wherever they lie.")
    ] = "layer",
    match: Annotated[str, typer.Option(help="Rule whose cells random-load-matched carries the load of.")] = "specialization",
    model: Annotated[str | None, typer.Option(help="The evaluated model, for rules that look at it: folder, hub id or embedded.")] = None,
    tasks: Annotated[str, typer.Option(help="The evaluated task, for rules that look at the model.")] = "embedded",
    average: Annotated[
        str, one_of("average", ("tokens", "samples"), "For ESFT's rules: all tokens alike (its code), or samples (its paper).")
    ] = "tokens",
    seed: Annotated[int, typer.Option(help="Seed of random rules and of resampling.")] = 0,
    format: Annotated[
        str, one_of("format", ("dbes", "esft", "table", "json"), "Of the path: dbes, everything, or esft. With --for: table or json.")
    ] = "dbes",
    output: Annotated[Path | None, typer.Option(help="With --for: file for a page, or with --format json for that.")] = None,
) -> None:
    """Choose the experts that serve a domain, within a budget, and say what they cover and how sure the choice is."""
    from dbes.paths.search import find_path
    from dbes.results import load_result

    if purpose is not None:
        kind = "json" if format == "json" else "table"
        budgets = tuple(budget or ())
        _measure(result, purpose, domain, budgets, allocation, model=model, tasks=tasks, seed=seed, out=out, output=output, format=kind)
        return
    if domain is None or out is None:
        raise SettingError(f"{'--domain' if domain is None else '--out'} is needed: a path is of one domain, and written to a file")
    if format not in ("dbes", "esft") or len(budget or ()) > 1 or output is not None or allocation != "layer":
        raise SettingError("formats table and json, several budgets, --allocation and --output are of --for placement or pruning")
    check_writable(out)
    size = budget[0] if budget else "auto"
    path = find_path(result, domain=domain, rule=rule, budget=size, match=match, model=model, tasks=tasks, average=average, seed=seed)
    written = path.save(out, format=format)
    stability = "" if path.stability is None else f", {path.stability:.0%} chosen again on half of the texts"
    say(
        f"{len(path.cells)} of {sum(path.experts)} cells ({path.share:.1%} of the expert parameters) take {path.coverage:.1%} of the "
        f"slots of {domain}{stability}",
        err=True,
    )
    say(written)
    say(next_step(load_result(result), written, domain=domain, model=model, tasks=tasks), err=True)


def _measure(
    result: Path,
    purpose: str,
    domain: str | None,
    budgets: tuple[float, ...],
    allocation: str,
    *,
    model: str | None,
    tasks: str,
    seed: int,
    out: Path | None,
    output: Path | None,
    format: str,
) -> None:
    """`dbes paths --for placement` and `--for pruning`."""
    from dbes.paths.evidence import given_evidence
    from dbes.paths.placement import path_of, place
    from dbes.reporting import export, placement

    for file in filter(None, (out, output)):
        check_writable(file)
    if out is not None and (domain is None or len(budgets) > 1):
        raise SettingError("--out holds the experts of one domain and one budget; give both once")
    evidence = given_evidence(result)
    if purpose == "placement":
        if len(budgets) > 1:
            raise SettingError(f"--for placement takes one budget, {len(budgets)} were given")
        found = chosen = place(evidence, domain=domain, budget=budgets[0] if budgets else 0.25, allocation=allocation)
    else:
        if domain is None or model is None:
            raise SettingError(f"--for pruning needs {'--domain' if domain is None else '--model, which reads the texts without experts'}")
        if allocation != "layer":
            raise SettingError("--for pruning keeps as many experts of every layer, as checkpoints have; leave --allocation out")
        from dbes.comparison.pruning import prune

        found = prune(evidence, domain=domain, model=model, tasks=tasks, budgets=budgets or (0.5,), seed=seed)
        chosen = found.budgets[0].placement
    if output is not None:
        export.write(placement.as_json(found) if format == "json" else placement.render_page(found), output)
        say(output)
    elif format == "json":
        say(placement.as_json(found), nl=False)
    else:
        stdout().print(placement.render_terminal(found))
    if out is not None and domain is not None:
        say(path_of(chosen, domain, evidence).save(out), err=True)
        keep = ["export", out, "--format", "prune-list", "--out", "keep.json"]
        load = ["export", result, "--format", "logical-count", "--domain", domain, "--out", "load.json"]
        say(f"Next, as lists of experts to keep and to drop:\n  {command(keep)}", err=True)
        say(f"The load of the domain, by which servers place experts:\n  {command(load)}", err=True)


def next_step(found: Result, written: Path, *, domain: str, model: str | None, tasks: str) -> str:
    """The command that trains the path, as far as the result says which model and task it is of."""
    from dbes.shipped import EMBEDDED_NAME

    revision = found.model.revision
    local = revision is None or revision.startswith("sha256:")
    named = "embedded" if found.model.name == EMBEDDED_NAME else None if local else found.model.name
    model = model or found.settings.get("model") or named
    task = tasks if tasks != "embedded" else found.settings.get("tasks") or _shipped(found.task)
    missing = [f"MODEL is the folder of {found.model.name}"] if model is None else []
    missing += [f"TASK is the YAML file of task {found.task.name}"] if task is None else []
    words = ["finetune", "--model", model or "MODEL", *option("revision", None if local else revision), *option("paths", written)]
    words += ["--data", f"task:{domain}", "--out", _free(f"finetuned-{''.join(c if c.isalnum() else '-' for c in domain)}")]
    words += option("tasks", task or "TASK", default="embedded")
    said = f"Next, train these experts only ({', '.join(missing)}):" if missing else "Next, train these experts only:"
    return f"{said}\n  {command(words)}\nIts report says what other domains forget; --protect makes updates that these hardly feel."


def _shipped(task: TaskFacts) -> str | None:
    """The name by which dbes finds this task; None where it is one of the user's."""
    from dbes.errors import TaskError
    from dbes.tasks.task import load_task

    try:
        known = load_task(task.name)
    except TaskError:
        return None
    return task.name if (known.version, list(known.domains)) == (task.version, list(task.domains)) else None


def _free(name: str) -> str:
    """The name, or with a number, that no file has yet."""
    return next(one for number in count(1) if not Path(one := name if number == 1 else f"{name}-{number}").exists())
