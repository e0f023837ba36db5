"""The committed pages are what `make reports` makes of the data beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbes.cli import app

REPORTS = Path(__file__).parents[1] / "reports"
COMMANDS = {
    "leaderboard.html": ("compare", "reports/entries", "--format", "html", "--output", "reports/leaderboard.html"),
    "entries/dbes-embedded/report.html": ("report", "reports/entries/dbes-embedded"),
    "intervention/embedded/report.html": ("report", "reports/intervention/embedded"),
    "testbed/report/index.html": ("testbed", "report", "reports/testbed"),
}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data without any page, where the commands of the Makefile find them."""
    shutil.copytree(REPORTS, tmp_path / "reports", ignore=shutil.ignore_patterns("*.html"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "reports"


@pytest.mark.parametrize("page", COMMANDS)
def test_a_committed_page_follows_from_its_data(copy: Path, page: str) -> None:
    assert not (copy / page).exists()
    done = CliRunner().invoke(app, list(COMMANDS[page]))
    assert done.exit_code == 0, done.output
    assert (copy / page).read_bytes() == (REPORTS / page).read_bytes(), "run `make reports`"


def test_no_other_page_is_committed_and_make_builds_each() -> None:
    makefile = (REPORTS.parent / "Makefile").read_text()
    ignored = (REPORTS.parent / ".gitignore").read_text().splitlines()
    for page in COMMANDS:
        if page.endswith("report.html"):
            assert f"!/reports/{page}" in ignored
    kept = [line for line in ignored if line.startswith("!/reports/")]
    assert len(kept) == sum(page.endswith("report.html") for page in COMMANDS)
    built = ("dbes compare reports/entries --format html", "$(SHARED) report $${folder%/}", "$(SHARED) testbed report reports/testbed")
    for words in built:
        assert words in makefile
