"""The committed benchmark: what its card, its manifest and its tasks say of it is true."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dbes.files import sha256_of
from dbes.shipped import ROOT
from dbes.tasks.task import load_task, read_documents, separability, task_fingerprint

DATA = ROOT / "benchmark_data"
DOMAINS = ("math", "science", "medicine", "law", "finance", "code", "software_engineering", "general")
FILES = {domain: DATA / "embedded" / f"{domain}.jsonl.gz" for domain in DOMAINS}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        domain: [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n") if line]
        for domain, path in FILES.items()
    }


@pytest.fixture(scope="module")
def builder():
    sys.path.insert(0, str(DATA))
    import build

    yield build
    sys.path.remove(str(DATA))


def test_files_are_those_of_the_tasks_and_the_card():
    card = (DATA / "CARD.md").read_text("utf-8")
    for name in ("embedded", "smoke"):
        task = load_task(name)
        for domain, source in task.domains.items():
            digest = sha256_of(FILES[domain])
            assert list(source.sha256.values()) == [digest]
            assert digest in card
            assert hashlib.sha256(gzip.decompress(FILES[domain].read_bytes())).hexdigest() in card


def test_embedded_task_reads_every_row(rows):
    task = load_task("embedded")
    documents = read_documents(task)
    assert tuple(task.domains) == DOMAINS
    assert [document.id for document in documents] == [row["id"] for domain in DOMAINS for row in rows[domain]]
    assert task_fingerprint(task, documents) == task_fingerprint(task, read_documents(task))
    smoke = Counter(document.domain for document in read_documents(load_task("smoke")))
    assert smoke == {"math": 8, "law": 8, "code": 8, "general": 8}


def test_domains_are_large_enough(rows):
    # 4.5 characters to a token is more than a vocabulary of 4,096 reaches on any of these texts (CARD.md: 2.5 to 3.6)
    for members in rows.values():
        assert len(members) >= 160
        assert sum(len(row["text"]) for row in members) / 4.5 >= 25_000


def test_lengths_are_matched_across_domains(rows):
    classes = {domain: Counter((len(row["text"]) - 450) // 50 for row in members) for domain, members in rows.items()}
    assert all(found == classes["math"] for found in classes.values())
    means = [np.mean([len(row["text"]) for row in members]) for members in rows.values()]
    assert max(means) / min(means) < 1.02


def test_rows_keep_the_schema(rows):
    required = {"id", "domain", "source", "licence", "source_document", "text"}
    seen: set[str] = set()
    for domain, members in rows.items():
        for row in members:
            assert required <= set(row) <= required | {"question", "answer", "choices", "synthetic", "template"}
            assert row["domain"] == domain
            assert ("synthetic" in row) == ("template" in row)
            assert re.fullmatch(r"[0-9a-f]{16}", row["source_document"])
            if "question" in row:
                assert row["answer"] and row["text"].startswith(row["question"])
            assert row["text"] not in seen
            seen.add(row["text"])


def test_text_is_sane(rows):
    for members in rows.values():
        for row in members:
            text = row["text"]
            assert text == unicodedata.normalize("NFC", text)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ufffd\ufeff]|â€|Ã©|&[a-z]+;", text), row["id"]
            assert sum(c.isalnum() or c.isspace() for c in text) / len(text) > 0.6, row["id"]


def test_no_template_covers_more_than_a_twentieth(rows):
    for members in rows.values():
        total = sum(len(row["text"]) for row in members)
        covered: Counter[str] = Counter()
        for row in members:
            if row.get("synthetic"):
                covered[row["template"]] += len(row["text"])
        assert max(covered.values(), default=0) / total <= 0.05
        assert sum(covered.values()) / total <= 0.25


def test_documents_share_no_long_passage(rows, builder):
    seen: dict[int, str] = {}
    for members in rows.values():
        for row in members:
            if row.get("synthetic"):
                continue
            for passage in set(builder.passages(row["text"])):
                assert seen.setdefault(passage, row["source_document"]) == row["source_document"], row["id"]


def test_no_source_of_the_training_text_is_evaluated(rows):
    manifest = json.loads((DATA / "training_manifest.json").read_text("utf-8"))
    assert tuple(manifest) == DOMAINS
    trained = {name for told in manifest.values() for name in told["source_documents"]}
    evaluated = {row["source_document"] for members in rows.values() for row in members}
    assert not trained & evaluated
    for told in manifest.values():
        assert told["documents"] >= 500
        assert told["characters"] >= 400_000
        assert re.fullmatch(r"[0-9a-f]{64}", told["sha256"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_text_when_it_is_there(domain, rows, builder):
    path = ROOT / "build" / "train" / f"{domain}.jsonl"
    told = json.loads((DATA / "training_manifest.json").read_text("utf-8"))[domain]
    if not path.is_file() or sha256_of(path) != told["sha256"]:
        pytest.skip("training text was not built here")
    evaluated = {passage for row in rows[domain] for passage in builder.passages(row["text"])}
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line]
    assert len(texts) == told["documents"]
    # every tenth text is enough to see a broken filter, and keeps this quick
    assert not any(evaluated.intersection(builder.passages(text)) for text in texts[::10])


def test_generated_items_are_made_again_the_same(rows, builder):
    families = {
        "finance": builder.generated_finance.FINANCE,
        "law": builder.generated_law.LAW,
        "medicine": builder.generated_medicine.MEDICINE,
    }
    for domain, named in families.items():
        made = {item.text: item for item in builder.items(named, each=builder.GENERATED_EACH, shortest=450, longest=900)}
        found = [row for row in rows[domain] if row.get("synthetic")]
        assert len(found) >= 30
        assert {row["template"] for row in found} == set(named)
        for row in found:
            assert made[row["text"]].answer == row["answer"]


def test_generated_answers_by_hand(rows):
    """Bond prices are computed again from the numbers in the question."""
    checked = 0
    for row in rows["finance"]:
        if row.get("template") == "bond_price":
            numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
            if "What should you pay" in row["question"]:
                years, face, coupon, rate = numbers
            else:
                face, coupon, years, rate = numbers
            price = sum(face * coupon / 100 / (1 + rate / 100) ** t for t in range(1, years + 1)) + face / (1 + rate / 100) ** years
            assert row["answer"] == f"{price:.2f}"
            checked += 1
    assert checked


def test_card_gives_notices_and_packages(rows):
    card = (DATA / "CARD.md").read_text("utf-8")
    for notice in re.findall(r"\(NOTICES/([^)]+)\)", card):
        assert (DATA / "NOTICES" / notice).stat().st_size > 100
    sources = {row["source"] for members in rows.values() for row in members} - {"generated by build.py"}
    for source in sources:
        name, version = source.rsplit(" ", 1)
        assert f"`{name}` {version}" in card


def test_separability_in_the_card_is_the_measured_one():
    told = separability(read_documents(load_task("embedded")))
    assert f"Words alone tell the domain of {told:.1%}" in (DATA / "CARD.md").read_text("utf-8")
    assert 0.5 < told <= 1


def test_documents_are_cut_between_parts(builder):
    source = builder.S.Source(identity="x", package="p", licence="l", parts=tuple(f"Line {n} " + "word " * 30 for n in range(20)))
    cut = [text for text, _ in builder.documents(source)]
    assert cut
    assert all(450 <= len(text) <= 900 for text in cut)
    lines = [line for text in cut for line in text.split("\n")]
    assert set(lines) <= {part.strip() for part in source.parts}
    assert len(lines) == len(set(lines))


def test_passages_find_what_two_texts_share(builder):
    shared = "the quick brown fox jumps over the lazy dog while seventeen astonished badgers look on"
    one, other = f"Alpha, beta: {shared}. Gamma", f"Delta {shared.upper()} epsilon"
    assert set(builder.passages(one)) & set(builder.passages(other))
    assert not set(builder.passages(one)) & set(builder.passages(other[:60]))
    assert list(builder.passages("too short")) == []


def test_sides_depend_on_the_source_alone(builder):
    share = sum(builder.on_evaluation_side(f"source/{n}", 0.3) for n in range(2000)) / 2000
    assert abs(share - 0.3) < 0.05
    assert builder.on_evaluation_side("a", 1.0)
    assert not builder.on_evaluation_side("a", 0.0)


def test_packed_files_carry_no_time():
    for path in FILES.values():
        assert path.read_bytes()[4:8] == b"\0\0\0\0"
    assert not list(Path(DATA / "embedded").glob("*.jsonl"))
