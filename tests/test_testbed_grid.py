"""Runs, grid and report: finished runs are kept, failed ones recorded, claims decided by their intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from testbed_mix import tiny_mix

from dbes.errors import MixError, SettingError
from dbes.reporting.html import unpacked
from dbes.scoring.score import score
from dbes.testbed import grid as grid_module
from dbes.testbed import runs as runs_module
from dbes.testbed.analysis import TOKEN_CLASSES, conditional_information, domain_probe, forking_tokens, token_classes, topic_and_syntax
from dbes.testbed.contrasts import Grid, interval
from dbes.testbed.experiments import Findings, Verdict, analyse
from dbes.testbed.grid import read_grid, run_grid
from dbes.testbed.heldout import measure, training_routes
from dbes.testbed.mixes import prepare_mix
from dbes.testbed.models import build_model
from dbes.testbed.presets import SCALE_STEPS, Preset, preset
from dbes.testbed.report import page as render_page
from dbes.testbed.report import write_report
from dbes.testbed.runs import RUN_FILE, GridRun, execute
from dbes.testbed.settings import MixSettings, ModelSettings, OptimizerSettings, RoutingSettings, TrainSettings
from dbes.testbed.tables import TRUTH, explained_by, frozen_baseline, kendall_tau, metric_table
from dbes.testbed.training import STATE, StateError, TrainingError
from dbes.testbed.upcycling import merge_experts, train_upcycled
from dbes.trace.baselines import ideal_trace

WORDS = {
    "fruit": "apple banana cherry date elder fig grape honey iris juniper",
    "metal": "iron copper zinc nickel silver gold lead tin chrome cobalt",
    "number": "12 345 6 78 901 2345 67 8 90 123",
    "river": "Donau Rhein Elbe Weser Oder Main Neckar Mosel Isar Inn",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A mix of four tiny domains from a user's own folder."""
    folder = tmp_path_factory.mktemp("mix")
    generator = np.random.default_rng(0)
    for name, words in WORDS.items():
        rows = []
        for number in range(40):
            text = " ".join(generator.choice(words.split(), 60))
            rows.append(json.dumps({"id": f"{name}-{number}", "domain": name, "source_document": f"{name}/{number}", "text": text}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return prepare_mix(str(folder), vocabulary=300, max_positions=64, cache=folder / "cache")


def settings(steps=4, **changes):
    values = {
        "mix": MixSettings(tokens_per_step=256, lengths=(32,)),
        "model": ModelSettings(vocabulary=300, hidden=32, layers=2, experts=12, intermediate=8, max_positions=64),
        "routing": RoutingSettings(micro_batch=2),
        "optimizer": OptimizerSettings(steps=steps, warmup=1),
    }
    return TrainSettings(**{**values, **changes})


def test_a_prepared_mix_is_read_back_from_its_cache(prepared):
    again = prepare_mix(str(prepared.folder.parent.parent), vocabulary=300, max_positions=64, cache=prepared.folder.parent)
    assert again.folder == prepared.folder
    assert again.mix.digest == prepared.mix.digest
    assert again.mix.domains == ("fruit", "metal", "number", "river")


def test_a_folder_without_domains_is_no_mix(tmp_path):
    with pytest.raises(MixError, match="at least two"):
        prepare_mix(str(tmp_path), vocabulary=300, max_positions=64, cache=tmp_path)


def test_a_finished_cell_is_read_back_and_its_state_removed(prepared, tmp_path, monkeypatch):
    run = GridRun(arm="any", settings=settings(), documents=4, permutations=20, probe=True)
    record = execute(run, prepared.folder, tmp_path)
    assert record["status"] == "ok"
    assert set(record["bits_per_byte"]) == set(WORDS)
    assert set(record["probe"]) == {"input", "experts", "chance"}
    assert record["calibrated"]["specialization_normalized"]["reference"] == pytest.approx(1, abs=0.05)
    assert not list(tmp_path.glob(f"**/{STATE}"))
    monkeypatch.setattr(runs_module, "train", lambda *_, **__: pytest.fail("trained again"))
    assert execute(run, prepared.folder, tmp_path) == record


def test_what_a_killed_cell_left_is_removed(tmp_path):
    for folder in (tmp_path, tmp_path / "seedling"):
        folder.mkdir(exist_ok=True)
        (folder / STATE).write_text("state")
        (folder / f".{STATE}.ab12.part").write_text("half")
    runs_module.remove_state(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["seedling"]


def test_a_state_that_cannot_be_resumed_is_no_diverged_cell(prepared, tmp_path):
    run = GridRun(arm="any", settings=settings(), documents=4, permutations=20)
    (tmp_path / STATE).write_bytes(b"damaged")
    with pytest.raises(StateError, match=r"training state is damaged .*delete it"):
        execute(run, prepared.folder, tmp_path)
    assert not (tmp_path / RUN_FILE).exists()


def test_a_diverged_cell_is_recorded_as_failed(prepared, tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise TrainingError("the loss is nan at step 3")

    monkeypatch.setattr(runs_module, "train", diverges)
    record = execute(GridRun(arm="any", settings=settings()), prepared.folder, tmp_path)
    assert (record["status"], record["error"]) == ("failed", "the loss is nan at step 3")


def test_upcycling_makes_experts_of_domain_models(prepared, tmp_path):
    model = ModelSettings(vocabulary=300, hidden=32, layers=2, experts=4, intermediate=8, max_positions=64, normalise=True)
    trained = train_upcycled(settings(6, model=model), prepared.mix, folder=tmp_path)
    assert trained.log[-1]["step"] == 1
    dense = [build_model(model.model_copy(update={"experts": 1, "top_k": 1}), seed=seed) for seed in range(4)]
    merged = merge_experts(dense, settings(model=model))
    name = "model.layers.1.mlp.experts.down_proj"
    assert merged[name].shape[0] == 4
    assert all((merged[name][index] == dict(one.named_parameters())[name][0]).all() for index, one in enumerate(dense))
    with pytest.raises(MixError, match="one expert of each of 4 domains"):
        train_upcycled(settings(), prepared.mix)


def test_reference_router_scores_one_and_an_even_one_zero_on_every_domain_metric():
    """The trained reference router of the testbed against the ideal one of scoring; and the uniform one of scoring."""
    mix = tiny_mix(documents=80)
    model = build_model(
        ModelSettings(vocabulary=300, hidden=32, layers=2, experts=12, intermediate=8, max_positions=64, router_std=0.3), seed=0
    )
    reference = RoutingSettings(router="reference", balancing="none")
    trace = measure(model, mix, routing=reference, length=64, documents=40).trace
    result = score(trace, permutations=100)
    for metric in ("specialization_normalized", "der", "domain_isolation"):
        assert result.record(metric).score > 0.9, metric
    tokens = np.bincount(trace.loaded[0].document, minlength=len(trace.shape.document_domain))
    ideal = score(ideal_trace(trace.shape, tokens, seed=5), permutations=100)
    even = score(
        measure(model, mix, routing=RoutingSettings(router="hash", balancing="none"), length=64, documents=40).trace, permutations=100
    )
    for metric in ("specialization_normalized", "der", "domain_isolation"):
        record = ideal.record(metric)
        assert record.score_low - 0.02 <= 1 <= record.score_high + 0.02, metric
        assert even.record(metric).score < ideal.record(metric).score


@pytest.mark.parametrize(
    ("routing", "architecture"),
    [
        (RoutingSettings(balancing="assignment", scope="sequence"), "olmoe"),
        (RoutingSettings(scope="sequence", capacity=1.0), "olmoe"),
        (RoutingSettings(balancing="loss_free", coefficient=0.01), "deepseek_v3"),
    ],
)
def test_routes_as_trained_are_those_of_training(routing, architecture):
    model_settings = settings().model.model_copy(update={"architecture": architecture, "experts": 8})
    whole = settings(model=model_settings, routing=routing)
    model, mix = build_model(model_settings, seed=0).eval(), tiny_mix()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace = training_routes(model, mix, whole, bias=torch.zeros(2, 8), batches=3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    routes = next(iter(trace))
    ids = routes.ids.astype(int)
    assert len(ids) == 3 * 256
    missing = np.iinfo(routes.ids.dtype).max
    by_sequence = ids.reshape(-1, 32, 2, 2)
    for sequence in by_sequence:
        for layer in range(2):
            counts = np.bincount(sequence[:, layer][sequence[:, layer] != missing], minlength=8)[:8]
            if routing.balancing == "assignment":
                # A token that was left with experts it already has makes one expert exceed its share by one.
                assert counts.min() >= 6 and counts.max() <= 9
            if routing.capacity:
                assert counts.max() <= 8
    assert (ids == missing).any() == (routing.capacity is not None)


def test_token_classes_come_from_the_vocabulary(prepared):
    classes = token_classes(prepared.tokenizer)

    def class_of(text):
        return [TOKEN_CLASSES[classes[token]] for token in prepared.tokenizer(text)["input_ids"]]

    assert set(class_of("123")) == {"digit"}
    assert set(class_of("日本")) == {"other script"}
    assert class_of(" iron")[0] == "word start"
    assert class_of(".") == ["punctuation"]
    assert class_of("\n") == ["white space"]


def test_conditional_information_by_hand():
    experts = np.asarray([[0], [0], [1], [1], [0], [1], [0], [1]])
    label = np.asarray([0, 0, 1, 1, 0, 0, 1, 1])
    given = np.asarray([0, 0, 0, 0, 1, 1, 1, 1])
    # Given 0 the label names the expert; given 1 it says nothing: half of ln 2.
    assert conditional_information(experts, label, given) == pytest.approx(math.log(2) / 2)
    assert conditional_information(experts, label, label) == pytest.approx(0)


def test_analyses_see_what_is_there(prepared):
    model = build_model(settings(model=settings().model.model_copy(update={"router_std": 0.3})).model, seed=0)
    hashed, topical = (
        measure(model, prepared.mix, routing=RoutingSettings(router=router, balancing="none"), length=32, documents=6, keep_inputs=True)
        for router in ("hash", "reference")
    )
    classes = token_classes(prepared.tokenizer)
    syntax, topic = topic_and_syntax(hashed, classes), topic_and_syntax(topical, classes)
    assert np.mean(topic["topic"]) > np.mean(syntax["topic"])
    probe = domain_probe(topical)
    assert min(probe["experts"]) > 0.95, "the reference router's experts name the domain"
    assert min(probe["input"]) > 0.5
    values = forking_tokens(topical)
    assert values["forking"] > 0.8 and values["others"] > 0.8


@pytest.mark.usefixtures("in_process")
def test_the_grid_trains_each_cell_once_and_names_what_it_lacks(prepared, tmp_path, monkeypatch):
    arms = {
        name: GridRun(arm=name, settings=settings(2, routing=routing), documents=3, permutations=10)
        for name, routing in (
            ("reference", RoutingSettings(router="reference")),
            ("frozen", RoutingSettings(router="frozen", balancing="none")),
        )
    }
    tiny = Preset(
        name="smoke", mix=str(prepared.folder.parent.parent), seeds=2, vocabulary=300, arms=arms, experiments={"scope": list(arms)}
    )
    monkeypatch.setattr(grid_module, "preset", lambda _: tiny)
    monkeypatch.setattr(grid_module, "prepare_mix", lambda *_, **__: prepared)
    told = []
    run_grid("smoke", tmp_path, progress=told.append)
    assert told[0] == "0 of 4 runs are finished; 4 to train"
    told.clear()
    run_grid("smoke", tmp_path, progress=told.append)
    assert told == ["4 of 4 runs are finished; 0 to train"]
    about, records = read_grid(tmp_path)
    assert [(record["arm"], record["seed"]) for record in records] == [(arm, seed) for seed in (0, 1) for arm in arms]
    assert about["mix_digest"] == prepared.mix.digest
    page = write_report(tmp_path)
    (scope,) = unpacked(page.read_text("utf-8"))["tables"]
    assert scope["rows"] == json.loads((tmp_path / "report" / "scope.json").read_text("utf-8"))
    assert [column["key"] for column in scope["columns"]][:3] == ["arm", "seeds", "specialization"] and scope["columns"][1]["whole"]
    assert len(pd.read_parquet(tmp_path / "report" / "scope.parquet")) == 2
    assert (tmp_path / "report" / "FINDINGS.md").read_text("utf-8").startswith("# Findings")
    with pytest.raises(SettingError, match="no experiment of preset smoke is called 'nothing'; there are scope"):
        run_grid("smoke", tmp_path, only=("nothing",))
    crowded = arms["reference"].model_copy(
        update={"settings": settings(model=settings().model.model_copy(update={"experts": 8}), routing=RoutingSettings(router="reference"))}
    )
    tiny.arms["reference"] = crowded
    with pytest.raises(MixError, match="8 experts over 4 domains"):
        run_grid("smoke", tmp_path / "other")


def test_a_folder_without_a_grid_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(MixError, match="no testbed run here"):
        read_grid(tmp_path)
    (tmp_path / "grid.json").write_text("{", "utf-8")
    with pytest.raises(MixError, match="not JSON"):
        read_grid(tmp_path)
    (tmp_path / "grid.json").write_text('{"schema_version": 99}', "utf-8")
    with pytest.raises(MixError, match="schema_version 99; this dbes reads 1"):
        read_grid(tmp_path)
    (tmp_path / RUN_FILE).write_text("[]", "utf-8")
    with pytest.raises(MixError, match="expected a JSON object, found list"):
        execute(GridRun(arm="any", settings=settings()), tmp_path, tmp_path)


def test_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert math.isnan(interval([1.0]).low)
    assert interval([]).seeds == 0


def record_of(arm, seed, run, *, specialization, loss=2.0, utilization=0.95, rs=None):
    generator = np.random.default_rng([seed, len(arm)])
    value = specialization + 0.005 * generator.standard_normal()
    calibrated = {name: {"corrected": value, "score": value, "value": value} for name in ("specialization_normalized", "der", "stiffness")}
    return {
        "status": "ok",
        "cell": run.model_dump(mode="json"),
        "arm": arm,
        "seed": seed,
        "error": None,
        "tokens": 1000,
        "parameters": 10,
        "cpu_seconds": 1.0,
        "dropped": 0.0,
        "bits_per_byte": {"a": loss, "b": loss + 0.1},
        "nats_per_token": {"a": loss + 1, "b": loss + 1},
        "calibrated": {**calibrated, "by_layer": {}},
        "published": {"rs": value if rs is None else rs + 0.001 * generator.standard_normal()},
        "companions": {"utilization": utilization, "max_violation": 0.1, "dead_experts": 0.0},
        "information": {"topic": [value], "syntax": [0.5 - value]},
        "forking": {"forking": value + 0.1, "others": value},
        "probe": {"input": [0.9], "experts": [0.5], "chance": [0.125]},
    }


def synthetic_grid():
    """All arms of the standard preset, with the outcome that the design expects."""
    grid = preset("standard")
    level = {"sequence": 0.05, "micro_batch": 0.06, "global_batch": 0.35}
    records = []
    for arm, seed, run in grid.runs():
        base = next((value for name, value in level.items() if arm.split("/")[1:2] == [name]), 0.25)
        base = 0.3 if arm.endswith("mixed order") else base
        base = 1.0 if arm == "reference" else 0.06 if arm.endswith("dropping") else 0.5 if "sequence level" in arm else base
        # A published value that follows load, not specialization.
        rs = {"frozen": 2.0, "aux_loss/sequence": 1.5, "aux_loss/global_batch": 0.4, "reference": 1.4}.get(arm)
        loss = 2.2 if "sequence" in arm else 2.3 if arm == "rerandomised" else 2.0
        records.append(record_of(arm, seed, run, specialization=base, rs=rs, loss=loss))
    return {"preset": "standard", "mix": "packages", "domains": ["a", "b"], "experiments": grid.experiments}, records


def test_verdicts_follow_the_intervals():
    about, records = synthetic_grid()
    findings = analyse(about, records)
    outcomes = {verdict.claim: verdict.outcome for verdict in findings.verdicts}
    assert outcomes["scope, not method, decides how far experts specialize (as a plain checkpoint routes)"] == "reproduces"
    assert outcomes["strict dropping cancels the specialization that wide scope allows"] == "reproduces"
    assert outcomes["equal utilization is not equal loss"] == "reproduces"
    assert outcomes["the order of scopes holds at every size"] == "reproduces"
    assert outcomes["perplexity of a frozen router is about that of a learned one"] == "reproduces"
    assert outcomes["perplexity of a rerandomised router is clearly above that of a learned one"] == "reproduces"
    assert outcomes["routing by sequence follows topic, routing by token follows syntax"] == "reproduces"
    assert (
        outcomes["the published domain metrics order routers of known specialization as their calibrated forms do"] == "does not reproduce"
    )
    shares = explained_by(Grid(about, records), lambda record: record["calibrated"]["der"]["value"])
    assert shares is not None and shares["scope"] > 0.95
    assert outcomes["the contrast of scope survives domains that overlap"] == "reproduces"
    assert outcomes["what counts is how many domains a scope spans, not its size"] == "reproduces"
    assert set(findings.tables) == {"scope", "soft", "scale", "frozen", "levels", "upstream", "probe", "forking", "metrics"}


def test_specialization_is_compared_with_the_frozen_router_of_the_same_data_and_size():
    about, records = synthetic_grid()
    grid = Grid(about, records)
    assert frozen_baseline(grid, "aux_loss/global_batch") == "frozen"
    assert frozen_baseline(grid, "aux_loss/micro_batch/mixed order") == "frozen"
    assert frozen_baseline(grid, f"aux_loss/sequence/12m, {SCALE_STEPS} steps") == f"frozen/12m, {SCALE_STEPS} steps"
    assert frozen_baseline(grid, "aux_loss/sequence/a third of other domains") == "frozen/a third of other domains"
    assert frozen_baseline(grid, "sequence level/16 experts, top-2") is None
    table = analyse(about, records).tables["scale"].set_index("arm")
    own = table.loc[f"aux_loss/global_batch/4m, {SCALE_STEPS} steps"]
    assert own["above_frozen"] == pytest.approx(own["specialization"] - table.loc[f"frozen/4m, {SCALE_STEPS} steps", "specialization"])


def test_the_opposite_outcome_is_said_as_plainly():
    about, records = synthetic_grid()
    flipped = [{**r, "calibrated": {**r["calibrated"], "specialization_normalized": {"corrected": -s, "score": -s}}} for r in records
               for s in [r["calibrated"]["specialization_normalized"]["corrected"]]]  # fmt: skip
    outcomes = {verdict.claim: verdict.outcome for verdict in analyse(about, flipped).verdicts}
    assert outcomes["the order of scopes holds at every size"] == "does not reproduce"
    assert outcomes["a learned router with wide scope specializes more than a frozen random one"] == "does not reproduce"
    one_seed = [record for record in records if record["seed"] == 0]
    outcomes = {verdict.claim: verdict.outcome for verdict in analyse(about, one_seed).verdicts}
    assert outcomes["the order of scopes holds at every size"] == "undecided"


def test_kendalls_tau_finds_the_metric_that_fails():
    about, records = synthetic_grid()
    table = metric_table(Grid(about, records), draws=200).set_index("metric")
    assert table.loc["calibrated specialization_normalized", "tau"] > 0.9
    assert not table.loc["calibrated specialization_normalized", "fails"]
    assert table.loc["published rs", "fails"]
    assert set(TRUTH) <= set(table.columns)


def test_kendalls_tau_is_scipys():
    generator = np.random.default_rng(0)
    truth, values = generator.integers(0, 4, 12), generator.integers(0, 6, (20, 12)).astype(float)
    expected = [stats.kendalltau(truth, row).statistic for row in values]
    assert kendall_tau(truth, values) == pytest.approx(expected)
    assert np.isnan(kendall_tau(truth, np.full((1, 12), np.nan)))[0]


def page_of(table: pd.DataFrame, verdicts: list[Verdict] | None = None) -> str:
    about = {"preset": "smoke", "mix": "tiny", "domains": ["law"]}
    records = [{"status": "ok", "seed": 0, "cpu_seconds": 10.0}]
    return render_page(about, records, Findings(tables={"levels": table}, verdicts=verdicts or []), [])


def test_the_page_has_every_arm_and_names_stay_text():
    table = pd.DataFrame({"arm": ["a</script><b>", "c\u202e"], "topic": [1.0, 2.0], "topic_low": [0.5, math.nan], "syntax": math.nan})
    verdict = Verdict(claim="<i>claim", outcome="does not reproduce", sentence="of <u>\u202e</u>")
    page = page_of(table, [verdict])
    (shown,) = unpacked(page)["tables"]
    assert shown["rows"] == [
        {"arm": "a</script><b>", "topic": 1.0, "topic_low": 0.5, "syntax": None},
        {"arm": "c\\u202e", "topic": 2.0, "topic_low": None, "syntax": None},
    ]
    assert [column["key"] for column in shown["columns"]] == ["arm", "topic", "syntax"]
    assert [chart["column"] for chart in shown["charts"]] == ["topic"], "nothing is drawn of a column without a number"
    markup = page[: page.index('id="data"')]
    assert "<i>claim" not in markup and "<u>" not in markup and "\u202e" not in page
    assert "&lt;i&gt;claim" in markup and "1 do not reproduce" in markup


@pytest.mark.parametrize(("values", "zero"), [([0.0, 1.0], True), ([0.3, 0.7], True), ([-0.2, 0.1], True), ([3.42, 3.52], False)], ids=str)
def test_an_axis_holds_zero_unless_the_values_are_far_from_it(values: list[float], zero: bool):
    (shown,) = unpacked(page_of(pd.DataFrame({"arm": ["a", "b"], "topic": values})))["tables"]
    assert [chart["zero"] for chart in shown["charts"]] == [zero]


def test_the_committed_findings_follow_from_the_committed_cells():
    folder = Path(__file__).parents[1] / "reports" / "testbed"
    about, records = read_grid(folder)
    assert len(records) == len(about["cells"]) == len(list(preset("standard").runs()))
    wanted = {run.identity(about["mix_digest"]) for _, _, run in preset("standard").runs()}
    assert {entry["identity"] for entry in about["cells"]} == wanted
    found = [vars(verdict) for verdict in analyse(about, records).verdicts]
    assert found == json.loads((folder / "report" / "verdicts.json").read_text("utf-8"))
