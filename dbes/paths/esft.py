"""Expert paths from the expert configs of ESFT (arXiv 2407.01906)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from dbes.errors import PathError
from dbes.paths.types import Cell, ExpertPath, Provenance, read_object
from dbes.schema import Strict, first_problem, validated


class EsftConfig(Strict):
    """ESFT's expert config: experts to train by layer number, and whether shared experts and all other modules train too."""

    experts: dict[int, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False


def read_esft(
    file: str | Path, *, layers: tuple[int, ...], experts: tuple[int, ...], model: str, domain: str = "unnamed", revision: str | None = None
) -> ExpertPath:
    """The cells of an ESFT expert config as an expert path of a model.

    Args:
        layers, experts: the model's MoE layer numbers and the routed experts of each; the config does not name them.

    Raises:
        PathError: not an ESFT config; it trains shared experts or other modules, which a path does not; no or unknown cells.
    """
    config = validated(EsftConfig, read_object(Path(file)), where=f"{file}: not an ESFT expert config", error=PathError)
    if config.shared_experts or config.non_expert_modules:
        raise PathError(
            f"{file}: trains {'shared experts' if config.shared_experts else 'non-expert modules'} too; "
            "an expert path holds routed experts only: set shared_experts and non_expert_modules to false"
        )
    cells = sorted({Cell(layer, expert) for layer, chosen in config.experts.items() for expert in chosen})
    try:
        return ExpertPath(
            domain=domain,
            rule="esft-config",
            cells=tuple(cells),
            layers=layers,
            experts=experts,
            share=len(cells) / sum(experts),
            provenance=Provenance(model=model, revision=revision, dbes=version("dbes")),
        )
    except ValidationError as problem:
        raise PathError(f"{file}: {first_problem(problem)}") from None
