"""Cut the embedded mix of the testbed out of the training text.

python benchmark_data/build_mix.py --train-data build/train --out benchmark_data/mix
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from dbes.files import sha256_of, write_bytes, write_text  # noqa: E402
from dbes.shipped import EMBEDDED_MIX  # noqa: E402

BYTES_PER_DOMAIN = 380_000


def write_embedded_mix(train_data: Path, out: Path) -> dict[str, int]:
    """Cut the embedded mix out of the training text: whole documents, in an order by hash, up to a size per domain."""
    sizes, rows_of_card = {}, []
    for path in sorted(train_data.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
        taken: list[Mapping[str, str]] = []
        size = 0
        for row in rows:
            if size >= BYTES_PER_DOMAIN:
                break
            taken.append({key: row[key] for key in ("id", "domain", "source", "licence", "source_document", "text")})
            size += len(row["text"].encode())
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in taken).encode()
        write_bytes(out / f"{path.stem}.jsonl.gz", gzip.compress(content, mtime=0))
        sizes[path.stem] = size
        licences = ", ".join(sorted({row["licence"] for row in taken}))
        rows_of_card.append(
            f"| {path.stem}.jsonl.gz | {len(taken)} | {size:,} | {licences} | `{sha256_of(out / f'{path.stem}.jsonl.gz')}` |"
        )
    write_text(out / "README.md", _README.format(rows="\n".join(rows_of_card)))
    return sizes


_README = """# The small mix of the testbed

Training documents of the embedded benchmark, whole, in an order by hash: so that `dbes testbed run --preset smoke` and the tests
need to build nothing, and no document that a testbed model learned from is ever evaluated. Every line names its package and licence;
the notices stand in `benchmark_data/CARD.md` and `benchmark_data/NOTICES`.

Written by `python benchmark_data/build_mix.py --train-data build/train`.

| file | documents | bytes of text | licences | sha256 |
|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=EMBEDDED_MIX)
    given = parser.parse_args()
    print(json.dumps(write_embedded_mix(given.train_data, given.out)))


if __name__ == "__main__":
    main()
