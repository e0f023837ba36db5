"""`dbes import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbes.cli.common import one_of, say, tell

FORMATS = (
    "auto", "vllm", "sglang", "sglang-recorder", "imatrix", "trtllm", "gptoss-json", "flame", "esft", "dbes-jsonl", "counts", "jsonl"
)  # fmt: skip


def import_(
    sources: Annotated[list[Path], typer.Argument(help="Files, and folders of files.", metavar="SOURCE...")],
    out: Annotated[Path, typer.Option(help="Folder of the trace, or of the counts.")],
    format: Annotated[str, one_of("format", FORMATS, "What the files are; auto says what it takes them for.")] = "auto",
    domain_map: Annotated[
        Path | None, typer.Option(help='YAML or JSON: globs over source paths to domains, {"law/*": "law"}; see docs/formats.md.')
    ] = None,
    model_config: Annotated[Path | None, typer.Option(help="config.json of the model: sizes, and which layers are dense.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed experts of a layer, where nothing else says it.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts that a token takes, where nothing else says it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trace or counts in the folder.")] = False,
) -> None:
    """Read routing that servers, calibration files or papers recorded; score it with `dbes score`."""
    from dbes.importing.importing import import_routing

    found = import_routing(
        sources, output_path=out, format=format, domain_map=domain_map, model_config=model_config, experts=experts, top_k=top_k,
        overwrite=overwrite,
    )  # fmt: skip
    for note in found.told:
        tell(note)
    say(f"{out}: {found.summary}")
