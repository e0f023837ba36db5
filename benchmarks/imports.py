"""The import graph of the package as tables: what imports what, modules per layer, cycles, imports that go upward.

    python benchmarks/imports.py [CHECKOUT]

Layers are those of the checkout's .importlinter, 1 the lowest; parts are the modules and packages directly below ``dbes``. Imports
that are only for types (``TYPE_CHECKING``) are left out, as they never run. Ends with 1 when there is a cycle of parts, a cycle of
modules while they are loaded, or an upward import.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import grimp
import networkx

PACKAGE = "dbes"
ROOT = f"{PACKAGE} itself"
"""The package's own ``__init__``, which stands above all layers: it passes the public names on."""


def part_of(module: str) -> str:
    """The module or package directly below ``dbes`` to which a module belongs."""
    return module.split(".")[1] if "." in module else ROOT


def layers_of(checkout: Path) -> list[list[str]]:
    """The layers of the contract that names the most of them, highest first, each the parts that stand side by side."""
    parser = ConfigParser()
    parser.read(checkout / ".importlinter", encoding="utf-8")
    longest = max((parser[section].get("layers", "").strip().splitlines() for section in parser.sections()), key=len)
    return [[part.strip("() ").removeprefix(f"{PACKAGE}.") for part in re.split("[|:]", line)] for line in longest]


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of nodes of which each imports every other, directly or not."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(list(edges)))
    return sorted(sorted(group) for group in groups if len(group) > 1)


def upward(edges: Iterable[tuple[str, str]], layers: list[list[str]]) -> list[tuple[str, str]]:
    """Imports of a higher layer, or of a part that stands in the same layer."""
    height = {part: rank for rank, layer in enumerate(layers) for part in layer}
    return sorted(
        (start, end) for start, end in edges if start != end and start in height and end in height and height[end] <= height[start]
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width, the first flush left."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [header, *rows])


@dataclass(frozen=True)
class Imports:
    """The modules of the package with their lines, and which imports which: when it is loaded, and inside a function."""

    lines: dict[str, int]
    loading: list[tuple[str, str]]
    deferred: list[tuple[str, str]]

    @property
    def all(self) -> list[tuple[str, str]]:
        return self.loading + self.deferred


def imports_of(checkout: Path) -> Imports:
    """What the modules of a checkout import of each other."""
    sys.path.insert(0, str(checkout))
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    found = Imports({}, [], [])
    for module in sorted(graph.modules):
        path = checkout.joinpath(*module.split("."))
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8").splitlines()
        found.lines[module] = len(source)
        for other in sorted(graph.find_modules_directly_imported_by(module)):
            numbers = [detail["line_number"] for detail in graph.get_import_details(importer=module, imported=other)]
            inside = all(source[number - 1].startswith(" ") for number in numbers)
            (found.deferred if inside else found.loading).append((module, other))
    return found


def drawing(imports: Imports, layers: list[list[str]]) -> tuple[str, bool]:
    """What is printed, and whether the graph is free of cycles of parts, cycles while loading and upward imports."""
    edges = Counter((part_of(start), part_of(end)) for start, end in imports.all if part_of(start) != part_of(end))
    modules, written = Counter(map(part_of, imports.lines)), Counter()
    for module, count in imports.lines.items():
        written[part_of(module)] += count
    layered = [part for layer in layers for part in layer if part in modules]
    outside = [part for part in sorted(modules) if part not in layered and part != ROOT]
    order = [part for part in [ROOT, *outside, *layered] if part in modules]
    height = {part: str(len(layers) - index) for index, layer in enumerate(layers) for part in layer}
    rows = [
        [
            f"{number:2} {part}",
            height.get(part, "-"),
            str(modules[part]),
            str(written[part]),
            *("·" if part == other else str(edges.get((part, other), "")) for other in order),
        ]
        for number, part in enumerate(order, 1)
    ]
    numbers = [str(number) for number in range(1, len(order) + 1)]
    matrix = table(["what the row imports", "layer", "modules", "lines", *numbers], rows)

    loading, parts, wrong = cycles(imports.loading), cycles(edges), upward(edges, layers)
    whole = [group for group in cycles(imports.all) if group not in loading]
    summary = [
        f"{len(modules)} parts in {len(layers)} layers, {len(imports.lines)} modules, {sum(imports.lines.values())} lines, "
        f"{len(imports.all)} imports ({len(imports.deferred)} of them inside functions)",
        f"cycles of parts: {len(parts)}{listed(parts)}",
        f"cycles of modules while they are loaded: {len(loading)}{listed(loading)}",
        f"cycles of modules with imports inside functions: {len(whole)}{listed(whole)}",
        f"upward imports: {len(wrong)}{listed([f'{start} -> {end} ({edges[start, end]})'] for start, end in wrong)}",
        f"parts outside the layers: {len(outside)}{listed([part] for part in outside)}",
    ]
    return f"{matrix}\n\n" + "\n".join(summary), not (parts or loading or wrong)


def listed(groups: Iterable[list[str]]) -> str:
    """Groups one below the other, under the line that counts them."""
    return "".join("\n  " + ", ".join(group) for group in groups)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1], help="folder of a clone (default: this one)")
    checkout = parser.parse_args().checkout.resolve()
    text, clean = drawing(imports_of(checkout), layers_of(checkout))
    print(text)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
