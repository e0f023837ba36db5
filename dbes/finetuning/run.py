"""`finetune`: from a checkpoint, an expert path and data to a checkpoint whose other experts are untouched, and a report."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from dbes.errors import DbesError, FinetuneError, PathError, SettingError
from dbes.evaluation.plan import read_needs
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.checkpoint import Checkpoint, refuse_full_disk
from dbes.finetuning.evaluation import Measured, measure_texts, scores, tracked_scores
from dbes.finetuning.guard import Guard, split_protected
from dbes.finetuning.machine import memory_explained, refuse_sharding
from dbes.finetuning.needs import LEAST, needs_of_cells, refuse_unfit
from dbes.finetuning.output import Rows, base_checkpoint, claimed, refuse_untrainable, round_rows, tidy, write_output
from dbes.finetuning.report import FinetuneReport, changes, peak_memory, read_report, refuse_damaged, versions, write_report
from dbes.finetuning.settings import FinetuneSettings, read_settings
from dbes.finetuning.summary import warnings_after, warnings_before
from dbes.finetuning.training import Trained, train
from dbes.finetuning.validation import Split, split_validation
from dbes.models import LoadedModel, load_model
from dbes.models.adapters import is_installed
from dbes.models.encoding import full_rows
from dbes.models.sites import find_sites
from dbes.models.windows import embedding_rows, padding_id
from dbes.paths.esft import read_esft
from dbes.paths.types import ExpertPath
from dbes.schema import read_json
from dbes.shipped import EMBEDDED, located
from dbes.tasks.entries import Data, Entry, prepare_data
from dbes.tasks.task import Task
from dbes.text import unknown

Say = Callable[[str], None]

LIMIT = 64
"""Held-out texts of a domain that are measured, at most, unless told otherwise."""

GUARD = "guarded by protected texts"
"""In the identity of a protected run: one of before rates were guarded made another choice, and is not resumed."""


def finetune(
    model: str | Path,
    paths: str | Path | ExpertPath,
    data: str | Path,
    out: str | Path,
    config: str | Path | FinetuneSettings | None = None,
    *,
    steps: int | None = None,
    lr: float | str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    protect: float | None = None,
    tasks: str | Path | Task = EMBEDDED,
    limit: int | None = LIMIT,
    save: str = "model",
    revision: str | None = None,
    trust_remote_code: bool = False,
    accelerator: Any = None,
    checkpoint_seconds: float = 120.0,
    say: Say | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> FinetuneReport:
    """Train only the experts of a path, and report what that did to the target domain and to all others.

    The same call resumes an interrupted run, and returns the report of a finished one. Under ``accelerate launch`` every
    process calls it.

    Args:
        model: folder, hub id, or ``"embedded"``.
        paths: an expert path, its file, or an ESFT expert config.
        data: a file (.jsonl, .json, .csv, .txt, .parquet), or ``task:DOMAIN``. A fifth is held out.
        out: folder of the checkpoint.
        config: `FinetuneSettings`, or a YAML file of settings; those given by name here stand above it.
        steps: updates at most; four passes over the data by default.
        lr: peak learning rate; ``"auto"``, the default: found by short runs on text set apart.
        batch_size: sequences per update, 8 by default; seq_len: tokens of each, 512 by default.
        protect: train updates that other domains hardly feel, with this floor (0.03; smaller protects more).
        tasks: whose domains are measured before and after.
        limit: held-out texts per domain at most.
        save: ``model``: a whole checkpoint; ``delta``: only the trained slices, see `merge`.
        revision: branch, tag or commit of a model on the hub; trust_remote_code: run model code that comes with it.
        accelerator: one whose trackers the caller has started; by default one is made, with the tracker of the settings.
        checkpoint_seconds: between two states on disk.
        say: called with what is being done; progress: with the figures of every step.

    Raises:
        SettingError: no such way to save, or domain.
        FinetuneError: see `prepare_data`, `TrainableCells` and `train`; a path of another model; ``out`` holds something else.
        ModelError, PathError, TaskError: model, path or task cannot be read.
    """
    if save not in ("model", "delta"):
        raise SettingError(unknown("way to save", save, ("model", "delta")))
    settings = read_settings(config, steps=steps, lr=lr, protect=protect, batch_size=batch_size, seq_len=seq_len)
    say, where, data, out = say or (lambda _: None), located(model)[0], str(data), Path(out)
    found = prepare_data(data, tasks=tasks, limit=limit)
    refuse_sharding(accelerator)
    refuse_untrainable(where, revision=revision, trust_remote_code=trust_remote_code)
    started = accelerator is not None
    accelerator = accelerator if accelerator is not None else _accelerator(settings, out)
    with claimed(out, where, save=save) if accelerator.is_main_process else nullcontext():
        say("loading")
        loaded = _load(model, paths, settings, accelerator, revision=revision, trust_remote_code=trust_remote_code)
        path = checked_path(paths, loaded)
        guarded = (GUARD,) if settings.protect is not None else ()
        identity = settings.identity(loaded.revision, path.cells, found.digest, tasks, limit, save, *guarded)
        if (finished := _finished(out, identity, check=accelerator.is_main_process)) is not None:
            return finished
        checkpoint = base_checkpoint(where, out, revision=getattr(loaded.model.config, "_commit_hash", None) or revision)
        if accelerator.is_main_process and save == "model":
            refuse_full_disk(out, checkpoint.bytes)
        split, texts, guard = _split(found, loaded, settings, say)
        if not started:
            _start_tracker(accelerator, settings, out)
        run = _Run(
            loaded=loaded, path=path, data=found, split=split, texts=texts, guard=guard, settings=settings, out=out, identity=identity,
            accelerator=accelerator, checkpoint_seconds=checkpoint_seconds, say=say, progress=progress,
        )  # fmt: skip
        report = _trained(run, checkpoint, save=save, named=data if data.startswith("task:") else Path(data).name)
        _end_trackers(accelerator, settings)
        return report


def _load(model: str | Path, paths: str | Path | ExpertPath, settings: FinetuneSettings, accelerator: Any, **options: Any) -> LoadedModel:
    """The base model, on the device of this process where there are several; not begun where it and the path cannot fit together."""
    place = {"": accelerator.device} if accelerator.num_processes > 1 and accelerator.device.type != "cpu" else None
    try:
        skeleton, needs = read_needs(str(model), **options)
        path = paths if isinstance(paths, ExpertPath) else read_path(Path(paths), skeleton, str(model))
        found = needs_of_cells(skeleton, path.cells, rank=settings.lora_rank, dtype=LEAST)
    except DbesError:
        pass  # what is wrong with model or path is told when they are loaded
    else:
        refuse_unfit(str(model), needs, found, settings, device_map=place)
    with memory_explained():
        return load_model(model, device_map=place, **options)


def _finished(out: Path, identity: str, *, check: bool) -> FinetuneReport | None:
    """The report of this very run, if it has ended; ``check``: compare its files with their sha256."""
    finished = read_report(out)
    if finished is None:
        return None
    if finished.identity != identity:
        raise FinetuneError(f"{out}: holds another run (model, path, data or settings differ); choose another --out folder")
    if check:
        refuse_damaged(finished, out)
    return finished


def _split(found: Data, loaded: LoadedModel, settings: FinetuneSettings, say: Say) -> tuple[Split, dict[str, list[Tensor]], Guard | None]:
    """What is set apart to choose by, and the texts that protect; says what a user should know before the run."""
    split = split_validation(found.training, loaded.tokenizer, settings, known=embedding_rows(loaded.model))
    texts, guard = protection(found, loaded, settings, split)
    for warning in warnings_before(split, settings, guard):
        say(f"warning: {warning}")
    return split, texts, guard


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run is given.

    Attributes:
        texts: token ids of what is protected, by domain; guard: the texts by which rates and states are refused.
    """

    loaded: LoadedModel
    path: ExpertPath
    data: Data
    split: Split
    texts: dict[str, list[Tensor]]
    guard: Guard | None
    settings: FinetuneSettings
    out: Path
    identity: str
    accelerator: Any
    checkpoint_seconds: float
    say: Say
    progress: Callable[[dict[str, Any]], None] | None

    def measure(self) -> dict[str, Measured]:
        """The held-out texts of every domain as the model now predicts them."""
        model, length = self.loaded.model, self.settings.seq_len
        with memory_explained(), self.accelerator.autocast():
            return measure_texts(model, self.loaded.tokenizer, self.data.heldout, length=length, accelerator=self.accelerator)

    def train(self, cells: TrainableCells) -> Trained:
        model = self.loaded.model
        if self.settings.protect is not None:
            self.say("measuring what other domains need")
            with memory_explained():
                cells.protect(self.texts, floor=self.settings.protect, share=broadcast if self.accelerator.num_processes > 1 else None)
        return train(
            model, cells, self.split.training, self.settings, validation=self.split.validation, guard=self.guard,
            padding=padding_id(self.loaded.tokenizer, embedding_rows(model)), accelerator=self.accelerator, folder=self.out,
            identity=self.identity, evaluate=lambda: scores(self.measure()), progress=self.progress, say=self.say,
            checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip


def _trained(run: _Run, checkpoint: Checkpoint, *, save: Literal["model", "delta"], named: str) -> FinetuneReport:
    """Measure, train, measure again, and save.

    Args:
        named: the data, as the report calls it.
    """
    loaded, settings, accelerator, say = run.loaded, run.settings, run.accelerator, run.say
    say("measuring before")
    before = run.measure()
    accelerator.log(tracked_scores(scores(before)), step=0)
    say("training")
    with TrainableCells(
        loaded.model, run.path.cells, method=settings.method, rank=settings.lora_rank, train_router=settings.train_router,
        seed=settings.seed,
    ) as cells:  # fmt: skip
        rows = Rows(loaded.model, checkpoint, cells.cells, tuple(cells.trained_routers()))
        digest = rows.digest(loaded=True) if accelerator.is_main_process else ""
        trained = run.train(cells)
        cells.merge()
        values = round_rows(loaded.model, cells, rows)
        method, protection_bytes = cells.method, cells.protection_bytes
    say("measuring after")
    after = run.measure()
    accelerator.log(tracked_scores(scores(after)), step=trained.steps)
    report = FinetuneReport(
        identity=run.identity,
        model=loaded.name,
        revision=loaded.revision,
        path_domain=run.path.domain,
        path_rule=run.path.rule,
        cells=run.path.cells,
        share=run.path.share,
        data=named,
        data_sha256=run.data.digest,
        sequences=len(run.split.training),
        target=run.data.target,
        settings=settings,
        method=method,
        steps=trained.steps,
        train_loss=(trained.log[0]["loss"], trained.log[-1]["loss"]),
        before=scores(before),
        after=scores(after),
        **changes(before, after, run.data.target),
        validation_unit=run.split.unit,
        choice=trained.choice,
        passes=settings.passes(trained.choice.best_step, len(run.split.training)),
        warnings=warnings_after(run.split, settings, trained.steps, run.guard, trained.choice),
        parameters=trained.parameters,
        chosen_bytes=trained.chosen_bytes,
        optimizer_bytes=trained.optimizer_bytes,
        protection_bytes=protection_bytes,
        peak_memory_bytes=peak_memory(),
        seconds=round(trained.seconds, 2),
        device=loaded.device,
        processes=accelerator.num_processes,
        dtype=loaded.dtype,
        saved=save,
        versions=versions(),
    )
    if accelerator.is_main_process:
        say("saving")
        files = write_output(rows, values, run.out, save=save, model=loaded.name, revision=loaded.revision, base_digest=digest)
        if save == "model" and checkpoint.left_out:
            say(f"not copied, because they would stay as they were before training: {', '.join(checkpoint.left_out)}")
        report = report.model_copy(update={"files": files})
        write_report(report, run.out)
        tidy(run.out)
    accelerator.wait_for_everyone()
    return report


def protection(data: Data, loaded: LoadedModel, settings: FinetuneSettings, split: Split) -> tuple[dict[str, list[Tensor]], Guard | None]:
    """Token ids of what is to be protected, by domain, and the guard where something is chosen by texts; never held-out text.

    Raises:
        FinetuneError: a domain that the task does not have, or the target.
    """
    if settings.protect is None:
        return {}, None
    unknown = [name for name in settings.protect_domains if name not in data.elsewhere]
    if unknown:
        raise FinetuneError(f"protect_domains {', '.join(unknown)}: other domains of the task are {', '.join(data.elsewhere)}")
    entries: dict[str, Sequence[Entry]] = {name: data.elsewhere[name] for name in settings.protect_domains or tuple(data.elsewhere)}
    known, guard = embedding_rows(loaded.model), None
    if split.validation:
        matrices, guard = split_protected(entries, loaded.tokenizer, settings, known=known)
        entries = {**matrices}
    options = {"length": settings.seq_len, "tokens": settings.protect_tokens, "known": known}
    return {name: full_rows(part, loaded.tokenizer, **options) for name, part in entries.items()}, guard if guard and guard.texts else None


def checked_path(paths: str | Path | ExpertPath, loaded: LoadedModel) -> ExpertPath:
    """The expert path, which fits the model.

    Raises:
        PathError: it cannot be read.
        FinetuneError: its layers, experts or revision are another model's.
    """
    sites = find_sites(loaded.model)
    layers, experts = tuple(site.layer for site in sites), tuple(site.num_experts for site in sites)
    path = paths if isinstance(paths, ExpertPath) else read_path(Path(paths), loaded.model, loaded.name)
    if path.layers != layers:
        raise FinetuneError(
            f"the path is of another model: its MoE layers are {_span(path.layers)}, those of {loaded.name} {_span(layers)}"
        )
    if path.experts != experts:
        raise FinetuneError(f"the path is of another model: it has {_span(path.experts)} experts by layer, {loaded.name} {_span(experts)}")
    revision = path.provenance.revision
    if revision is not None and loaded.revision != "unknown" and revision != loaded.revision:
        raise FinetuneError(
            f"the path was found on revision {revision[:24]} of {path.provenance.model}, this is {loaded.revision[:24]} of {loaded.name}: "
            "the experts differ; run `dbes paths` on this model"
        )
    return path


def read_path(file: Path, model: PreTrainedModel, name: str) -> ExpertPath:
    """The expert path or ESFT expert config in a file; ``model`` may be one without weights.

    Raises:
        PathError: it cannot be read.
        FinetuneError: it has no cells, or is an ESFT config of another model.
    """
    content = read_json(file, error=PathError, missing=f"{file}: there is no such file; run `dbes paths` first")
    empty = f"{file}: the expert path is empty: it has no cells, so there is nothing to train"
    if isinstance(content, dict) and content.get("cells") == []:
        raise FinetuneError(empty)
    if isinstance(content, dict) and "schema_version" not in content and "experts" in content:
        if isinstance(content["experts"], dict) and not any(content["experts"].values()):
            raise FinetuneError(empty)
        try:
            sites = find_sites(model)
            layers, experts = tuple(site.layer for site in sites), tuple(site.num_experts for site in sites)
            return read_esft(file, layers=layers, experts=experts, model=name)
        except PathError as problem:
            raise FinetuneError(f"{problem}: is it the path of another model?") from None
    return ExpertPath.load(file)


def _accelerator(settings: FinetuneSettings, out: Path) -> Accelerator:
    tracker = settings.tracker
    if tracker != "none" and not is_installed(tracker):
        raise FinetuneError(f"tracker {tracker}: this needs the package {tracker}; install it with pip install 'dbes[{tracker}]'")
    return Accelerator(
        mixed_precision="bf16" if settings.bf16 else None,
        log_with=tracker if tracker != "none" else None,
        project_dir=str(out),
    )


def _start_tracker(accelerator: Accelerator, settings: FinetuneSettings, out: Path) -> None:
    """Begin the tracker's run; called when training is sure to begin, so that a finished or refused run leaves no empty one."""
    if settings.tracker == "none":
        return
    config = {name: value for name, value in settings.model_dump(mode="json").items() if value is not None}
    with redirect_stdout(sys.stderr):  # some trackers greet on the standard output, which is the report's
        accelerator.init_trackers("dbes", config=config, init_kwargs={"wandb": {"name": out.name}})


def _end_trackers(accelerator: Accelerator, settings: FinetuneSettings) -> None:
    with redirect_stdout(sys.stderr):
        accelerator.end_training()
        if settings.tracker == "trackio":
            # accelerate closes the run, but trackio takes it for open and would close it once more, in words, when Python ends
            with suppress(ImportError, RuntimeError):
                importlib.import_module("trackio").finish()


def _span(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
