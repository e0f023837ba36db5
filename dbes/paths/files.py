"""Expert paths as files: dbes's own JSON, and the expert-config JSON of ESFT (arXiv 2407.01906)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dbes.errors import FileError, PathError
from dbes.files import write_json
from dbes.paths.types import PATH_SCHEMA, Cell, ExpertPath, Provenance
from dbes.schema import Strict, first_problem, read_json, read_versioned, validated


class EsftConfig(Strict):
    """ESFT's expert config: experts to train by layer number, and whether shared experts and all other modules train too."""

    experts: dict[int, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False


def write_path(path: ExpertPath, file: str | Path) -> Path:
    """Write an expert path as strict JSON, whole or not at all.

    Raises:
        PathError: the file cannot be written.
    """
    return _write(path.model_dump(mode="json"), Path(file))


def read_path(file: str | Path) -> ExpertPath:
    """The expert path in a file that ``write_path`` wrote.

    Raises:
        PathError: missing, not JSON, another schema version, unknown fields, cells that the model does not have.
    """
    file = Path(file)
    content = _read(file)
    if "schema_version" not in content and "experts" in content and "non_expert_modules" in content:
        raise PathError(f"{file}: this is an ESFT expert config; read it with read_esft, which needs the model's layers and experts")
    return read_versioned(file, ExpertPath, error=PathError, versions=(PATH_SCHEMA,))


def write_esft(path: ExpertPath, file: str | Path) -> Path:
    """Write the cells as ESFT's expert config; every MoE layer is named, also one without a cell.

    Raises:
        PathError: the file cannot be written.
    """
    by_layer: dict[str, list[int]] = {str(layer): [] for layer in path.layers}
    for cell in path.cells:
        by_layer[str(cell.layer)].append(cell.expert)
    return _write({"experts": by_layer, "shared_experts": False, "non_expert_modules": False}, Path(file))


def read_esft(
    file: str | Path, *, layers: tuple[int, ...], experts: tuple[int, ...], model: str, domain: str = "unnamed", revision: str | None = None
) -> ExpertPath:
    """The cells of an ESFT expert config as an expert path of a model.

    Args:
        layers, experts: the model's MoE layer numbers and the routed experts of each; the config does not name them.

    Raises:
        PathError: not an ESFT config; it trains shared experts or other modules, which a path does not; no or unknown cells.
    """
    config = validated(EsftConfig, _read(Path(file)), where=f"{file}: not an ESFT expert config", error=PathError)
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


def _write(content: dict[str, Any], file: Path) -> Path:
    try:
        write_json(file, content)
    except FileError as problem:
        raise PathError(str(problem)) from problem
    return file


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file, error=PathError, missing=f"{file}: there is no such file; run `dbes paths` first")
    if not isinstance(content, dict):
        raise PathError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
