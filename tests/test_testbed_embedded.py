"""The checkpoint and the mix that ship: what they were made of, that they load anywhere, and that routing is specialized."""

import gzip
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from dbes.files import sha256_of
from dbes.scoring.score import score
from dbes.shipped import EMBEDDED_MIX as EMBEDDED
from dbes.shipped import ROOT
from dbes.testbed.heldout import measure
from dbes.testbed.mix import Mix, Text, tokenize_mix

MODEL = ROOT / "benchmark_data" / "model"
_SCRIPT = importlib.util.spec_from_file_location("build_model", ROOT / "benchmark_data" / "build_model.py")
build_model = importlib.util.module_from_spec(_SCRIPT)
_SCRIPT.loader.exec_module(build_model)
DOMAINS, RECIPE = build_model.DOMAINS, build_model.RECIPE
MANIFEST = ROOT / "benchmark_data" / "training_manifest.json"


@pytest.fixture(scope="module")
def facts():
    return json.loads((MODEL / "training.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").rstrip("\n").split("\n")]


@pytest.fixture(scope="module")
def evaluated():
    return {path.name.split(".")[0]: rows(path) for path in sorted((ROOT / "benchmark_data" / "embedded").glob("*.jsonl.gz"))}


def test_no_evaluated_document_comes_from_a_source_that_was_trained_on(facts, evaluated):
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    assert set(evaluated) == set(manifest) == set(DOMAINS)
    assert {name: about["sha256"] for name, about in manifest.items()} == {n: a["sha256"] for n, a in facts["domains"].items()}
    trained = {source for about in manifest.values() for source in about["source_documents"]}
    for name, documents in evaluated.items():
        assert len(documents) >= 160
        assert not trained & {row["source_document"] for row in documents}, name


def test_the_embedded_mix_is_of_training_sources_and_hashes_as_its_card_says(evaluated):
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    card = (EMBEDDED / "README.md").read_text("utf-8")
    told = dict(re.findall(r"^\| (\S+\.jsonl\.gz) .*`([0-9a-f]{64})` \|$", card, re.M))
    assert set(told) == {f"{name}.jsonl.gz" for name in DOMAINS}
    size = 0
    for name in DOMAINS:
        path = EMBEDDED / f"{name}.jsonl.gz"
        assert sha256_of(path) == told[path.name]
        documents = rows(path)
        size += sum(len(row["text"].encode()) for row in documents)
        sources = {row["source_document"] for row in documents}
        assert sources <= set(manifest[name]["source_documents"])
        assert not sources & {row["source_document"] for row in evaluated[name]}
        assert all(row["licence"] and row["domain"] == name for row in documents)
    assert size >= 1_000_000


def test_it_is_the_recipe_and_the_card_says_so(facts):
    recipe = RECIPE.model_copy(update={"seed": facts["settings"]["seed"], "data_seed": facts["settings"]["data_seed"]})
    assert facts["settings"] == recipe.model_dump(mode="json")
    assert recipe.identity(facts["mix_digest"]) == facts["identity"]
    assert (MODEL / "README.md").read_text("utf-8") == build_model.model_card(facts)
    log = [json.loads(line) for line in (MODEL / "training_log.jsonl").read_text("utf-8").splitlines()]
    assert (log[0], log[-1]) == (facts["first"], facts["last"])
    assert log[-1]["step"] == recipe.optimizer.steps - 1
    assert min(log[-1]["load_entropy"]) > 0.98


def test_it_is_a_plain_olmoe_of_four_million_parameters_in_bfloat16(model):
    assert type(model) is OlmoeForCausalLM
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (128, 4, 16, 2)
    assert model.num_parameters() == pytest.approx(4e6, rel=0.1)
    stored = (MODEL / "model.safetensors").stat().st_size
    assert stored < 8.5e6
    assert json.loads((MODEL / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_its_tokenizer_reads_any_text_and_adds_nothing(tokenizer):
    text = "def f(x):\n    return x ** 2  # π ≈ 3.14159, 日本"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (4096, 0, 1)
    assert not {0, 1} & set(ids)
    assert tokenizer.model_max_length == 512


def documents_of(evaluated, tokenizer, count) -> Mix:
    texts = {
        name: [
            Text(id=row["id"], domain=name, source=f"{number % 2}{row['id']}", text=row["text"]) for number, row in enumerate(of[:count])
        ]
        for name, of in evaluated.items()
    }
    return tokenize_mix(texts, tokenizer, heldout_share=0.5)


def test_it_reads_every_domain_far_better_than_chance_and_long_contexts_too(model, tokenizer, evaluated):
    mix = documents_of(evaluated, tokenizer, 16)
    found = measure(model, mix, routing=RECIPE.routing, length=512)
    assert (found.nats_per_token < np.log(4096) - 2.5).all(), dict(zip(mix.domains, found.nats_per_token, strict=True))
    # One document after another, up to the last position: later tokens are not predicted worse than early ones.
    tokens = torch.from_numpy(mix.heldout[DOMAINS.index("general")].tokens[:512].astype(np.int64))[None]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    assert losses[256:].mean() < losses[:128].mean() + 1.0


def test_its_routing_is_specialized_above_the_document_null_in_every_layer(model, tokenizer, evaluated):
    mix = documents_of(evaluated, tokenizer, 40)
    result = score(measure(model, mix, routing=RECIPE.routing, length=256).trace, permutations=200)
    for layer in range(4):
        record = result.record("specialization_normalized", layer=layer)
        assert record.p < 0.01
        assert record.ci_low > 3 * record.null > 0
    assert result.companions["model"]["dead_experts"] == 0
    assert result.companions["model"]["load_entropy"] > 0.95


def test_it_continues_text_of_its_domains(model, tokenizer):
    prompt = "    def __init__(self, name, value):\n        self.name ="
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
    assert text.isascii() and re.search(r"[a-z]{2,}", text)
