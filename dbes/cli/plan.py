"""`dbes plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbes.cli.common import FormatOption, RemoteOption, say_json, stdout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dbes.finetuning.needs import PathNeeds


def plan(
    model: Annotated[str, typer.Option(help="Hub id or folder; `embedded` is the small checkpoint that ships with dbes.")] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to plan for; a million by default.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Plan for the texts of this task instead.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of another machine, such as 64GiB.")] = None,
    disk_speed: Annotated[str | None, typer.Option(help="What its disk reads in a second, such as 3GB.")] = None,
    flops: Annotated[float | None, typer.Option(min=1, help="Floating-point operations of it in a second, such as 4e14.")] = None,
    paths: Annotated[
        str | None, typer.Option(help="What finetuning needs too: a share of the experts such as 0.15, or the file of an expert path.")
    ] = None,
    trust_remote_code: RemoteOption = False,
    format: FormatOption = "table",
) -> None:
    """Say what evaluating a model needs before it is loaded: memory, engine, and about how long it takes here or elsewhere."""
    from dbes.errors import SettingError
    from dbes.evaluation.plan import TOKENS, count_tokens, read_needs
    from dbes.evaluation.plan import plan as run
    from dbes.models.memory import Available
    from dbes.reporting.plan import as_json, render
    from dbes.wording import bytes_of

    if tokens is not None and tasks is not None:
        raise SettingError("--tokens and --tasks: give one of them")
    given = None if memory is None else Available(bytes_of(memory, option="--memory"), "the memory that was given")
    disk = None if disk_speed is None else float(bytes_of(disk_speed, option="--disk-speed"))
    skeleton, needs = read_needs(model, revision=revision, trust_remote_code=trust_remote_code)
    if tasks is not None:
        tokens = count_tokens(model, tasks, revision=revision, trust_remote_code=trust_remote_code)
    found = run(needs, model=model, tokens=tokens or TOKENS, available=given, disk=disk, flops=flops)
    path = None if paths is None else _path_needs(paths, skeleton, model, dtype=found.dtype)
    if format == "json":
        say_json(as_json(found, path))
    else:
        stdout().print(render(found, path))


def _path_needs(paths: str, skeleton: PreTrainedModel, model: str, *, dtype: str) -> PathNeeds:
    """Of a share, or of the path in a file."""
    from dbes.finetuning.needs import needs_of_cells, needs_of_share
    from dbes.finetuning.run import read_path

    try:
        share = float(paths)
    except ValueError:
        return needs_of_cells(skeleton, read_path(Path(paths), skeleton, model).cells, dtype=dtype)
    return needs_of_share(skeleton, share, dtype=dtype)
