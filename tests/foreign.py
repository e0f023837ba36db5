"""Small writers of the formats that are imported, made from the formats' descriptions alone: nothing here uses dbes.importing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def routing(rng: np.random.Generator, tokens: int, layers: int, experts: int, k: int) -> np.ndarray:
    """Random routes [tokens, layers, k], no expert twice in a row, slots unsorted."""
    return np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k].astype(np.int64)


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=array.dtype.hasobject)
    return content.getvalue()


def base64_npy(array: np.ndarray) -> str:
    return base64.b64encode(npy(array)).decode()


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def config(folder: Path, *, layers: int, experts: int, k: int, **more: Any) -> Path:
    """The config.json of a model."""
    return write_json(folder / "config.json", {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": k, **more})


def vllm_response(name: str, routes: np.ndarray, prompt: Sequence[int], output: Sequence[int], **more: Any) -> dict[str, Any]:
    """What the completions endpoint of vLLM answers; one row for each token that ran, so none for the last."""
    choice = {"index": 0, "text": "", "token_ids": list(output), "prompt_token_ids": list(prompt), "routed_experts": base64_npy(routes)}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(output)}
    return {"id": name, "object": "text_completion", "choices": [choice], "usage": usage, **more}


def gguf_imatrix(path: Path, layers: Mapping[int, np.ndarray], *, chunks: int, size: int, **more: Any) -> Path:
    """A calibration file of llama.cpp: counts of three projections a layer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch="")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type(more.pop("type", "imatrix"))
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    for layer, counts in layers.items():
        for part in ("gate", "up", "down"):
            given = more.get(f"{part}_{layer}", counts)
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            writer.add_tensor(f"{name}.in_sum2", np.ones((len(given), 4), np.float32))
            writer.add_tensor(f"{name}.counts", np.asarray(given, np.float32).reshape(-1, 1))
        writer.add_tensor(f"blk.{layer}.attn_q.weight.counts", np.asarray([[float(chunks * size)]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hits_of(routes: np.ndarray, experts: int) -> np.ndarray:
    """Counts [layers, experts] of routes [tokens, layers, k], by a loop; -1 is no choice."""
    hits = np.zeros((routes.shape[1], experts), np.int64)
    for token in routes:
        for layer, row in enumerate(token):
            for expert in row:
                if expert >= 0:
                    hits[layer, expert] += 1
    return hits


def rows_of(trace: Any) -> dict[str, np.ndarray]:
    """The routes of a trace by document id, int [tokens, layers, k] with -1 where a slot is missing, sorted along slots."""
    found: dict[str, list[np.ndarray]] = {}
    for routes in trace:
        mark = int(np.iinfo(routes.ids.dtype).max)
        ids = routes.ids.astype(np.int64)
        ids[ids == mark] = -1
        for document in np.unique(routes.document):
            found.setdefault(trace.shape.document_ids[document], []).append(np.sort(ids[routes.document == document], axis=2))
    return {name: np.concatenate(parts) for name, parts in found.items()}
