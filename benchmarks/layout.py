"""The list of modules in CONTRIBUTING.md, from the first line of each module's docstring.

    python benchmarks/layout.py

Packages stand in the order of the layers, the command line first. A test compares the list with the tree.
"""

from __future__ import annotations

import ast
from pathlib import Path

from imports import PACKAGE, layers_of

CHECKOUT = Path(__file__).parents[1]
START, END = "<!-- modules: make layout -->\n", "<!-- end of modules -->\n"


def first_line(path: Path) -> str:
    """What a module says of itself, as Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    if not text:
        raise SystemExit(f"{path.relative_to(CHECKOUT)}: has no docstring")
    return text.splitlines()[0].replace(":math:`", "`").replace("``", "`").replace("|", "\\|")


def modules_of(part: Path) -> list[Path]:
    """The files of a package or module, the package's own first."""
    if part.is_dir():
        return sorted(part.rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path.name))
    return [part.with_suffix(".py")]


def module_list() -> str:
    """The table: a row for each package, in bold, and for each module."""
    folder = CHECKOUT / PACKAGE
    found = [folder / "__init__.py", *(path for layer in layers_of(CHECKOUT) for part in layer for path in modules_of(folder / part))]
    rows = ["| module | what it holds |", "|---|---|"]
    for path in found:
        name = path.relative_to(CHECKOUT).as_posix()
        name = f"**{name.removesuffix('/__init__.py')}/**" if path.name == "__init__.py" else f"`{name.removeprefix(f'{PACKAGE}/')}`"
        rows.append(f"| {name} | {first_line(path)} |")
    return "\n".join(rows) + "\n"


def with_modules(text: str) -> str:
    """CONTRIBUTING.md with the list as the code has it."""
    before, rest = text.split(START)
    return before + START + "\n" + module_list() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    page = CHECKOUT / "CONTRIBUTING.md"
    page.write_text(with_modules(page.read_text("utf-8")), "utf-8")
