"""What a run leaves behind: a plain Hugging Face checkpoint, or only the trained slices, which `merge_delta` puts into their base."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dbes.errors import FinetuneError
from dbes.files import sha256_of, write_bytes, write_json
from dbes.finetuning.cells import TrainableCells, checked_cells
from dbes.models import load_config, load_weights
from dbes.paths.types import Cell
from dbes.sites import expert_slices, find_sites

DELTA, DELTA_FACTS = "delta.safetensors", "delta.json"


class DeltaFacts(BaseModel):
    """What a delta belongs to.

    Attributes:
        base_rows_sha256: of the trained rows as they were before training: a base with other rows is another model, wherever it lies.
        sha256: of the file with the tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    model: str
    revision: str
    cells: tuple[Cell, ...]
    routers: tuple[str, ...]
    dtype: str
    base_rows_sha256: str
    sha256: str
    dbes: str


def storage_dtype(where: str, *, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a checkpoint is stored in, by its config; float32 where it does not say."""
    config: Any = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = getattr(torch, named, None) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def round_rows(model: PreTrainedModel, cells: TrainableCells, dtype: torch.dtype) -> None:
    """Round the merged rows to what the checkpoint can hold, so that what is measured is what is saved."""
    trained = set(cells.trained_routers())
    names = dict(model.named_parameters())
    for _, parameter, cut in _slices(model, cells.cells):
        rows = cut(parameter.data)
        rows.copy_(rows.to(dtype))
    for name in trained:
        names[name].data.copy_(names[name].data.to(dtype))


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the model as `save_pretrained` does, with its tokenizer. config.json comes last: without it there is no checkpoint.

    Tensors go back to the dtype they were stored in where that loses nothing, so that no value changes.
    """
    store = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in store:
            if tensor.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
                narrow = tensor.data.to(dtype)
                if torch.equal(narrow.float(), tensor.data):
                    tensor.data = narrow
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        mode = (temporary / "config.json").stat().st_mode
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(mode)  # safetensors writes files that nobody else may read
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def base_rows_digest(model: PreTrainedModel, cells: tuple[Cell, ...], dtype: torch.dtype) -> str:
    """sha256 over names and values of the cells' rows, in the dtype they are stored in."""
    digest = hashlib.sha256()
    for name, parameter, cut in _slices(model, cells):
        rows = cut(parameter.data).to(dtype).contiguous().cpu()
        digest.update(f"{name}\0{tuple(rows.shape)}\0".encode() + rows.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_delta(cells: TrainableCells, folder: Path, *, model: str, revision: str, dtype: torch.dtype, base_digest: str) -> None:
    """Write the merged rows as ``parameter[expert]`` (and whole routers, where trained) with the facts they belong to."""
    tensors = {f"{name}[{expert}]": rows.to(dtype) for name, experts in cells.trained_slices().items() for expert, rows in experts.items()}
    routers = cells.trained_routers()
    tensors |= {name: value.to(dtype) for name, value in routers.items()}
    write_bytes(folder / DELTA, save({name: value.cpu().contiguous() for name, value in tensors.items()}))
    facts = DeltaFacts(
        model=model,
        revision=revision,
        cells=cells.cells,
        routers=tuple(routers),
        dtype=str(dtype).removeprefix("torch."),
        base_rows_sha256=base_digest,
        sha256=sha256_of(folder / DELTA),
        dbes=version("dbes"),
    )
    write_json(folder / DELTA_FACTS, facts.model_dump(mode="json"))


def read_delta(folder: Path) -> tuple[DeltaFacts, dict[str, Tensor]]:
    """The facts and tensors of a delta.

    Raises:
        FinetuneError: no delta there, or one that was altered or cut short.
    """
    try:
        facts = DeltaFacts.model_validate(json.loads((folder / DELTA_FACTS).read_text("utf-8")))
        if sha256_of(folder / DELTA) != facts.sha256:
            raise FinetuneError(f"{folder / DELTA}: the file was altered or cut short; copy it again")
        return facts, load_file(folder / DELTA)
    except FileNotFoundError as problem:
        raise FinetuneError(
            f"{folder}: no delta here ({Path(str(problem.filename)).name} is missing); dbes finetune --save delta writes one"
        ) from None
    except ValidationError as problem:
        first = problem.errors()[0]
        raise FinetuneError(f"{folder / DELTA_FACTS}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError, SafetensorError) as problem:
        raise FinetuneError(f"{folder}: the delta cannot be read ({problem})") from None


def merge_delta(base: str, delta: Path, out: Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Write the checkpoint that the run of a delta would have written, from its base. Returns ``out``.

    Raises:
        FinetuneError: no or a damaged delta; the base is not the model it was trained on; ``out`` holds a checkpoint already.
        ModelError: the base cannot be loaded.
    """
    facts, tensors = read_delta(delta)
    refuse_occupied(out)
    stored = getattr(torch, facts.dtype)
    model = load_weights(base, revision=revision, dtype="float32", trust_remote_code=trust_remote_code)
    cells = checked_cells(find_sites(model), facts.cells)
    if base_rows_digest(model, cells, stored) != facts.base_rows_sha256:
        raise FinetuneError(f"{base}: its experts are not those that the delta was trained from ({facts.model}, revision {facts.revision})")
    put_rows(model, tensors)
    tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    save_checkpoint(model, tokenizer, out, stored)
    return out


def put_rows(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write the rows of a delta into the model.

    Raises:
        FinetuneError: a parameter the model does not have, or of another shape.
    """
    names = dict(model.named_parameters())
    cuts = {}
    for name in tensors:
        if match := re.fullmatch(r"(.+)\[(\d+)\]", name):
            cuts[name] = (match[1], int(match[2]))
    by_name = {id(parameter): name for name, parameter in names.items()}
    wanted = set(cuts.values())
    places = {}
    for site in find_sites(model):
        for expert in {expert for _, expert in wanted if expert < site.num_experts}:
            for parameter, cut in expert_slices(site, expert):
                places[by_name[id(parameter)], expert] = cut(parameter.data)
    for name, value in tensors.items():
        rows = places.get(cuts[name]) if name in cuts else names[name].data if name in names else None
        if rows is None or rows.shape != value.shape:
            raise FinetuneError(f"{name}: the base has no such tensor of shape {tuple(value.shape)}; it is another model")
        rows.copy_(value)


def refuse_occupied(out: Path) -> None:
    """Raises FinetuneError when a checkpoint is there already, which writing would mix with another."""
    if (out / "config.json").is_file():
        raise FinetuneError(f"{out}: holds a checkpoint already; choose another --out folder")


def _slices(model: PreTrainedModel, cells: tuple[Cell, ...]) -> list[tuple[str, torch.nn.Parameter, Any]]:
    """(name, parameter, cut) of everything that belongs to the cells, in their order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sites = {site.layer: site for site in find_sites(model)}
    return [
        (f"{names[id(parameter)]}[{cell.expert}]", parameter, cut)
        for cell in cells
        for parameter, cut in expert_slices(sites[cell.layer], cell.expert)
    ]
