"""Files that were cut, changed in one byte, or are of another format: every format answers with one line, or imports what is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import dbes
from dbes.errors import DbesError
from dbes.importing.detection import FORMATS, format_of

LAYERS, EXPERTS, K = 2, 4, 2
IDS = foreign.routing(np.random.default_rng(0), 6, LAYERS, EXPERTS, K)


def vllm(folder: Path) -> Path:
    return foreign.write_lines(folder / "a.jsonl", [foreign.vllm_response("r", IDS.astype(np.uint8), [1, 2, 3, 4, 5], [6, 7])])


def sglang(folder: Path) -> Path:
    import base64

    meta = {"prompt_tokens": 5, "completion_tokens": 2, "routed_experts": base64.b64encode(IDS.astype("<i4").tobytes()).decode()}
    return foreign.write_lines(folder / "a.jsonl", [{"meta_info": meta}])


def recorder(folder: Path) -> Path:
    import torch

    ids = np.full((LAYERS, 6, 8), -1, np.int32)
    ids[:, :, :K] = np.moveaxis(IDS, 1, 0)
    record = {"forward_pass_id": 1, "rank": 0, "input_ids": list(range(6)), "positions": list(range(6)), "extend_seq_lens": [6]}
    path = folder / "expert_distribution_recorder_1_0.pt"
    mapping = torch.arange(EXPERTS).expand(LAYERS, EXPERTS).clone()
    torch.save({"records": [{**record, "topk_ids_of_layer": torch.from_numpy(ids)}], "last_physical_to_logical_map": mapping}, path)
    return path


def imatrix(folder: Path) -> Path:
    return foreign.gguf_imatrix(folder / "a.gguf", dict(enumerate(foreign.hits_of(IDS, EXPERTS))), chunks=2, size=3)


def trtllm(folder: Path) -> Path:
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": K}))
    save_file({f"1_{layer}": row for layer, row in enumerate(foreign.hits_of(IDS, EXPERTS))}, folder / "rank0.safetensors")
    return folder / "rank0.safetensors"


def gptoss(folder: Path) -> Path:
    rows = [{f"token_{token}": {f"layer_{layer}": {"selected_experts": row.tolist(), "selected_probs": [0.5, 0.5]}
             for layer, row in enumerate(IDS[token])}} for token in range(6)]  # fmt: skip
    return foreign.write_json(folder / "a.json", {"dataset": "d", "router_data": rows})


def flame(folder: Path) -> Path:
    for layer in range(LAYERS):
        pq.write_table(pa.table({"indices": IDS[:, layer].tolist(), "scores": [[0.5, 0.5]] * 6}), folder / f"layer_{layer}.parquet")
    return folder / "layer_1.parquet"


def esft(folder: Path) -> Path:
    for layer in range(LAYERS):
        ids = IDS[:, layer].reshape(-1).tolist()
        (folder / f"layer_{layer}.txt").write_text("\t".join(map(str, ids)) + "\t\t" + "\t".join(["0.5"] * len(ids)) + "\n")
    return folder / "layer_1.txt"


def reference(folder: Path) -> Path:
    return foreign.write_lines(folder / "a.jsonl", [
        {"request_id": "r", "token_index": token, "output_token_id": 3, "layers": {
            str(layer): {"expert_ids": row.tolist(), "weights": [0.5, 0.5]} for layer, row in enumerate(IDS[token])}} for token in range(6)
    ])  # fmt: skip


def counts(folder: Path) -> Path:
    rows = [f"{layer},{expert},{count}" for (layer, expert), count in np.ndenumerate(foreign.hits_of(IDS, EXPERTS))]
    path = folder / "a.csv"
    path.write_text("\n".join(["layer,expert,count", *rows]) + "\n")
    return path


def counts_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", logical_count=foreign.hits_of(IDS, EXPERTS))
    return folder / "a.npz"


def vllm_npy(folder: Path) -> Path:
    np.save(folder / "a.npy", IDS.astype(np.uint8))
    return folder / "a.npy"


def jsonl(folder: Path) -> Path:
    return foreign.write_lines(folder / "a.jsonl", [{"id": "a", "domain": "d", "routes": IDS.tolist(), "token_ids": list(range(6))}])


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "vllm": ("vllm", vllm), "vllm npy": ("vllm", vllm_npy), "sglang": ("sglang", sglang), "sglang-recorder": ("sglang-recorder", recorder),
    "imatrix": ("imatrix", imatrix), "trtllm": ("trtllm", trtllm), "gptoss-json": ("gptoss-json", gptoss), "flame": ("flame", flame),
    "esft": ("esft", esft), "dbes-jsonl": ("dbes-jsonl", reference), "counts": ("counts", counts), "counts npz": ("counts", counts_npz),
    "jsonl": ("jsonl", jsonl),
}  # fmt: skip


def options(folder: Path, format: str) -> dict[str, Any]:
    return {"format": format, "model_config": foreign.config(folder, layers=LAYERS, experts=EXPERTS, k=K), "overwrite": True}


def attempt(folder: Path, format: str) -> str | None:
    """Import the folder; the message when it is refused. Anything else than an error of dbes is a defect."""
    try:
        dbes.import_routing(folder / "in", output_path=folder / "out", **options(folder, format))
    except DbesError as problem:
        assert "\n" not in str(problem) and len(str(problem)) < 1500
        return str(problem)
    return None


def test_every_format_is_here():
    assert {name for name, _ in WRITERS.values()} == set(FORMATS)


@pytest.mark.parametrize("name", list(WRITERS))
def test_what_is_whole_is_imported_and_recognized(tmp_path, name):
    format, write = WRITERS[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    assert attempt(tmp_path, format) is None
    found = dbes.import_routing(tmp_path / "in", output_path=tmp_path / "auto", **{**options(tmp_path, format), "format": "auto"})
    assert found.format == format and any(f"taken for {format}" in note for note in found.told)


@pytest.mark.parametrize("name", list(WRITERS))
def test_cut_files(tmp_path, name):
    format, write = WRITERS[name]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in")
    whole = path.read_bytes()
    for length in sorted({0, 1, 5, *np.linspace(8, len(whole) - 2, 10).astype(int)}):
        path.write_bytes(whole[:length])
        message = attempt(tmp_path, format)
        # padding, whole lines or the digits of a last weight may be cut off without a trace
        assert message is not None or format in ("imatrix", "counts", "dbes-jsonl", "esft"), length


@pytest.mark.parametrize("name", list(WRITERS))
def test_changed_bytes(tmp_path, name):
    format, write = WRITERS[name]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 30):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        attempt(tmp_path, format)


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_other_formats(tmp_path, name):
    suffixes = format_of(name).suffixes
    for other, (theirs, write) in WRITERS.items():
        if theirs == name:
            continue
        folder = tmp_path / other.replace(" ", "-")
        (folder / "in").mkdir(parents=True)
        written = folder / "written"
        written.mkdir()
        content = write(written).read_bytes()
        for suffix in suffixes:
            for path in (folder / "in").iterdir():
                path.unlink()
            target = folder / "in" / f"rank0{suffix}"
            target.write_bytes(content)
            assert attempt(folder, name) is not None, (other, suffix)


def test_deep_and_long_json(tmp_path):
    (tmp_path / "in").mkdir()
    deep = "[" * 200_000 + "]" * 200_000
    digits = "9" * 10_000
    keys = {"gptoss-json": "router_data", "counts": "logical_count", "jsonl": "routes", "dbes-jsonl": "layers"}
    for name in (*keys, "vllm", "sglang"):
        suffix = ".json" if name in ("gptoss-json", "counts") else ".jsonl"
        start = f'{{"id": "a", "{keys.get(name, "routed_experts")}": '
        for content in (deep, f"{start}{deep}}}", f"{start}[[[{digits}]]]}}", "null", '"a"', "[]", "{}", "[1]"):
            for path in (tmp_path / "in").iterdir():
                path.unlink()
            (tmp_path / "in" / f"a{suffix}").write_text(content)
            assert attempt(tmp_path, name) is not None, (name, content[:40])


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
@pytest.mark.parametrize("name", FORMATS)
def test_a_pipe_is_no_file(tmp_path, name):
    import os

    suffix = format_of(name).suffixes[0]
    path = tmp_path / ("layer_0" + suffix if name in ("esft", "flame") else "rank0" + suffix)
    os.mkfifo(path)
    with pytest.raises(DbesError, match="pipe"):
        dbes.import_routing(path, output_path=tmp_path / "out", **options(tmp_path, name))
