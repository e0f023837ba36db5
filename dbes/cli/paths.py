"""`dbes paths`."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbes.cli.common import one_of, say
from dbes.cli.hints import command, option
from dbes.files import check_writable

if TYPE_CHECKING:
    from dbes.results import Result, TaskFacts


def paths(
    result: Annotated[Path, typer.Argument(help="Folder of a result that kept its trace.")],
    domain: Annotated[str, typer.Option(help="Domain to find the experts of.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    rule: Annotated[
        str,
        typer.Option(
            help="specialization, trajectory, lift, esft-token, esft-gate, target-load, load, gradient, gradient-contrast, "
            "gradient-layer, causal, random, random-load-matched, bottom or all."
        ),
    ] = "specialization",
    budget: Annotated[
        float | None, typer.Option(help="Share of the routed-expert parameters at most; 0.15, or ESFT's own sets, by default.")
    ] = None,
    match: Annotated[str, typer.Option(help="Rule whose cells random-load-matched carries the load of.")] = "specialization",
    model: Annotated[str | None, typer.Option(help="The evaluated model, for rules that look at it: folder, hub id or embedded.")] = None,
    tasks: Annotated[str, typer.Option(help="The evaluated task, for rules that look at the model.")] = "embedded",
    average: Annotated[
        str, one_of("average", ("tokens", "samples"), "For ESFT's rules: all tokens alike (its code), or samples (its paper).")
    ] = "tokens",
    seed: Annotated[int, typer.Option(help="Seed of random rules and of resampling.")] = 0,
    format: Annotated[str, one_of("format", ("dbes", "esft"), "dbes: everything; esft: ESFT's expert config.")] = "dbes",
) -> None:
    """Choose the experts that serve a domain, within a budget, and say what they cover and how sure the choice is."""
    from dbes.paths.search import find_path
    from dbes.results import load_result

    check_writable(out)
    size = "auto" if budget is None else budget
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
