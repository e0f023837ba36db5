"""What a run leaves behind: the base's own files with the trained rows replaced, or only these rows, which `merge` puts there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbes.errors import FileError, FinetuneError
from dbes.files import locked, refused_by_system, sha256_of, write_json
from dbes.finetuning.cells import TrainableCells, checked_cells
from dbes.finetuning.checkpoint import (
    Checkpoint,
    compare_files,
    copied,
    local_folder,
    read_checkpoint,
    refuse_full_disk,
    refuse_quantized,
    refuse_quantized_config,
    replace_tensor,
)
from dbes.finetuning.conversion import Layout
from dbes.finetuning.delta import DELTA_FILES, DeltaFacts, read_delta, save_delta
from dbes.finetuning.report import read_report
from dbes.finetuning.state import STATE
from dbes.models import build, load_config, load_weights
from dbes.models.folder import CONFIG
from dbes.models.sites import RoutingSite, expert_slices, find_sites
from dbes.paths.types import Cell
from dbes.schema import Strict, read_versioned
from dbes.shipped import located

MERGING = ".merging.json"
Cut = Callable[[Tensor], Tensor]


class Rows:
    """The rows that belong to some cells: in a model, and in the files of its checkpoint.

    Args:
        model: of the class that loads the checkpoint; only its structure is used, its weights may be on the meta device.
        routers: parameters that belong to it whole.

    Raises:
        FinetuneError: the files do not hold these parameters, or hold them in a dtype that cannot be trained.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, cells: Sequence[Cell], routers: Sequence[str] = ()) -> None:
        self.checkpoint, self._parameters = checkpoint, dict(model.named_parameters())
        self._layout = Layout(model, {key: stored.shape for key, stored in checkpoint.tensors.items()})
        self.cells, self.routers = tuple(cells), tuple(routers)
        self._units: list[dict[str, tuple[str, Cut]]] = []
        """By layer, in the order of the cells: what is written as ``parameter[expert]``, its parameter, and how to cut it out."""
        slices = _slices(model, cells)
        for layer in sorted({cell.layer for cell in cells}):
            self._units.append({label: (name, cut) for cell, label, name, cut in slices if cell.layer == layer})
        self.experts = [label for unit in self._units for label in unit]
        self._units += [{name: (name, _whole)} for name in routers]
        owners = {name for unit in self._units for name, _ in unit.values()}
        self._dtypes = {name: checkpoint.trained_dtype(self._layout.keys(name)) for name in sorted(owners)}
        self._owner = {label: name for unit in self._units for label, (name, _) in unit.items()}

    def dtype(self, label: str) -> torch.dtype:
        """The dtype that the files hold these rows in."""
        return self._dtypes[self._owner[label]]

    def shape(self, label: str) -> tuple[int, ...]:
        name = self._owner[label]
        cut = next(unit[label][1] for unit in self._units if label in unit)
        return tuple(cut(torch.empty(self._parameters[name].shape, device="meta")).shape)

    def digest(self, *, loaded: bool = False) -> str:
        """sha256 over names and values of the cells' rows in the files, in the order of the cells.

        Args:
            loaded: see that the model in memory holds the same rows, too.
        """
        digest = hashlib.sha256()
        for unit, places in self._placed():
            if any(label not in self.experts for label in unit):
                continue
            for label, (name, cut) in unit.items():
                rows = self._read(places[label], self._dtypes[name])
                if loaded:
                    held = cut(self._parameters[name].data)
                    if not torch.equal(rows.to(held.dtype), held.cpu()):
                        raise FinetuneError(
                            f"{label}: the loaded model does not hold what {self.checkpoint.folder} does; something else changed its "
                            "weights (an adapter?), so a checkpoint with the base's own files would be another model"
                        )
                digest.update(f"{label}\0{tuple(rows.shape)}\0".encode() + rows.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def write(self, values: Mapping[str, Tensor], out: Path) -> dict[str, tuple[int, str]]:
        """Write the base's files with these rows into ``out``, and read them back. Returns bytes and sha256 of each file.

        Raises:
            FinetuneError: what was written is not the base with these rows; nothing is left then.
            FileError: a file cannot be written.
        """
        remove_files(self.checkpoint, out)
        with copied(self.checkpoint, out) as places:
            for key, tensor in self._changed(values):
                replace_tensor(self.checkpoint, key, tensor, places)
            return self.check(values, places)

    def check(self, values: Mapping[str, Tensor], places: Mapping[str, Path]) -> dict[str, tuple[int, str]]:
        """Bytes and sha256 of the files in ``places``, which are the base's with these rows.

        Raises:
            FinetuneError: they are not.
        """
        changed = []
        for key, tensor in self._changed(values):
            changed.append(key)
            if not torch.equal(_bits(self.checkpoint.read(key, places)), _bits(tensor)):
                raise FinetuneError(f"{places[self.checkpoint.tensors[key].file]}: {key} is not what was trained")
        return compare_files(self.checkpoint, places, changed)

    def _changed(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of every tensor of the files that holds some of the rows, with these in their place."""
        seen: set[str] = set()
        for unit, places in self._placed():
            tensors: dict[str, Tensor] = {}
            for label in unit.keys() & values.keys():
                flat = values[label].to(self._dtypes[self._owner[label]]).flatten()
                for key, rows, elements in places[label].by_key():
                    if key not in tensors:
                        tensors[key] = self.checkpoint.read(key)
                    tensors[key].view(-1)[elements] = flat[rows]
            if twice := seen & tensors.keys():
                raise FinetuneError(f"{min(twice)}: holds rows of two layers, which cannot be written apart")
            seen |= tensors.keys()
            yield from sorted(tensors.items())

    def _placed(self) -> Iterator[tuple[dict[str, tuple[str, Cut]], dict[str, Any]]]:
        for unit in self._units:
            by_name: dict[str, list[str]] = {}
            for label, (name, _) in unit.items():
                by_name.setdefault(name, []).append(label)
            places = {}
            for name, labels in by_name.items():
                places |= dict(zip(labels, self._layout.places(name, [unit[label][1] for label in labels]), strict=True))
            yield unit, places

    def _read(self, places: Any, dtype: torch.dtype) -> Tensor:
        rows = torch.empty(places.elements.numel(), dtype=dtype)
        for key, wanted, elements in places.by_key():
            rows[wanted] = self.checkpoint.read(key).view(-1)[elements]
        return rows.view(places.elements.shape)


def base_checkpoint(where: str, out: Path, *, revision: str | None = None) -> Checkpoint:
    """The files of a checkpoint that is a folder or on the hub.

    Raises:
        FinetuneError: they are damaged, incomplete or quantized.
        ModelError: neither a folder nor a repository.
    """
    return read_checkpoint(local_folder(where, revision=revision), besides=out)


def refuse_untrainable(where: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Raises FinetuneError where the weights are quantized, as far as that can be told before they are loaded."""
    if Path(where).is_dir():
        refuse_quantized(Path(where))
    else:
        refuse_quantized_config(where, load_config(where, revision=revision, trust_remote_code=trust_remote_code).to_dict())


@contextmanager
def claimed(out: Path, where: str, *, save: str) -> Iterator[None]:
    """The folder of a run belongs to this process until the block ends; of a finished run it is only tidied, where that can be.

    Raises:
        FileError: another run is writing there, or it cannot be written to.
        FinetuneError: it holds something else; its disk has no room for the checkpoint.
    """
    if read_report(out) is not None:
        with suppress(FileError), locked(out):
            tidy(out)
        yield
        return
    with locked(out):
        _remove_litter(out)
        shards = list(Path(where).glob("*.safetensors")) if Path(where).is_dir() and save == "model" else []
        refuse_full_disk(out, sum(path.stat().st_size for path in shards))
        if not (out / STATE).exists():
            refuse_occupied(out)
        yield


def tidy(out: Path) -> None:
    """Remove what is of no use once a run is finished."""
    with suppress(OSError):
        (out / STATE).unlink(missing_ok=True)
    _remove_litter(out)


def _remove_litter(out: Path) -> None:
    """Whole checkpoints that earlier versions wrote beside their place before they were killed."""
    for folder in out.glob(".saving-*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_output(
    rows: Rows, values: Mapping[str, Tensor], out: Path, *, save: str, model: str, revision: str, base_digest: str
) -> dict[str, tuple[int, str]]:
    """Write a checkpoint, or the delta alone; returns bytes and sha256 by name.

    Raises:
        FileError, FinetuneError: see `Rows.write`; the base's files are no longer those that were loaded.
    """
    if save == "model":
        if rows.digest() != base_digest:
            raise FinetuneError(f"{rows.checkpoint.folder}: its weights were changed while the experts were trained; put them back")
        return rows.write(values, out)
    dtype = str(rows.dtype(rows.experts[0])).removeprefix("torch.")
    save_delta(values, out, cells=rows.cells, routers=rows.routers, model=model, revision=revision, dtype=dtype, base_digest=base_digest)
    return {name: ((out / name).stat().st_size, sha256_of(out / name)) for name in DELTA_FILES}


def round_rows(model: PreTrainedModel, cells: TrainableCells, rows: Rows) -> dict[str, Tensor]:
    """Round the merged rows, and trained routers, to what the checkpoint can hold, so that what is measured is what is saved.

    Returns:
        They as ``parameter[expert]`` (routers by their parameter), on the CPU and in the dtype of the files.

    Raises:
        FinetuneError: they are beyond what that dtype holds.
    """
    parameters, found = dict(model.named_parameters()), {}
    views = [(label, cut(parameters[name].data)) for _, label, name, cut in _slices(model, cells.cells) if label in cells.labels]
    views += [(name, parameters[name].data) for name in cells.trained_routers()]
    for label, view in views:
        rounded = view.to(rows.dtype(label))
        if not bool(rounded.isfinite().all()):
            raise FinetuneError(f"{label}: has values beyond what {rounded.dtype} holds; lower --lr and choose another --out folder")
        view.copy_(rounded)
        found[label] = rounded.detach().to("cpu", copy=True)
    return found


def merge(base: str | Path, delta: str | Path, out: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Write the checkpoint that the run of a delta would have written, from its base. Returns ``out``.

    The same call finishes one that was killed, and finds one that had finished already.

    Args:
        base: the model the delta was trained from: folder, hub id, or ``"embedded"``.
        delta: folder that `finetune` wrote with ``save="delta"``.
        out: folder of the checkpoint.
        revision: branch, tag or commit of a base on the hub.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        FinetuneError: the delta is damaged, or of another base; the base is quantized; ``out`` holds something else; the disk is full.
        FileError: ``out`` cannot be written, or another run is writing there.
        ModelError: the base cannot be loaded.
    """
    base, out = located(base)[0], Path(out)
    facts, tensors = read_delta(Path(delta))
    refuse_untrainable(base, revision=revision, trust_remote_code=trust_remote_code)
    checkpoint = base_checkpoint(base, out, revision=revision)
    model = _structure(base, revision=revision, trust_remote_code=trust_remote_code)
    sites = find_sites(model)
    rows = Rows(model, checkpoint, checked_cells(sites, facts.cells), checked_routers(model, sites, facts))
    checked_tensors(rows, facts, tensors)
    if rows.digest() != facts.base_rows_sha256:
        raise FinetuneError(f"{base}: its experts are not those that the delta was trained from ({facts.model}, revision {facts.revision})")
    if _is_merged(rows, tensors, out):
        return out
    with locked(out):
        _remove_litter(out)
        mark = _Merging(delta=facts.sha256, base=str(checkpoint.folder.resolve()))
        _refuse_other_merge(out, mark, checkpoint)
        refuse_full_disk(out, checkpoint.bytes)
        write_json(out / MERGING, mark.model_dump(mode="json"))
        rows.write(tensors, out)
        with refused_by_system(out / MERGING):
            (out / MERGING).unlink()
    return out


def checked_routers(model: PreTrainedModel, sites: Sequence[RoutingSite], facts: DeltaFacts) -> list[str]:
    """The routers' parameters that a delta declares.

    Raises:
        FinetuneError: one twice, or one that is no router of the cells' layers.
    """
    names, layers = {id(parameter): name for name, parameter in model.named_parameters()}, {cell.layer for cell in facts.cells}
    routers = [site.router for site in sites if site.layer in layers and site.router is not None]
    known = {names[id(parameter)] for router in routers for parameter in router.parameters() if id(parameter) in names}
    odd = next((name for name in facts.routers if name not in known), None)
    if odd is not None or len(set(facts.routers)) < len(facts.routers):
        raise FinetuneError(f"the delta declares the router {odd or facts.routers}; the routers of its layers are {sorted(known)}")
    return list(facts.routers)


def checked_tensors(rows: Rows, facts: DeltaFacts, tensors: Mapping[str, Tensor]) -> None:
    """Raises FinetuneError where a delta's tensors are not exactly its cells' (or their matrices alone: low rank) and routers'."""
    matrices = {label for label in rows.experts if len(rows.shape(label)) == 2}
    wanted = [set(facts.routers) | experts for experts in (set(rows.experts), matrices) if experts]
    if tensors.keys() not in wanted:
        missing, odd = sorted(wanted[-1] - tensors.keys()), sorted(tensors.keys() - wanted[0])
        what = f"lacks {missing[0]}" if missing else f"holds {odd[0]}, which is none of its cells" if odd else "lacks some of its vectors"
        raise FinetuneError(f"the delta's tensors are not those of its {len(facts.cells)} cells: it {what}; write it again")
    for label, value in tensors.items():
        if tuple(value.shape) != rows.shape(label):
            raise FinetuneError(f"{label}: the delta has shape {tuple(value.shape)}, the base {rows.shape(label)}; it is another model")
        if value.dtype != rows.dtype(label):
            raise FinetuneError(f"{label}: the delta is stored as {value.dtype}, the base as {rows.dtype(label)}; it is another model")
        if not bool(value.isfinite().all()):
            raise FinetuneError(f"{label}: the delta has values that are not finite; write it again")


def refuse_occupied(out: Path, base: Checkpoint | None = None) -> None:
    """Raises FinetuneError when a checkpoint is there already, or files that one would overwrite or be mixed with."""
    if (out / CONFIG).exists():
        raise FinetuneError(f"{out}: holds a checkpoint already; choose another --out folder")
    found = [path for path in (*out.glob("*.safetensors*"), *(out / name for name in DELTA_FILES)) if path.exists()]
    found += [out / name for name in base.files if (out / name).exists()] if base is not None else []
    if found:
        raise FinetuneError(f"{out}: holds {found[0].name} already, which would be overwritten or mixed up; choose another --out folder")


def remove_files(base: Checkpoint, out: Path) -> None:
    """Remove what a killed run wrote of a checkpoint, config.json first."""
    for name in reversed(base.files):
        with refused_by_system(out / name, doing="removed"):
            (out / name).unlink(missing_ok=True)


class _Merging(Strict):
    """Which merge a folder belongs to while it is written."""

    schema_version: int = 1
    delta: str
    base: str


def _is_merged(rows: Rows, tensors: Mapping[str, Tensor], out: Path) -> bool:
    """Whether the folder holds just what this merge writes."""
    places = {name: out / name for name in rows.checkpoint.files}
    if (out / MERGING).exists() or not all(path.is_file() for path in places.values()):
        return False
    try:
        rows.check(tensors, places)
    except FinetuneError:
        return False
    return True


def _refuse_other_merge(out: Path, mark: _Merging, base: Checkpoint) -> None:
    """Files may be there of the same merge, killed; of another one only its mark."""
    if not (out / MERGING).exists():
        refuse_occupied(out, base)
    elif read_versioned(out / MERGING, _Merging, error=FinetuneError) != mark:
        try:
            refuse_occupied(out, base)
        except FinetuneError:
            problem = f"{out}: holds an unfinished merge of another delta or base; delete it, or choose another --out folder"
            raise FinetuneError(problem) from None


def _structure(where: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a checkpoint without its weights, where it can be built so."""
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return build(config, trust_remote_code=trust_remote_code)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return load_weights(where, revision=revision, dtype="float32", trust_remote_code=trust_remote_code)


def _slices(model: PreTrainedModel, cells: Sequence[Cell]) -> list[tuple[Cell, str, str, Cut]]:
    """(cell, label, parameter, cut) of everything that belongs to the cells, in their order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sites = {site.layer: site for site in find_sites(model)}
    return [
        (cell, f"{names[id(parameter)]}[{cell.expert}]", names[id(parameter)], cut)
        for cell in cells
        for parameter, cut in expert_slices(sites[cell.layer], cell.expert)
    ]


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
