"""evaluate(): benchmark -> model -> trace -> scores -> result folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from dbes.errors import DbesError, ModelError, ResultError, SettingError, TraceError, refusal
from dbes.evaluation.answers import PHASE_FOLDERS
from dbes.evaluation.measuring import lacking, measured_beside, require_measurable
from dbes.evaluation.options import Further, Options, Progress
from dbes.evaluation.request import (
    Job,
    Request,
    Subject,
    expected_of,
    given_model,
    read_benchmark,
    subject_of,
)
from dbes.evaluation.reuse import finished_result, missing_files, notes, only_lacking, other_recording, same_result, whole_trace
from dbes.evaluation.scored import scored
from dbes.files import discard, locked
from dbes.recording.crew import Crew
from dbes.results import PAGE_FILE, RESULT_FILE, ModelFacts, RecordingFacts, Result, TaskFacts, load_result
from dbes.scoring.tables import COMPANIONS
from dbes.shipped import EMBEDDED, EMBEDDED_MODEL
from dbes.tasks.task import Task, is_group, tasks_of
from dbes.trace.loss import DocumentLoss, read_loss
from dbes.trace.store import MANIFEST, TRACE_FOLDER, Trace, read_manifest
from dbes.trace.types import TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dbes.evaluation.request import Model
    from dbes.models import LoadedModel

Several = Sequence[str] | Sequence[Path] | Sequence[Task] | Sequence[str | Path | Task]

RECOVERED = (DbesError, OSError, RuntimeError, MemoryError)
"""What a failed evaluation writes a result about; anything else is a defect."""


@overload
def evaluate(model: Model = ..., *, tasks: str | Path | Task = ..., **options: Unpack[Options]) -> Result: ...
@overload
def evaluate(model: Model = ..., *, tasks: Several, **options: Unpack[Options]) -> list[Result]: ...
def evaluate(
    model: Model = EMBEDDED,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Path | Task | Several = EMBEDDED,
    output_path: str | Path = "results",
    revision: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    permutations: int = 1000,
    trust_remote_code: bool = False,
    engine: Literal["auto", "memory", "streaming", "vllm", "openai"] = "auto",
    max_memory: int | str | None = None,
    overwrite: bool = False,
    save_trace: bool = True,
    embedded_fallback: bool = False,
    progress: Progress | None = None,
    **further: Unpack[Further],
) -> Result | list[Result]:
    """Measure how a Mixture-of-Experts checkpoint routes the domains of a task, and write the result.

    Everything is written below ``<output_path>/<model name>/<revision>/<task>/``, the ``folder`` of the result. A finished result of
    the same thing is returned as it is (the logger ``dbes`` says so, and when it was recorded); files of it that are missing are made
    again. An interrupted recording is resumed from its last whole shard.

    Args:
        model: hub id, folder, ``"embedded"`` for the checkpoint that ships with dbes, a `LoadedModel`, or a model of transformers or
            peft in memory (with its ``tokenizer``), which is left as it was.
        tasks: name of a task, path of a task YAML or a prepared folder, a `Task`, a group of tasks, or a list of these. All tasks
            of a list are read before anything is written; of one that fails later, the result in the list has status
            "error", and the others are run.
        output_path: folder of the results.
        revision: branch, tag or commit of a model on the hub. limit: read at most this many documents of each domain.
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype on an accelerator; or float32, bfloat16, float16, float64.
        device_map: as in transformers, for example "auto" or "cpu".
        batch_size: windows per batch, or "auto".
        seed: of the random-router control, the permutations and the reference router.
        permutations: shuffles of the documents' domain labels that make the chance level.
        trust_remote_code: run model code that comes with the checkpoint.
        engine: "memory" loads all weights, "streaming" one decoder layer at a time; "auto" is "memory" where the model fits;
            "vllm" and "openai" (a server): weights are not loaded here.
        max_memory: what the process may use with "streaming", in bytes or as "4GiB"; by default what the machine has free.
        overwrite: evaluate again although there is a result, or another recording, in the folder.
        save_trace: keep the recorded routes beside the result, so that they can be scored again without the model.
        embedded_fallback: when the hub cannot be reached, use the embedded sample and say so.
        progress: called as progress(stage, done, total).
        further: what is measured beside, and answers: ``loss``, ``ablate``, ``strata``, ``generate``, ..., see `Further`.

    Returns:
        The result, or one for each task of a list or a group.

    Raises:
        TaskError, SettingError: a task or an argument cannot be used (nothing is written).
        FileError: nothing can be written there, or another run is writing there.
        ResultError: the folder holds a finished result of something else, which is left alone.
        DbesError: the evaluation failed; a result with status "error" has been written.
    """
    several = not isinstance(tasks, str | Path | Task) or is_group(tasks)
    wanted = [each for task in ([tasks] if isinstance(tasks, str | Path | Task) else tasks) for each in tasks_of(task)]
    crew = Crew.here()
    with given_model(model, tokenizer) as given, crew.meeting(Path(output_path)):
        request = Request.of(
            given, revision=revision, limit=limit, dtype=dtype, device_map=device_map, batch_size=batch_size, seed=seed, engine=engine,
            max_memory=max_memory, permutations=permutations, trust_remote_code=trust_remote_code, embedded_fallback=embedded_fallback,
            **further,
        )  # fmt: skip
        results = _of_tasks(
            given, wanted, request, crew, several=several, output_path=Path(output_path), overwrite=overwrite, save_trace=save_trace,
            progress=progress,
        )  # fmt: skip
    return results if several else results[0]


def _of_tasks(
    given: str | Path | LoadedModel, wanted: Sequence[str | Path | Task], request: Request, crew: Crew, *,
    output_path: Path, several: bool, overwrite: bool, save_trace: bool, progress: Progress | None,
) -> list[Result]:  # fmt: skip
    benchmarks = [read_benchmark(task, limit=request.limit, embedded_fallback=request.embedded_fallback) for task in wanted]
    if not benchmarks:
        raise SettingError("tasks: expected at least one")
    crew.check(request.device_map)
    subject = subject_of(given, request)
    job = Job(subject=subject, request=request, benchmark=benchmarks[0], output_path=output_path, save_trace=save_trace)
    results = []
    for number, (task, benchmark) in enumerate(zip(wanted, benchmarks, strict=True)):
        job = replace(job, request=request.on(task), benchmark=benchmark)
        result, job = _of_task(job, crew, number, several=several, overwrite=overwrite, progress=progress)
        results.append(result)
    return results


def _of_task(job: Job, crew: Crew, number: int, *, several: bool, overwrite: bool, progress: Progress | None) -> tuple[Result, Job]:
    """As `_done`, of one of the tasks; of one that fails beside others, what is to be read of it."""
    crew.begin(number)
    try:
        result, job = _done(job, crew, overwrite=overwrite, progress=progress) if crew.first else _helped(job, crew, number)
    except DbesError as problem:
        if not several:
            raise
        result = _failure(job, problem)
    crew.tell("done", folder=job.folder)
    return result, job


def _done(job: Job, crew: Crew, *, overwrite: bool, progress: Progress | None) -> tuple[Result, Job]:
    """The result of a job, and the job with the model in it, where that was loaded."""
    while True:
        if not overwrite and (found := finished_result(job)) is not None:
            return found, job
        with locked(job.folder):
            try:
                if not overwrite and (found := _repaired(job)) is not None:
                    return found, job
                crew.tell("loading")
                loaded = job.subject.loaded or _loaded(job.subject, job.request, device=crew.device)
                where, job = job.folder, job.with_model(loaded)
                if job.folder == where:
                    return _evaluated(job, loaded, crew, fresh=overwrite, progress=progress), job
            except RECOVERED as problem:
                raise _failed(job, problem) from problem
        # the revision was not known before, so the result belongs into another folder
        with suppress(OSError):
            where.rmdir()


def _helped(job: Job, crew: Crew, task: int) -> tuple[Result, Job]:
    """As `_done` of a process that is not the first: it records units of the trace, and touches nothing else.

    Raises:
        DbesError: what the first process failed of.
    """
    if crew.reached(task, "loading"):
        loaded = job.subject.loaded or _loaded(job.subject, job.request, device=crew.device)
        job = job.with_model(loaded)
        if crew.reached(task, "recording"):
            with suppress(DbesError):  # it stands in the unit that was not finished, of which the first process fails
                _recorded(job, loaded, job.folder / TRACE_FOLDER, progress=None, crew=crew)
    found = load_result(crew.result(task))
    if found.status != "ok":
        raise ResultError(found.error or "failed")
    return found, job


def record(
    model: Model = EMBEDDED,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Path | Task = EMBEDDED,
    output_path: str | Path | None = None,
    revision: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    engine: Literal["auto", "memory", "streaming"] = "auto",
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Trace:
    """The routing of a model over a task, without scores.

    Args:
        output_path: folder of the trace; without one it stays in memory.
        model, tokenizer, ...: as of `evaluate`; one task only.

    Raises:
        SettingError: an argument cannot be used.
        DbesError: the task or the model cannot be used, or the recording failed its checks.
    """
    with given_model(model, tokenizer) as given:
        request = Request.of(
            given, revision=revision, limit=limit, dtype=dtype, device_map=device_map, batch_size=batch_size, seed=seed, permutations=0,
            trust_remote_code=trust_remote_code, engine=engine, max_memory=max_memory,
        ).on(tasks)  # fmt: skip
        benchmark = read_benchmark(tasks, limit=limit)
        subject = subject_of(given, request)
        job = Job(subject=subject, request=request, benchmark=benchmark, output_path=Path(), save_trace=output_path is not None)
        with nullcontext() if output_path is None else locked(Path(output_path)):
            loaded = subject.loaded or _loaded(subject, request)
            return _recorded(job, loaded, None if output_path is None else Path(output_path), progress=progress)[0]


def _loaded(subject: Subject, request: Request, *, device: str | None = None) -> LoadedModel:
    from dbes.models import load_model
    from dbes.models.load import load_description

    assert request.model is not None
    if request.served:
        return load_description(
            subject.where or request.model, name=subject.name, revision=request.revision, trust_remote_code=request.trust_remote_code
        )
    if request.model == EMBEDDED and not EMBEDDED_MODEL.is_dir():
        raise ModelError(f"{EMBEDDED_MODEL}: no embedded checkpoint; install dbes again, or give --model a folder")
    return load_model(
        subject.where or request.model,
        name=subject.name,
        revision=request.revision,
        dtype=request.dtype or "auto",
        device_map=request.device_map or device,
        trust_remote_code=request.trust_remote_code,
        layerwise={"auto": None, "memory": False, "streaming": True}[request.engine],
    )


def _repaired(job: Job) -> Result | None:
    """The finished result with missing files made again from its routes; None where it has none, or they are to be recorded first."""
    if (same := same_result(job)) is None:
        return None
    found, folder = same[0], job.folder
    missing, trace = missing_files(folder, found), whole_trace(folder / TRACE_FOLDER)
    if lacking(job, found.measures):
        return None
    if not missing and (trace is not None or not job.save_trace or not (folder / TRACE_FOLDER).is_dir()):
        return finished_result(job)  # another run has finished it meanwhile
    lost = ", ".join(missing) or "part of the recorded routes"
    if not missing or trace is None or other_recording(trace.provenance, job.expected, job.request):
        notes.warning(f"{folder}: {lost} missing or altered; recorded again")
        return None
    notes.warning(f"{folder}: {lost} missing or altered; made again from the recorded routes")
    return scored(job, trace, found.recording or _facts(job, trace), found.measures)


def _evaluated(job: Job, loaded: LoadedModel, crew: Crew, *, fresh: bool, progress: Progress | None) -> Result:
    folder = job.folder
    require_measurable(job, loaded)
    earlier = None if fresh or (same := same_result(job)) is None else same[0]
    if earlier is not None and not only_lacking(job, earlier):
        fresh, earlier = True, None
    if fresh:
        for name in (RESULT_FILE, PAGE_FILE, *COMPANIONS, TRACE_FOLDER, *PHASE_FOLDERS):
            discard(folder / name)
    trace, facts, loss = _recorded(job, loaded, folder / TRACE_FOLDER, progress=progress, crew=crew)
    if earlier is not None:
        facts = earlier.recording or facts
    if progress is not None:
        progress("scoring", 0, 0)
    before = None if earlier is None else earlier.measures
    return scored(job, trace, facts, measured_beside(job, loaded, trace, loss, facts, earlier=before, progress=progress))


def _recorded(
    job: Job, loaded: LoadedModel, folder: Path | None, *, progress: Progress | None, crew: Crew | None = None
) -> tuple[Trace, RecordingFacts, DocumentLoss | None]:
    from dbes.evaluation.servers import connect
    from dbes.recording.chat import Template
    from dbes.recording.record import record_documents

    benchmark, request = job.benchmark, job.request
    if folder is not None and (folder / MANIFEST).is_file() and read_manifest(folder).complete:
        # interrupted while scoring: the recording itself is whole
        trace = Trace.load(folder)
        other = other_recording(trace.provenance, expected_of(loaded, task=benchmark.facts), request)
        if other:
            raise TraceError(f"{folder}: holds another recording (another {' and '.join(other)}); use --overwrite or another --output-path")
        return trace, _facts(job, trace), read_loss(folder, trace.provenance, documents=len(trace.shape.document_ids))
    done = record_documents(
        loaded,
        benchmark.documents,
        domains=benchmark.domains,
        window=benchmark.task.window,
        output_path=folder,
        batch_size=request.batch_size,
        seed=request.seed,
        loss=request.loss,
        max_memory=request.max_memory,
        # how windows share a batch can change close choices, so it is part of what a recording is
        provenance={"task": benchmark.facts, "batch_size": request.batch_size},
        progress=None if progress is None else lambda now, total: progress("recording", now, total),
        crew=crew,
        generation=request.generation,
        server=connect(request, loaded) if request.served else None,
        template=Template(loaded.tokenizer, request.system) if request.chat_template else None,
    )
    facts = _facts(job, done.trace)
    took = {name: getattr(done, name) for name in ("seconds", "tokens_per_second", "engine", "bytes_read", "bytes_skipped")}
    return done.trace, facts.model_copy(update=took), done.loss


def _facts(job: Job, trace: Trace) -> RecordingFacts:
    around = None
    if job.request.chat_template:
        around = sum(int((routes.phase == TEMPLATE).sum()) for routes in trace.with_columns("phase") if routes.phase is not None)
    return RecordingFacts(documents=len(job.benchmark.documents), tokens=trace.tokens, template_tokens=around)


def _failed(job: Job, problem: BaseException) -> DbesError:
    """The error to raise, after a result that says what went wrong was written; any other result that stands there is left alone."""
    reason = refusal(problem)
    error = problem if isinstance(problem, DbesError) else ResultError(reason or f"{type(problem).__name__}: {problem}")
    folder = job.folder
    if (folder / RESULT_FILE).exists():
        try:
            if load_result(folder).status == "ok":
                return error
        except DbesError:
            return error
    # where even this cannot be written (a full disk) the error itself still reaches the caller
    with suppress(DbesError):
        _failure(job, error).save(folder)
    return error


def _failure(job: Job, error: DbesError) -> Result:
    """What is to be read of a job that failed."""
    task = job.benchmark.task
    return Result(
        status="error",
        error=str(error),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelFacts(name=job.subject.name, revision=job.subject.commit),
        task=TaskFacts(name=task.name, version=task.version, fingerprint=job.benchmark.facts["fingerprint"]),
        settings=job.request.settings,
    )
