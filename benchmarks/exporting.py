"""How fast, and with how much memory, routes and counts are exported as tables.

Synthetic routing of 48 layers, 128 experts, top-8 is saved as a trace, and exported in a process of its own for every format and kind of
rows.

    python benchmarks/exporting.py results.json
    python benchmarks/exporting.py results.json --tokens 1000000 --formats parquet
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dbes.exporting.tables import ROWS, TABLES
from dbes.trace.store import Trace

LAYERS, EXPERTS, K, DOMAINS = 48, 128, 8, 8

CHILD = """
import json, resource, sys, time
from pathlib import Path
from dbes.exporting.export import export
source, out, format, rows = sys.argv[1:]
start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
export(source, out, format=format, rows=rows)
end, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": round(end - start, 2),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime, 2),
    "loaded_gib": round(before.ru_maxrss / 2**20, 3),
    "peak_gib": round(usage.ru_maxrss / 2**20, 3),
    "bytes": Path(out).stat().st_size,
}))
"""


def recording(folder: Path, tokens: int, length: int) -> Path:
    """A trace whose domains prefer some experts."""
    rng = np.random.default_rng(0)
    texts = max(tokens // length, DOMAINS)
    domain = np.arange(texts) % DOMAINS
    start = rng.integers(0, EXPERTS // 2, (texts * length, LAYERS, 1)) + 8 * np.repeat(domain, length)[:, None, None]
    step = 2 * rng.integers(0, EXPERTS // 2, start.shape) + 1  # odd, so that no expert comes twice
    ids = ((start + step * np.arange(K)) % EXPERTS).astype(np.uint8)
    names = [f"domain-{number}" for number in range(DOMAINS)]
    Trace.from_arrays(
        ids, document=np.repeat(np.arange(texts), length), domain=domain, domains=names, layers=range(LAYERS), experts=EXPERTS,
        weights=rng.random(ids.shape, np.float32), token_ids=rng.integers(0, 50_000, len(ids)),
    ).save(folder)  # fmt: skip
    return folder


def measure(source: Path, out: Path, format: str, rows: str) -> dict[str, Any]:
    """What a process of its own says of an export."""
    words = [sys.executable, "-c", CHILD, str(source), str(out), format, rows]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    out.unlink()
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=500, help="tokens of a document")
    parser.add_argument("--formats", default=",".join(TABLES))
    asked = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "sizes": [LAYERS, EXPERTS, K], "exports": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = recording(Path(folder) / "trace", asked.tokens, asked.length)
        tokens = Trace.load(source).shape.document_domain.size * asked.length
        measure(source, Path(folder) / "first", "parquet", ROWS[0])  # counts once, which the trace keeps
        for format in asked.formats.split(","):
            for rows in ROWS:
                made = measure(source, Path(folder) / f"table.{format}", format, rows)
                made |= {"tokens": tokens, "tokens_per_second": round(tokens / max(made["seconds"], 0.01))}
                found["exports"][f"{format} {rows}"] = made
                print(format, rows, json.dumps(made))
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
