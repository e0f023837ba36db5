"""Importing from SGLang (responses, recorder) and TensorRT-LLM, with the traps of each."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from safetensors.numpy import save_file

import dbes
from dbes.errors import DbesError, SourceError

LAYERS, EXPERTS, K, PROMPT, OUTPUT = 4, 8, 2, 6, 4
MOE = LAYERS - 1
ROWS = PROMPT + OUTPUT - 1


def imported(tmp_path: Path, *sources: Path, **options: Any) -> Any:
    return dbes.import_routing(list(sources), output_path=tmp_path / "out", **options)


def refused(tmp_path: Path, path: Path, told: str, **options: Any) -> None:
    with pytest.raises(DbesError, match=told) as caught:
        imported(tmp_path, path, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return foreign.config(tmp_path, layers=LAYERS, experts=EXPERTS, k=K, first_k_dense_replace=1)


def moe(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    return foreign.routing(np.random.default_rng(seed), rows, MOE, EXPERTS, K)


def raw(routes: np.ndarray, dense: int = 0) -> str:
    """All hidden layers, the first dense, as raw int32."""
    whole = np.full((len(routes), LAYERS, K), dense, np.int32)
    whole[:, 1:] = routes
    return base64.b64encode(whole.tobytes()).decode()


def response(name: str, routes: np.ndarray, *, prompt: int = PROMPT, output: int = OUTPUT, **more: Any) -> dict[str, Any]:
    meta = {"id": name, "prompt_tokens": prompt, "completion_tokens": output, "routed_experts": raw(routes), **more}
    return {"text": "", "output_ids": list(range(output)), "meta_info": meta}


@pytest.mark.parametrize("dense", [0, -1, 12345])
def test_a_response_of_generate(tmp_path, config, dense):
    record = response("g", moe())
    record["meta_info"]["routed_experts"] = raw(moe(), dense)
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]), model_config=config)
    assert found.format == "sglang" and found.routes.shape.layers == (1, 2, 3)
    assert np.array_equal(foreign.rows_of(found.routes)["g"], np.sort(moe(), axis=2))
    (shard,) = list(found.routes)
    assert shard.phase.tolist() == [0] * PROMPT + [1] * (OUTPUT - 1) and shard.token_ids is None
    assert any("1 dense layers were dropped" in note for note in found.told)


def test_token_ids_where_the_prompt_is_there(tmp_path, config):
    record = {**response("g", moe()), "input_ids": list(range(50, 50 + PROMPT))}
    (shard,) = list(imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]), model_config=config).routes)
    assert shard.token_ids.tolist() == [*range(50, 50 + PROMPT), *range(OUTPUT - 1)]


@pytest.mark.parametrize("place", ["response", "choice"])
def test_an_openai_response_has_the_first_choice_only(tmp_path, config, place):
    record: dict[str, Any] = {
        "id": "c", "choices": [{"index": 0}, {"index": 1}], "usage": {"prompt_tokens": PROMPT, "completion_tokens": 2 * OUTPUT},
    }  # fmt: skip
    (record if place == "response" else record["choices"][0])["sglext"] = {"routed_experts": raw(moe())}
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]), model_config=config)
    assert found.format == "sglang" and found.routes.shape.document_ids == ("c",) and found.routes.tokens == ROWS


def test_padded_rows_stay_missing(tmp_path, config):
    routes = moe()
    routes[-2:] = -1
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [response("g", routes)]), model_config=config)
    assert (foreign.rows_of(found.routes)["g"][-2:] == -1).all() and any("2 tokens have no routing" in note for note in found.told)


def test_requests_that_only_read_lack_the_last_row(tmp_path, config):
    record = response("g", moe(rows=PROMPT - 1), output=1)
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]), model_config=config)
    assert found.routes.tokens == PROMPT - 1 and any("1 requests that only read a prompt" in note for note in found.told)


def test_a_start_after_the_beginning(tmp_path, config):
    record = response("g", moe(rows=ROWS - 3), routed_experts_start_len=3)
    (shard,) = list(imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]), model_config=config).routes)
    assert shard.positions.tolist() == list(range(3, ROWS)) and shard.phase.tolist() == [0] * (PROMPT - 3) + [1] * (OUTPUT - 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"routed_experts": "AAAA"}, "3 bytes, no multiple of 4 x 4 layers x top-k 2"),
        ({"routed_experts": "AA*A"}, "not base64"),
        ({"routed_experts": [1]}, "expected base64 of raw int32"),
        ({"completion_tokens": OUTPUT + 1}, f"{ROWS} rows of routing, expected {ROWS + 1}"),
        ({"completion_tokens": "4"}, "completion_tokens is"),
        ({"routed_experts_start_len": -2}, "routed_experts_start_len"),
        ({"routed_experts": raw(np.full((ROWS, MOE, K), 9))}, "id 9 in row 0"),
        ({"routed_experts": raw(np.zeros((ROWS, MOE, K)))}, "stands twice"),
    ],
)
def test_responses_that_cannot_be(tmp_path, config, change, told):
    record = response("g", moe())
    del record["output_ids"]
    record["meta_info"].update(change)
    refused(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]), told, model_config=config)


def test_without_a_config_and_without_routing(tmp_path, config):
    path = foreign.write_lines(tmp_path / "a.jsonl", [response("g", moe())])
    refused(tmp_path, path, "without its shape; give --model-config", format="sglang", experts=EXPERTS, top_k=K)
    foreign.write_lines(path, [{"meta_info": {"id": "x"}}])
    refused(tmp_path, path, "return_routed_experts", format="sglang", model_config=config)


# the recorder: [layers, tokens, 8] of physical experts


def physical_map(replicas: int = 2) -> np.ndarray:
    """[layers, physical]: every layer shuffles the logical experts, some of them twice."""
    rng = np.random.default_rng(7)
    return np.stack([rng.permutation(np.r_[np.arange(EXPERTS), rng.integers(0, EXPERTS, replicas)]) for _ in range(LAYERS)])


def physical(routes: np.ndarray, mapping: np.ndarray, dense: bool = True) -> np.ndarray:
    """Ids as the recorder keeps them: 8 columns, -1 where nothing is set, a dense layer never set."""
    found = np.full((LAYERS, len(routes), 8), -1, np.int32)
    for layer in range(int(dense), LAYERS):
        for token, row in enumerate(routes[:, layer - int(dense)]):
            for slot, expert in enumerate(row):
                found[layer, token, slot] = -1 if expert < 0 else np.flatnonzero(mapping[layer] == expert)[-1]
    return found


def record_of(number: int, rank: int, ids: np.ndarray, lengths: list[int] | None, *, first: int = 0, start: int = 0) -> dict[str, Any]:
    import torch

    tokens = ids.shape[1]
    positions = [start + place for length in (lengths or [1] * tokens) for place in range(length)]
    return {
        "forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "input_ids": list(range(first, first + tokens)),
        "positions": positions, "extend_seq_lens": lengths, "forward_mode": 1, "misc_objects": [],
        "topk_ids_of_layer": torch.from_numpy(ids),
    }  # fmt: skip


def dump(folder: Path, rank: int, records: list[dict[str, Any]], mapping: np.ndarray | None) -> Path:
    import torch

    folder.mkdir(exist_ok=True)
    path = folder / f"expert_distribution_recorder_1700000000.{rank}_{rank}.pt"
    given = None if mapping is None else torch.from_numpy(mapping)
    torch.save({"records": records, "last_physical_to_logical_map": given}, path)
    return path


def test_physical_experts_become_logical(tmp_path, config):
    mapping, routes = physical_map(), moe(rows=9)
    path = dump(tmp_path / "d", 0, [record_of(1, 0, physical(routes, mapping), [5, 4])], mapping)
    found = imported(tmp_path, path, model_config=config)
    assert found.format == "sglang-recorder" and found.routes.shape.experts == (EXPERTS,) * MOE
    rows = foreign.rows_of(found.routes)
    assert np.array_equal(rows["pass-1/rank-0/0"], np.sort(routes[:5], axis=2))
    assert np.array_equal(rows["pass-1/rank-0/1"], np.sort(routes[5:], axis=2))
    assert any("physical to logical" in note for note in found.told)


def test_without_a_map_nobody_knows_the_experts(tmp_path, config):
    path = dump(tmp_path / "d", 0, [record_of(1, 0, physical(moe(), physical_map()), [ROWS])], None)
    refused(tmp_path, path, "nobody knows which expert its ids mean", model_config=config)


def test_files_of_all_ranks_belong_together(tmp_path, config):
    mapping = physical_map()
    one, other = physical(moe(1, 5), mapping), physical(moe(2, 5), mapping)
    early, late = one.copy(), one.copy()
    early[3:], late[:3] = -1, -1  # ranks of a pipeline have their own layers
    dump(tmp_path / "d", 0, [record_of(1, 0, one, [5]), record_of(2, 0, early, [5], first=90)], mapping)
    dump(tmp_path / "d", 1, [record_of(1, 1, one, [5]), record_of(2, 1, late, [5], first=90)], mapping)
    dump(tmp_path / "d", 2, [record_of(1, 2, other, [5], first=50)], mapping)
    found = imported(tmp_path, tmp_path / "d", model_config=config)
    rows = foreign.rows_of(found.routes)
    assert sorted(rows) == ["pass-1/rank-0/0", "pass-1/rank-2/0", "pass-2/rank-0/0"]
    assert np.array_equal(rows["pass-2/rank-0/0"], np.sort(moe(1, 5), axis=2))
    assert np.array_equal(rows["pass-1/rank-2/0"], np.sort(moe(2, 5), axis=2))
    assert any("1 records of passes that another rank has too" in note for note in found.told)
    assert any("1 records of a pass were put together" in note for note in found.told)


def test_generated_tokens_and_chunks(tmp_path, config):
    mapping = physical_map()
    records = [
        record_of(1, 0, physical(moe(1, 4), mapping), [4]),
        record_of(2, 0, physical(moe(2, 3), mapping), [3], start=4),
        record_of(3, 0, physical(moe(3, 2), mapping), None),
    ]
    found = imported(tmp_path, dump(tmp_path / "d", 0, records, mapping), model_config=config)
    assert found.routes.tokens == 7 and any("2 generated tokens were left out" in note for note in found.told)
    assert any("1 texts begin after their first token" in note for note in found.told)


def test_dense_layers_need_a_config(tmp_path):
    mapping = physical_map()
    path = dump(tmp_path / "d", 0, [record_of(1, 0, physical(moe(), mapping), [ROWS])], mapping)
    refused(tmp_path, path, "0 experts at layer 0, but 2 at layer 1.*--model-config")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"extend_seq_lens": [3]}, "extend_seq_lens sum to 3"),
        ({"input_ids": [1]}, "are not of the 9 tokens"),
        ({"topk_ids_of_layer": None}, "expected whole numbers"),
        ({"forward_pass_id": "x"}, "forward_pass_id"),
    ],
)
def test_records_that_cannot_be(tmp_path, config, change, told):
    mapping = physical_map()
    path = dump(tmp_path / "d", 0, [{**record_of(1, 0, physical(moe(), mapping), [ROWS]), **change}], mapping)
    refused(tmp_path, path, told, model_config=config)


def test_records_of_other_modes_and_ids_beyond_the_map(tmp_path, config):
    mapping = physical_map()
    fine = record_of(1, 0, physical(moe(), mapping), [ROWS])
    path = dump(tmp_path / "d", 0, [{name: value for name, value in fine.items() if name != "topk_ids_of_layer"}], mapping)
    refused(tmp_path, path, "per_token", model_config=config)
    ids = physical(moe(), mapping)
    ids[2, 3, 1] = 99
    dump(tmp_path / "d", 0, [record_of(1, 0, ids, [ROWS])], mapping)
    refused(tmp_path, path, "physical expert 99, but .* has 10", model_config=config)
    dump(tmp_path / "d", 0, [fine, fine], mapping)
    refused(tmp_path, path, "pass 1 of rank 0 came before", model_config=config)
    dump(tmp_path / "d", 0, [fine], mapping + 1)
    refused(tmp_path, path, "9 experts, but 8 were given", model_config=config)
    three = physical(foreign.routing(np.random.default_rng(0), ROWS, MOE, EXPERTS, 3), mapping)
    dump(tmp_path / "d", 0, [record_of(1, 0, three, [ROWS])], mapping)
    refused(tmp_path, path, "3 of 8 columns are in use, expected top-k 2", model_config=config)


def stat(folder: Path, rank: int, counts: np.ndarray) -> Path:
    import torch

    folder.mkdir(exist_ok=True)
    path = folder / f"expert_distribution_recorder_1700000000.{rank}_{rank}.pt"
    torch.save({"rank": rank, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None}, path)
    return path


def steps(*seeds: int) -> np.ndarray:
    tables = np.stack([foreign.hits_of(moe(seed, 40), EXPERTS) for seed in seeds])
    return np.pad(tables, [(0, 1), (1, 0), (0, 0)])  # an empty step of the buffer, a dense layer


def test_counts_of_the_recorder(tmp_path, config):
    stat(tmp_path / "d", 0, steps(1, 2))
    stat(tmp_path / "d", 1, steps(3, 4))
    found = imported(tmp_path, tmp_path / "d", model_config=config)
    assert found.format == "sglang-recorder" and not found.routes.by_documents and found.routes.shape.layers == (1, 2, 3)
    assert np.array_equal(found.routes.whole().hits[0], steps(1, 2, 3, 4).sum(axis=0)[1:])
    assert "cannot be said" in dbes.score(tmp_path / "out").verdict or len(found.routes.shape.domains) == 1


def test_counts_that_every_rank_was_sent(tmp_path, config):
    for rank in range(3):
        stat(tmp_path / "d", rank, steps(1, 2))
    found = imported(tmp_path, tmp_path / "d", model_config=config)
    assert np.array_equal(found.routes.whole().hits[0], steps(1, 2).sum(axis=0)[1:])
    assert any("2 dumps repeat" in note for note in found.told)


def test_two_modes_in_one_import(tmp_path, config):
    mapping = physical_map()
    dump(tmp_path / "d", 0, [record_of(1, 0, physical(moe(), mapping), [ROWS])], mapping)
    stat(tmp_path / "d", 1, steps(1))
    refused(tmp_path, tmp_path / "d", "import them apart", model_config=config)


# TensorRT-LLM


def statistic(folder: Path, ranks: list[dict[str, np.ndarray]], **meta: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": K, **meta}))
    for rank, counts in enumerate(ranks):
        save_file(counts, folder / f"rank{rank}.safetensors")
    return folder


def iterations(*seeds: int) -> dict[str, np.ndarray]:
    tables = [foreign.hits_of(moe(seed), EXPERTS) for seed in seeds]
    return {f"{50 + step}_{layer + 1}": row for step, table in enumerate(tables) for layer, row in enumerate(table)}


def total(*seeds: int) -> np.ndarray:
    return np.sum([foreign.hits_of(moe(seed), EXPERTS) for seed in seeds], axis=0)


def test_statistics_of_tensorrt(tmp_path):
    statistic(tmp_path / "law", [iterations(1, 2), iterations(3, 4)])
    statistic(tmp_path / "code", [iterations(5, 6), iterations(5, 6)])
    found = imported(tmp_path, tmp_path / "law", tmp_path / "code")
    assert found.format == "trtllm" and found.routes.shape.domains == ("law", "code") and found.routes.shape.layers == (1, 2, 3)
    assert np.array_equal(found.routes.whole().hits, [total(1, 2, 3, 4), total(5, 6)])
    assert any("1 ranks repeat" in note for note in found.told)


@pytest.mark.parametrize(
    ("counts", "meta", "told"),
    [
        ({"a": np.ones(8, np.int64)}, {}, "expected keys <iteration>_<layer>"),
        ({"1_1": np.ones(4, np.int64)}, {}, "4 experts, but meta_info.json says 8"),
        ({"1_1": -np.ones(8, np.int64)}, {}, "whole numbers from 0"),
        ({**iterations(1), "51_1": np.ones(8, np.int64)}, {}, "layer 2 has 1 of 2 iterations"),
        ({"1_1": np.ones(8, np.int64), "1_2": 2 * np.ones(8, np.int64)}, {}, "8 slots at layer 1, but 16 at layer 2"),
        (iterations(1), {"num_experts": "8"}, "meta_info.json: num_experts"),
        (iterations(1), {"num_experts_per_token": 5}, "no multiple of top_k"),
    ],
)
def test_statistics_that_cannot_be(tmp_path, counts, meta, told):
    refused(tmp_path, statistic(tmp_path / "d", [counts], **meta), told)


def test_statistics_that_are_damaged(tmp_path):
    folder = statistic(tmp_path / "d", [iterations(1)])
    whole = (folder / "rank0.safetensors").read_bytes()
    for content in (whole[:-8], whole[:20], b"", b"\xff" * 8 + whole):
        (folder / "rank0.safetensors").write_bytes(content)
        refused(tmp_path, folder, "rank0.safetensors: not a safetensors file")
    (folder / "rank0.safetensors").write_bytes(whole)
    (folder / "meta_info.json").unlink()
    refused(tmp_path, folder, "meta_info.json: no such file", format="trtllm")
    (folder / "rank0.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(SourceError, match=r"no rank<r>\.safetensors"):
        imported(tmp_path, folder, format="trtllm")
