"""What one call of evaluate() asks for: model, task and settings, and what a recording made now would say of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dbes.errors import ModelError, SettingError
from dbes.evaluation.harness import HARNESS, require_harness
from dbes.evaluation.options import ANSWERS, GENERATION, generation_of
from dbes.scoring.own import Metric, checked
from dbes.scoring.stratified import checked_kinds
from dbes.shipped import EMBEDDED, located
from dbes.tasks.task import Document, Task, load_task, read_task, task_facts
from dbes.text import unknown
from dbes.wording import bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dbes.models import LoadedModel
    from dbes.recording.generation import Generation

    Model = str | Path | LoadedModel | PreTrainedModel
    """What can be evaluated: folder, hub id or ``embedded``, or a model in memory."""

UNRESOLVED = "unresolved"
"""Stands for the revision in the path of a result whose model could not be loaded."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

ENGINES = ("auto", "memory", "streaming", "vllm", "openai")
SERVED = ENGINES[3:]

NEEDS_MEMORY = "needs the model whole in memory, and streaming ends the last layer with its router; use --engine memory"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task with its documents read, and what identifies them."""

    task: Task
    documents: tuple[Document, ...]
    facts: dict[str, Any]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.task.domains)


def read_benchmark(tasks: str | Path | Task, *, limit: int | None = None, embedded_fallback: bool = False) -> Benchmark:
    """The task and its documents.

    Raises:
        TaskError: unknown task, or one that cannot be used.
    """
    task = load_task(tasks)
    reading = read_task(task, limit=limit, embedded_fallback=embedded_fallback)
    return Benchmark(task=task, documents=reading.documents, facts=task_facts(task, reading))


def result_folder(
    output_path: str | Path, name: str, revision: str, task: str, *, limit: int | None = None, generate: int | None = None
) -> Path:
    """``<output_path>/<model name>/<revision>/<task>``; a limited task, and one that is answered, stand apart from the whole one."""
    parts = [re.sub(r"[^\w.=-]+", "__", part).strip(".") or "_" for part in (name, revision.removeprefix("sha256:")[:12], task)]
    if limit is not None:
        parts[2] += f"-limit{limit}"
    if generate is not None:
        parts[2] += f"-generate{generate}"
    return Path(output_path).joinpath(*parts)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one call of evaluate() asks for, as it was given; ``model`` and ``tasks`` are None where they were built in Python.

    Raises:
        SettingError: a value that no evaluation can use.
    """

    permutations: int
    seed: int
    limit: int | None
    batch_size: int | Literal["auto"]
    dtype: str | None
    device_map: str | None
    trust_remote_code: bool
    engine: str = "auto"
    max_memory: int | None = None
    embedded_fallback: bool = False
    loss: bool = False
    accuracy: bool | str = False
    ablate: bool = False
    metrics: tuple[Metric, ...] = ()
    strata: tuple[str, ...] = ()
    name: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    engine_args: str | None = None
    generation: Generation | None = None
    chat_template: bool = False
    system: str | None = None
    drop_loops: bool = False
    model: str | None
    tasks: str | None
    revision: str | None

    @classmethod
    def of(cls, model: str | Path | LoadedModel, **options: Any) -> Request:
        """What is asked of a model, before any task is named; how a model in memory computes was settled elsewhere."""
        if not isinstance(model, str | Path):
            options |= {"dtype": None, "device_map": None}
            if options.get("engine") in SERVED:
                raise SettingError(f"engine {options['engine']!r}: give the folder or hub id of the model that the server runs")
            if options.get("engine") == "streaming" and model.layerwise is None:
                raise SettingError("engine 'streaming': this model is in memory already; give its folder or hub id")
        if (given := options.get("max_memory")) is not None:
            options["max_memory"] = bytes_of(str(given), option="max_memory")
        options |= {name: tuple(options.get(name, ())) for name in ("metrics", "strata")}
        options["chat_template"] = options.pop("apply_chat_template", False)
        options["generation"] = generation_of(**{name: options.pop(name, usual) for name, usual in ANSWERS.items()}, **options)
        return cls(model=str(model) if isinstance(model, str | Path) else None, tasks=None, **options)

    def on(self, task: str | Path | Task) -> Request:
        return replace(self, tasks=None if isinstance(task, Task) else str(task))

    def __post_init__(self) -> None:
        checked(self.metrics)
        checked_kinds(self.strata)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise SettingError(unknown("dtype", self.dtype, DTYPES))
        if self.engine not in ENGINES:
            raise SettingError(unknown("engine", self.engine, ENGINES))
        if self.accuracy not in (False, True, HARNESS):
            raise SettingError(f"accuracy {self.accuracy!r}: expected True, False or {HARNESS!r}")
        if self.accuracy == HARNESS:
            require_harness()
        self._check_server()
        if self.name is not None and not self.name.strip():
            raise SettingError("name: expected some text")
        if self.engine == "streaming" and (asked := self.beside):
            raise SettingError(f"{asked}: {NEEDS_MEMORY}")
        if self.generation is not None and (asked := self.beside):
            raise SettingError(f"{asked}: measured on the given texts; evaluate once with it, and once with generate")
        if self.batch_size != "auto" and not (_whole(self.batch_size) and self.batch_size >= 1):
            raise SettingError(f"batch_size {self.batch_size!r}: expected 'auto' or a whole number of at least 1")
        for name, value, least in (("seed", self.seed, 0), ("permutations", self.permutations, 0), ("limit", self.limit, 1)):
            if value is None and name == "limit":
                continue
            if not _whole(value) or (value or 0) < least:
                raise SettingError(f"{name} {value!r}: expected a whole number of at least {least}")
        if self.revision is not None and self.model is not None and (self.model == EMBEDDED or Path(self.model).is_dir()):
            raise SettingError(f"revision {self.revision!r}: {self.model} is a folder; only models of the hub have revisions")

    @property
    def served(self) -> bool:
        """Whether a server runs the model."""
        return self.engine in SERVED

    def _check_server(self) -> None:
        for name, engine in (("base_url", "openai"), ("api_key_env", "openai"), ("engine_args", "vllm")):
            if getattr(self, name) is not None and self.engine != engine:
                raise SettingError(f"{name}: means something with engine {engine!r} only")
        if self.engine == "openai" and self.base_url is None:
            raise SettingError("engine 'openai': give base_url, such as http://127.0.0.1:8000")
        if self.served and (asked := self.beside):
            raise SettingError(f"{asked}: a server returns no logits, and its experts cannot be masked; use engine 'memory'")

    @property
    def beside(self) -> str:
        """What is to be measured beside specialization, in words; empty for nothing."""
        return " and ".join(name for name in ("loss", "accuracy", "ablate") if getattr(self, name))

    @property
    def settings(self) -> dict[str, Any]:
        """What a result keeps under ``settings``; enough, with ``own_metrics``, to compare it and to write the command for it."""
        about: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "metrics"}
        if self.generation is None:
            for name in GENERATION:
                del about[name]
        else:
            about["generation"] = asdict(self.generation)
        return about


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a recording made now would say of itself. None: not known before the model is loaded.

    Attributes:
        task: name, version, fingerprint, ... of the task.
        accelerator: kind of the accelerator of this machine, or "cpu".
    """

    task: Mapping[str, Any]
    revision: str | None
    accelerator: str
    dtype: str | None
    device: str | None
    attention: str | None = None
    experts_implementation: str | None = None
    tokenizer_sha256: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """The facts that are known, under the names of a trace's provenance."""
        names = ("revision", "dtype", "device", "attention", "experts_implementation", "tokenizer_sha256")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def expected_before_loading(model: str, *, where: Path | None, commit: str | None, request: Request, task: Mapping[str, Any]) -> Expected:
    """What is known of a recording before the weights are read.

    Args:
        where: the model's folder, None on the hub (whose commit stands for the tokenizer too).

    Raises:
        SettingError: there is no such device.
        ModelError: the tokenizer cannot be read.
    """
    from dbes.models import load_config, load_tokenizer, tokenizer_fingerprint

    accelerator = accelerator_here()
    place = str(where or model)
    if request.served:
        known = None if where is None else tokenizer_fingerprint(load_tokenizer(place, trust_remote_code=request.trust_remote_code))
        return Expected(task=task, revision=commit, accelerator=accelerator, dtype=None, device=None, tokenizer_sha256=known)
    dtype = request.dtype
    if dtype == "auto":
        dtype = "float32"
        if accelerator != "cpu":
            config = load_config(place, revision=request.revision, trust_remote_code=request.trust_remote_code)
            own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
            dtype = None if own is None else str(own).removeprefix("torch.")
    tokenizer = None
    if where is not None:
        tokenizer = tokenizer_fingerprint(load_tokenizer(place, trust_remote_code=request.trust_remote_code))
    return Expected(
        task=task,
        revision=commit,
        accelerator=accelerator,
        dtype=dtype,
        device=device_named(request.device_map, accelerator),
        tokenizer_sha256=tokenizer,
    )


def expected_of(loaded: LoadedModel, *, task: Mapping[str, Any]) -> Expected:
    """The same of a model that is loaded: all is known."""
    return Expected(
        task=task,
        revision=loaded.revision,
        accelerator=accelerator_here(),
        dtype=loaded.dtype,
        device=loaded.device,
        attention=loaded.attention,
        experts_implementation=loaded.experts_implementation,
        tokenizer_sha256=loaded.tokenizer_sha256,
    )


def accelerator_here() -> str:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def device_named(device_map: Any, accelerator: str) -> str | None:
    """Kind of the device that a ``device_map`` names; None for a map of modules.

    Raises:
        SettingError: no such device.
    """
    import torch

    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return accelerator
    if not isinstance(device_map, str):
        return None
    try:
        return torch.device(device_map).type
    except RuntimeError:
        raise SettingError(f"device_map {device_map!r}: expected auto, cpu, or a device of torch such as cuda or cuda:0") from None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model to evaluate. ``where``: its folder; ``commit``: its revision; each None where it is not known before loading."""

    name: str
    commit: str | None
    where: Path | None = None
    loaded: LoadedModel | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of evaluate()."""

    subject: Subject
    request: Request
    benchmark: Benchmark
    output_path: Path
    save_trace: bool

    @property
    def folder(self) -> Path:
        name, commit = self.subject.name, self.subject.commit or UNRESOLVED
        tokens = None if self.request.generation is None else self.request.generation.tokens
        return result_folder(self.output_path, name, commit, self.benchmark.task.name, limit=self.request.limit, generate=tokens)

    @cached_property
    def expected(self) -> Expected:
        subject, facts = self.subject, self.benchmark.facts
        if subject.loaded is not None:
            return expected_of(subject.loaded, task=facts)
        assert self.request.model is not None
        return expected_before_loading(self.request.model, where=subject.where, commit=subject.commit, request=self.request, task=facts)

    def with_model(self, loaded: LoadedModel) -> Job:
        subject = replace(self.subject, name=loaded.name, commit=loaded.revision, loaded=loaded)
        return replace(self, subject=subject)


@contextmanager
def given_model(model: Model, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str | Path | LoadedModel]:
    """The model as it is named, or as it is loaded; one in memory is in eval mode inside the block, and left as it was.

    Raises:
        SettingError: a tokenizer for a model that has its own.
        ModelError: a model in memory that cannot be recorded, or without tokenizer.
    """
    from dbes.models import LoadedModel, load_model, transformers_model
    from dbes.models.execution import mode

    if isinstance(model, str | Path | LoadedModel):
        if tokenizer is not None:
            raise SettingError("tokenizer: for a model of transformers in memory only; any other comes with its own")
        yield model
        return
    with mode(transformers_model(model), training=False):
        yield load_model(model, tokenizer=tokenizer)


def subject_of(model: str | Path | LoadedModel, request: Request) -> Subject:
    """The model with what can be known of it without reading its weights.

    Raises:
        SettingError: there is no such device.
    """
    if not isinstance(model, str | Path):
        model = model if request.name is None else replace(model, name=request.name)
        return Subject(name=model.name, commit=model.revision, loaded=model)
    from dbes.models import find_commit, folder_fingerprint

    device_named(request.device_map, "cpu")
    where, name = located(model)
    folder = Path(where)
    if not folder.is_dir():
        commit = None
        if isinstance(model, str):
            with suppress(ModelError):  # told when it is loaded
                commit = find_commit(model, revision=request.revision)
        return Subject(name=request.name or str(model), commit=commit)
    name, commit = request.name or name or folder.resolve().name, None
    if (folder / "config.json").is_file():
        with suppress(OSError, ModelError):
            commit = folder_fingerprint(folder)
    return Subject(name=name, commit=commit, where=folder)
