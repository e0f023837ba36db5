"""Accuracy of held-out items as an outcome: against a naive count, by hand, and nothing of it where there are no items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from dbes.intervention.analysis import analyse
from dbes.intervention.data import ITEM_COLUMNS, ExperimentData, load_data, read_sources, save_data, tokenize
from dbes.intervention.grid import RUNS, intervene, read_experiment
from dbes.intervention.outcomes import accuracy_changes, accuracy_figure
from dbes.intervention.runs import execute, measure_items
from dbes.intervention.settings import ArmRun, InterventionSettings, run_key
from dbes.models import LoadedModel, load_model
from dbes.paths.types import Cell
from dbes.reporting.outcome import EXPERIMENT_FILE

SETTINGS = InterventionSettings(
    domains=("quiz",),
    budgets=(0.2,),
    rules=("target-load", "random-load-matched"),
    extras=("full", "router"),
    seeds=2,
    rates=(1e-3,),
    steps=4,
    warmup=0,
    sequences=2,
    length=48,
    points=(2, 4),
    full_points=(1, 2, 4),
    documents=9,
    other_documents=4,
    tuning_documents=2,
    evidence_tokens=1500,
    permutations=40,
    masks=2,
)
FULL = ArmRun(target="quiz", kind="full", cells=(), rank=None, only=None, rate=3e-3, seed=0, tuning=False)


def row_of(index: int, random: np.random.Generator) -> dict[str, Any]:
    """An item of two to four choices; one in three is given by its index, one by its letter, one by its words."""
    count = 2 + index % 3
    choices = [" ".join(random.choice(["ut", "sed", "non", "quo", "velut"], 1 + int(random.integers(3)))) + str(c) for c in range(count)]
    right = int(random.integers(count))
    question = f"{' '.join(random.choice(['cur', 'quid', 'ubi'], 2 + index % 9))}?"
    answer = [str(right), chr(ord("A") + right), choices[right]][index % 3]
    text = f"{question} {choices[right]} " + " ".join(random.choice(["ut", "sed", "non"], 30))
    return {
        "id": f"q{index}",
        "text": text,
        "question": question,
        "choices": choices,
        "answer": answer,
        "source_document": f"s{index // 2}",
    }


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(11)
    path = tmp_path_factory.mktemp("quiz") / "quiz.jsonl"
    path.write_text("".join(json.dumps(row_of(index, random)) + "\n" for index in range(80)), "utf-8")
    return path


@pytest.fixture(scope="module")
def data(loaded: LoadedModel, tiny_task: Path, quiz: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentData:
    texts, names = read_sources(f"task:{tiny_task}", (f"quiz={quiz}",), cache=tmp_path_factory.mktemp("cache"))
    return tokenize(texts, loaded.tokenizer, targets=names, settings=SETTINGS)


def naive(model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, length: int) -> tuple[list[int], list[int]]:
    """Rightly answered items, by likelihood and by likelihood per byte: one forward for every choice, tokens read one by one."""
    likely, per_byte = [], []
    for row in rows:
        choices = row["choices"]
        names = {**{text: i for i, text in enumerate(choices)}, **{str(i): i for i in range(4)}, **dict(zip("ABCD", range(4), strict=True))}
        scores = []
        for choice in choices:
            before, after = row["question"].encode(), f" {choice}".encode()
            ids = tokenizer((before + after).decode())["input_ids"]
            assert len(ids) == len(before + after), "a byte-level tokenizer without merges: one byte a token"
            ids = ids[-length:]
            with torch.no_grad():
                told = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(told[place - 1, ids[place]]) for place in range(len(ids) - len(after), len(ids))))
        right = names[row["answer"]]
        likely.append(int(max(range(len(scores)), key=scores.__getitem__) == right))
        shares = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
        per_byte.append(int(max(range(len(shares)), key=shares.__getitem__) == right))
    return likely, per_byte


def asked(data: ExperimentData, quiz: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows behind the items, found by the text of their first choice."""
    rows = [json.loads(line) for line in quiz.read_text("utf-8").splitlines()]
    items, found, at = data.items["quiz"], [], 0
    for count in items.choices:
        text = tokenizer.decode(items.samples()[at].ids)
        (row,) = [row for row in rows if f"{row['question']} {row['choices'][0]}".endswith(text)]
        found.append(row)
        at += count
    return found


def test_items_follow_the_split_of_the_documents(data: ExperimentData, quiz: Path, tiny_task: Path, tmp_path: Path, loaded: Any) -> None:
    texts, _ = read_sources(f"task:{tiny_task}", (f"quiz={quiz}",), cache=tmp_path)
    training = {text.source for text in texts.training["quiz"]}
    rows = asked(data, quiz, loaded.tokenizer)
    assert len(rows) == SETTINGS.documents and not training & {row["source_document"] for row in rows}
    assert data.items.keys() == {"quiz"} and sorted(set(data.items["quiz"].choices.tolist())) == [2, 3, 4]


def test_accuracy_is_the_naive_count_before_and_after_training(data: ExperimentData, quiz: Path, loaded: LoadedModel) -> None:
    rows = asked(data, quiz, loaded.tokenizer)
    expected = naive(loaded.model, loaded.tokenizer, rows, length=SETTINGS.length)
    found = measure_items(loaded.model, data.items, padding=data.boundary)
    assert (found["right"]["quiz"], found["right_per_byte"]["quiz"]) == expected
    assert 0 < sum(expected[0]) < len(rows)
    shifted = load_model(loaded.model.name_or_path)
    with torch.no_grad():
        for parameter in shifted.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    expected = naive(shifted.model, loaded.tokenizer, rows, length=SETTINGS.length)
    again = measure_items(shifted.model, data.items, padding=data.boundary)
    assert (again["right"]["quiz"], again["right_per_byte"]["quiz"]) == expected and again != found


def test_a_planted_change_of_the_model_turns_every_answer(loaded: LoadedModel, tiny_task: Path, tmp_path: Path) -> None:
    """Choices of one letter; the output weights are turned so that one of the two letters is always the likelier."""
    path = tmp_path / "letters.jsonl"
    rows = [{"id": str(i), "text": f"cur {i} x y z", "question": f"cur {i}", "choices": ["x", "y"], "answer": "x"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    texts, names = read_sources(f"task:{tiny_task}", (f"quiz={path}",), cache=tmp_path)
    data = tokenize(texts, loaded.tokenizer, targets=names, settings=SETTINGS.model_copy(update={"length": 4, "steps": 2, "sequences": 1}))
    x, y = (loaded.tokenizer(letter)["input_ids"][0] for letter in "xy")
    weight = loaded.model.lm_head.weight
    kept = weight.detach().clone()
    found = {}
    try:
        for name, likelier, other in (("right", x, y), ("wrong", y, x)):
            with torch.no_grad():
                # the state that predicts the choice, as the row of one letter and negated as that of the other
                state = loaded.model.model(input_ids=torch.from_numpy(data.items["quiz"].samples()[0].ids)[None]).last_hidden_state[0, -2]
                weight.copy_(kept)
                weight[likelier], weight[other] = 50 * state, -50 * state
            found[name] = measure_items(loaded.model, data.items, padding=data.boundary)["right"]["quiz"]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert found["right"] == [1] * 6 and found["wrong"] == [0] * 6


def test_data_with_items_round_trip(data: ExperimentData, tmp_path: Path) -> None:
    save_data(data, tmp_path / "data.safetensors")
    again = load_data(tmp_path / "data.safetensors", domains=data.domains, boundary=data.boundary, digest=data.digest)
    assert again.parts.keys() == data.parts.keys() and again.items.keys() == data.items.keys()
    for name in ITEM_COLUMNS:
        one, other = getattr(data.items["quiz"], name), getattr(again.items["quiz"], name)
        assert np.array_equal(one, other) and one.dtype == other.dtype


def test_every_point_is_measured_but_not_those_of_the_search(data: ExperimentData, loaded: LoadedModel) -> None:
    record = execute(loaded.model, FULL, data, SETTINGS)
    assert [list(point) for point in record["curve"]] == [["step", "seconds", "nats", "right", "right_per_byte"]] * 3
    assert all(len(point["right"]["quiz"]) == 9 for point in record["curve"])
    search = execute(loaded.model, FULL.model_copy(update={"tuning": True}), data, SETTINGS)
    plain = execute(loaded.model, FULL, data.without_items(), SETTINGS)
    assert [list(point) for one in (search, plain) for point in one["curve"]] == [["step", "seconds", "nats"]] * 4
    assert [point["nats"] for point in plain["curve"]] == [point["nats"] for point in record["curve"]], "measuring changes no training"


def test_without_items_identities_are_what_they_were(data: ExperimentData, loaded: LoadedModel, tiny_task: Path, tmp_path: Path) -> None:
    """Golden values of the version before items were measured: its folders are gone on with."""
    random = np.random.default_rng(5)
    path = tmp_path / "new.jsonl"
    rows = [{"id": f"n{i}", "text": " ".join(random.choice(["ut", "sed", "non", "quo", "vel"], 60))} for i in range(15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, names = read_sources(f"task:{tiny_task}", ("law", f"new={path}"), cache=tmp_path)
    settings = InterventionSettings(
        domains=names, new=("new",), steps=4, warmup=0, sequences=2, length=32, points=(2, 4), full_points=(1, 2, 4), documents=3,
        other_documents=2, tuning_documents=2, evidence_tokens=2000,
    )  # fmt: skip
    found = tokenize(texts, loaded.tokenizer, targets=names, settings=settings)
    assert not found.items and found.without_items() == found
    assert found.digest == "d8ef773afbcc85a1fe2cb5e989dff43fcb251e44b828383987b2f460f4c49394"
    key = run_key(settings, model="m", data=found.digest)
    assert key == "1f74f3536af0fdf2793a6b4b0db8af060bd8330f2efa0f35080ac753c2edd024"
    run = ArmRun(target="law", kind="cells", cells=(Cell(0, 1), Cell(2, 5)), rank=2, only=None, rate=1e-3, seed=0, tuning=False)
    assert run.identity(key) == "58365c433c980e398be4"
    save_data(found, tmp_path / "data.safetensors")
    assert not load_data(tmp_path / "data.safetensors", domains=found.domains, boundary=0, digest=found.digest).items
    assert data.digest != data.without_items().digest, "items are part of what a run depends on"


def test_the_interval_of_a_small_case_by_hand() -> None:
    """Two seeds, three items of the target, two of another domain; one point."""
    right = {"a": np.array([[[1, 1, 0]], [[1, 0, 0]]]), "b": np.array([[[0, 1]], [[0, 1]]])}
    base = {"a": np.array([0, 0, 0]), "b": np.array([1, 1])}
    gain, elsewhere, strata = accuracy_changes(right, base, "a", ("b", "c"))
    assert gain is not None and elsewhere is not None
    # whole; without each seed; without each item: means over seeds of the items are 1, 1/2 and 0
    assert gain[:, 0] == pytest.approx([1 / 2, 1 / 3, 2 / 3, 1 / 4, 1 / 2, 3 / 4, 1 / 2, 1 / 2])
    assert elsewhere[:, 0] == pytest.approx([-1 / 2, -1 / 2, -1 / 2, -1 / 2, -1 / 2, -1 / 2, 0, -1])
    found = accuracy_figure(gain[:, 0], strata)
    seeds, items = 1 / 2 * 2 * (1 / 6) ** 2, 2 / 3 * 2 * (1 / 4) ** 2
    half = student.ppf(0.975, (seeds + items) ** 2 / (seeds**2 / 1 + items**2 / 2)) * (seeds + items) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((1 / 2, 1 / 2 - half, 1 / 2 + half))
    none, all_wrong, strata = accuracy_changes({"b": right["b"]}, {"b": np.array([0, 1])}, "a", ("b",))
    assert none is None and all_wrong is not None
    unknown = accuracy_figure(all_wrong[:, 0], strata)
    assert (unknown.value, unknown.low, unknown.p) == (0.0, None, None), "no item turned: the spread is unknown, not 0"


def test_the_whole_experiment_with_items_and_older_folders(
    tiny_checkpoint: Path, tiny_task: Path, quiz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments: dict[str, Any] = {"texts": f"task:{tiny_task}", "targets": (f"quiz={quiz}",), "processes": 1, "cache": tmp_path}
    found = intervene(str(tiny_checkpoint), out, SETTINGS, **arguments)
    target = found["targets"]["quiz"]
    about, records, _ = read_experiment(out)
    before = about["accuracy"]["right"]["quiz"]
    choices = about["accuracy"]["choices"]["quiz"]
    assert target["accuracy"] == {
        "quiz": {
            "items": 9,
            "chance": pytest.approx(sum(1 / count for count in choices) / 9),
            "base": pytest.approx(sum(before) / 9),
            "base_per_byte": pytest.approx(sum(about["accuracy"]["right_per_byte"]["quiz"]) / 9),
        }
    }
    for arm in target["arms"]:
        own = [record for one, record in records if one.name == arm["arm"]]
        last = [sum(record["curve"][-1]["right"]["quiz"]) for record in own]
        assert arm["accuracy"]["gain"]["value"] == pytest.approx((sum(last) / 2 - sum(before)) / 9, abs=1e-4)
        assert arm["accuracy"]["elsewhere"] is None and (arm["accuracy"]["items"], arm["accuracy"]["items_elsewhere"]) == (9, 0)
        assert [point["step"] for point in arm["accuracy"]["curve"]] == [point["step"] for point in arm["curve"][1:]]

    # As the version before wrote it: the same texts, no items. The finished runs are not run again.
    older = tmp_path / "older"
    with monkeypatch.context() as patched:
        patched.setattr("dbes.intervention.grid.tokenize", lambda *given, **named: tokenize(*given, **named).without_items())
        plain = intervene(str(tiny_checkpoint), older, SETTINGS, **arguments)
    assert "accuracy" not in json.loads((older / EXPERIMENT_FILE).read_text()) and "accuracy" not in plain["targets"]["quiz"]
    assert not any("accuracy" in arm for arm in plain["targets"]["quiz"]["arms"])
    stamps, said = {path: path.stat().st_mtime_ns for path in (older / RUNS).iterdir()}, []
    again = intervene(str(tiny_checkpoint), older, SETTINGS, **arguments, progress=said.append)
    assert again == plain and {path: path.stat().st_mtime_ns for path in (older / RUNS).iterdir()} == stamps
    assert any("begun without accuracy" in line for line in said)
    assert {arm["arm"]: arm["gain"] for arm in plain["targets"]["quiz"]["arms"]} == {arm["arm"]: arm["gain"] for arm in target["arms"]}


def test_items_of_a_folder_and_of_the_embedded_benchmark(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for domain in ("one", "two"):
        rows = [{**row_of(index, random), "domain": domain} for index in range(60)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    texts, _ = read_sources(str(tmp_path), ("one",), cache=tmp_path)
    assert all(text.item is not None for name in texts.domains for text in (*texts.training[name], *texts.heldout[name]))
    embedded, _ = read_sources("task:embedded", ("medicine",), cache=tmp_path)
    held = [text.item for text in embedded.heldout["medicine"] if text.item is not None]
    assert len(held) + sum(text.item is not None for text in embedded.training["medicine"]) == 9


def test_an_outcome_without_items_says_nothing_of_accuracy() -> None:
    from intervention_records import experiment

    found = analyse(*experiment({"target-load": (0.1, 0.01), "full": (0.2, 0.05)}, np.random.default_rng(0), seeds=2))
    assert "accuracy" not in json.dumps(found)
