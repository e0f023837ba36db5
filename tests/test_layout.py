"""The package is laid out as CONTRIBUTING.md says, in modules and functions that can be read at a sitting."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(ROOT.joinpath("dbes").rglob("*.py"))}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CONTRIBUTING = ROOT.joinpath("CONTRIBUTING.md").read_text("utf-8")


def test_every_module_is_listed_and_every_listed_module_exists():
    listed = re.findall(r"^\| (?:\*\*(dbes[\w/]*)/\*\*|`([\w/]+\.py)`) \|", CONTRIBUTING, re.MULTILINE)
    names = [f"{package}/__init__.py" if package else f"dbes/{module}" for package, module in listed]
    assert sorted(names) == sorted(MODULES), "make layout"


def test_the_list_says_what_the_modules_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert import_module("layout").with_modules(CONTRIBUTING) == CONTRIBUTING, "make layout"


def test_no_module_is_longer_than_400_lines():
    lines = {name: len(text.splitlines()) for name, text in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_no_function_is_longer_than_80_lines():
    functions = [(name, node) for name, text in MODULES.items() for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS)]
    lines = {f"{name}: {node.name}": node.end_lineno - node.lineno + 1 for name, node in functions}
    assert {name: count for name, count in lines.items() if count > 80} == {}
