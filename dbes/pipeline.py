"""evaluate(): benchmark -> model -> trace -> scores -> result folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dbes.benchmark import Document, Task, load_task, read_task, task_facts
from dbes.errors import DbesError, ModelError, ResultError, TraceError
from dbes.results import RESULT_FILE, ModelFacts, RecordingFacts, Result, TaskFacts, load_result
from dbes.scoring import score_tables
from dbes.tables import write_tables
from dbes.trace import MANIFEST, Trace, read_manifest

if TYPE_CHECKING:
    from dbes.models import LoadedModel

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "benchmark_data" / "model"
EMBEDDED_NAME = "dbes-embedded"

UNRESOLVED = "unresolved"
"""Stands for the revision in the path of a result whose model could not be loaded."""

TRACE_FOLDER = "trace"

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); the stage names what is being done."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task with its documents read, and what identifies them."""

    task: Task
    documents: tuple[Document, ...]
    facts: dict[str, Any]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.task.domains)


def evaluate(
    model: str | Path | LoadedModel,
    *,
    tasks: str | Path = "embedded",
    output_path: str | Path = "results",
    revision: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    permutations: int = 1000,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    save_trace: bool = True,
    embedded_fallback: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Measure how a Mixture-of-Experts checkpoint routes the domains of a task, and write the result.

    Everything is written below ``<output_path>/<model name>/<revision>/<task>/``, see ``result_folder``. A finished result with
    the same settings is returned as it is; an interrupted recording is gone on with from its last whole shard.

    Args:
        model: hub id, folder, ``"embedded"`` for the checkpoint that ships with dbes, or a ``LoadedModel``.
        tasks: name of a task or path of a task YAML.
        limit: read at most this many documents of each domain.
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype on an accelerator.
        batch_size: windows per batch, or "auto"; changes no count.
        seed: of the random-router control, the permutations and the reference router.
        overwrite: evaluate again although there is a result, or another recording, in the folder.
        save_trace: keep the recorded routes beside the result, so that they can be scored again without the model.
        embedded_fallback: when the hub cannot be reached, use the embedded sample and say so.
        progress: see ``Progress``.

    Raises:
        TaskError: the task cannot be used (nothing is written).
        DbesError: the evaluation failed; a result with status "error" has been written.
    """
    benchmark = read_benchmark(tasks, limit=limit, embedded_fallback=embedded_fallback)
    settings = {"permutations": permutations, "seed": seed, "limit": limit}
    name, commit = _identity(model)
    folder = result_folder(output_path, name, commit or UNRESOLVED, benchmark.task.name, limit=limit)
    try:
        if commit is not None and (found := _finished(folder, settings, benchmark, overwrite=overwrite)) is not None:
            return found
        loaded = _loaded(model, name, revision, dtype, device_map, trust_remote_code=trust_remote_code)
        folder = result_folder(output_path, loaded.name, loaded.revision, benchmark.task.name, limit=limit)
        if (found := _finished(folder, settings, benchmark, overwrite=overwrite)) is not None:
            return found
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        trace, facts = _recorded(loaded, benchmark, folder / TRACE_FOLDER, batch_size=batch_size, seed=seed, progress=progress)
        if progress is not None:
            progress("scoring", 0, 0)
        scores = score_tables(trace, permutations=permutations, seed=seed)
        result = scores.result.model_copy(
            update={"recording": facts, "settings": {**scores.result.settings, **settings, "batch_size": batch_size}}
        )
        write_tables(scores, folder)
        result.save(folder)
        if not save_trace:
            shutil.rmtree(folder / TRACE_FOLDER)
        return result
    except (DbesError, OSError, RuntimeError, MemoryError) as problem:
        error = problem if isinstance(problem, DbesError) else ResultError(f"{type(problem).__name__}: {problem}")
        _save_failure(folder, name, commit, benchmark, settings, error)
        raise error from problem


def record(
    model: str | Path | LoadedModel,
    *,
    tasks: str | Path = "embedded",
    output_path: str | Path | None = None,
    revision: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """The routing of a model over a task, without scores; in memory unless ``output_path`` names a folder for it.

    Raises:
        DbesError: the task or the model cannot be used, or the recording failed its checks.
    """
    benchmark = read_benchmark(tasks, limit=limit)
    name, _ = _identity(model)
    loaded = _loaded(model, name, revision, dtype, device_map, trust_remote_code=trust_remote_code)
    target = None if output_path is None else Path(output_path)
    return _recorded(loaded, benchmark, target, batch_size=batch_size, seed=seed, progress=progress)[0]


def read_benchmark(tasks: str | Path, *, limit: int | None = None, embedded_fallback: bool = False) -> Benchmark:
    """The task and its documents.

    Raises:
        TaskError: unknown task, or one that cannot be used.
    """
    task = load_task(tasks)
    reading = read_task(task, limit=limit, embedded_fallback=embedded_fallback)
    return Benchmark(task=task, documents=reading.documents, facts=task_facts(task, reading))


def result_folder(output_path: str | Path, name: str, revision: str, task: str, *, limit: int | None = None) -> Path:
    """``<output_path>/<model name>/<revision>/<task>``; a limited task stands apart from the whole one."""
    parts = [re.sub(r"[^\w.=-]+", "__", part).strip(".") or "_" for part in (name, revision.removeprefix("sha256:")[:12], task)]
    if limit is not None:
        parts[2] += f"-limit{limit}"
    return Path(output_path).joinpath(*parts)


def existing_folder(output_path: str | Path, result: Result, *, limit: int | None = None) -> Path:
    """Where evaluate() wrote a result."""
    return result_folder(output_path, result.model.name, result.model.revision or UNRESOLVED, result.task.name, limit=limit)


def _identity(model: str | Path | LoadedModel) -> tuple[str, str | None]:
    """Name and, where it can be had without loading the weights, revision of a model."""
    if not isinstance(model, str | Path):
        return model.name, model.revision
    from dbes.models import folder_fingerprint

    folder = EMBEDDED_MODEL if str(model) == "embedded" else Path(model)
    name = EMBEDDED_NAME if str(model) == "embedded" else folder.resolve().name if folder.is_dir() else str(model)
    if (folder / "config.json").is_file():
        with suppress(OSError):
            return name, folder_fingerprint(folder)
    return name, None


def _loaded(
    model: str | Path | LoadedModel, name: str, revision: str | None, dtype: str, device_map: str | None, *, trust_remote_code: bool
) -> LoadedModel:
    if not isinstance(model, str | Path):
        return model
    from dbes.models import load_model

    where = EMBEDDED_MODEL if str(model) == "embedded" else model
    if where is EMBEDDED_MODEL and not EMBEDDED_MODEL.is_dir():
        raise ModelError(f"{EMBEDDED_MODEL}: no embedded checkpoint; run dbes from a clone of its repository, or give --model a folder")
    return load_model(where, name=name, revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)


def _finished(folder: Path, settings: dict[str, Any], benchmark: Benchmark, *, overwrite: bool) -> Result | None:
    """A finished result of the same thing in the folder, or None.

    Raises:
        ResultError: the folder holds a finished result with other settings or of another version of the task.
    """
    if overwrite or not (folder / RESULT_FILE).is_file():
        return None
    found = load_result(folder)
    if found.status != "ok":
        return None
    differences = [key for key, value in settings.items() if found.settings.get(key) != value]
    if found.task.fingerprint != benchmark.facts["fingerprint"]:
        differences.append("task fingerprint")
    if differences:
        raise ResultError(
            f"{folder}: holds a finished result with another {' and '.join(differences)}; use --overwrite or another --output-path"
        )
    return found


def _recorded(
    loaded: LoadedModel,
    benchmark: Benchmark,
    folder: Path | None,
    *,
    batch_size: int | Literal["auto"],
    seed: int,
    progress: Progress | None,
) -> tuple[Trace, RecordingFacts]:
    from dbes.recording import record_documents

    if folder is not None and (folder / MANIFEST).is_file() and read_manifest(folder).complete:
        # Interrupted while scoring: the recording itself is whole.
        trace = Trace.load(folder)
        about = trace.provenance
        if about.get("task") != benchmark.facts or about.get("revision") != loaded.revision or about.get("seed") != seed:
            raise TraceError(f"{folder}: holds another recording; use --overwrite or another --output-path")
        return trace, RecordingFacts(documents=len(benchmark.documents), tokens=trace.tokens)
    done = record_documents(
        loaded,
        benchmark.documents,
        domains=benchmark.domains,
        window=benchmark.task.window,
        output_path=folder,
        batch_size=batch_size,
        seed=seed,
        provenance={"task": benchmark.facts},
        progress=None if progress is None else lambda now, total: progress("recording", now, total),
    )
    facts = RecordingFacts(
        documents=len(benchmark.documents), tokens=done.trace.tokens, seconds=done.seconds, tokens_per_second=done.tokens_per_second
    )
    return done.trace, facts


def _save_failure(
    folder: Path, name: str, revision: str | None, benchmark: Benchmark, settings: dict[str, Any], error: DbesError
) -> None:
    """A result that says what went wrong; a finished result that stands there already is left alone."""
    with suppress(DbesError):
        if (folder / RESULT_FILE).is_file() and load_result(folder).status == "ok":
            return
    result = Result(
        status="error",
        error=str(error),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelFacts(name=name, revision=revision),
        task=TaskFacts(name=benchmark.task.name, version=benchmark.task.version, fingerprint=benchmark.facts["fingerprint"]),
        settings=settings,
    )
    # Where even this cannot be written (a full disk, a read-only folder) the error itself still reaches the caller.
    with suppress(ResultError):
        result.save(folder)
