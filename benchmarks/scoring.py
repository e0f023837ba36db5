"""How long, and with how much memory, a large trace is scored.

A synthetic trace (1 M tokens, 2,000 documents, 8 domains, 48 layers, 128 experts, top-8) is written as shards to a temporary folder and
scored by ``dbes.score`` with 1,000 permutations and all intervals in a process of its own.

    python benchmarks/scoring.py results.json

``--case NAME``: one of the sizes below, whole or of some of its layers (``--part LAYERS``). ``--against FOLDER``: scored with the code of
another checkout too, in the same run, so that ratios can be told on a machine that others use:

    python benchmarks/scoring.py results.json --case documents10k --part 2 --against ../before

``--counting``: the trace is counted only, for example of many short documents:

    python benchmarks/scoring.py results.json --counting --documents 50000

``--draws 3``: with so many draws of a random router beside it. All threads of BLAS but one are taken away, or their waiting would count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dbes.trace.types import RoutingShape, TokenRoutes, storage_dtype
from dbes.trace.writer import TraceWriter

SHARD_TOKENS = 1 << 16

CASES: dict[str, dict[str, int]] = {
    "usual": {},
    "documents1k": {"documents": 1000, "tokens": 500_000},
    "documents10k": {"documents": 10_000, "tokens": 200_000, "domains": 50, "layers": 94, "draws": 3, "permutations": 200},
    "documents50k": {"documents": 50_000, "tokens": 500_000, "permutations": 200},
    "tokens1m": {"layers": 16, "experts": 64, "permutations": 200},
    "tokens4m": {"tokens": 4_000_000, "layers": 16, "experts": 64, "permutations": 200},
    "layers94": {"tokens": 300_000, "layers": 94, "permutations": 200},
}
"""Sizes that differ from the usual one, which the defaults of the options are."""

CHILD = """
import json, resource, sys, time
start = time.perf_counter()
import dbes
dbes.score
imported = time.perf_counter()
result = dbes.score(dbes.Trace.load(sys.argv[1]), permutations=int(sys.argv[2]))
end = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
record = result.record("specialization")
print(json.dumps({
    "import_seconds": round(imported - start, 2),
    "score_seconds": round(end - imported, 2),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    "peak_gib": round(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20, 3),
    "specialization": record.value,
    "p": record.p,
    "records": len(result.calibrated),
    "specialists": len(result.specialists),
}))
"""


COUNTING = """
import json, resource, sys, time
from pathlib import Path
import dbes.scoring.stored as stored
from dbes.scoring.counting import count_routes
from dbes.scoring.counts import Counts
from dbes.trace.store import Trace

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss counts what the parent held
    return {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2), "peak_gib": round(peak / 2**20, 3)}

start = time.perf_counter()
counts = count_routes(Trace.load(sys.argv[1]))
counted = time.perf_counter()
found = {"count_seconds": round(counted - start, 2), "counted": used()}
stored.save_counts(counts, Path(sys.argv[1]) / "counts")
saved = time.perf_counter()
totals = Counts.load(Path(sys.argv[1]) / "counts").totals()
found |= {"save_seconds": round(saved - counted, 2), "read_seconds": round(time.perf_counter() - saved, 2), "saved_and_read": used()}
size = sum(path.stat().st_size for path in (Path(sys.argv[1]) / "counts").iterdir())
found |= {"hits": int(totals.hits.sum()), "counts_gib": round(size / 2**30, 3)}
print(json.dumps(found))
"""


def write_trace(folder: Path, *, tokens: int, documents: int, domains: int, layers: int, experts: int, top_k: int, seed: int) -> None:
    """Documents of log-normal length; each (document, layer) favours some experts, and domains lean to blocks of experts."""
    random = np.random.default_rng(seed)
    share = random.lognormal(0, 0.5, documents)
    lengths = np.maximum(2, np.round(share / share.sum() * tokens)).astype(int)
    lengths[0] = max(2, lengths[0] + tokens - lengths.sum())
    domain = np.sort(np.arange(documents) % domains)
    shape = RoutingShape(
        layers=tuple(range(layers)),
        experts=(experts,) * layers,
        top_k=(top_k,) * layers,
        domains=tuple(f"domain{index}" for index in range(domains)),
        document_domain=domain.astype(np.int32),
        document_ids=tuple(f"text-{index}" for index in range(documents)),
    )
    writer = TraceWriter(folder, shape, {"model": "synthetic"})
    parts: list[dict[str, np.ndarray]] = []
    for document, length in enumerate(lengths):
        # k distinct experts: a random start and odd stride over the experts of the document, shifted by its domain.
        start = (
            random.integers(0, experts // 2, (length, layers, 1))
            + domain[document] * (experts // domains)
            + random.integers(0, 16, (1, layers, 1))
        )
        stride = 2 * random.integers(0, experts // 2, (length, layers, 1)) + 1
        ids = ((start + stride * np.arange(top_k)) % experts).astype(storage_dtype(experts))
        weights = random.random((length, layers, top_k), dtype=np.float32)
        scaled = random.random((length, layers), dtype=np.float32)
        parts.append(
            {
                "ids": ids,
                "document": np.full(length, document, np.int32),
                "positions": np.arange(length, dtype=np.int32),
                "token_ids": random.zipf(1.3, length).clip(max=50_000).astype(np.int32),
                "weights": (weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
                "logit_margins": scaled.astype(np.float16),
                "selection_margins": scaled,
                "scaled_margins": scaled.astype(np.float16),
                "kept": (top_k - (random.random((length, layers, 4), dtype=np.float32) < [0, 0.01, 0.1, 0.5])).astype(np.uint8),
            }
        )
        if sum(len(part["document"]) for part in parts) >= SHARD_TOKENS or document == documents - 1:
            writer.write(TokenRoutes(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}))
            parts = []
    writer.finish()


def write_routers(folder: Path, draws: int, size: dict[str, int]) -> None:
    """The trace, and below it the draws of a random router, each the control of the one before."""
    for seed in range(draws + 1):
        write_trace(folder, **size, seed=seed)
        folder = folder / "control"


def child(script: str, folder: str, permutations: int, code: Path | None = None) -> dict[str, Any]:
    """What a process of its own measures, with the code of this checkout or of another."""
    code = (Path(__file__).parents[1] if code is None else code).resolve()
    shutil.rmtree(Path(folder) / "counts", ignore_errors=True)  # what an earlier process kept
    command = [sys.executable, "-c", script, folder, str(permutations)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=code).stdout)


def measure(size: dict[str, int], *, permutations: int, draws: int, counting: bool, against: Path | None) -> dict[str, Any]:
    """Seconds and memory of scoring (or only counting) a trace of this size in a child process, and with the code of ``against``."""
    script = COUNTING if counting else CHILD
    with tempfile.TemporaryDirectory(prefix="dbes-scoring-") as folder:
        start = time.perf_counter()
        write_routers(Path(folder), draws, size)
        written = time.perf_counter() - start
        before = None if against is None else child(script, folder, permutations, against)
        load = os.getloadavg()[0]
        start = time.perf_counter()
        found = child(script, folder, permutations)
        wall = time.perf_counter() - start
    if before is not None:
        ratios = {name: round(found[name] / before[name], 3) for name in ("cpu_seconds", "peak_gib") if name in found}
        found |= {"before": before, "ratio": ratios}
    return {
        "what": "count a trace on disk, save and read the counts"
        if counting
        else "score a trace on disk, every metric, permutations and intervals",
        "size": {**size, "permutations": permutations, "draws": draws},
        "wall_seconds": round(wall, 2),
        **found,
        "limits": {"peak_gib": 2},
        "write_seconds": round(written, 1),
        "load_before": round(load, 2),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="where to write the measurements")
    parser.add_argument("--case", choices=CASES, default="usual", help="a size with a name; options that are given win over it")
    parser.add_argument("--part", type=int, metavar="LAYERS", help="so many of its layers only")
    parser.add_argument("--counting", action="store_true", help="count only")
    parser.add_argument("--against", type=Path, help="another checkout, whose code scores the same trace first")
    usual = {
        "permutations": 1000,
        "draws": 0,
        "tokens": 1_000_000,
        "documents": 2000,
        "domains": 8,
        "layers": 48,
        "experts": 128,
        "top_k": 8,
    }
    for name, default in usual.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{default:,} unless the case says otherwise")
    given = vars(parser.parse_args())
    path, case, part, counting, against = (given.pop(name) for name in ("json", "case", "part", "counting", "against"))
    size = usual | CASES[case] | {name: value for name, value in given.items() if value is not None}
    whole = size["layers"]
    size["layers"] = min(whole, part or whole)
    how = {name: size.pop(name) for name in ("permutations", "draws")}
    found = {"case": case, "layers_of_case": whole} | measure(size, **how, counting=counting, against=against)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
