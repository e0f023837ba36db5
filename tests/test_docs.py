"""The page of the API says what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import dbes

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "api.py"


def test_the_api_page_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("api_page", SCRIPT)
    assert spec is not None and spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    page = api.page()
    assert api.PAGE.read_text("utf-8") == page, "run make docs"
    headings = {line.removeprefix("### ") for line in page.split("\n") if line.startswith("### ")}
    errors = {line.split("`")[1] for line in page.split("## Errors")[1].split("\n") if line.startswith("* ")}
    assert headings | errors == set(dbes.__all__)
    assert " at 0x" not in page
