"""The index of a folder of results: every result once, newest first, with links that lead somewhere and names that are no markup."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from report_results import HOSTILE, counted_domains, simulated_trace, write_result
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.reporting.page import write_page
from dbes.results import RESULT_FILE


def test_the_index_links_what_is_there(tmp_path: Path) -> None:
    first = write_result(tmp_path / "a b" / "first", simulated_trace(1, model="first"), keep_trace=False, permutations=20)
    write_page(first)
    write_result(tmp_path / "second", simulated_trace(2, model=HOSTILE[0]), keep_trace=False, permutations=20)
    counted_domains(tmp_path / "counts")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / RESULT_FILE).write_text("{", "utf-8")
    (tmp_path / "leaderboard.html").write_text("a comparison", "utf-8")
    assert dbes.report(tmp_path) == tmp_path / "index.html"
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "4 results, newest first" in page and HOSTILE[0] not in page and "&lt;script&gt;" in page
    links = re.findall(r'href="([^"#]+\.html)"', page)
    assert len(links) == 2 and all((tmp_path / unquote(link)).is_file() for link in links)
    record = dbes.load_result(first).record("specialization")
    assert f"{record.score:.1%}" in page and page.count("<tr><td>") == 4
    assert dbes.load_result(first).verdict[:40] in page


def test_a_result_is_no_index_and_a_folder_without_any_says_so(tmp_path: Path) -> None:
    folder = write_result(tmp_path / "one", simulated_trace(1), keep_trace=False, permutations=20)
    assert dbes.report(folder) == folder / "report.html" and not (folder / "index.html").exists()
    (tmp_path / "none").mkdir()
    with pytest.raises(dbes.ResultError, match="no result"):
        dbes.report(tmp_path / "none")
    ran = CliRunner().invoke(app, ["report", str(tmp_path), "--format", "card"])
    assert ran.exit_code == 1
