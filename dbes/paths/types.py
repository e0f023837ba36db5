"""An expert path: the cells of a model chosen for one domain, what they cover, and how sure the choice is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from dbes.errors import FileError, PathError, SettingError
from dbes.files import write_json
from dbes.schema import Finite, read_json, read_versioned
from dbes.text import unknown

PATH_SCHEMA = 1
FORMATS = ("dbes", "esft")
Average = Literal["tokens", "samples"]


class Cell(NamedTuple):
    """One routed expert of one layer. ``layer`` is the model's own decoder-layer number, not the place among its MoE layers."""

    layer: int
    expert: int


class Trajectory(Finite):
    r"""One expert per MoE layer, e_1 -> ... -> e_L, that the domain follows more than all domains together do.

    .. math:: \ln\frac{p_d(e_1)}{\bar p(e_1)} + \sum_l \ln\frac{p_d(e_{l+1} | e_l)}{\bar p(e_{l+1} | e_l)}

    in nats, over pairs of slots of one token in neighbouring MoE layers; pbar is the mean of the domains' probabilities. The chain
    is found on one random half of the texts and measured on the other, so that the search cannot inflate the value.

    Attributes:
        experts: one per MoE layer of the path's ``layers``.
        found: log-lift in the half it was found in (inflated by the search).
        log_lift, low, high: log-lift in the other half and its 95 % interval (jackknife over source texts); None where a
            transition of the chain does not occur there, or the domain has fewer than two texts there.
    """

    experts: tuple[int, ...]
    found: float
    log_lift: float | None = None
    low: float | None = None
    high: float | None = None


class Overlap(Finite):
    """How much another domain uses the same cells.

    Attributes:
        coverage: share of the other domain's slots that the cells take.
        jaccard: of the cells with the other domain's own path by the same rule and budget; None where it has none.
    """

    coverage: float
    jaccard: float | None = None


class Provenance(Finite):
    """What a path was found on; ``finetuning`` refuses a path of another model."""

    model: str
    revision: str | None = None
    task: str | None = None
    task_version: int | None = None
    task_fingerprint: str | None = None
    dbes: str
    seed: int = 0


class ExpertPath(Finite):
    """A set of cells for one domain.

    Attributes:
        rule: how the cells were chosen.
        average: what the shares of ESFT's rules are means over; None for other rules.
        budget: most of the routed-expert parameters the cells may hold, as a share; None: the rule's own size.
        cells: chosen cells, by layer and expert.
        layers: the model's MoE layers, ascending; experts: routed experts of each.
        share: routed-expert parameters the cells do hold, as a share.
        coverage: share of the domain's (token, slot) pairs that the cells take; None for a path read from an ESFT config.
        overlap: by name of each other domain.
        stability: share of the cells chosen again when the same rule sees a random half of every domain's source texts, mean
            of several draws; None where the rule does not look at documents.
        trajectories: strongest chains, no two sharing a cell.
    """

    schema_version: Literal[1] = PATH_SCHEMA
    domain: str
    rule: str
    average: Average | None = None
    budget: float | None = None
    cells: tuple[Cell, ...]
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    share: float
    coverage: float | None = None
    overlap: dict[str, Overlap] = Field(default_factory=dict)
    stability: float | None = None
    trajectories: tuple[Trajectory, ...] = ()
    provenance: Provenance

    @classmethod
    def load(cls, file: str | Path) -> ExpertPath:
        """The expert path in a file that ``save`` wrote.

        Raises:
            PathError: missing, not JSON, another schema version, unknown fields, cells that the model does not have.
        """
        file = Path(file)
        content = read_object(file)
        if "schema_version" not in content and "experts" in content and "non_expert_modules" in content:
            raise PathError(f"{file}: this is an ESFT expert config; read it with read_esft, which needs the model's layers and experts")
        return read_versioned(file, cls, error=PathError, versions=(PATH_SCHEMA,))

    def save(self, file: str | Path, *, format: str = "dbes") -> Path:
        """Write the path as strict JSON, whole or not at all, and return the file.

        Args:
            format: ``dbes``: everything; ``esft``: the expert config of ESFT (arXiv 2407.01906), the cells alone.

        Raises:
            SettingError: there is no such format.
            PathError: the file cannot be written.
        """
        if format not in FORMATS:
            raise SettingError(unknown("format", format, FORMATS))
        try:
            write_json(Path(file), self._esft() if format == "esft" else self.model_dump(mode="json"))
        except FileError as problem:
            raise PathError(str(problem)) from problem
        return Path(file)

    def _esft(self) -> dict[str, Any]:
        """Every MoE layer is named, also one without a cell."""
        by_layer: dict[str, list[int]] = {str(layer): [] for layer in self.layers}
        for cell in self.cells:
            by_layer[str(cell.layer)].append(cell.expert)
        return {"experts": by_layer, "shared_experts": False, "non_expert_modules": False}

    @model_validator(mode="after")
    def _cells_of_the_model(self) -> ExpertPath:
        if len(self.layers) != len(self.experts):
            raise ValueError(f"{len(self.layers)} layers, but {len(self.experts)} numbers of experts")
        if not self.cells:
            raise ValueError("no cells: an expert path holds at least one")
        if list(self.cells) != sorted(set(self.cells)):
            raise ValueError("cells must be distinct and ordered by layer and expert")
        sizes = dict(zip(self.layers, self.experts, strict=True))
        for cell in self.cells:
            if not 0 <= cell.expert < sizes.get(cell.layer, 0):
                known = f"experts 0 to {sizes[cell.layer] - 1}" if cell.layer in sizes else f"MoE layers {list(self.layers)}"
                raise ValueError(f"cell (layer {cell.layer}, expert {cell.expert}) does not exist: the model has {known}")
        return self


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a path.

    Raises:
        PathError: missing, not strict JSON, or no object.
    """
    content = read_json(file, error=PathError, missing=f"{file}: there is no such file; run `dbes paths` first")
    if not isinstance(content, dict):
        raise PathError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
