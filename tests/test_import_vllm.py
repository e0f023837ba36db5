"""Importing what vLLM returns, in all forms it comes in, with the traps of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

import dbes
from dbes.errors import DbesError, SourceError
from dbes.importing import routes as writing

LAYERS, EXPERTS, K, PROMPT, OUTPUT = 3, 8, 2, 6, 4
ROWS = PROMPT + OUTPUT - 1


@pytest.fixture
def ids() -> np.ndarray:
    return foreign.routing(np.random.default_rng(3), ROWS, LAYERS, EXPERTS, K)


@pytest.fixture
def tokens() -> tuple[list[int], list[int]]:
    return list(range(100, 100 + PROMPT)), list(range(200, 200 + OUTPUT))


def imported(tmp_path: Path, *sources: Path, **options: Any) -> Any:
    return dbes.import_routing(list(sources), output_path=tmp_path / "out", **{"format": "vllm", "experts": EXPERTS, **options})


def refused(tmp_path: Path, path: Path, told: str, **options: Any) -> None:
    with pytest.raises(DbesError, match=told) as caught:
        imported(tmp_path, path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value) and not (tmp_path / "out").exists()


def test_a_response_of_the_server(tmp_path, ids, tokens):
    path = foreign.write_lines(tmp_path / "a.jsonl", [foreign.vllm_response("cmpl-1", ids.astype(np.uint8), *tokens)])
    found = imported(tmp_path, path, format="auto")
    assert found.format == "vllm"
    (shard,) = list(found.routes)
    assert np.array_equal(foreign.rows_of(found.routes)["cmpl-1"], np.sort(ids, axis=2))
    assert shard.token_ids.tolist() == [*tokens[0], *tokens[1]][:-1]  # the last token never ran
    assert shard.phase.tolist() == [0] * PROMPT + [1] * (OUTPUT - 1) and shard.positions.tolist() == list(range(ROWS))


@pytest.mark.parametrize("lacking", [1, -1])
def test_rows_must_be_those_of_the_tokens_that_ran(tmp_path, ids, tokens, lacking):
    other = ids[:-1] if lacking == 1 else np.concatenate([ids, ids[:1]])
    path = foreign.write_lines(tmp_path / "a.jsonl", [foreign.vllm_response("r", other.astype(np.uint8), *tokens)])
    refused(tmp_path, path, rf"{ROWS - lacking} rows of routing, expected {ROWS}")


def test_a_start_after_the_beginning(tmp_path, ids, tokens):
    response = foreign.vllm_response("r", ids[2:].astype(np.uint8), *tokens)
    response["choices"][0]["routed_experts_prompt_start"] = 2
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [response]))
    (shard,) = list(found.routes)
    assert shard.positions.tolist() == list(range(2, ROWS)) and shard.token_ids.tolist() == [*tokens[0], *tokens[1]][2:-1]
    assert shard.phase.tolist() == [0] * (PROMPT - 2) + [1] * (OUTPUT - 1)
    assert any("2 tokens before" in note for note in found.told)


def test_several_choices_of_one_prompt_are_one_text(tmp_path, ids, tokens):
    response = foreign.vllm_response("r", ids.astype(np.uint8), *tokens)
    response["choices"].append({**response["choices"][0], "index": 1, "routed_experts": foreign.base64_npy(ids[::-1].astype(np.uint8))})
    for choice in response["choices"]:
        del choice["token_ids"]
    response["usage"]["completion_tokens"] = 2 * OUTPUT  # of both choices together
    shape = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [response])).routes.shape
    assert shape.document_ids == ("r/0", "r/1") and shape.document_source == ("r", "r")


def test_dense_layers_are_dropped_by_the_config(tmp_path, ids, tokens):
    whole = np.zeros((ROWS, LAYERS + 1, K), np.uint8)
    whole[:, 1:] = ids
    path = foreign.write_lines(tmp_path / "a.jsonl", [foreign.vllm_response("r", whole, *tokens)])
    refused(tmp_path, path, "stands twice in row 0 at layer 0.*--model-config")
    config = foreign.config(tmp_path, layers=LAYERS + 1, experts=EXPERTS, k=K, mlp_only_layers=[0])
    found = imported(tmp_path, path, model_config=config, experts=None)
    assert found.routes.shape.layers == (1, 2, 3) and np.array_equal(foreign.rows_of(found.routes)["r"], np.sort(ids, axis=2))
    assert any("1 dense layers were dropped" in note for note in found.told)


def test_only_moe_layers_are_numbered_by_the_config(tmp_path, ids, tokens):
    path = foreign.write_lines(tmp_path / "a.jsonl", [foreign.vllm_response("r", ids.astype(np.uint8), *tokens)])
    config = foreign.config(tmp_path, layers=LAYERS + 1, experts=EXPERTS, k=K, first_k_dense_replace=1)
    assert imported(tmp_path, path, model_config=config).routes.shape.layers == (1, 2, 3)


def test_a_config_of_another_model(tmp_path, ids, tokens):
    path = foreign.write_lines(tmp_path / "a.jsonl", [foreign.vllm_response("r", ids.astype(np.uint8), *tokens)])
    refused(tmp_path, path, "3 layers, but .* has 9", model_config=foreign.config(tmp_path, layers=9, experts=EXPERTS, k=K))


def test_zeros_of_unsupported_kernels_are_no_routing(tmp_path, ids, tokens):
    path = foreign.write_lines(tmp_path / "a.jsonl", [
        foreign.vllm_response("fine", ids.astype(np.uint8), *tokens), foreign.vllm_response("zeros", np.zeros_like(ids, np.uint8), *tokens)
    ])  # fmt: skip
    config = foreign.config(tmp_path, layers=LAYERS, experts=EXPERTS, k=K)
    refused(tmp_path, path, "line 2.*stands twice.*did not record routing", model_config=config)


def test_zeros_with_one_expert_a_token(tmp_path):
    whole = foreign.routing(np.random.default_rng(0), 20, LAYERS, EXPERTS, 1)
    whole[:, 0] = 0
    path = tmp_path / "a.npy"
    np.save(path, whole.astype(np.uint8))
    refused(tmp_path, path, "every token has expert 0 at layer 0.*--model-config")
    config = foreign.config(tmp_path, layers=LAYERS, experts=EXPERTS, k=1)
    assert any("every token has expert 0" in note for note in imported(tmp_path, path, model_config=config).told)


def test_the_split_form_of_021_with_a_cached_prefix(tmp_path, ids, tokens):
    prompt = ids[:PROMPT].astype(np.int16)
    prompt[:3] = -1
    record = {
        "request_id": "r", "prompt_token_ids": tokens[0], "prompt_routed_experts": prompt.tolist(),
        "outputs": [{"index": 0, "token_ids": tokens[1], "routed_experts": ids[PROMPT:].tolist()}],
    }  # fmt: skip
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record]))
    rows = foreign.rows_of(found.routes)["r"]
    assert (rows[:3] == -1).all() and np.array_equal(rows[3:], np.sort(ids[3:], axis=2))
    (shard,) = list(found.routes)
    assert shard.phase.tolist() == [0] * PROMPT + [1] * (OUTPUT - 1)
    assert any("3 tokens have no routing" in note for note in found.told)
    counted = dbes.Counts.load(tmp_path / "out" / "counts" / "all") if dbes.score(tmp_path / "out", permutations=0) else None
    assert counted is not None and counted.whole().hits.sum() == (ROWS - 3) * LAYERS * K


def test_a_row_missing_at_some_layers_only(tmp_path, ids, tokens):
    broken = ids.astype(np.int16)
    broken[4, 1] = -1
    path = foreign.write_lines(tmp_path / "a.jsonl", [foreign.vllm_response("r", broken, *tokens)])
    refused(tmp_path, path, "row 4 has 2 experts at layer 0, but 0 at layer 1")


@pytest.mark.parametrize("suffix", ["npy", "npz", "npz of requests"])
def test_arrays(tmp_path, ids, tokens, suffix):
    stored = ids.astype(np.uint16)
    if suffix == "npy":
        path = tmp_path / "request.npy"
        path.write_bytes(foreign.npy(stored))
    elif suffix == "npz":
        path = tmp_path / "request.npz"
        np.savez_compressed(path, routed_experts=stored, prompt_token_ids=tokens[0], token_ids=tokens[1])
    else:
        path = tmp_path / "request.npz"
        np.savez(path, a=stored, b=stored[:4])
    found = imported(tmp_path, path, format="auto")
    rows = list(foreign.rows_of(found.routes).values())
    assert np.array_equal(rows[0], np.sort(ids, axis=2))
    assert len(rows) == (2 if suffix == "npz of requests" else 1)
    (shard,) = list(found.routes)
    assert (shard.token_ids is not None) == (suffix == "npz")


def test_a_long_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_TOKENS", 64)
    long = foreign.routing(np.random.default_rng(0), 200, LAYERS + 1, EXPERTS, K)
    long[:, 0] = 0
    path = tmp_path / "long.npy"
    np.save(path, np.asfortranarray(long.astype(np.uint8)))
    config = foreign.config(tmp_path, layers=LAYERS + 1, experts=EXPERTS, k=K, mlp_only_layers=[0])
    rows = foreign.rows_of(imported(tmp_path, path, model_config=config).routes)
    assert np.array_equal(np.concatenate(list(rows.values())), np.sort(long[:, 1:], axis=2))


def test_256_experts_in_8_bits(tmp_path):
    ids = foreign.routing(np.random.default_rng(0), 30, 2, 256, 8)
    path = tmp_path / "a.npy"
    np.save(path, ids.astype(np.uint8))
    rows = foreign.rows_of(imported(tmp_path, path, experts=256).routes)
    assert np.array_equal(next(iter(rows.values())), np.sort(ids, axis=2))


def test_responses_without_routing(tmp_path, ids, tokens):
    plain = foreign.vllm_response("plain", ids.astype(np.uint8), *tokens)
    del plain["choices"][0]["routed_experts"]
    path = foreign.write_lines(tmp_path / "a.jsonl", [plain])
    refused(tmp_path, path, "not while streaming.*Rust front end")
    found = imported(tmp_path, foreign.write_lines(path, [plain, foreign.vllm_response("r", ids.astype(np.uint8), *tokens)]))
    assert any("1 responses without" in note for note in found.told)


def test_the_final_chunk_of_generate(tmp_path, ids, tokens):
    routed = foreign.base64_npy(ids.astype(np.uint8))
    chunks = [
        {"request_id": "g", "choices": [{"index": 0, "token_ids": tokens[1][:2], "routed_experts": None}]},
        {"request_id": "g", "choices": [{"index": 0, "token_ids": tokens[1][2:], "routed_experts": routed}]},
    ]
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", chunks))
    assert np.array_equal(foreign.rows_of(found.routes)["g"], np.sort(ids, axis=2))


def hostile(ids: np.ndarray) -> dict[str, tuple[bytes, str]]:
    good = foreign.npy(ids.astype(np.uint8))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000000, 8), }"
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64
    return {
        "cut": (good[:-5], "cut short"),
        "longer": (good + b"x", "damaged"),
        "huge": (huge, "need .* bytes, the file holds"),
        "objects": (foreign.npy(np.asarray([{"a": 1}], object)), "pickled Python objects"),
        "floats": (foreign.npy(ids.astype(np.float32)), "expected whole numbers"),
        "flat": (foreign.npy(ids.reshape(-1)), "expected whole numbers"),
        "no npy": (b"hello", "not a .npy file"),
        "empty": (b"", "not a .npy file"),
        "header": (b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118, "not a .npy file"),
    }


@pytest.mark.parametrize("kind", list(hostile(np.zeros((2, 2, 2)))))
def test_files_that_are_none(tmp_path, ids, kind):
    content, told = hostile(ids)[kind]
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    refused(tmp_path, path, told)


def test_an_archive_that_is_none(tmp_path, ids):
    path = tmp_path / "bad.npz"
    np.savez(path, routed_experts=ids)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PK\x03\x04" + b"\0" * 50, b""):
        path.write_bytes(content)
        refused(tmp_path, path, "not an .npz file")
    path.write_bytes(whole.replace(b"\x93NUMPY", b"\x93NUMPX"))
    refused(tmp_path, path, "not")


def test_an_archive_that_unpacks_without_end(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, routed_experts=np.zeros((2**24, 2, 2), np.uint8))
    refused(tmp_path, path, "that unpack to")


def test_objects_in_an_archive(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, routed_experts=np.asarray([[1], [1, 2]], object))
    refused(tmp_path, path, "pickled Python objects")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"routed_experts": "AAAA*"}, "choices.0., routed_experts: not base64"),
        ({"routed_experts": 7}, "expected a list or the base64"),
        ({"token_ids": [1, -1, 2, 3]}, "token_ids: expected token ids"),
        ({"routed_experts_prompt_start": -1}, "routed_experts_prompt_start"),
        ({"routed_experts_prompt_start": "1"}, "routed_experts_prompt_start"),
    ],
)
def test_responses_that_cannot_be(tmp_path, ids, tokens, change, told):
    response = foreign.vllm_response("r", ids.astype(np.uint8), *tokens)
    response["choices"][0].update(change)
    refused(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [response]), told)


def test_other_files_in_a_folder_are_left_out(tmp_path, ids):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "notes.md").write_text("x")
    np.save(tmp_path / "logs" / "a.npy", ids)
    found = imported(tmp_path, tmp_path / "logs")
    assert found.routes.shape.document_ids == ("logs/a",) and any("1 files of other names" in note for note in found.told)
    with pytest.raises(SourceError, match=r"notes.md: vllm files end with"):
        dbes.import_routing(tmp_path / "logs" / "notes.md", output_path=tmp_path / "o", format="vllm", experts=8)
