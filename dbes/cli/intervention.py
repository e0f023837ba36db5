"""`dbes intervene`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dbes.cli.common import names, one_of, say


def intervene(
    out: Annotated[Path, typer.Option(help="Folder of the experiment; the same command resumes an interrupted one.")],
    domain: Annotated[list[str], typer.Option(help="Target: a domain of the texts, NAME=FILE or NAME=TRAINING,HELDOUT; repeatable.")],
    model: Annotated[str, typer.Option(help="Folder, hub id, or embedded.")] = "embedded",
    texts: Annotated[str, typer.Option(help="task:NAME, mix:NAME (of the testbed) or a folder of JSONL files.")] = "task:embedded",
    new: Annotated[str, typer.Option(help="Domains the model was not trained on, by comma: never counted as forgotten.")] = "",
    budget: Annotated[str, typer.Option(help="Shares of the routed-expert parameters, by comma; 0.15 by default.")] = "",
    rules: Annotated[str, typer.Option(help="Rules of the paths, by comma; all by default.")] = "",
    ideas: Annotated[str, typer.Option(help="Further arms: down, lora-path, per-layer, router-first, layer-rates.")] = "",
    protected: Annotated[str, typer.Option(help="Rules whose paths are also trained with updates that other domains hardly feel.")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of every arm; 5 by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any further settings (steps, rates, documents, ...).")] = None,
    routing: Annotated[
        str | None,
        one_of(
            "routing",
            ("plain", "as-trained"),
            "plain: by the model's own router, the default; as-trained: a checkpoint of `dbes testbed train --prescribed`, "
            "every text by the experts of its domain.",
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    cache: Annotated[Path, typer.Option(help="Where built mixes are kept.")] = Path("build/testbed"),
) -> None:
    """Train every kind of expert path, and what it must beat, on held-out terms; say in words whether any paid."""
    from dbes.intervention.grid import intervene as run
    from dbes.intervention.settings import read_configuration
    from dbes.reporting.outcome import OUTCOME_FILE

    given: dict[str, Any] = {"domains": tuple(name.partition("=")[0] for name in domain)}
    named = {"new": new, "budgets": budget, "rules": rules, "ideas": ideas, "protected": protected}
    given |= {name: names(text) for name, text in named.items() if text}
    if seeds is not None:
        given["seeds"] = seeds
    if routing is not None:
        given["routing"] = routing
    outcome = run(
        model, out, read_configuration(config, given), texts=texts, targets=domain, cache=cache, processes=processes,
        progress=lambda message: say(message, err=True),
    )  # fmt: skip
    for found in outcome["targets"].values():
        say(found["verdict"]["text"])
    say(outcome["verdict"])
    say(out / OUTCOME_FILE, err=True)
