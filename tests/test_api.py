"""The verbs: one round in Python on a small model, models in memory, tasks built in Python, lists of tasks; the page of the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, OlmoeForCausalLM
from transformers.modeling_utils import PreTrainedModel

import dbes
from dbes.evaluation.request import read_benchmark
from dbes.scoring.counting import counts_of

WORDS = {"law": "court clause liability tenant notice", "code": "def return import self list", "math": "prime sum angle proof root"}
QUICK: dict[str, Any] = {"permutations": 30, "limit": 6}


def texts(words: str, count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(words.split(), size=40)) for _ in range(count)]


@pytest.fixture(scope="module")
def task() -> dbes.Task:
    domains: Any = {name: texts(words, 8, seed) for seed, (name, words) in enumerate(WORDS.items())}
    return dbes.Task(name="mine", version=1, window=64, domains=domains)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> OlmoeForCausalLM:
    return OlmoeForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round")


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path, task: dbes.Task, folder: Path) -> dbes.Result:
    return dbes.evaluate(tiny_checkpoint, tasks=task, output_path=folder / "results", **QUICK)


def test_every_name_is_there_and_says_what_it_is() -> None:
    for name in dbes.__all__:
        assert getattr(dbes, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'evaluates'"):
        _ = dbes.evaluates
    assert set(dbes.__all__) < set(dir(dbes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"domains": {"law": ["a"]}}, "task: 1 domain given.*at least 2 are needed", id="one domain"),
        pytest.param({"domains": {"law": ["a"], "code": []}}, r"domains\.code\.texts: .*at least 1 item", id="no text"),
        pytest.param({"domains": {"law": ["a"], "code": [3]}}, r"domains\.code\.texts\.0: .*valid string", id="no string"),
        pytest.param(
            {"domains": {"law": ["a"], "code": {"texts": ["x"], "colour": 1}}}, r"domains\.code\.colour: unknown key", id="unknown key"
        ),
        pytest.param({"domains": {"law": ["a"], "code": 3}}, "domains.code", id="a domain that is a number"),
        pytest.param({"window": 1}, "window: ", id="a window of one token"),
        pytest.param({"winodw": 64}, "winodw: unknown key", id="a field that there is not"),
        pytest.param({"name": "a/b"}, "name: ", id="a name that is a path"),
    ],
)
def test_a_task_built_wrongly_in_python_names_the_field(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"name": "mine", "version": 1, "domains": {"law": ["a"], "code": ["b"]}, **change}
    with pytest.raises(dbes.TaskError, match=message) as told:
        dbes.Task(**given)
    assert "\n" not in str(told.value) and "pydantic" not in str(told.value)


def test_a_task_built_in_python_is_that_of_the_same_texts_in_files(task: dbes.Task, tmp_path: Path) -> None:
    lines = [f"name: {task.name}", "version: 1", "window: 64", "domains:"]
    for domain in WORDS:
        given = task.domains[domain].texts  # pyright: ignore[reportAttributeAccessIssue]
        rows = [{"id": f"{domain}/{number}", "text": text} for number, text in enumerate(given, start=1)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append(f"  {domain}: {{files: [{domain}.jsonl]}}")
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    built, written = read_benchmark(task), read_benchmark(tmp_path / "mine.yaml")
    assert built.documents == written.documents and built.facts == written.facts
    assert [len(read_benchmark(task, limit=2).documents), len(built.documents)] == [6, 24]
    assert dbes.load_task(task) is task

    mixed = dbes.Task(name="mixed", version=1, domains={"law": {"files": [str(tmp_path / "law.jsonl")]}, "code": ["a = 1", "b = 2"]})  # pyright: ignore[reportArgumentType]
    assert [document.domain for document in read_benchmark(mixed).documents] == ["law"] * 8 + ["code"] * 2


def test_empty_texts_are_left_out_and_counted() -> None:
    found = read_benchmark(dbes.Task(name="mine", version=1, domains={"a": ["x"], "b": ["x", " "]}))  # pyright: ignore[reportArgumentType]
    assert [document.text for document in found.documents] == ["x", "x"]
    assert found.facts["note"] == "rows without text were left out: b (1)"


def state(model: PreTrainedModel) -> list[Any]:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [[module.training for module in model.modules()], hooks, [parameter.requires_grad for parameter in model.parameters()]]


def test_a_model_in_memory_is_evaluated_as_its_folder_and_left_as_it_was(
    model: OlmoeForCausalLM, result: dbes.Result, task: dbes.Task, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model.train()
    model.model.layers[1].eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    found = dbes.evaluate(model, tokenizer=tokenizer, tasks=task, output_path=tmp_path, **QUICK)
    assert state(model) == before
    assert found.to_dataframe().equals(result.to_dataframe()) and found.folder is not None and found.folder.is_relative_to(tmp_path)
    trace = dbes.record(model, tokenizer=tokenizer, tasks=task, limit=6)
    assert dbes.score(trace, permutations=30).to_dataframe().equals(result.to_dataframe())
    assert dbes.examine(model).ok and state(model) == before
    with pytest.raises(dbes.ModelError, match="needs its tokenizer"):
        dbes.evaluate(model, tasks=task, output_path=tmp_path)
    with pytest.raises(dbes.SettingError, match="tokenizer: for a model of transformers in memory only"):
        dbes.evaluate(tiny_checkpoint, tokenizer=tokenizer, tasks=task, output_path=tmp_path)
    assert state(model) == before


def test_a_list_of_tasks_gives_a_list_of_results_and_loads_the_model_once(
    task: dbes.Task, tiny_task: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real = dbes.load_model
    monkeypatch.setattr("dbes.models.load_model", lambda *given, **named: loaded.append(given) or real(*given, **named))
    unfit = dbes.Task(name="unfit", version=1, domains={"a": ["x"], "b": ["\0" * 9]})  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("dbes.recording.record.record_documents", refusing("unfit"))
    found = dbes.evaluate(tiny_checkpoint, tasks=[task, unfit, tiny_task], output_path=tmp_path, **QUICK)
    assert [(each.task.name, each.status) for each in found] == [("mine", "ok"), ("unfit", "error"), ("tiny", "ok")]
    assert len(loaded) == 1 and "it cannot be recorded" in str(found[1].error)
    assert [each.folder for each in found if each.status == "ok"] == [path.parent for path in sorted(tmp_path.rglob("scores.csv"))]
    with pytest.raises(dbes.TaskError, match="did you mean smoke"):
        dbes.evaluate(tiny_checkpoint, tasks=[task, "smoek"], output_path=tmp_path / "none")
    with pytest.raises(dbes.SettingError, match="at least one"):
        dbes.evaluate(tiny_checkpoint, tasks=[], output_path=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def refusing(name: str) -> Any:
    from dbes.recording import record

    real = record.record_documents

    def recorded(*given: Any, **named: Any) -> Any:
        if named["provenance"]["task"]["name"] == name:
            raise dbes.RecordingError("it cannot be recorded")
        return real(*given, **named)

    return recorded


def test_a_path_is_found_in_a_result_its_folder_a_trace_and_counts(result: dbes.Result, tmp_path: Path) -> None:
    assert result.folder is not None
    trace = dbes.Trace.load(result.folder / "trace")
    counts = counts_of(trace).save(tmp_path / "counts")
    sources: list[Any] = [result, result.folder, str(result.folder / "result.json")]
    sources += [trace, result.folder / "trace", counts, tmp_path / "counts"]
    found = [dbes.find_path(source, domain="law", rule="target-load", budget=0.2) for source in sources]
    assert all(path.cells == found[0].cells and path.coverage == found[0].coverage for path in found)
    assert dbes.find_path(result, domain="law", rule="target-load").budget == 0.15
    assert dbes.find_path(result, domain="law", rule="esft-token").budget is None
    assert dbes.ExpertPath.load(found[0].save(tmp_path / "path.json")) == found[0]
    esft = json.loads(found[0].save(tmp_path / "esft.json", format="esft").read_text())
    assert {(int(layer), expert) for layer, experts in esft["experts"].items() for expert in experts} == set(found[0].cells)
    with pytest.raises(dbes.SettingError, match="no format is called 'yaml'"):
        found[0].save(tmp_path / "path.yaml", format="yaml")
    with pytest.raises(dbes.PathError, match="not written to a folder"):
        dbes.find_path(dbes.score(trace, permutations=5), domain="law")


def test_a_path_is_found_by_a_model_in_memory(model: OlmoeForCausalLM, task: dbes.Task, tiny_checkpoint: Path) -> None:
    tokenizer = dbes.load_model(tiny_checkpoint).tokenizer
    trace = dbes.record(model, tokenizer=tokenizer, tasks=task)
    given: dict[str, Any] = {"domain": "law", "rule": "gradient", "tasks": task, "resamples": 0}
    assert dbes.find_path(trace, model=model, tokenizer=tokenizer, **given).share <= 0.15
    with pytest.raises(dbes.ModelError, match="needs its tokenizer"):
        dbes.find_path(trace, model=model, **given)


def test_the_whole_round_with_a_task_that_has_no_file(result: dbes.Result, task: dbes.Task, tiny_checkpoint: Path, folder: Path) -> None:
    path = dbes.find_path(result, domain="law", rule="gradient", budget=0.2, model=tiny_checkpoint, tasks=task)
    loaded = dbes.load_model(tiny_checkpoint)
    assert dbes.find_path(result, domain="law", rule="gradient", budget=0.2, model=loaded, tasks=task) == path
    options: dict[str, Any] = {"tasks": task, "steps": 2, "lr": 0.05, "limit": 2, "seq_len": 32}
    told = dbes.finetune(tiny_checkpoint, path, "task:law", folder / "law", **options)
    assert told.target == "law" and told.cells == path.cells and set(told.after) == set(WORDS)
    assert dbes.finetune(tiny_checkpoint, path, "task:law", folder / "law", **options) == told, "the report of a finished run"
    dbes.finetune(tiny_checkpoint, path, "task:law", folder / "delta", **options, save="delta")
    merged = dbes.merge(tiny_checkpoint, folder / "delta", folder / "merged")
    assert (merged / "model.safetensors").read_bytes() == (folder / "law" / "model.safetensors").read_bytes()

    after = dbes.evaluate(folder / "law", tasks=task, output_path=folder / "results", **QUICK)
    both = dbes.compare([result, after])
    table = both.to_dataframe()
    assert len(both.entries) == 2 and len(table) == 2
    scores = {each.record("specialization").score for each in (result, after)}
    assert set(table["specialization"]) == scores
    assert [entry.label for entry in dbes.compare(folder / "results").entries] == list(table["model"])
    assert dbes.report(after).read_text().startswith("<!") and "law" in str(dbes.report(after, format="card"))
    with pytest.raises(dbes.SettingError, match="did you mean html"):
        dbes.report(after, format="htm")
    with pytest.raises(dbes.ResultError, match="was not written"):
        dbes.compare(dbes.score(dbes.Trace.load(Path(str(after.folder)) / "trace"), permutations=5))


def test_score_takes_folders_and_names_as_the_command_does(result: dbes.Result, tmp_path: Path) -> None:
    assert result.folder is not None
    ideal = dbes.score(result.folder / "trace", router="reference", permutations=30, output_path=tmp_path)
    assert ideal.folder == tmp_path and dbes.load_result(tmp_path).to_dataframe().equals(ideal.to_dataframe())
    assert ideal.record("specialization").score == pytest.approx(1, abs=0.05)
    for named, message in (({"router": "referenc"}, "did you mean reference"), ({"phase": "prompts"}, "did you mean prompt")):
        with pytest.raises(dbes.SettingError, match=message):
            dbes.score(result.folder / "trace", **named)


def test_a_result_knows_its_folder_and_equals_its_copy_elsewhere(result: dbes.Result, tmp_path: Path) -> None:
    assert result.folder is not None
    result.model_copy().save(tmp_path)
    again = dbes.load_result(tmp_path)
    assert again.folder == tmp_path and dbes.load_results(tmp_path)[0].folder == tmp_path
    assert json.loads(again.model_dump_json()) == json.loads(result.model_dump_json())
