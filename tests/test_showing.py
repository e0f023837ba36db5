"""What a console and a notebook show of results, traces and counts: a few lines, nothing that is run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from report_results import HOSTILE, counted_domains, simulated_trace
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.scoring.counting import count_routes
from dbes.scoring.score import score


def test_a_few_lines_instead_of_everything() -> None:
    trace = simulated_trace()
    result, counts = score(trace, permutations=20), count_routes(trace)
    for shown, words in (
        (result, ("Result", "simulated", "4 MoE layers of 16 experts, top-2", "4 domains", result.verdict[:60])),
        (trace, ("Trace", "simulated", "48 documents of 4 domains", f"{trace.tokens:,} tokens", "random routers  1")),
        (counts, ("Counts", "simulated", "48 documents of 4 domains")),
    ):
        assert repr(shown) == str(shown) and len(repr(shown)) < 2_000
        assert all(word in repr(shown) for word in words), repr(shown)
        assert all(word.split("  ")[0] in shown._repr_html_() for word in words[1:3])


def test_counts_of_domains_do_not_speak_of_documents(tmp_path: Path) -> None:
    assert "verdict" in repr(dbes.load_result(counted_domains(tmp_path)))


@pytest.mark.parametrize("name", HOSTILE[:6], ids=range(6))
def test_names_are_never_markup_or_commands_of_a_terminal(name: str) -> None:
    trace = simulated_trace(model=name)
    assert "<script" not in trace._repr_html_() and "<img" not in trace._repr_html_()
    assert not any((ord(character) < 32 and character != "\n") or character in "\u202e\u2028" for character in repr(trace))


def test_the_version_is_told() -> None:
    ran = CliRunner().invoke(app, ["--version"])
    assert ran.exit_code == 0
    assert ran.output.strip() == f"dbes {version('dbes')}"


def test_a_model_is_called_what_is_asked(tmp_path: Path) -> None:
    found = dbes.evaluate("embedded", tasks="smoke", limit=4, permutations=20, output_path=tmp_path, name="my <model>")
    assert found.model.name == "my <model>" and found.folder.parts[len(tmp_path.parts)] == "my__model__"
    again = dbes.evaluate("embedded", tasks="smoke", limit=4, permutations=20, output_path=tmp_path, name="my <model>")
    assert again.created == found.created
    with pytest.raises(dbes.SettingError, match="name: expected some text"):
        dbes.evaluate("embedded", tasks="smoke", limit=4, output_path=tmp_path, name=" ")


def test_a_clone_beside_a_running_python_does_not_hide_the_package(tmp_path: Path) -> None:
    """A folder called dbes in the current folder is a namespace without a name in it; the installed package comes first all the same."""
    (tmp_path / "dbes" / "dbes").mkdir(parents=True)
    (tmp_path / "dbes" / "README.md").write_text("a clone", "utf-8")
    script = "import dbes; print(dbes.Trace.__name__)"
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # what is installed, and nothing else
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=without, capture_output=True, text=True, check=True)
    assert ran.stdout == "Trace\n"
