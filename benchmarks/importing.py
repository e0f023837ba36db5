"""How fast, and with how much memory, routing of other programs is imported, and whether a large import can be scored.

Synthetic routing of 48 layers, 128 experts, top-8 is written in each format to a temporary folder, and imported in a process of its own;
the trace of ``--scored`` is scored in another. Formats of JSON lists hold fewer tokens, whose number the answer says.

    python benchmarks/importing.py results.json
    python benchmarks/importing.py results.json --formats vllm --tokens 10000000 --scored vllm
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, K, DOMAINS = 48, 128, 8, 8
Documents = Iterator[tuple[int, np.ndarray, np.ndarray]]

SMALLER = {"jsonl": 20, "gptoss-json": 50, "esft": 20, "dbes-jsonl": 50, "flame": 5}
"""Formats of text, and what part of the tokens they are measured with."""

CHILD = """
import json, resource, sys, time
start = time.perf_counter()
import dbes
options = json.loads(sys.argv[2])
if sys.argv[1] == "import":
    dbes.import_routing
    imported = time.perf_counter()
    found = dbes.import_routing(**options)
    counts = getattr(found.routes, "tokens")
    about = {"tokens": int(counts if isinstance(counts, int) else counts.sum())}
else:
    dbes.score
    imported = time.perf_counter()
    record = dbes.score(**options).record("specialization")
    about = {"specialization": record.value, "p": record.p}
end = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": round(end - imported, 2),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    "peak_gib": round(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20, 3),
    **about,
}))
"""


def documents(tokens: int, length: int) -> Documents:
    """Documents with ids [length, LAYERS, K] and weights; every domain prefers some experts."""
    rng = np.random.default_rng(0)
    for number in range(max(tokens // length, DOMAINS)):
        start = rng.integers(0, EXPERTS, (length, LAYERS, 1)) * (number % 4 > 0) + 16 * (number % DOMAINS)
        step = 2 * rng.integers(0, EXPERTS // 2, (length, LAYERS, 1)) + 1  # odd, so that no expert comes twice
        yield number, ((start + step * np.arange(K)) % EXPERTS).astype(np.uint8), rng.random((length, LAYERS, K)).round(3)


def text_of(number: int) -> dict[str, Any]:
    return {"id": f"d{number}", "domain": f"domain-{number % DOMAINS}"}


def npy(array: np.ndarray) -> str:
    content = io.BytesIO()
    np.save(content, array)
    return base64.b64encode(content.getvalue()).decode()


def write_vllm(folder: Path, texts: Documents) -> dict[str, Any]:
    with (folder / "a.jsonl").open("w") as lines:
        for number, ids, _ in texts:
            choice = {"index": 0, "prompt_token_ids": list(range(len(ids))), "token_ids": [1], "routed_experts": npy(ids)}
            lines.write(json.dumps({**text_of(number), "choices": [choice]}) + "\n")
    return {"experts": EXPERTS}


def write_sglang(folder: Path, texts: Documents) -> dict[str, Any]:
    with (folder / "a.jsonl").open("w") as lines:
        for number, ids, _ in texts:
            routed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
            meta = {"prompt_tokens": len(ids), "completion_tokens": 1, "routed_experts": routed}
            lines.write(json.dumps({**text_of(number), "meta_info": meta}) + "\n")
    config = folder.with_suffix(".config.json")
    config.write_text(json.dumps({"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": K}))
    return {"model_config": str(config)}


def write_jsonl(folder: Path, texts: Documents) -> dict[str, Any]:
    with (folder / "a.jsonl").open("w") as lines:
        for number, ids, _ in texts:
            lines.write(json.dumps({**text_of(number), "routes": ids.tolist()}) + "\n")
    return {"experts": EXPERTS}


def write_gptoss(folder: Path, texts: Documents) -> dict[str, Any]:
    for number, ids, weights in texts:
        rows = [
            {f"token_{place}": {f"layer_{layer}": {"selected_experts": row.tolist(), "selected_probs": gates.tolist()}
             for layer, (row, gates) in enumerate(zip(ids[place], weights[place], strict=True))}} for place in range(len(ids))
        ]  # fmt: skip
        (folder / f"{number}.json").write_text(json.dumps({"dataset": text_of(number)["domain"], "router_data": rows}))
    return {"experts": EXPERTS}


def write_esft(folder: Path, texts: Documents) -> dict[str, Any]:
    files = [(folder / f"layer_{layer}.txt").open("w") for layer in range(LAYERS)]
    for _, ids, weights in texts:
        for layer, file in enumerate(files):
            file.write("\t\t".join("\t".join(map(str, part[:, layer].reshape(-1).tolist())) for part in (ids, weights)) + "\n")
    for file in files:
        file.close()
    return {"experts": EXPERTS, "top_k": K}


def write_reference(folder: Path, texts: Documents) -> dict[str, Any]:
    with (folder / "a.jsonl").open("w") as lines:
        for number, ids, weights in texts:
            for place in range(len(ids)):
                layers = {str(layer): {"expert_ids": row.tolist(), "weights": gates.tolist()}
                          for layer, (row, gates) in enumerate(zip(ids[place], weights[place], strict=True))}  # fmt: skip
                about = {"request_id": f"d{number}", "token_index": place, "output_token_id": place}
                lines.write(json.dumps({**about, "layers": layers}) + "\n")
    return {"experts": EXPERTS}


def write_flame(folder: Path, texts: Documents) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"indices": pa.list_(pa.int16()), "scores": pa.list_(pa.float16())})
    writers = [pq.ParquetWriter(folder / f"layer_{layer}.parquet", schema) for layer in range(LAYERS)]
    for _, ids, weights in texts:
        offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * K)
        for layer, writer in enumerate(writers):
            parts = (ids[:, layer].reshape(-1).astype(np.int16), weights[:, layer].reshape(-1).astype(np.float16))
            writer.write_table(pa.table([pa.ListArray.from_arrays(offsets, pa.array(part)) for part in parts], schema=schema))
    for writer in writers:
        writer.close()
    return {"experts": EXPERTS}


FORMATS: dict[str, Callable[[Path, Documents], dict[str, Any]]] = {
    "vllm": write_vllm,
    "sglang": write_sglang,
    "flame": write_flame,
    "jsonl": write_jsonl,
    "esft": write_esft,
    "gptoss-json": write_gptoss,
    "dbes-jsonl": write_reference,
}


def child(verb: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own says of an import, or of scoring."""
    done = subprocess.run([sys.executable, "-c", CHILD, verb, json.dumps(options)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(name: str, texts: Documents, folder: Path, *, scored: bool) -> dict[str, Any]:
    source = folder / name
    source.mkdir()
    start = time.perf_counter()
    options = FORMATS[name](source, texts)
    size = sum(path.stat().st_size for path in source.iterdir())
    written = {"source_bytes": size, "writing_seconds": round(time.perf_counter() - start, 1)}
    target = folder / f"{name}.trace"
    found = child("import", {"sources": str(source), "output_path": str(target), "format": name, **options})
    shutil.rmtree(source)
    found |= {"tokens_per_cpu_second": round(found["tokens"] / found["cpu_seconds"]), **written}
    found["trace_bytes"] = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if scored:
        found["score"] = child("score", {"trace": str(target), "permutations": 200})
    shutil.rmtree(target)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a document")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--scored", default="", help="formats whose trace is scored, too")
    asked = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "sizes": [LAYERS, EXPERTS, K], "formats": {}}
    for name in asked.formats.split(","):
        texts = documents(asked.tokens // SMALLER.get(name, 1), asked.length)
        with tempfile.TemporaryDirectory() as folder:
            found["formats"][name] = measure(name, texts, Path(folder), scored=name in asked.scored.split(","))
        print(name, json.dumps(found["formats"][name]))
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        asked.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
