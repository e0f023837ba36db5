"""The experiment on a tiny model: data that never overlap, runs that leave the model as it was, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import exact
from torch.nn import functional

from dbes.errors import InterventionError, PathError, SettingError
from dbes.finetuning.cells import TrainableCells
from dbes.intervention.arms import SEARCH_SEED, equal_rank, evidence_of, plan_arms
from dbes.intervention.data import ExperimentData, joined_rows, load_data, read_sources, save_data, tokenize, training_batches, tuning_split
from dbes.intervention.grid import MASKS, RUNS, best_rate, intervene
from dbes.intervention.masking import plan_masks
from dbes.intervention.runs import document_nats, execute
from dbes.intervention.settings import IDEAS, ArmRun, InterventionSettings, read_configuration, run_key
from dbes.intervention.trainables import protected_texts, with_replay
from dbes.models import LoadedModel, load_model
from dbes.paths.types import Cell
from dbes.recording.record import record_documents
from dbes.reporting.arms import EXTRA_ARMS, REPLAY, SLOWER
from dbes.reporting.outcome import EXPERIMENT_FILE, OUTCOME_FILE
from dbes.testbed.mix import Text

RULES = ("target-load", "gradient", "random", "random-load-matched")
EPS = torch.finfo(torch.float32).eps
"""Logits are rounded to float32 before the loss, also those of a model in float64."""

SETTINGS = InterventionSettings(
    domains=("law", "new"),
    new=("new",),
    budgets=(0.2,),
    rules=RULES,
    extras=EXTRA_ARMS,
    ideas=IDEAS,
    protected=("target-load", "random-load-matched"),
    idea_rule="target-load",
    seeds=2,
    rates=(1e-3, 1e-2),
    steps=4,
    warmup=0,
    sequences=2,
    length=32,
    points=(2, 4),
    full_points=(1, 2, 4),
    documents=3,
    other_documents=2,
    tuning_documents=2,
    evidence_tokens=2000,
    permutations=40,
    masks=2,
)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def new_domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(5)
    rows = [{"id": f"n{i}", "text": " ".join(random.choice(["ut", "sed", "non", "quo", "vel"], 60))} for i in range(15)]
    path = tmp_path_factory.mktemp("new") / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(loaded: LoadedModel, tiny_task: Path, new_domain: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentData:
    texts, names = read_sources(f"task:{tiny_task}", ("law", f"new={new_domain}"), cache=tmp_path_factory.mktemp("cache"))
    assert names == ("law", "new") and texts.domains == ("law", "code", "math", "new")
    return tokenize(texts, loaded.tokenizer, targets=names, settings=SETTINGS)


def test_no_source_stands_on_two_sides(tiny_task: Path, new_domain: Path, tmp_path: Path) -> None:
    texts, _ = read_sources(f"task:{tiny_task}", ("law", f"new={new_domain}"), cache=tmp_path)
    for domain in texts.domains:
        training, tuning = tuning_split(texts.training[domain])
        sides = [{text.source for text in side} for side in (training, tuning, texts.heldout[domain])]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)), domain


def test_the_split_of_a_testbed_mix_is_the_one_its_models_were_trained_with(tmp_path: Path) -> None:
    from dbes.shipped import EMBEDDED_MIX as EMBEDDED
    from dbes.testbed.mix import is_heldout, read_texts
    from dbes.testbed.mixes import HELDOUT_SHARE

    texts, _ = read_sources("mix:embedded", ("law",), cache=tmp_path)
    every = read_texts(EMBEDDED / "law.jsonl.gz")
    assert {t.id for t in texts.heldout["law"]} == {t.id for t in every if is_heldout(t.source, share=HELDOUT_SHARE)}
    assert len(texts.training["law"]) + len(texts.heldout["law"]) == len(every)


def test_texts_of_one_source_are_one_document_of_the_evidence(loaded: LoadedModel) -> None:
    one, other = (Text(id=name, domain="law", source="book", text=name * 9) for name in ("ut", "vel"))
    recorded = record_documents(loaded, [one, other], domains=("law",), window=32, control=False, stiffness=False).trace
    assert recorded.shape.document_source == ("book", "book")


def test_two_files_must_not_share_a_text(tiny_task: Path, new_domain: Path, tmp_path: Path) -> None:
    with pytest.raises(InterventionError, match="texts or sources are in both files"):
        read_sources(f"task:{tiny_task}", (f"new={new_domain},{new_domain}",), cache=tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x", "text": "vel quo ut"}\n{"id": "y", "text": "sed non"}\n')
    texts, _ = read_sources(f"task:{tiny_task}", (f"new={new_domain},{other}",), cache=tmp_path)
    assert len(texts.training["new"]) == 15 and [text.id for text in texts.heldout["new"]] == ["x", "y"]


def test_refused_targets(tiny_task: Path, new_domain: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="or give NAME=FILE"):
        read_sources(f"task:{tiny_task}", ("poems",), cache=tmp_path)
    with pytest.raises(InterventionError, match="has a domain 'law' already"):
        read_sources(f"task:{tiny_task}", (f"law={new_domain}",), cache=tmp_path)


def test_data_round_trip_and_batches(data: ExperimentData, tmp_path: Path) -> None:
    save_data(data, tmp_path / "data.safetensors")
    again = load_data(tmp_path / "data.safetensors", domains=data.domains, boundary=data.boundary, digest=data.digest)
    assert again.parts.keys() == data.parts.keys()
    for key, part in data.parts.items():
        assert all(np.array_equal(getattr(part, name), getattr(again.parts[key], name)) for name in ("tokens", "starts", "bytes"))
    order = list(protected_texts(data, "law", length=32))
    for _ in range(6):  # safetensors gives its arrays in another order each time
        again = load_data(tmp_path / "data.safetensors", domains=data.domains, boundary=data.boundary, digest=data.digest)
        assert list(protected_texts(again, "law", length=32)) == order
    part = data.parts["law", "train"]
    one, same, other = (training_batches(part, SETTINGS, boundary=data.boundary, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.shape(one) == (4, 2, 32)


def test_bytes_are_those_of_the_predicted_tokens(data: ExperimentData) -> None:
    for part in data.parts.values():
        if len(part) and len(part.document(0)) <= SETTINGS.length:
            assert part.bytes[0] == len(part.document(0)) - 1, "a byte-level tokenizer without merges: one byte a token"


def test_document_nats_against_one_document_at_a_time(loaded: LoadedModel) -> None:
    documents = [np.random.default_rng(i).integers(1, 250, size) for i, size in enumerate((9, 30, 2, 17, 30))]
    expected = []
    model = exact(loaded.model)
    for document in documents:
        ids = torch.from_numpy(document)[None]
        with torch.no_grad():
            expected.append(float(functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")))
    for batch_tokens in (16, 64, 4096):
        np.testing.assert_allclose(document_nats(model, documents, batch_tokens=batch_tokens), expected, rtol=16 * EPS)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"kind": "full"}, id="full"),
        pytest.param({"kind": "router"}, id="router"),
        pytest.param({"kind": "cells", "cells": (Cell(0, 1), Cell(2, 5))}, id="cells"),
        pytest.param({"kind": "cells", "cells": (Cell(0, 1), Cell(2, 5)), "rank": 2}, id="low rank"),
        pytest.param({"kind": "cells", "cells": (Cell(0, 1), Cell(1, 3)), "only": "down_proj"}, id="down-projections"),
        pytest.param({"kind": "cells", "cells": (Cell(0, 1), Cell(2, 5)), "protect": 0.1}, id="protected"),
        pytest.param({"kind": "full", "protect": 0.1}, id="full with protected experts"),
        pytest.param({"kind": "full", "replay": 0.5}, id="full with replay"),
        pytest.param({"kind": "cells", "cells": (Cell(0, 1), Cell(2, 5)), "router_steps": 1}, id="router first"),
        pytest.param({"kind": "cells", "cells": (Cell(0, 1), Cell(2, 5)), "layer_rates": ((0, 2.0), (2, 0.5))}, id="rates by layer"),
    ],
)
def test_a_run_learns_and_leaves_the_model_as_it_was(change: dict[str, Any], loaded: LoadedModel, data: ExperimentData) -> None:
    run = ArmRun(**{"target": "law", "cells": (), "rank": None, "only": None, "rate": 3e-3, "seed": 0, "tuning": False, **change})
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in loaded.model.parameters()]
    record = execute(loaded.model, run, data, SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == flags
    json.dumps(record, allow_nan=False)
    nats = {point["step"]: sum(point["nats"]["law"]) for point in record["curve"]}
    base = document_nats(loaded.model, [data.parts["law", "heldout"].document(i) for i in range(2)]).sum()
    assert list(nats) == [1, 2, 4] if change["kind"] == "full" else [2, 4]
    assert nats[4] < nats[2] < base * 1.0001 and record["status"] == "ok"
    expected = {"full": sum(p.numel() for p in loaded.model.parameters()), "router": 3 * 8 * 32}.get(change["kind"])
    if expected is None:
        expected = 2 * 16 * 32 if "only" in change else 2 * 2 * (32 + 32 + 32 + 16) if "rank" in change else 2 * 3 * 16 * 32
    assert record["trainable_parameters"] == expected and record["optimizer_bytes"] == 2 * 4 * expected
    again = execute(loaded.model, run, data, SETTINGS)
    assert [point["nats"] for point in again["curve"]] == [point["nats"] for point in record["curve"]], (
        "a run depends on nothing but itself"
    )


def test_router_first_trains_the_routers_and_only_then_the_path(loaded: LoadedModel, data: ExperimentData) -> None:
    """With as many router steps as there are steps the run is the router's; a path alone differs from both."""
    common: dict[str, Any] = {"target": "law", "rank": None, "only": None, "rate": 3e-3, "seed": 0, "tuning": False}
    routers = ArmRun(kind="router", cells=(), **common)
    cells = ArmRun(kind="cells", cells=(Cell(0, 1), Cell(2, 5)), **common)
    found = {steps: execute(loaded.model, cells.model_copy(update={"router_steps": steps}), data, SETTINGS)["losses"] for steps in (2, 4)}
    alone = execute(loaded.model, routers, data, SETTINGS)["losses"]
    assert found[4] == alone and found[2][:3] == alone[:3] and found[2][3] != alone[3]
    assert execute(loaded.model, cells, data, SETTINGS)["losses"][1:] != found[2][1:]


def test_rates_by_layer_of_one_are_none_and_twice_the_rate_is_a_factor_of_two(loaded: LoadedModel, data: ExperimentData) -> None:
    common: dict[str, Any] = {"target": "law", "rank": None, "only": None, "seed": 0, "tuning": False, "kind": "cells"}
    plain = ArmRun(cells=(Cell(0, 1), Cell(2, 5)), rate=2e-3, **common)
    by_layer = [plain.model_copy(update={"rate": rate, "layer_rates": ((0, f), (2, f))}) for rate, f in ((2e-3, 1.0), (1e-3, 2.0))]
    losses = [execute(loaded.model, run, data, SETTINGS)["losses"] for run in (plain, *by_layer)]
    assert losses[0] == losses[1] == losses[2]
    uneven = plain.model_copy(update={"layer_rates": ((0, 2.0), (2, 0.1))})
    assert execute(loaded.model, uneven, data, SETTINGS)["losses"] != losses[0]


def test_protection_sees_training_text_of_other_domains_only(
    data: ExperimentData, loaded: LoadedModel, tiny_task: Path, new_domain: Path, tmp_path: Path
) -> None:
    sources = read_sources(f"task:{tiny_task}", ("law", f"new={new_domain}"), cache=tmp_path)
    protected = {domain for domain, kind in data.parts if kind == "protected"}
    assert protected == {"law", "code", "math"}, "new domains count as forgotten nowhere"
    held = {domain: {tuple(data.parts[domain, "heldout"].document(i)) for i in range(2)} for domain in protected}
    for domain in protected:
        part = data.parts[domain, "protected"]
        beginnings = {tuple(part.document(i)[: SETTINGS.length]) for i in range(len(part))}
        assert not beginnings & held[domain]
    few = SETTINGS.model_copy(update={"protect_domains": ("code",), "new": ("new", "code")})
    texts, names = sources
    parts = tokenize(texts, loaded.tokenizer, targets=names, settings=few).parts
    assert {domain for domain, kind in parts if kind == "protected"} == {"code"}
    with pytest.raises(InterventionError, match="protect_domains \\['sea'\\]"):
        tokenize(texts, loaded.tokenizer, targets=names, settings=few.model_copy(update={"protect_domains": ("sea",)}))
    with pytest.raises(InterventionError, match="tokens to protect it with, fewer than a sequence of 600"):
        tokenize(texts, loaded.tokenizer, targets=names, settings=SETTINGS.model_copy(update={"protect_tokens": 1, "length": 600}))
    rows = joined_rows(data.parts["law", "protected"], length=SETTINGS.length, boundary=data.boundary)
    assert all(batch.shape[1] == SETTINGS.length and len(batch) <= 8 for batch in rows)


def test_replay_takes_its_share_from_other_domains() -> None:
    batches = [np.full((4, 8), 7) for _ in range(60)]
    texts = {"a": [torch.full((3, 8), 1)], "b": [torch.full((1, 8), 2), torch.full((2, 8), 2)]}
    mixed = with_replay(batches, texts, share=0.5, seed=0)
    assert all({*batch[:2, 0].tolist()} <= {1, 2} and (batch[2:] == 7).all() and len(batch) == 4 for batch in mixed)
    drawn = np.asarray([batch[row, 0] for batch in mixed for row in range(2)])
    assert 0.35 < (drawn == 1).mean() < 0.65, "domains alike, whatever their length"
    assert all((batch == 7).all() for batch in batches) and (with_replay(batches, texts, share=0.01, seed=0)[0][0] != 7).all()
    assert np.array_equal(mixed, with_replay(batches, texts, share=0.5, seed=0))


def test_identities_of_finished_runs_stay() -> None:
    """Names that version 37d9854 gave: folders of experiments made before protection can be gone on with."""
    run = ArmRun(target="law", kind="cells", cells=(Cell(0, 1), Cell(2, 5)), rank=None, only=None, rate=1e-3, seed=0, tuning=False)
    assert run.identity("k") == "910c32dcfb07732367dd"
    assert (
        run_key(InterventionSettings(domains=("law",)), model="m", data="d")
        == "85cb3db078a6d42c7cf74feb361dfe3aec7dc6dda32c68fc3541faa4cfe9f10e"
    )
    assert run.model_copy(update={"protect": 0.03}).identity("k") != run.model_copy(update={"protect": 0.1}).identity("k")


def test_a_run_of_the_search_sees_no_held_out_document(loaded: LoadedModel, data: ExperimentData) -> None:
    run = ArmRun(target="new", kind="router", cells=(), rank=None, only=None, rate=1e-3, seed=SEARCH_SEED, tuning=True)
    (point,) = execute(loaded.model, run, data, SETTINGS)["curve"]
    assert point["step"] == 4 and point["nats"].keys() == {"new"} and len(point["nats"]["new"]) == len(data.parts["new", "tuning"])


def test_a_rate_that_breaks_the_loss_is_recorded_and_never_chosen(loaded: LoadedModel, data: ExperimentData) -> None:
    runs = [
        ArmRun(target="law", kind="full", cells=(), rank=None, only=None, rate=rate, seed=SEARCH_SEED, tuning=True) for rate in (1e-3, 1e30)
    ]
    records = [execute(loaded.model, run, data, SETTINGS) for run in runs]
    assert records[1]["status"] == "failed" and "not a number at step" in records[1]["error"]
    assert best_rate(records) == 1e-3
    with pytest.raises(InterventionError, match="give lower --rates"):
        best_rate(records[1:])
    assert all(torch.isfinite(parameter).all() for parameter in loaded.model.parameters())


def test_arms_of_the_plan(loaded: LoadedModel, tiny_task: Path, new_domain: Path, tmp_path: Path) -> None:
    texts, names = read_sources(f"task:{tiny_task}", ("law", f"new={new_domain}"), cache=tmp_path)
    settings = SETTINGS.model_copy(update={"rules": (*RULES, "specialization")})
    evidence = evidence_of(loaded, texts, targets=names, settings=settings)
    plan = plan_arms(evidence, loaded.model, settings)
    skipped = {(row["target"], row["arm"]) for row in plan.skipped}
    expected = {*settings.rules, *settings.ideas, *settings.extras, *(f"{rule}-protected" for rule in settings.protected)}
    followers = {*SLOWER, *REPLAY} - {"full-replay"}
    for target in names:
        arms = [arm for arm in plan.arms if arm.target == target]
        assert {arm.name for arm in arms} == {name for name in expected if (target, name) not in skipped}
        for name in {arm.name for arm in arms}:
            assert {arm.seed for arm in arms if arm.name == name} == {0, 1, *(() if name in followers else (SEARCH_SEED,))}
        by_name = {arm.name: arm for arm in arms if arm.seed == 0}
        assert len(by_name["target-load"].cells) == len(by_name["random"].cells) == 4
        assert len(by_name["down"].cells) == 14 and by_name["down"].only == "down_proj"
        per_layer = [cell.layer for cell in by_name["per-layer"].cells]
        assert per_layer == [0, 1, 2] and len(by_name["all"].cells) == 24
        twin = by_name["target-load-protected"]
        assert twin.cells == by_name["target-load"].cells and twin.protect == settings.protect and by_name["target-load"].protect is None
        assert by_name["all-protected"].protect == by_name["full-protected"].protect == settings.protect
        assert by_name["router-first"].router_steps == 1 and by_name["router-first"].cells == by_name["target-load"].cells
        factors = dict(by_name["layer-rates"].layer_rates or ())
        assert set(factors) == {cell.layer for cell in by_name["layer-rates"].cells}
        counts = [sum(cell.layer == layer for cell in by_name["layer-rates"].cells) for layer in factors]
        assert np.average(list(factors.values()), weights=counts) == pytest.approx(1, abs=1e-3)
        matched = by_name["random-load-matched"]
        assert not set(matched.cells) & set(by_name["target-load"].cells)
        assert matched.coverage == pytest.approx(by_name["target-load"].coverage, abs=0.05)
    assert all("no cell passes" in row["reason"] or "match" in row["reason"] for row in plan.skipped)
    rank = equal_rank(loaded.model, evidence, 0.2)
    with TrainableCells(loaded.model, [(layer, expert) for layer in range(3) for expert in range(8)], rank=rank) as cells:
        share = sum(parameter.numel() for parameter in cells.parameters()) / (24 * 3 * 16 * 32)
    assert share == pytest.approx(0.2, abs=0.08)
    for job in plan_masks(evidence, plan, settings):
        assert len(job.controls) == 2 and not set(job.cells) & {cell for cells in job.controls for cell in cells}


def test_protected_arms_of_a_model_that_cannot_be_protected_are_left_out_with_the_reason(
    loaded: LoadedModel, tiny_task: Path, new_domain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, names = read_sources(f"task:{tiny_task}", ("law", f"new={new_domain}"), cache=tmp_path)
    settings = SETTINGS.model_copy(update={"rules": ("target-load",), "protected": ("target-load",), "ideas": ()})
    evidence = evidence_of(loaded, texts, targets=names, settings=settings)
    monkeypatch.setattr("dbes.finetuning.cells.uses_interface", lambda _: False)
    plan = plan_arms(evidence, loaded.model, settings)
    assert {row["arm"] for row in plan.skipped} == {"target-load-protected", "all-protected", "full-protected"}
    assert all("experts interface" in row["reason"] for row in plan.skipped)
    assert not [arm for arm in plan.arms if arm.protect is not None] and {"target-load", "full", "all"} <= {arm.name for arm in plan.arms}


def test_the_whole_experiment_and_going_on_with_it(tiny_checkpoint: Path, tiny_task: Path, new_domain: Path, tmp_path: Path) -> None:
    small = {"domains": ("new",), "ideas": (), "extras": ("full", "full-slow"), "rules": ("target-load", "random-load-matched")}
    small["protected"] = ("target-load",)
    settings = SETTINGS.model_copy(update={**small, "rates": (1e-3,)})
    arguments: dict[str, Any] = {"texts": f"task:{tiny_task}", "targets": (f"new={new_domain}",), "processes": 1, "cache": tmp_path}
    out, said = tmp_path / "out", []
    found = intervene(str(tiny_checkpoint), out, settings, **arguments, progress=said.append)
    assert json.loads((out / OUTCOME_FILE).read_text()) == json.loads(json.dumps(found)) and "target load" in found["verdict"]
    target = found["targets"]["new"]
    assert target["others"] == ["law", "code", "math"] and target["is_new"]
    assert {row["arm"] for row in target["arms"]} == {"target-load", "target-load-protected", "random-load-matched", "full", "full-slow"}
    assert [(row["arm"], row["control"]) for row in target["protection"]] == [("target-load-protected", "target-load")]
    assert {(row["arm"], row["control"]) for row in target["contrasts"]} == {("target-load", "random-load-matched")}
    slow, full = (next(row for row in target["arms"] if row["arm"] == name) for name in ("full-slow", "full"))
    assert slow["rate"] == pytest.approx(full["rate"] / 4) and full["rate"] in settings.rates
    assert all(row["gain"]["low"] <= row["gain"]["value"] <= row["gain"]["high"] for row in target["arms"])
    assert len(found["masks"]) == len(list((out / MASKS).iterdir()))

    runs = sorted((out / RUNS).iterdir())
    runs[0].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in runs[1:]}
    # process seconds differ from run to run, nothing else does
    again = intervene(str(tiny_checkpoint), out, settings, **arguments, progress=said.append)
    assert {path: path.stat().st_mtime_ns for path in runs[1:]} == stamps and runs[0].is_file()
    strip = ("training_seconds", "peak_added_bytes", "equal_compute")
    assert [{k: v for k, v in row.items() if k not in strip} for row in again["targets"]["new"]["arms"]] == [
        {k: v for k, v in row.items() if k not in strip} for row in target["arms"]
    ]
    with pytest.raises(InterventionError, match="holds an experiment with another"):
        intervene(str(tiny_checkpoint), out, settings.model_copy(update={"steps": 5, "points": (5,), "full_points": (5,)}), **arguments)
    (out / EXPERIMENT_FILE).write_text("{")
    with pytest.raises(InterventionError, match="not JSON"):
        intervene(str(tiny_checkpoint), out, settings, **arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"domains": ()}, "at least one", id="no target"),
        pytest.param({"domains": ("a", "a")}, "each once", id="twice"),
        pytest.param(
            {"domains": ("a",), "rules": ("load",), "protected": ("lift",)}, "expected some of the rules", id="nothing to compare"
        ),
        pytest.param({"domains": ("a",), "extras": ("full-slow",)}, "take their learning rates from full", id="no rate to take"),
        pytest.param({"domains": ("a",), "rates": (0.0,)}, "above 0", id="no rate"),
        pytest.param({"domains": ("a",), "points": (5, 10)}, "the last of them 40", id="points that miss the end"),
        pytest.param({"domains": ("a",), "stepps": 3}, "stepps", id="unknown setting"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        read_configuration(None, given)


def test_an_unknown_rule_is_refused_with_the_right_ones() -> None:
    with pytest.raises(SettingError, match="no rule is called 'best'; there are specialization"):
        read_configuration(None, {"domains": ("a",), "rules": ("best",)})


def test_configuration_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("seeds: 3\nbudgets: [0.1]\n")
    found = read_configuration(file, {"domains": ("a",), "seeds": 2})
    assert (found.seeds, found.budgets) == (2, (0.1,))
    with pytest.raises(PathError, match="above 0 and at most 1"):
        read_configuration(None, {"domains": ("a",), "budgets": (1.5,)})
    file.write_text("- 1")
    with pytest.raises(InterventionError, match="expected settings, one"):
        read_configuration(file, {"domains": ("a",)})
