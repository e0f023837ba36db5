"""The expert counts in OLMoE's pickles as CSV, read without running them: ``python unpickled.py FOLDER > counts.csv``.

A pickle is a program. This reads its instructions with pickletools and carries out only those that build lists of
``collections.Counter`` from numpy integers to integers; anything else is refused. Each file of the folder is a domain, named by it;
its list has the counters of layers 0, 7 and 15 (for either model), as ``scripts/run_routing_analysis.py`` of OLMoE writes them.
"""

from __future__ import annotations

import pickletools
import sys
from pathlib import Path
from typing import Any

LAYERS = (0, 7, 15)
SCALAR = ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")
INT64 = "int64"
MARK = object()
NUMBERS = ("BININT", "BININT1", "BININT2", "SHORT_BINBYTES", "SHORT_BINUNICODE")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def counters(content: bytes) -> list[dict[int, int]]:
    """The counters of a pickle.

    Raises:
        ValueError: it holds anything else.
    """
    stack: list[Any] = []
    memo: list[Any] = []

    def since_mark() -> list[Any]:
        place = max(number for number, each in enumerate(stack) if each is MARK)
        found = stack[place + 1 :]
        del stack[place:]
        return found

    for code, given, _ in pickletools.genops(content):
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[given])
            case "MARK":
                stack.append(MARK)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in NUMBERS:
                stack.append(given)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(code.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "STACK_GLOBAL":
                stack[-2:] = [(stack[-2], stack[-1])]
            case "BUILD":  # the byte order of a dtype
                if (state := stack.pop())[:2] != (3, "<") or stack[-1] != INT64:
                    raise ValueError(f"a state {state} of something else than a little-endian integer")
            case "REDUCE":
                arguments = stack.pop()
                stack[-1] = _made(stack[-1], arguments)
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "STOP":
                return _checked(stack.pop())
            case name:
                raise ValueError(f"instruction {name}, which counts do not need")
    raise ValueError("cut short")


def _made(what: Any, arguments: tuple) -> Any:
    if what == ("collections", "Counter") and all(isinstance(each, dict) for each in arguments) and len(arguments) <= 1:
        return dict(*arguments)
    if what == ("numpy", "dtype") and arguments[0] == "i8":
        return INT64
    if what in SCALAR and arguments[0] == INT64 and isinstance(arguments[1], bytes) and len(arguments[1]) == 8:
        return int.from_bytes(arguments[1], "little", signed=True)
    raise ValueError(f"a call of {what}, which counts do not need")


def _checked(found: Any) -> list[dict[int, int]]:
    listed = found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else [{None: None}]
    if all(type(number) is int and number >= 0 for each in listed for pair in each.items() for number in pair):
        return listed
    raise ValueError("expected a list of counters of experts")


def as_csv(folder: Path, without: tuple[str, ...] = ()) -> str:
    """Rows ``domain,layer,expert,count`` of every pickle in a folder."""
    rows = ["domain,layer,expert,count"]
    for path in sorted(folder.glob("*.pkl")):
        if path.stem in without:
            continue
        for layer, counts in zip(LAYERS, counters(path.read_bytes()), strict=True):
            rows += [f"{path.stem},{layer},{expert},{count}" for expert, count in sorted(counts.items())]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_csv(Path(sys.argv[1])))
