"""Importing logs that papers published: gpt-oss, FLAME-MoE, ESFT, the DBES reference code; with the traps of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dbes
from dbes.errors import DbesError
from dbes.importing import flame

LAYERS, EXPERTS, K = 3, 8, 2


def imported(tmp_path: Path, *sources: Path, **options: Any) -> Any:
    return dbes.import_routing(list(sources), output_path=tmp_path / "out", **{"experts": EXPERTS, **options})


def refused(tmp_path: Path, path: Path, told: str, **options: Any) -> None:
    with pytest.raises(DbesError, match=told) as caught:
        imported(tmp_path, path, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def moe(seed: int = 0, rows: int = 10) -> np.ndarray:
    return foreign.routing(np.random.default_rng(seed), rows, LAYERS, EXPERTS, K)


def weights(seed: int = 0, rows: int = 10) -> np.ndarray:
    """Weights that float16 holds exactly."""
    return np.random.default_rng(seed + 99).integers(1, 64, (rows, LAYERS, K)) / 64


def stored(trace: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ids and weights of each document, as they were written."""
    found = {}
    for shard in trace:
        for document in np.unique(shard.document):
            rows = shard.document == document
            found[trace.shape.document_ids[document]] = (shard.ids[rows].astype(int), shard.weights[rows].astype(float))
    return found


# gpt-oss


def log(path: Path, seed: int = 0, first: int = 20, **more: Any) -> Path:
    routes, gates = moe(seed), weights(seed)
    layers = ["layer_1", "layer_10", "layer_2"]  # as JSON may order them; by number they are 1, 2, 10
    places = {"layer_1": 0, "layer_2": 1, "layer_10": 2}
    rows = [
        {f"token_{first + token}": {
            name: {"selected_experts": routes[token, places[name]].tolist(), "selected_probs": gates[token, places[name]].tolist()}
            for name in layers}}
        for token in range(len(routes))
    ]  # fmt: skip
    about = {"dataset": "mmlu", "category": "law", "row_index": seed, "has_repetition": False, "original_prompt": f"prompt {seed}"}
    return foreign.write_json(path, {**about, "router_data": rows, **more})


def test_logs_of_gpt_oss(tmp_path):
    for seed in range(3):
        log(tmp_path / "logs" / f"{seed}.json", seed, dataset="mmlu" if seed else "code")
    found = imported(tmp_path, tmp_path / "logs")
    trace = found.routes
    assert found.format == "gptoss-json" and trace.shape.layers == (1, 2, 10) and trace.shape.domains == ("code", "mmlu")
    for seed in range(3):
        ids, gates = stored(trace)[f"logs/{seed}"]
        assert np.array_equal(ids, moe(seed)) and np.array_equal(gates, weights(seed))
    (shard,) = list(trace)
    assert shard.positions[:10].tolist() == list(range(20, 30)) and (shard.phase == 1).all() and shard.token_ids is None


def test_equal_prompts_are_one_text_and_repetition_is_told(tmp_path):
    log(tmp_path / "logs" / "a.json", 1, original_prompt="same")
    log(tmp_path / "logs" / "b.json", 2, original_prompt="same", has_repetition=True)
    log(tmp_path / "logs" / "c.json", 3)
    found = imported(tmp_path, tmp_path / "logs", domain_map={"field": "category"})
    sources = found.routes.shape.document_source
    assert sources[0] == sources[1] != sources[2] and found.routes.shape.domains == ("law",)
    assert any("1 documents repeat themselves" in note for note in found.told)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"token_1": {"layer_0": {"selected_experts": [0, 1]}}}], "without selected_experts and selected_probs"),
        ([{"tok_1": {}}], "expected one token_<position>"),
        ([{"token_1": {"l0": {}}}], "expected layer_<number>"),
        ([{"token_1": {"layer_0": {"selected_experts": [0, 1], "selected_probs": [1]}}}], "selected_probs"),
        ([{"token_1": {"layer_0": {"selected_experts": [0, 0], "selected_probs": [0.5, 0.5]}}}], "stands twice"),
        ([{"token_1": {"layer_0": {"selected_experts": [0, 9], "selected_probs": [0.5, 0.5]}}}], "id 9"),
        ([{f"token_{place}": {"layer_0": {"selected_experts": [0, 1], "selected_probs": [0.5, 0.5]}}} for place in (5, 4)], "positions"),
        ({"a": 1}, "router_data, a list"),
    ],
)
def test_logs_of_gpt_oss_that_cannot_be(tmp_path, rows, told):
    refused(tmp_path, foreign.write_json(tmp_path / "a.json", {"router_data": rows}), told, format="gptoss-json")


def test_tokens_of_other_layers(tmp_path):
    cell = {"selected_experts": [0, 1], "selected_probs": [0.5, 0.5]}
    rows = [{"token_1": {"layer_0": cell, "layer_1": cell}}, {"token_2": {"layer_0": cell}}]
    path = foreign.write_json(tmp_path / "a.json", {"router_data": rows})
    refused(tmp_path, path, r"router_data\[1\]: 1 layers, but the first token has 2")
    config = foreign.config(tmp_path, layers=2, experts=EXPERTS, k=K)
    path = log(tmp_path / "logs" / "a.json")
    refused(tmp_path, path, r"layers \[1, 2, 10\], but by .* \[0, 1\]", model_config=config)


def words(first: int = 20, rows: int = 10, last: str = "<|return|>") -> list[str]:
    """The texts of all tokens: of a prompt, of those that were routed (three kinds), and the last one, which has no row."""
    return ["p"] * first + [f"w{place % 3}" for place in range(rows)] + [last]


def test_texts_of_tokens_stand_for_token_ids(tmp_path):
    log(tmp_path / "logs" / "a.json", 1, full_text=words())
    log(tmp_path / "logs" / "b.json", 2, full_text=["other"] * 20 + ["w2", "new"] * 5 + ["."])
    found = imported(tmp_path, tmp_path / "logs")
    (shard,) = list(found.routes)
    first, second = shard.token_ids[:10].tolist(), shard.token_ids[10:].tolist()
    assert first == [0, 1, 2] * 3 + [0] and second == [2, 3] * 5


def test_texts_that_were_split_otherwise_are_left_out(tmp_path):
    log(tmp_path / "logs" / "a.json", 1, full_text=words())
    log(tmp_path / "logs" / "b.json", 2, full_text=[*words(), "one more"])
    found = imported(tmp_path, tmp_path / "logs")
    assert found.routes.shape.document_ids == ("logs/a",)
    assert any("1 documents were left out: full_text" in note for note in found.told)
    refused(tmp_path / "only", log(tmp_path / "only" / "c.json", full_text=words(21)), "c.json: full_text does not have one token more")
    refused(tmp_path / "only", log(tmp_path / "only" / "d.json", full_text=[1, 2]), "texts of all tokens")


def test_texts_as_one_string_say_nothing_of_tokens(tmp_path):
    found = imported(tmp_path, log(tmp_path / "logs" / "a.json", full_text="all in one"))
    (shard,) = list(found.routes)
    assert shard.token_ids is None


def test_statistics_among_the_documents_are_left_out(tmp_path):
    """As published: a folder of a category holds sums beside the documents, and there is a table of contents."""
    log(tmp_path / "data" / "mmlu" / "law" / "True_False_examples.json", 1)
    sums = {"sample_count": 14, "think_expert_analytics": {"layer_0": {}}}
    foreign.write_json(tmp_path / "data" / "mmlu" / "law" / "True_False.json", sums)
    foreign.write_json(tmp_path / "data" / "map.json", {"mmlu": {"law": {"True_False": {"sample_count": 14}}}})
    found = imported(tmp_path, tmp_path / "data")
    assert len(found.routes.shape.document_ids) == 1 and any("2 records without router_data were left out" in note for note in found.told)
    (tmp_path / "data" / "mmlu" / "law" / "True_False_examples.json").unlink()
    with pytest.raises(DbesError, match="no record has router_data"):
        dbes.import_routing(tmp_path / "data", output_path=tmp_path / "none", experts=EXPERTS, format="gptoss-json")


@pytest.mark.parametrize("rules", [{}, {"paths": {"logs/*": "law"}}, {"field": "category"}])
def test_documents_that_a_domain_map_leaves_out(tmp_path, rules):
    log(tmp_path / "logs" / "a.json", 1, has_repetition=True)
    log(tmp_path / "logs" / "b.json", 2)
    found = imported(tmp_path, tmp_path / "logs", domain_map={**rules, "leave_out": {"has_repetition": True}})
    assert found.routes.shape.document_ids == ("logs/b",)
    assert any("1 documents were left out by the domain map" in note for note in found.told)


# FLAME-MoE


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def traces(folder: Path, seed: int = 0, rows: int = 30, numbers: tuple[int, ...] = (2, 3, 12)) -> Path:
    routes, gates = moe(seed, rows), weights(seed, rows)
    for place, layer in enumerate(numbers):
        parquet(
            folder / f"layer_{layer}.parquet",
            indices=pa.array(routes[:, place].tolist(), pa.list_(pa.int16())),
            scores=pa.array([[np.float16(value) for value in row] for row in gates[:, place]], pa.list_(pa.float16())),
        )
    parquet(folder / "tokens.parquet", token_id=pa.array(range(rows), pa.int32()))
    return folder


def test_traces_of_flame(tmp_path, monkeypatch):
    monkeypatch.setattr(flame, "PIECE", 8)
    traces(tmp_path / "f" / "law", 0)
    traces(tmp_path / "f" / "code", 1)
    found = imported(tmp_path, tmp_path / "f", domain_map={"law/*": "law", "code/*": "code"})
    trace = found.routes
    assert found.format == "flame" and trace.shape.layers == (2, 3, 12) and trace.shape.domains == ("code", "law")
    assert set(trace.shape.document_source) == {"f/law", "f/code"} and len(trace.shape.document_ids) == 8
    ids, gates = (np.concatenate(parts) for parts in zip(*[stored(trace)[f"f/law/{piece}"] for piece in range(4)], strict=True))
    assert np.array_equal(ids, moe(0, 30)) and np.array_equal(gates, weights(0, 30))
    words = np.concatenate([shard.token_ids[shard.document >= 4] for shard in trace])
    assert words.tolist() == list(range(30))
    result = dbes.score(tmp_path / "out", permutations=19)
    assert any("one source text only" in warning for warning in result.warnings) and np.isnan(result.record("specialization").score_low)


def test_layers_as_folders(tmp_path):
    routes = moe(0, 20)
    for place in range(LAYERS):
        for part in range(2):
            rows = routes[10 * part : 10 * part + 10, place]
            parquet(tmp_path / "f" / f"layer-{place}" / f"part-{part}.parquet", indices=pa.array(rows.tolist(), pa.list_(pa.int32())))
    trace = imported(tmp_path, tmp_path / "f").routes
    assert np.array_equal(foreign.rows_of(trace)["f/0"], np.sort(routes, axis=2)) and next(iter(trace)).weights is None


def test_traces_of_flame_that_cannot_be(tmp_path):
    folder = traces(tmp_path / "f")
    parquet(folder / "layer_3.parquet", indices=moe(0, 20)[:, 0].tolist(), scores=weights(0, 20)[:, 0].tolist())
    refused(tmp_path, folder, "end at different rows")
    parquet(folder / "layer_3.parquet", indices=[[1, 2]] * 29 + [[1]], scores=[[1.0, 1.0]] * 30)
    refused(tmp_path, folder, "layer_3.parquet, indices: rows of 1 to 2 experts|with other numbers of experts")
    parquet(folder / "layer_3.parquet", indices=[[1, 2]] * 29 + [None], scores=[[1.0, 1.0]] * 30)
    refused(tmp_path, folder, "holds empty values")
    parquet(folder / "layer_3.parquet", indices=[["a", "b"]] * 30, scores=[[1.0, 1.0]] * 30)
    refused(tmp_path, folder, "expected numbers")
    parquet(folder / "layer_3.parquet", other=[1])
    refused(tmp_path, folder, "neither indices nor token_id")
    whole = (folder / "layer_2.parquet").read_bytes()
    (folder / "layer_3.parquet").write_bytes(whole[:-30])
    refused(tmp_path, folder, "layer_3.parquet: not a parquet file")
    (folder / "layer_3.parquet").write_bytes(whole)
    (folder / "layer_12.parquet").rename(folder / "twelve.parquet")
    refused(tmp_path, folder, "does not tell the layer")


# ESFT


def esft(folder: Path, documents: list[tuple[np.ndarray, np.ndarray]], first: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(LAYERS):
        rows = ["\t\t".join("\t".join(map(str, part[:, layer].reshape(-1))) for part in document) for document in documents]
        (folder / f"expert_log_{first + layer}.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_logs_of_esft(tmp_path):
    firsts = {"law": 0, "code": 10}
    texts = {name: [(moe(seed, 5 + seed), weights(seed, 5 + seed)) for seed in range(first, first + 4)] for name, first in firsts.items()}
    for domain, documents in texts.items():
        esft(tmp_path / "logs" / domain, documents)
    found = imported(tmp_path, tmp_path / "logs", top_k=K, domain_map={"law/*": "law", "code/*": "code"})
    trace = found.routes
    assert found.format == "esft" and trace.shape.layers == (1, 2, 3)
    for domain, documents in texts.items():
        for number, (ids, gates) in enumerate(documents):
            kept = stored(trace)[f"logs/{domain}/{number + 1}"]
            assert np.array_equal(kept[0], ids) and np.array_equal(kept[1], gates)
    result = dbes.score(tmp_path / "out", permutations=19)
    assert np.isfinite(result.record("ngram_expertise_2").value)


def test_k_of_esft_must_be_known(tmp_path):
    refused(tmp_path, esft(tmp_path / "logs", [(moe(), weights())]), "--top-k")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("0\t1\t0.5\t0.5", "expected ids, two tabs, weights; found 1 parts"),
        ("0\t1\t\t0.5", "2 ids and 1 weights"),
        ("0\t1\t2\t\t0.5\t0.5\t0.5", "3 ids and 3 weights, expected .* a multiple of top-k 2"),
        ("0\tx\t\t0.5\t0.5", "not numbers"),
        ("0\t-1\t\t0.5\t0.5", "id -1"),
        ("0\t1\t\t0.5\tnan", "weights hold NaN"),
        ("3\t3\t\t0.5\t0.5", "stands twice"),
        ("0\t1\t\t0.5\t0.5", "1 tokens, but 10|10 tokens, but 1"),
    ],
)
def test_lines_of_esft_that_cannot_be(tmp_path, line, told):
    folder = esft(tmp_path / "logs", [(moe(), weights())])
    for layer in (1, 2, 3) if "twice" in told or "NaN" in told else (2,):
        (folder / f"expert_log_{layer}.txt").write_text(line + "\n")
    refused(tmp_path, folder, told, format="esft", top_k=K)


def test_files_of_esft_of_unequal_length(tmp_path):
    folder = esft(tmp_path / "logs", [(moe(), weights()), (moe(1), weights(1))])
    lines = (folder / "expert_log_2.txt").read_text().splitlines(keepends=True)
    (folder / "expert_log_2.txt").write_text(lines[0])
    refused(tmp_path, folder, "expert_log_2.txt: has no line 2", top_k=K)
    (folder / "expert_log_2.txt").write_text("\n" + lines[1])
    refused(tmp_path, folder, "expert_log_2.txt: has no line 1", top_k=K)


# the reference code


def token(request: str, index: int, routes: np.ndarray, gates: np.ndarray, **more: Any) -> dict[str, Any]:
    layers = {
        str(layer): {
            "expert_ids": routes[layer].tolist(), "weights": gates[layer].tolist(), "logits": [3.0 + layer, 2.0], "next_expert_logit": 1.5
        } for layer in range(LAYERS)
    }  # fmt: skip
    return {"request_id": request, "token_index": index, "output_token_id": 100 + index, "layers": layers, "model": "m", **more}


def test_logs_of_the_reference_code(tmp_path):
    records = []
    for place in (3, 1, 0, 2):  # out of order, and two requests in turn
        records += [token("a", place, moe(0)[place], weights(0)[place]), token("b", place, moe(1)[place], weights(1)[place])]
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", records), domain_map={"ids": {"a": "law", "b": "code"}})
    trace = found.routes
    assert found.format == "dbes-jsonl" and trace.shape.domains == ("law", "code")
    for name, seed in (("a", 0), ("b", 1)):
        ids, gates = stored(trace)[name]
        assert np.array_equal(ids, moe(seed)[:4]) and np.array_equal(gates, weights(seed)[:4])
    (shard,) = list(trace)
    assert shard.token_ids.tolist() == [100, 101, 102, 103] * 2
    assert (shard.logit_margins == 0.5).all()  # the weakest chosen is 2.0, the strongest rejected 1.5


def test_gaps_and_tokens_without_logits(tmp_path):
    records = [token("a", place, moe()[place], weights()[place]) for place in (0, 4)]
    for record in records:
        for cell in record["layers"].values():
            del cell["logits"], cell["weights"]
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", records))
    (shard,) = list(found.routes)
    assert shard.positions.tolist() == [0, 4] and shard.weights is None and shard.logit_margins is None
    assert any("3 tokens between others" in note for note in found.told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"request_id": None}, "no request_id"),
        ({"token_index": -1}, "token_index: -1"),
        ({"token_index": 0}, "token_index 0 stands there twice"),
        ({"layers": {}}, "no layers"),
        ({"layers": {"x": {}}}, "expected numbers of layers"),
        ({"layers": {"0": {"expert_ids": [0, 1]}}}, r"layers \[0\], but \[0, 1, 2\] before"),
        ({"layers": {str(layer): {"expert_ids": [0]} for layer in range(LAYERS)}}, "other numbers of experts"),
        ({"layers": {str(layer): {"expert_ids": [0, 1], "weights": [1]} for layer in range(LAYERS)}}, "weights: shape"),
        ({"layers": {str(layer): {"expert_ids": [0, 1], "logits": [1], "next_expert_logit": 0} for layer in range(LAYERS)}}, "logits"),
    ],
)
def test_records_of_the_reference_code_that_cannot_be(tmp_path, change, told):
    records = [token("a", 0, moe()[0], weights()[0]), {**token("a", 1, moe()[1], weights()[1]), **change}]
    refused(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", records), told, format="dbes-jsonl")


def test_a_cut_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(token("a", 0, moe()[0], weights()[0])) + "\n" + json.dumps(token("a", 1, moe()[1], weights()[1]))[:-30])
    refused(tmp_path, path, "a.jsonl, line 2: not JSON", format="dbes-jsonl")
