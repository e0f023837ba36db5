"""Whether two folders hold the same numbers: results, traces, tables, records and pages, before and after a change of the code.

    python benchmarks/same_numbers.py BEFORE AFTER [--tolerance 1e-12] [--ignore KEY ...] [--renamed OLD=NEW ...]

Compared are the values of files of equal name: JSON and JSONL (numbers and texts), safetensors, parquet and csv (with the type of
each column), and of pages the numbers of the data in them. NaN equals NaN. Left out are what changes with every run (times,
versions, places and the hashes of files that are compared themselves) and the keys and files that ``--ignore`` names. Ends with 1
where a value differs, or where AFTER lacks a file or a value; what only AFTER has is counted as new.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from safetensors.numpy import load_file

IGNORED = frozenset(
    """created seconds cpu_seconds training_seconds tokens_per_second files where versions dbes numpy python torch transformers
    recorded_with_dbes recorded_with_torch recorded_with_transformers""".split()  # noqa: SIM905 (a table of names)
)
PAGE_DATA = re.compile(r'<script type="text/plain" id="data">([^<]*)</script>')
SHOWN = 10


@dataclass
class Comparison:
    """What one pair of files has: how many values, which differ, how many only one side has, and the largest relative difference."""

    values: int = 0
    different: list[str] = field(default_factory=list)
    new: int = 0
    largest: float = 0.0


def leaves(value: Any, ignored: frozenset[str], name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of a JSON value, with the place where it stands; an empty list or object is a value too."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key not in ignored:
                yield from leaves(item, ignored, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, ignored, f"{name}[{index}]")
    else:
        yield name, value


def page_numbers(text: str, ignored: frozenset[str]) -> dict[str, Any]:
    """The numbers of the data that a page carries, without how its charts are drawn."""
    found = PAGE_DATA.search(text)
    data = json.loads(gzip.decompress(base64.b64decode(found[1]))) if found else None
    return {name: value for name, value in leaves(data, ignored | {"specs"}) if isinstance(value, int | float)}


def values_of(path: Path, ignored: frozenset[str]) -> dict[str, Any] | None:
    """The values of a file by name: numbers, texts and arrays; None for a kind of file that is not compared."""
    match path.suffix:
        case ".json":
            return dict(leaves(json.loads(path.read_text("utf-8")), ignored))
        case ".jsonl":
            return dict(leaves([json.loads(line) for line in path.read_text("utf-8").splitlines()], ignored))
        case ".html":
            return page_numbers(path.read_text("utf-8"), ignored)
        case ".safetensors":
            return {name: array for name, array in load_file(path).items() if name not in ignored}
        case ".parquet" | ".csv":
            read = pandas.read_parquet if path.suffix == ".parquet" else pandas.read_csv
            return {str(name): column.to_numpy() for name, column in read(path).items() if name not in ignored}
    return None


def distance(before: Any, after: Any) -> float:
    """The largest relative difference of two values: 0 where they are equal, infinite where they are not comparable."""
    first, second = np.asarray(before), np.asarray(after)
    alike = first.dtype == second.dtype if isinstance(before, np.ndarray) else first.dtype.kind == second.dtype.kind
    if not alike or first.shape != second.shape:
        return math.inf
    if first.dtype.kind not in "iuf":
        return 0.0 if pandas.Series(first.ravel()).equals(pandas.Series(second.ravel())) else math.inf
    unequal = (first != second) & ~((first != first) & (second != second))
    if not unequal.any():
        return 0.0
    one, other = first[unequal].astype(np.float64), second[unequal].astype(np.float64)
    if not (np.isfinite(one) & np.isfinite(other)).all():
        return math.inf
    return float((abs(one - other) / np.maximum(abs(one), abs(other))).max())


def compare_files(before: Path, after: Path, ignored: frozenset[str], renamed: dict[str, str], tolerance: float) -> Comparison | None:
    """What differs between two files; None where their kind is not compared."""
    first, second = values_of(before, ignored), values_of(after, ignored)
    if first is None or second is None:
        return None
    for old, new in renamed.items():
        first = {re.sub(rf"(^|\.){re.escape(old)}(?=$|[.\[])", rf"\g<1>{new}", name): value for name, value in first.items()}
    found = Comparison(values=len(first), new=len(second.keys() - first.keys()))
    for name, value in first.items():
        if name not in second:
            found.different.append(f"{name}: missing in AFTER")
            continue
        far = distance(value, second[name])
        if not math.isinf(far):
            found.largest = max(found.largest, far)
        if far > tolerance:
            how = f"{clipped(value)} -> {clipped(second[name])}"
            found.different.append(f"{name}: {how}" + ("" if math.isinf(far) else f" (relative {far:.1e})"))
    return found


def clipped(value: Any) -> str:
    text = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def files_below(folder: Path, ignored: frozenset[str]) -> dict[str, Path]:
    """The files of a folder by their path in it; a file alone stands under its suffix."""
    if folder.is_file():
        return {f"*{folder.suffix}": folder}
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ignored}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference that is allowed (default: none)")
    parser.add_argument("--ignore", nargs="*", default=[], metavar="KEY", help="further keys, arrays, columns or files to leave out")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="keys of JSON that have another name in AFTER")
    options = parser.parse_args()
    ignored = IGNORED | set(options.ignore)
    renamed = dict(pair.split("=", 1) for pair in options.renamed)
    before, after = files_below(options.before, ignored), files_below(options.after, ignored)
    if not before.keys() & after.keys():
        parser.error(f"no file of {options.before} is in {options.after}")

    values = new = wrong = 0
    largest, others = 0.0, []
    for name in sorted(before.keys() & after.keys()):
        found = compare_files(before[name], after[name], ignored, renamed, options.tolerance)
        if found is None:
            others.append(name)
            continue
        values, new, wrong, largest = values + found.values, new + found.new, wrong + len(found.different), max(largest, found.largest)
        equal = f"equal within {found.largest:.1e}" if found.largest else "equal"
        print(
            f"{f'{len(found.different)} differ' if found.different else equal:>20}  {found.values:8} values  {name}"
            + (f"  ({found.new} new)" if found.new else "")
        )
        for line in found.different[:SHOWN]:
            print(f"{'':22}{line}")
        if len(found.different) > SHOWN:
            print(f"{'':22}and {len(found.different) - SHOWN} more")
    missing, added = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    for name in missing:
        print(f"{'missing in AFTER':>20}  {name}")
    compared = len(before) - len(missing) - len(others)
    print(f"{compared} files, {values} values compared: {wrong} differ, {len(missing)} files missing, relative difference <= {largest:.1e}")
    print(f"new: {len(added)} files, {new} values; not compared: {len(others)} files of other kinds")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
