"""Cautions about the texts of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from typer.testing import CliRunner

from dbes.cli import app
from dbes.evaluation.request import read_benchmark
from dbes.scoring.counts import Counts
from dbes.scoring.facts import task_facts
from dbes.tasks.cautions import by_domain, caution_lines, cautions
from dbes.tasks.documents import Document
from dbes.tasks.task import load_task, read_documents


def documents(domain: str, texts: Sequence[str], source: str | None = None) -> list[Document]:
    return [Document(id=f"{domain}-{index}", domain=domain, text=text, source_document=source) for index, text in enumerate(texts)]


def plain(domain: str, *, count: int = 10, words: int = 20) -> list[str]:
    """Texts that share nothing."""
    return [f"{index} of {domain} " + "word " * words for index in range(count)]


def lines(*domains: list[Document]) -> list[str]:
    return caution_lines(cautions([document for domain in domains for document in domain]))


def test_a_sound_benchmark_has_none() -> None:
    assert lines(documents("law", plain("law")), documents("math", plain("math"))) == []


def test_few_texts_are_told_in_one_line() -> None:
    (line,) = lines(documents("law", plain("law", count=7)), documents("math", plain("math")), documents("code", plain("code", count=2)))
    assert line == "fewer than 8 source texts, too few for intervals: law (7), code (2)"


def test_one_source_is_told_as_such() -> None:
    (line,) = lines(documents("law", plain("law"), source="one"), documents("math", plain("math")))
    assert line == "one source text only, no interval and no test: law (10 documents)"


def test_lengths_that_differ_much_are_told() -> None:
    (line,) = lines(documents("law", plain("law", words=90)), documents("math", plain("math")), documents("code", plain("code", words=40)))
    assert "3 times as long" in line
    assert "law (median 459 characters, math 110)" in line
    assert "code (" not in line


def test_the_domains_of_the_rarer_format_are_told() -> None:
    broken = documents("code", [f"{text}\nend" for text in plain("code")])
    (line,) = lines(broken, documents("law", plain("law")), documents("math", plain("math")))
    assert line.endswith("a router can follow: code (line breaks)")
    other = documents("rust", [f"{text}\nend" for text in plain("rust")])
    (line,) = lines(broken, documents("law", plain("law")), other)
    assert line.endswith("a router can follow: law (no line breaks)")


def test_texts_of_one_template_are_told() -> None:
    (line,) = lines(documents("quiz", [f"Question: {text}" for text in plain("quiz")]), documents("math", plain("math")))
    assert line.endswith("quiz (texts begin with 'Question')")


def test_copies_within_and_between_domains_are_told() -> None:
    law, math = plain("law"), plain("math")
    between, within = lines(documents("law", [*law, math[0]]), documents("math", [*math, math[1], math[1]]))
    assert between == "texts that are also in another domain: law (1 in math), math (1 in law)"
    assert within.endswith("no further evidence: math (2 of 12)")


def test_the_shipped_benchmark_has_the_format_of_one_domain_as_its_only_caution() -> None:
    found = cautions(read_documents(load_task("embedded")))
    assert [*by_domain(found)] == ["general"]
    assert by_domain(found)["general"] == ["another format than other domains, which a router can follow (no line breaks)"]


def test_validate_prints_a_line_for_each_kind(tmp_path: Path) -> None:
    task = {"name": "mine", "version": 1, "domains": {"law": ["a b", "a b"], "math": plain("math")}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task), "utf-8")
    done = CliRunner().invoke(app, ["tasks", "validate", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 0
    told = [line for line in done.stdout.splitlines() if line.startswith("Caution: ")]
    assert len(told) == 3
    assert "Caution: one source text only, no interval and no test: law (2 copies of a text)" in told


def test_one_line_tells_of_thirty_domains() -> None:
    few = [document for number in range(30) for document in documents(f"d{number:02}", plain(f"d{number:02}", count=3))]
    (line,) = lines(few, documents("math", plain("math")))
    assert line.endswith("d04 (3), d05 (3), and 24 domains more") and "d06" not in line


def test_cautions_stand_beside_the_domain_in_a_result(tmp_path: Path) -> None:
    task = {"name": "mine", "version": 1, "domains": {"law": plain("law", count=3), "math": plain("math")}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task), "utf-8")
    about = {"task": read_benchmark(tmp_path / "mine.yaml").facts}
    counts = Counts.from_arrays(np.ones((2, 1, 4)), domains=["law", "math"], document_domain=[0, 1], top_k=2, provenance=about)
    found = task_facts(counts).domains
    assert found["law"].cautions == ("fewer than 8 source texts, too few for intervals (3)",)
    assert found["math"].cautions == ()
