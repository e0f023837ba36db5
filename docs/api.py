"""Writes ``api.md`` from the signatures and docstrings of what ``import dbes`` offers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dbes

PAGE = Path(__file__).with_name("api.md")

HEAD = """# dbes in Python

Written by `make docs` from signatures and docstrings; the words are those of the command line (`--output-path` is `output_path=`).
The names below are those of `import dbes`; [examples/round.ipynb](../examples/round.ipynb) uses them in one round.
"""

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")


def page() -> str:
    """The text of the page."""
    names = [*dbes._HOMES]
    verbs = [name for name in names if inspect.isfunction(getattr(dbes, name))]
    errors = [name for name in dbes.__all__ if name.endswith("Error")]
    parts = [HEAD, "\n## Verbs\n"]
    for name in verbs:
        parts += [f"\n### {name}\n\n", called(f"dbes.{name}", getattr(dbes, name)), *described(getattr(dbes, name))]
    parts.append("\n## Types\n")
    for name in names:
        if name not in verbs:
            parts += type_part(name, getattr(dbes, name))
    parts.append("\n## Errors\n\n")
    parts += [f"* `{name}`: {inspect.getdoc(getattr(dbes, name))}\n" for name in errors]
    return "".join(parts)


def called(name: str, function: Any) -> str:
    """How a function is called, one argument a line where there are several."""
    signature = inspect.signature(function)
    given = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    words: list[str] = []
    for place, each in enumerate(given):
        if each.kind is each.KEYWORD_ONLY and (not place or given[place - 1].kind is not each.KEYWORD_ONLY):
            words.append("*")
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        default = "" if each.default is each.empty else f" = {each.default!r}"
        words.append(f"{stars}{each.name}: {each.annotation}{default}".replace("'", '"'))
    short = f"{name}({', '.join(words)}) -> {signature.return_annotation}"
    broken = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f") -> {signature.return_annotation}"
    return f"```python\n{short if len(short) <= 100 else broken}\n```\n"


def described(what: Any) -> Iterator[str]:
    """The docstring as Markdown: its sections as lists."""
    section, open_item = "", False
    for line in (inspect.getdoc(what) or "").split("\n"):
        if (found := SECTION.match(line)) is not None:
            section = found[1]
            yield f"\n**{section}**\n\n"
        elif not section:
            yield f"\n{line}" if line and not open_item else f" {line}" if line else "\n"
            open_item = bool(line)
        elif line.startswith("     "):
            yield f"  {line.strip()}\n"
        elif line.strip():
            name, colon, told = line.strip().partition(": ")
            yield f"* `{name}`: {told}\n" if colon and section != "Returns" else f"* {line.strip()}\n"
    if not section:
        yield "\n"


def type_part(name: str, of: type) -> Iterator[str]:
    """A class: what it is, its fields, and its own methods and properties."""
    yield f"\n### {name}\n"
    yield from described(of)
    fields = {field: kind for field, kind in vars(of).get("__annotations__", {}).items() if not field.startswith("_")}
    if fields:
        yield "\n**Fields**\n\n"
        yield from (f"* `{field}: {kind}`\n" for field, kind in fields.items())
    for member, value in vars(of).items():
        inside = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if member.startswith("_") or not inspect.getdoc(inside) or getattr(inside, "__module__", of.__module__) != of.__module__:
            continue
        if isinstance(value, property):
            yield f"\n#### {name}.{member}\n"
            yield from described(value)
        elif inspect.isfunction(inside):
            yield f"\n#### {name}.{member}\n\n"
            yield called(f"{name}.{member}", inside)
            yield from described(inside)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
