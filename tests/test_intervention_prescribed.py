"""The experiment on a checkpoint of the reference router: every forward by the expert block of its domain, and by nothing else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from rounding import assert_rounding_only, exact
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import InterventionError, MixError
from dbes.finetuning.cells import TrainableCells
from dbes.intervention.arms import evidence_of, plan_arms
from dbes.intervention.data import ExperimentData, Texts, read_sources, tokenize, training_batches
from dbes.intervention.grid import MASKS, RUNS, intervene
from dbes.intervention.masking import MaskJob, execute_masks
from dbes.intervention.routing import prescription_of, routable, routed
from dbes.intervention.runs import document_nats, execute, measure
from dbes.intervention.settings import ArmRun, InterventionSettings, run_key
from dbes.models import LoadedModel, load_model
from dbes.paths.evidence import Evidence
from dbes.paths.search import find_path
from dbes.paths.types import Cell
from dbes.reporting.outcome import EXPERIMENT_FILE, OUTCOME_FILE
from dbes.testbed.models import routers_of
from dbes.testbed.prescribed import Prescribed, Prescription, read_prescription
from dbes.testbed.settings import RoutingSettings

# not in alphabetical order, which is that of the files: the blocks are in the order of the training settings
WORDS = {
    "metal": "iron copper zinc nickel silver gold lead tin chrome cobalt",
    "fruit": "apple banana cherry date elder fig grape honey iris juniper",
    "birds": "owl raven heron finch robin stork swift wren lark crane",
}
NEW = {"poems": "thee thou thy shall hath doth whence ere nigh oft"}
EXPERTS, LAYERS, TOP_K = 12, 2, 2
BLOCKS = {"metal": range(4), "fruit": range(4, 8), "birds": range(8, 12)}
TRAINING = {
    "mix": {"domains": list(WORDS), "tokens_per_step": 192, "lengths": [32]},
    "model": {"vocabulary": 300, "hidden": 32, "layers": LAYERS, "experts": EXPERTS, "intermediate": 8, "max_positions": 64},
    "routing": {"router": "reference", "balancing": "none"},
    "optimizer": {"steps": 6, "warmup": 1},
}
SMALL: dict[str, Any] = {
    "budgets": [0.1], "rules": ["target-load", "random-load-matched"], "extras": ["full", "router"], "seeds": 2, "rates": [1e-3],
    "steps": 2, "warmup": 0, "sequences": 2, "length": 32, "points": [2], "full_points": [1, 2], "documents": 3, "other_documents": 2,
    "tuning_documents": 2, "evidence_tokens": 1500, "permutations": 20, "masks": 2,
}  # fmt: skip
SETTINGS = InterventionSettings(domains=("fruit",), routing="as-trained", **{**SMALL, "rules": ["specialization", "gradient", "causal"]})


def written_texts(folder: Path, words: dict[str, str]) -> Path:
    folder.mkdir()
    generator = random.Random(0)
    for name, own in words.items():
        rows = [
            {"id": f"{name}-{n}", "domain": name, "source_document": f"{name}/{n}", "text": " ".join(generator.choices(own.split(), k=40))}
            for n in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def dbes(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def train(folder: Path, mix: Path, *options: str, **routing: Any) -> Result:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**TRAINING, "routing": {**TRAINING["routing"], **routing}}), "utf-8")
    return dbes("testbed", "train", "--config", config, "--out", folder / "model", "--mix", mix, "--cache", mix.parent / "cache", *options)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Training sets the number of threads of the process; figures that are compared must be made with the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_texts(tmp_path_factory.mktemp("texts") / "mix", WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mix: Path) -> Path:
    where = tmp_path_factory.mktemp("prescribed")
    done = train(where, mix, "--prescribed")
    assert done.exit_code == 0, done.output
    return where / "model"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def prescription(folder: Path) -> Prescription:
    return read_prescription(folder)


@pytest.fixture(scope="module")
def texts(mix: Path) -> Texts:
    return read_sources(str(mix), ("fruit",), cache=mix.parent / "cache")[0]


@pytest.fixture(scope="module")
def data(loaded: LoadedModel, texts: Texts) -> ExperimentData:
    return tokenize(texts, loaded.tokenizer, targets=("fruit",), settings=SETTINGS)


@pytest.fixture(scope="module")
def evidence(loaded: LoadedModel, prescription: Prescription, texts: Texts) -> Evidence:
    with routed(loaded.model, prescription) as prescribed:
        return evidence_of(loaded, texts, targets=("fruit",), settings=SETTINGS, prescribed=prescribed)


def ids_of(seed: int = 0, sequences: int = 3, length: int = 20) -> Tensor:
    return torch.randint(2, 300, (sequences, length), generator=torch.Generator().manual_seed(seed))


class NaiveBlockRouter(nn.Module):
    """The two best experts of a block, token by token: softmax over the block alone, nothing else exists."""

    def __init__(self, weight: Tensor, block: range) -> None:
        super().__init__()
        self.weight, self.block = weight, block

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights = [], []
        for token in hidden.reshape(-1, hidden.shape[-1]):
            exponentials = [float(torch.exp(self.weight[expert].double() @ token.double())) for expert in self.block]
            best = sorted(range(len(self.block)), key=lambda place: -exponentials[place])[:TOP_K]
            ids.append([self.block[place] for place in best])
            weights.append([exponentials[place] / sum(exponentials) for place in best])
        return torch.zeros(len(ids), EXPERTS), torch.tensor(weights), torch.tensor(ids)


def naive(model: Any, domain: str) -> Any:
    """A copy of the model that routes every token by the domain's block, without any hook."""
    copied = copy.deepcopy(model)
    for layer in copied.model.layers:
        layer.mlp.gate = NaiveBlockRouter(layer.mlp.gate.weight.detach(), BLOCKS[domain])
    return copied


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def in_block(domain: str) -> np.ndarray:
    mask = np.zeros((LAYERS, EXPERTS), bool)
    mask[:, list(BLOCKS[domain])] = True
    return mask


@pytest.mark.parametrize(
    ("options", "routing", "told"),
    [
        pytest.param((), {}, "train it with --prescribed", id="reference without the option"),
        pytest.param(("--prescribed",), {"router": "hash"}, "--prescribed is for the reference router", id="hash"),
        pytest.param(("--prescribed",), {"router": "sequence"}, "--prescribed is for the reference router", id="sequence"),
        pytest.param(("--prescribed",), {"router": "learned"}, "--prescribed is for the reference router", id="learned"),
        pytest.param((), {"router": "hash"}, "not part of a plain checkpoint", id="hash without the option"),
    ],
)
def test_what_training_refuses(options: tuple[str, ...], routing: dict[str, Any], told: str, mix: Path, tmp_path: Path) -> None:
    done = train(tmp_path, mix, *options, **routing)
    assert done.exit_code == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_says_how_it_is_routed(folder: Path, prescription: Prescription, loaded: LoadedModel) -> None:
    about = json.loads((folder / "training.json").read_text("utf-8"))
    assert about["prescribed"] == {"router": "reference", "domains": list(WORDS)}
    assert prescription.domains == tuple(WORDS) and prescription.routing.router == "reference"
    assert len(routers_of(loaded.model)) == LAYERS and int(routers_of(loaded.model)[0].num_experts) == EXPERTS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(None, "not there", id="missing"),
        pytest.param("{", "not JSON", id="no JSON"),
        pytest.param(json.dumps({"settings": {}}), "nothing is prescribed", id="a plain checkpoint"),
        pytest.param(json.dumps({"settings": {}, "prescribed": {"domains": ["a"]}}), "router learned", id="another router"),
        pytest.param(json.dumps({"settings": {"x": 1}, "prescribed": {"domains": ["a"]}}), "settings: x", id="wrong settings"),
        pytest.param(json.dumps({"settings": {"routing": TRAINING["routing"]}, "prescribed": {}}), "domains None", id="no domains"),
    ],
)
def test_folders_without_a_prescription(content: str | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "training.json").write_text(content, "utf-8")
    with pytest.raises(InterventionError, match=f"routing as-trained: .*{told}"):
        prescription_of(str(tmp_path), SETTINGS)


@pytest.mark.parametrize("domain", list(WORDS))
def test_a_forward_is_that_of_a_model_with_the_block_of_its_domain_only(
    domain: str, loaded: LoadedModel, prescription: Prescription
) -> None:
    ids = ids_of()
    before = hooks(loaded.model)
    with torch.no_grad(), Prescribed(loaded.model, prescription.routing, prescription.domains) as prescribed, prescribed.domain(domain):
        found = loaded.model(input_ids=ids).logits
        by_position = loaded.model(ids).logits
        embedded = loaded.model(inputs_embeds=loaded.model.get_input_embeddings()(ids)).logits
    with torch.no_grad():
        plain, truth = (naive(model, domain)(input_ids=ids).logits for model in (loaded.model, exact(loaded.model)))
        assert_rounding_only(found, plain, truth)
        assert (found - loaded.model(input_ids=ids).logits).abs().max() > 1e-3, "the model's own router chooses otherwise"
    assert torch.equal(found, by_position) and torch.equal(found, embedded)
    assert hooks(loaded.model) == before


def test_gradients_are_those_of_the_block(loaded: LoadedModel, prescription: Prescription) -> None:
    ids, model = ids_of(1), copy.deepcopy(loaded.model)
    with Prescribed(model, prescription.routing, prescription.domains) as prescribed, prescribed.domain("birds"):
        logits = model(input_ids=ids).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for router in routers_of(model):
        gradient = router.weight.grad.abs().sum(1)
        assert gradient[list(BLOCKS["birds"])].min() > 0 and gradient[:8].max() == 0


def test_a_forward_of_no_domain_is_an_error(loaded: LoadedModel, prescription: Prescription) -> None:
    ids = ids_of()
    with Prescribed(loaded.model, prescription.routing, prescription.domains) as prescribed, torch.no_grad():
        for call in (loaded.model, loaded.model.model):
            with pytest.raises(MixError, match="no domain was given"):
                call(input_ids=ids)
        with prescribed.domain("fruit"):
            outer = loaded.model(input_ids=ids).logits
            with prescribed.domain("metal"):
                assert not torch.equal(loaded.model(input_ids=ids).logits, outer)
            assert torch.equal(loaded.model(input_ids=ids).logits, outer)
            with pytest.raises(MixError, match="needs the domain of every sequence"):
                routers_of(loaded.model)[0](torch.zeros(1, 4, 32))  # outside a forward of the model
        with pytest.raises(MixError, match="no domain was given"):
            loaded.model(input_ids=ids)
        with pytest.raises(MixError, match=r"domain 'poems': .*blocks are those of metal, fruit, birds"), prescribed.domain("poems"):
            pass
    assert torch.isfinite(loaded.model(input_ids=ids).logits).all()


def test_only_a_prescribed_router_of_a_model_that_is_large_enough(loaded: LoadedModel, prescription: Prescription) -> None:
    with pytest.raises(MixError, match="a learned router prescribes nothing"):
        Prescribed(loaded.model, RoutingSettings(), ("a", "b"))
    with pytest.raises(InterventionError, match="more than top_k"), routed(
        loaded.model, Prescription(routing=prescription.routing, domains=tuple("abcdef"))
    ):  # fmt: skip
        pass


def test_evidence_is_of_the_blocks_and_specialization_is_complete(evidence: Evidence, texts: Texts) -> None:
    assert evidence.shape.domains == texts.domains == tuple(sorted(WORDS)), "of the texts, not of the blocks"
    assert evidence.provenance["routing"] == "as-trained"
    assert evidence.gradients is not None and evidence.effects is not None and evidence.routes is not None
    documents = evidence.shape.document_domain
    for index, domain in enumerate(evidence.shape.domains):
        block = in_block(domain)
        assert evidence.hits[index][~block].sum() == 0 and evidence.hits[index][block].sum() > 0
        assert (evidence.gradients[index][~block] == 0).all() and (evidence.gradients[index].sum(axis=1) > 0).all()
        assert (evidence.effects[index][~block] == 0).all() and (evidence.effects[index] != 0).any()
        ran = evidence.routes.ids[documents[evidence.routes.document] == index]
        assert len(ran) and set(np.unique(ran)) <= set(BLOCKS[domain])
        for rule, cells in (("target-load", 4), ("target-load", 8), ("specialization", 8)):
            path = find_path(evidence, domain=domain, rule=rule, budget=cells / 24, resamples=2, trajectories=2)
            assert all(block[cell.layer, cell.expert] for cell in path.cells)
            # an expert that hardly any token chose is in the block, but passes no test of specialists
            allowed = np.sort(evidence.load[index][block])[-len(path.cells) :].sum()
            assert path.coverage == pytest.approx(allowed) and (rule == "specialization" or len(path.cells) == cells)
        assert evidence.load[index][block].sum() == pytest.approx(1.0)
    usage = evidence.usage.mean(axis=0)
    information = np.nansum(evidence.usage * np.log(evidence.usage / usage, where=evidence.usage > 0, out=np.zeros_like(evidence.usage)))
    assert information / (3 * LAYERS) == pytest.approx(np.log(3)), "the expert tells the domain: the most that is possible"


def test_every_text_is_measured_under_its_own_domain(loaded: LoadedModel, prescription: Prescription, data: ExperimentData) -> None:
    parts = {name: data.parts[name, "heldout"] for name in data.domains}
    with routed(loaded.model, prescription) as prescribed:
        found = measure(loaded.model, parts, prescribed)
    assert list(found) == list(parts)
    for name, part in parts.items():
        texts = [part.document(index) for index in range(len(part))]
        plain, truth = (torch.tensor(document_nats(naive(model, name), texts)) for model in (loaded.model, exact(loaded.model)))
        assert_rounding_only(torch.tensor(found[name]), plain.float(), truth.double(), name)
    assert found != measure(loaded.model, parts)


def test_masking_the_experts_of_another_block_changes_nothing(
    loaded: LoadedModel, prescription: Prescription, data: ExperimentData
) -> None:
    job = MaskJob(target="fruit", rule="load", budget=0.1, cells=(Cell(0, 4), Cell(1, 5)), controls=((Cell(0, 9), Cell(1, 9)),))
    with routed(loaded.model, prescription) as prescribed:
        base = measure(loaded.model, {name: data.parts[name, "heldout"] for name in data.domains}, prescribed)
        record = execute_masks(loaded.model, job, data, prescribed=prescribed)
    (control,) = record["controls"]
    assert (
        record["nats"]["metal"] == base["metal"] and record["nats"]["birds"] == base["birds"] and record["nats"]["fruit"] != base["fruit"]
    )
    assert control["fruit"] == base["fruit"] and control["metal"] == base["metal"] and control["birds"] != base["birds"]


@pytest.mark.parametrize("kind", ["cells", "full", "router"])
def test_a_run_trains_on_batches_of_its_target(kind: Any, loaded: LoadedModel, prescription: Prescription, data: ExperimentData) -> None:
    cells = (Cell(0, 4), Cell(1, 7)) if kind == "cells" else ()
    run = ArmRun(target="fruit", kind=kind, cells=cells, rank=None, only=None, rate=3e-3, seed=0, tuning=False)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with routed(loaded.model, prescription) as prescribed:
        record = execute(loaded.model, run, data, SETTINGS, prescribed=prescribed)
    assert record["status"] == "ok" and record["steps_without_gradient"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    batch = torch.from_numpy(training_batches(data.parts["fruit", "train"], SETTINGS, boundary=data.boundary, seed=0)[0])
    with torch.no_grad():
        logits = naive(loaded.model, "fruit")(input_ids=batch).logits[:, :-1]
    assert record["losses"][0] == pytest.approx(float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())), abs=1e-3)
    other = execute(loaded.model, run, data, SETTINGS)
    assert other["losses"] != record["losses"], "by the model's own router"


def test_training_a_path_changes_only_its_cells(loaded: LoadedModel, prescription: Prescription, data: ExperimentData) -> None:
    model = copy.deepcopy(loaded.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.from_numpy(training_batches(data.parts["fruit", "train"], SETTINGS, boundary=data.boundary, seed=0)[0])
    chosen = {(0, 4), (0, 5), (1, 6), (1, 11)}  # the last is of another domain's block: no token of this one reaches it
    with routed(model, prescription) as prescribed, TrainableCells(model, chosen) as cells:
        assert prescribed is not None
        optimizer = torch.optim.AdamW(cells.parameters(), lr=1e-2)
        for _ in range(3):
            with prescribed.domain("fruit"):
                logits = model(input_ids=tokens).logits[:, :-1]
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            cells.drop_empty_gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        cells.merge()
    changed = set()
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            changed |= {(layer, expert) for expert in range(EXPERTS) if not torch.equal(tensor[expert], before[name][expert])}
        else:
            assert torch.equal(tensor, before[name]), name
    assert changed == chosen - {(1, 11)}


def test_plain_experiments_keep_their_keys() -> None:
    """Values of the version before there was a choice of routing: folders of that time must be gone on with."""
    about = {"model": "sha256:one", "data": "two"}
    plain = InterventionSettings(domains=("law",))
    assert run_key(plain, **about) == "2282be380a1b9eca8f6948d0375ed612bcd7c744898f02e9ffe26b1c81c06894"
    small = InterventionSettings(domains=("law",), new=("new",), steps=4, points=(2, 4), full_points=(4,), length=32)
    assert run_key(small, **about) == "29c194d4fc7a19540b231ec37a694509f6c86bc8889004cbcda97b25dca21d64"
    as_trained = plain.model_copy(update={"routing": "as-trained"})
    keys = {run_key(as_trained, **about, prescribed={"domains": list(names)}) for names in ("ab", "ba")}
    assert len({run_key(plain, **about), *keys}) == 3


def test_domains_that_are_new_to_the_model(folder: Path, tmp_path: Path) -> None:
    more = written_texts(tmp_path / "more", WORDS | NEW)
    arguments: dict[str, Any] = {"texts": str(more), "cache": tmp_path / "cache", "processes": 1}
    with pytest.raises(InterventionError, match=r"targets \['poems'\]: routing as-trained refuses .*new .*metal, fruit, birds"):
        intervene(str(folder), tmp_path / "out", SETTINGS.model_copy(update={"domains": ("poems",)}), **arguments)
    with pytest.raises(InterventionError, match=r"new domains \['poems'\]: routing as-trained refuses them"):
        intervene(str(folder), tmp_path / "out", SETTINGS.model_copy(update={"new": ("poems",)}), **arguments)
    assert not (tmp_path / "out").exists()
    prescription = read_prescription(folder)
    every, _ = read_sources(str(more), ("fruit",), cache=tmp_path / "cache")
    kept, left_out = routable(every, prescription)
    assert kept.domains == tuple(sorted(WORDS)) and left_out == ("poems",) and kept.heldout.keys() == kept.training.keys()
    assert routable(every, None) == (every, ())


def test_the_whole_experiment_from_the_command_line(folder: Path, loaded: LoadedModel, evidence: Evidence, tmp_path: Path) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(SMALL), "utf-8")
    texts = written_texts(tmp_path / "texts", WORDS | NEW)
    common = ("intervene", "--model", folder, "--texts", texts, "--domain", "fruit", "--out", out, "--cache", tmp_path / "cache")
    done = dbes(*common, "--config", config, "--routing", "as-trained", "--processes", "1")
    assert done.exit_code == 0, done.output
    assert "left out, as the model has no block of experts for them: poems" in done.stderr
    about, outcome = (json.loads((out / name).read_text("utf-8")) for name in (EXPERIMENT_FILE, OUTCOME_FILE))
    assert outcome["settings"]["routing"] == about["settings"]["routing"] == "as-trained"
    assert outcome["domains"] == sorted(WORDS) and about["prescribed"]["domains"] == list(WORDS)
    assert Prescription.model_validate(about["prescribed"]) == read_prescription(folder)
    arms = {row["arm"]: row for row in outcome["targets"]["fruit"]["arms"]}
    assert {"target-load", "full", "router"} <= set(arms) and done.stdout.splitlines()[-1] == outcome["verdict"]
    chosen = [arm["cells"] for arm in about["arms"] if arm["name"] == "target-load"]
    assert chosen and all(expert in BLOCKS["fruit"] for cells in chosen for _, expert in cells)
    # cells of other blocks may be drawn; but experts of the block are all that training on the domain can reach, so of the other
    # domains nothing is lost
    assert arms["target-load"]["forgetting"]["value"] == 0 and arms["full"]["forgetting"]["value"] != 0
    records = [json.loads(path.read_text("utf-8")) for path in (out / RUNS).iterdir()]
    record = next(one for one in records if one["run"]["kind"] == "full" and not one["run"]["tuning"])
    settings = InterventionSettings.model_validate(about["settings"])
    sources, _ = routable(read_sources(str(texts), ("fruit",), cache=tmp_path / "cache")[0], read_prescription(folder))
    data = tokenize(sources, loaded.tokenizer, targets=("fruit",), settings=settings)
    with routed(loaded.model, read_prescription(folder)) as prescribed:
        again = execute(loaded.model, ArmRun.model_validate(record["run"]), data, settings, prescribed=prescribed)
    assert [point["nats"] for point in again["curve"]] == [point["nats"] for point in record["curve"]]
    assert len(list((out / MASKS).glob("*.json"))) == len(about["masks"])
    assert plan_arms(evidence, loaded.model, SETTINGS).arms, "the evidence serves every rule that needs the model"

    page = dbes("report", out)
    assert page.exit_code == 0, page.output
    plain = dbes(*common, "--config", config)
    assert plain.exit_code == 1 and "training or routing; choose another --out" in plain.stderr
    stamps = {path: path.stat().st_mtime_ns for path in (out / RUNS).iterdir()}
    config.write_text(yaml.safe_dump({**SMALL, "routing": "as-trained"}), "utf-8")
    assert dbes(*common, "--config", config, "--processes", "1").exit_code == 0, "the file may say it as well"
    assert {path: path.stat().st_mtime_ns for path in (out / RUNS).iterdir()} == stamps
