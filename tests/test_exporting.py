"""Exports: tables of routes and counts that read back as they were, and files as the tools they are for document or parse them."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.errors import PathError, SettingError, TraceError
from dbes.exporting.export import export
from dbes.paths.esft import read_esft
from dbes.paths.types import Cell, ExpertPath, Provenance
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts
from dbes.trace.store import Trace

DOMAINS = ("law", "=code")
LAYERS = (1, 2, 4)
LENGTHS = (5, 3, 7, 4)


@pytest.fixture(scope="module")
def trace() -> Trace:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.broadcast_to(np.arange(5), (19, 3, 5)), axis=2)[..., :2].copy()
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[4, 1] = -1  # a token of which nothing ran at a layer
    document = np.repeat(np.arange(4), LENGTHS)
    return Trace.from_arrays(
        ids, document=document, domain=[0, 1, 0, 1], domains=DOMAINS, layers=LAYERS, experts=5, token_ids=np.arange(19) + 100,
        weights=rng.random(ids.shape), document_ids=["a", "b, c", '"d"', "e"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def path() -> ExpertPath:
    cells = (Cell(1, 0), Cell(1, 3), Cell(2, 4), Cell(4, 1), Cell(4, 2))
    return ExpertPath(
        domain="law", rule="load", cells=cells, layers=LAYERS, experts=(5, 5, 5), share=1 / 3, provenance=Provenance(model="m", dbes="0")
    )


def expected_routes(trace: Trace) -> list[tuple[Any, ...]]:
    """Rows by a loop over tokens, layers and slots."""
    (routes,) = trace.loaded
    assert routes.token_ids is not None and routes.weights is not None
    found = []
    for row in range(len(routes)):
        document = int(routes.document[row])
        for column, layer in enumerate(LAYERS):
            slots = [slot for slot in range(2) if routes.ids[row, column, slot] != 255]
            if slots:
                found.append((
                    trace.shape.document_ids[document], DOMAINS[document % 2], int(routes.positions[row]),
                    int(routes.token_ids[row]), layer,
                    [int(routes.ids[row, column, slot]) for slot in slots], [float(routes.weights[row, column, slot]) for slot in slots],
                ))  # fmt: skip
    return found


def test_routes_read_back_as_they_were(trace: Trace, tmp_path: Path) -> None:
    expected = expected_routes(trace)
    names = ("document", "domain", "position", "token_id", "layer", "experts", "weights")
    table = pyarrow.parquet.read_table(export(trace, tmp_path / "routes.parquet", format="parquet", rows="routes")).to_pylist()
    assert [tuple(row[name] for name in names) for row in table] == expected
    lines = export(trace, tmp_path / "routes.jsonl", format="jsonl", rows="routes").read_text("utf-8").splitlines()
    assert [tuple(json.loads(line)[name] for name in names) for line in lines] == expected
    with export(trace, tmp_path / "routes.csv", format="csv", rows="routes").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, (document, domain, position, token, layer, experts, weights) in zip(rows, expected, strict=True):
        assert (row["document"], row["domain"]) == (document, f"'{domain}" if domain.startswith("=") else domain)
        assert (int(row["position"]), int(row["token_id"]), int(row["layer"])) == (position, token, layer)
        assert [int(each) for each in row["experts"].split(" ")] == experts
        # nine digits tell all numbers of single precision apart
        assert np.asarray(row["weights"].split(" "), np.float32).tolist() == weights


def test_what_a_recording_lacks_is_empty_never_zero(trace: Trace, tmp_path: Path) -> None:
    (routes,) = trace.loaded
    ids = np.where(routes.ids == 255, -1, routes.ids.astype(int))
    bare = Trace.from_arrays(ids, document=routes.document, domain=[0, 1, 0, 1], domains=DOMAINS, layers=LAYERS, experts=5)
    rows = pyarrow.parquet.read_table(export(bare, tmp_path / "r.parquet", format="parquet", rows="routes")).to_pylist()
    assert {(row["token_id"], row["weights"]) for row in rows} == {(None, None)}
    assert '"token_id": null' in export(bare, tmp_path / "r.jsonl", format="jsonl", rows="routes").read_text()
    assert ",,1," in export(bare, tmp_path / "r.csv", format="csv", rows="routes").read_text()


def tally(trace: Trace, *, by: str) -> Counter[tuple[Any, ...]]:
    counts: Counter[tuple[Any, ...]] = Counter()
    for document, domain, _, _, layer, experts, _ in expected_routes(trace):
        for expert in experts:
            counts[*((document, domain) if by == "documents" else (domain,)), layer, expert] += 1
    return counts


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("rows", ["counts", "documents"])
def test_counts_are_those_of_the_routes(trace: Trace, tmp_path: Path, rows: str, format: str) -> None:
    file = export(trace, tmp_path / "counts", format=format, rows=rows)
    if format == "jsonl":
        table = pd.DataFrame([json.loads(line) for line in file.read_text("utf-8").splitlines()])
    else:
        table = pd.read_parquet(file) if format == "parquet" else pd.read_csv(file)
    table["domain"] = table["domain"].str.removeprefix("'")
    names = [*(["document"] if rows == "documents" else []), "domain", "layer", "expert"]
    found = {tuple(key): int(count) for *key, count in table[[*names, "count"]].itertuples(index=False)}
    expected = tally(trace, by=rows)
    assert {key: count for key, count in found.items() if count} == expected
    # an expert that no token chose is one of the answers about a domain, and left out of documents, where most are unused
    assert len(found) == (2 * 3 * 5 if rows == "counts" else len(expected))


def test_counts_of_documents_make_the_same_counts_again(trace: Trace, tmp_path: Path) -> None:
    table = pd.read_parquet(export(trace, tmp_path / "documents.parquet", format="parquet", rows="documents"))
    hits = np.zeros((4, 3, 5), np.int64)
    place = {name: index for index, name in enumerate(trace.shape.document_ids)}
    hits[table["document"].map(place.__getitem__), table["layer"].map(LAYERS.index), table["expert"]] = table["count"]
    again = Counts.from_arrays(hits, domains=DOMAINS, document_domain=[0, 1, 0, 1], top_k=2, layers=LAYERS, tokens=LENGTHS)
    np.testing.assert_array_equal(again.whole().hits, counts_of(trace).whole().hits)


def server_reads(text: str) -> np.ndarray:
    """As SGLang 0.5 reads ``--init-expert-location FILE.json``: the key, and a count [layers, experts] is one step."""
    content = json.loads(text)
    assert "physical_to_logical_map" not in content and "logical_count" in content
    count = np.asarray(content["logical_count"])
    return count[None] if count.ndim == 2 else count


def test_a_logical_count_has_a_row_for_every_layer_of_the_model(trace: Trace, tmp_path: Path) -> None:
    count = server_reads(export(trace, tmp_path / "load.json", format="logical-count").read_text())
    assert count.shape == (1, 5, 5) and count.dtype.kind == "i"
    expected = np.zeros((5, 5), int)
    for (_, layer, expert), number in tally(trace, by="counts").items():
        expected[layer, expert] += number
    np.testing.assert_array_equal(count[0], expected)
    assert not count[0, [0, 3]].any()
    stored = load_file(export(trace, tmp_path / "load.safetensors", format="logical-count"))
    np.testing.assert_array_equal(stored["logical_count"], count)
    parts = [server_reads(export(trace, tmp_path / "one.json", format="logical-count", domain=name).read_text()) for name in DOMAINS]
    np.testing.assert_array_equal(parts[0] + parts[1], count)


def test_a_logical_count_of_unequal_layers_is_refused(tmp_path: Path) -> None:
    ids = np.zeros((4, 2, 1), int)
    uneven = Trace.from_arrays(ids, document=[0, 0, 1, 1], domain=[0, 1], domains=DOMAINS, layers=(0, 1), experts=(4, 8))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TraceError, match="layers have 4 to 8 experts"):
        export(uneven, tmp_path / "load.json", format="logical-count")


def target_of(config: Mapping[str, Any], name: str) -> bool:
    """As PEFT matches names: a pattern by re.fullmatch, names of a list by equality or as the end after a dot."""
    if isinstance(config["target_modules"], str):
        return re.fullmatch(config["target_modules"], name) is not None
    return any(name == target or name.endswith(f".{target}") for target in config["target_parameters"])


def test_adapter_targets_name_the_layers_of_a_model_and_say_what_they_cannot(path: ExpertPath, tmp_path: Path) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    content = json.loads(export(path, tmp_path / "peft.json", format="peft").read_text())
    assert content["experts"] == {"1": [0, 3], "2": [4], "4": [1, 2]}
    fused = content["fused_experts"]
    assert (fused["adapted_experts"], fused["chosen_experts"]) == (15, 5) and "all experts" in fused["cannot_express"]
    model = OlmoeForCausalLM(
        OlmoeConfig(vocab_size=8, hidden_size=8, intermediate_size=4, num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=2,
                    num_experts=5, num_experts_per_tok=2)
    )  # fmt: skip
    named = {name for name, _ in model.named_parameters() if target_of(fused["lora_config"], name)}
    assert named == {f"model.layers.{layer}.mlp.experts.{kind}" for layer in LAYERS for kind in ("gate_up_proj", "down_proj")}


def test_adapter_targets_of_experts_as_modules_are_exactly_the_cells(path: ExpertPath, tmp_path: Path) -> None:
    config = json.loads(export(path, tmp_path / "peft.json", format="peft").read_text())["experts_as_modules"]["lora_config"]
    kinds = ("gate_proj", "up_proj", "down_proj")
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}": (layer, expert)
        for layer in range(42) for expert in range(40) for kind in kinds
    }  # fmt: skip
    assert {cell for name, cell in names.items() if target_of(config, name)} == set(path.cells)
    others = ("model.layers.1.mlp.gate", "model.layers.1.mlp.shared_experts.gate_proj", "model.layers.1.self_attn.q_proj")
    assert not any(target_of(config, name) for name in others)


def test_adapter_targets_are_taken_by_peft_itself(path: ExpertPath, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    content = json.loads(export(path, tmp_path / "peft.json", format="peft").read_text())
    for kind in ("fused_experts", "experts_as_modules"):
        peft.LoraConfig(**content[kind]["lora_config"])


def test_esft_is_read_back(path: ExpertPath, tmp_path: Path) -> None:
    file = export(path, tmp_path / "esft.json", format="esft")
    again = read_esft(file, layers=path.layers, experts=path.experts, model="m")
    assert again.cells == path.cells


def test_a_prune_list_keeps_the_path_and_drops_the_rest(path: ExpertPath, tmp_path: Path) -> None:
    content = json.loads(export(path, tmp_path / "prune.json", format="prune-list").read_text())
    assert content["fewest_kept"] == 1 and content["keep"]["2"] == [4]
    for layer in map(str, LAYERS):
        assert sorted(content["keep"][layer] + content["drop"][layer]) == list(range(content["experts"][layer]))
    assert {Cell(int(layer), expert) for layer, kept in content["keep"].items() for expert in kept} == set(path.cells)


def vllm_reads(content: Mapping[str, Any], *, experts: int) -> dict[int, tuple[int, ...]]:
    """What vLLM demands of approximate_experts: layers to distinct ids in range, at least one expert of each layer kept."""
    found = {int(layer): tuple(sorted(map(int, ids))) for layer, ids in content["approximate_experts"].items()}
    for ids in found.values():
        assert len(set(ids)) == len(ids) and set(ids) < set(range(experts))
    return {layer: ids for layer, ids in found.items() if ids}


def test_substituted_experts_are_those_outside_the_path(path: ExpertPath, tmp_path: Path) -> None:
    content = json.loads(export(path, tmp_path / "vllm.json", format="vllm-substitution").read_text())
    assert vllm_reads(content, experts=5) == {1: (1, 2, 4), 2: (0, 1, 2, 3), 4: (0, 3, 4)}
    few = path.model_copy(update={"cells": (Cell(1, 0),)})
    with pytest.raises(PathError, match="no expert of layer 2"):
        export(few, tmp_path / "few.json", format="vllm-substitution")
    assert not (tmp_path / "few.json").exists()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        pytest.param({"format": "xml"}, SettingError, "no format is called 'xml'", id="format"),
        pytest.param({"format": "csv", "rows": "tokens"}, SettingError, "no kind of rows is called 'tokens'", id="rows"),
        pytest.param({"format": "logical-count", "rows": "routes"}, SettingError, "format logical-count has not", id="rows of no table"),
        pytest.param({"format": "csv", "domain": "law"}, SettingError, "only logical-count takes a domain", id="domain of a table"),
        pytest.param({"format": "logical-count", "domain": "lwa"}, SettingError, "did you mean law", id="domain"),
        pytest.param({"format": "peft"}, PathError, "is of an expert path; find one with `dbes paths", id="a path's format of a trace"),
    ],
)
def test_what_cannot_be_exported_is_refused(trace: Trace, tmp_path: Path, given: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        export(trace, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_counts_know_no_tokens_and_a_path_is_no_recording(trace: Trace, path: ExpertPath, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="know no single tokens"):
        export(counts_of(trace), tmp_path / "out", format="csv", rows="routes")
    domains = Counts.from_domains(np.ones((2, 1, 4), int), domains=DOMAINS, top_k=1)
    with pytest.raises(TraceError, match="not of documents"):
        export(domains, tmp_path / "out", format="csv", rows="documents")
    with pytest.raises(PathError, match="an expert path is exported as peft"):
        export(path.save(tmp_path / "path.json"), tmp_path / "out", format="csv")


def test_the_command_reads_folders_and_path_files(trace: Trace, path: ExpertPath, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace")
    out = tmp_path / "counts.csv"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "trace"), "--format", "csv", "--out", str(out)])
    assert done.exit_code == 0 and done.stdout.strip() == str(out), done.output
    assert out.read_text().splitlines()[0].replace('"', "") == "domain,layer,expert,count"
    path.save(tmp_path / "path.json")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "path.json"), "--format", "peft", "--out", str(tmp_path / "p.json")])
    assert done.exit_code == 0 and "all experts of the named layers" in done.stderr
    assert dbes.export(tmp_path / "path.json", tmp_path / "again.json", format="peft").read_text() == (tmp_path / "p.json").read_text()
