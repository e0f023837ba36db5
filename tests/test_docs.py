"""The pages that are written by scripts say what the code says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import dbes
from dbes.testbed.settings import TrainSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_page", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    return script("plan")


def test_the_api_page_is_that_of_the_code() -> None:
    api = script("api")
    page = api.page()
    assert api.PAGE.read_text("utf-8") == page, "run make docs"
    headings = {line.removeprefix("### ") for line in page.split("\n") if line.startswith("### ")}
    errors = {line.split("`")[1] for line in page.split("## Errors")[1].split("\n") if line.startswith("* ")}
    assert headings | errors == set(dbes.__all__)
    assert " at 0x" not in page


def test_the_page_of_well_known_checkpoints_is_that_of_the_code(plan: ModuleType) -> None:
    assert plan.PAGE.read_text("utf-8") == plan.page(), "run make docs"
    page = plan.PAGE.read_text("utf-8")
    # as their publishers say; gpt-oss counts its 5.1 B active parameters without the embedding
    for row in ("OLMoE-1B-7B | 6.9 B | 1.3 B", "Mixtral-8x7B | 46.7 B | 12.9 B", "Qwen3-235B-A22B | 235.1 B | 22.2 B"):
        assert f"| {row} |" in page
    assert "| DeepSeek-V3 | 671.0 B |" in page and "| gpt-oss-120b | 116.8 B |" in page
    assert "| Qwen3-235B-A22B | 34.1 B |" in page


def test_the_page_of_commands_is_that_of_the_code() -> None:
    commands = script("commands")
    page = commands.page()
    assert commands.PAGE.read_text("utf-8") == page, "run make docs"
    for name in ("evaluate", "score", "compare", "paths", "tasks init", "testbed train"):
        assert f"## dbes {name}\n" in page


def test_links_of_the_pages_lead_somewhere() -> None:
    root = DOCS.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md"), *(root / "reports").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_example_of_a_checkpoint_can_be_trained() -> None:
    settings = TrainSettings.model_validate(yaml.safe_load((DOCS.parent / "examples" / "checkpoint.yaml").read_text("utf-8")))
    assert settings.model.experts == 32
