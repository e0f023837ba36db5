"""How long, and with how much memory, the agreement of two recordings is found.

Two synthetic traces of 1 M tokens (2,000 documents, 8 domains, 48 layers, 128 experts, top-8, margins) of which a tenth of the rows
differ are written as shards to a temporary folder and compared in a process of its own, from the folders and once more.

    python benchmarks/agreement.py results.json

``--scores``: both are scored and their scores paired as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dbes.trace.types import RoutingShape, TokenRoutes
from dbes.trace.writer import TraceWriter

SHARD_TOKENS = 1 << 16
CHANGED = 0.1

CHILD = """
import json, sys, time
import dbes
dbes.agreement
start, cpu = time.perf_counter(), time.process_time()
found = dbes.agreement(sys.argv[1], sys.argv[2], scores=sys.argv[3] == "scores")
print(json.dumps({
    "seconds": round(time.perf_counter() - start, 2),
    "cpu_seconds": round(time.process_time() - cpu, 2),
    "peak_gib": round(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20, 3),
    "tokens": found.tokens,
    "differing": found.differing.value,
    "scores": len(found.scores),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=2_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--scores", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("first", "second")]
        write(paths, tokens=options.tokens, documents=options.documents, layers=options.layers)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        given = [*map(str, paths), "scores" if options.scores else "routes"]
        run = subprocess.run([sys.executable, "-c", CHILD, *given], env=environment, check=True, capture_output=True, text=True)
    found = {"tokens": options.tokens, "documents": options.documents, "layers": options.layers, "experts": 128, "top_k": 8}
    found |= json.loads(run.stdout)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def write(paths: list[Path], *, tokens: int, documents: int, layers: int) -> None:
    """Both traces, shard by shard: the second has the first's rows, but for those that are drawn again."""
    shape = RoutingShape(
        layers=tuple(range(layers)),
        experts=(128,) * layers,
        top_k=(8,) * layers,
        domains=tuple(f"domain {index}" for index in range(8)),
        document_domain=np.arange(documents, dtype=np.int32) % 8,
        document_ids=tuple(f"document {index}" for index in range(documents)),
    )
    writers = [TraceWriter(path, shape, {"model": path.name}) for path in paths]
    length = tokens // documents
    each = max(1, SHARD_TOKENS // length)
    for first in range(0, documents, each):
        rng = np.random.default_rng(first)
        here = np.arange(first, min(first + each, documents), dtype=np.int32)
        rows = len(here) * length
        # eight different experts: a random start and steps of 16
        ids = ((rng.integers(0, 128, size=(rows, layers, 1)) + 16 * np.arange(8)) % 128).astype(np.uint8)
        moved = rng.random((rows, layers, 1)) < CHANGED
        given = {
            "document": np.repeat(here, length),
            "positions": np.tile(np.arange(length, dtype=np.int32), len(here)),
            "token_ids": rng.integers(0, 50_000, size=rows).astype(np.int32),
            "scaled_margins": rng.lognormal(size=(rows, layers)).astype(np.float16),
            "weights": np.full((rows, layers, 8), 1 / 8, np.float16),
        }
        for writer, chosen in zip(writers, (ids, np.where(moved, (ids + 1) % 128, ids).astype(np.uint8)), strict=True):
            writer.write(TokenRoutes(ids=chosen, **given), last_document=int(here[-1]))
    for writer in writers:
        writer.finish()


if __name__ == "__main__":
    main()
