from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dbes.errors import TaskError
from dbes.files import sha256_of
from dbes.tasks import hub as hub_tasks
from dbes.tasks import local
from dbes.tasks.separability import fold_of, word_counts, word_separability
from dbes.tasks.sources import template_fields
from dbes.tasks.task import (
    Document,
    list_tasks,
    load_task,
    read_documents,
    read_task,
    separability,
    task_facts,
    task_fingerprint,
)


def written(folder: Path, text: str, name: str = "task.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), "utf-8")
    return path


def rows(path: Path, *items: dict) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows(tmp_path / "a.jsonl", {"id": "a1", "text": "one fish"}, {"id": "a2", "text": "two\u2028fish"})
    rows(
        tmp_path / "b.jsonl",
        {"id": "b1", "text": "red", "question": "r?", "answer": 3, "choices": ["x", "y"]},
        {"id": "b2", "text": "blue"},
    )
    return tmp_path


TWO = """
    name: mine
    version: 1
    domains:
      a: {files: [a.jsonl]}
      b: {files: [b.jsonl]}
"""


def problem(folder: Path, text: str) -> str:
    with pytest.raises(TaskError) as caught:
        read_documents(load_task(written(folder, text)))
    return str(caught.value)


# ---------------------------------------------------------------- reading


def test_documents_come_in_the_order_of_the_task(folder):
    documents = read_documents(load_task(written(folder, TWO)))
    assert [document.id for document in documents] == ["a1", "a2", "b1", "b2"]
    assert documents[1].text == "two\u2028fish"
    assert documents[2] == Document(id="b1", domain="b", text="red", question="r?", answer="3", choices=("x", "y"))
    assert [document.domain for document in documents] == ["a", "a", "b", "b"]


def test_limit_is_per_domain_and_takes_the_first(folder):
    task = load_task(written(folder, TWO.replace("files: [b.jsonl]", "files: [b.jsonl], limit: 1")))
    assert [document.id for document in read_documents(task)] == ["a1", "a2", "b1"]
    assert [document.id for document in read_documents(task, limit=1)] == ["a1", "b1"]
    with pytest.raises(TaskError, match="limit is 0"):
        read_documents(task, limit=0)


def test_every_local_format_gives_the_same_texts(folder):
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1, "text": "one"}\n\n{"id": 2, "text": "two"}\n'))
    pd.DataFrame({"key": ["p1"], "title": ["Title"], "body": ["Body"]}).to_parquet(folder / "p.parquet")
    (folder / "poems").mkdir()
    (folder / "poems" / "2.txt").write_text("\ufeffsecond\n", "utf-8")
    (folder / "poems" / "1.txt").write_text("first", "utf-8")
    task = load_task(
        written(
            folder,
            r"""
        name: mine
        version: 2
        domains:
          zipped: {files: [z.jsonl.gz]}
          table: {files: [p.parquet], template: "{title}\n{body}", id_field: key}
          poems: {files: ["poems/*.txt"]}
          plain: {files: [a.jsonl], format: jsonl, text_field: id}
    """,
        )
    )
    documents = read_documents(task)
    assert [(d.domain, d.id, d.text) for d in documents] == [
        ("zipped", "1", "one"),
        ("zipped", "2", "two"),
        ("table", "p1", "Title\nBody"),
        ("poems", "1.txt", "first"),
        ("poems", "2.txt", "second"),
        ("plain", "a1", "a1"),
        ("plain", "a2", "a2"),
    ]


def test_ids_default_to_file_and_line(folder):
    rows(folder / "a.jsonl", {"text": "x"}, {"text": "y"})
    assert [d.id for d in read_documents(load_task(written(folder, TWO)))][:2] == ["a/a.jsonl:1", "a/a.jsonl:2"]


def test_digest_is_checked(folder):
    good = sha256_of(folder / "a.jsonl")
    named = TWO.replace("files: [a.jsonl]", f"files: [a.jsonl], sha256: {{a.jsonl: {good}}}")
    assert len(read_documents(load_task(written(folder, named)))) == 4
    assert "sha256" in problem(folder, named.replace(good, "a" * 64))


def test_fingerprint_sees_every_part(folder):
    task = load_task(written(folder, TWO))
    documents = read_documents(task)
    marks = {task_fingerprint(task, documents)}
    marks.add(task_fingerprint(task, documents[:-1]))
    marks.add(task_fingerprint(task, [*documents[:-1], Document("b2", "b", "blue!")]))
    marks.add(task_fingerprint(task, [*documents[:-1], Document("b3", "b", "blue")]))
    marks.add(task_fingerprint(task, [*documents[:-1], Document("b2", "c", "blue")]))
    for change in ("version: 2", "version: 1\n    window: 64"):
        marks.add(task_fingerprint(load_task(written(folder, TWO.replace("version: 1", change))), documents))
    assert len(marks) == 7
    assert task_fingerprint(task, documents) in marks


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(("version: 1", "version: 1\n    colour: red"), "colour: unknown key", id="unknown key"),
        pytest.param(("files: [a.jsonl]", "files: [a.jsonl], text: body"), "domains.a.text: unknown key", id="unknown key of a domain"),
        pytest.param(("version: 1", ""), "version: required key is missing", id="missing key"),
        pytest.param(("version: 1", "version: one"), "version: Input should be a valid integer (given: 'one')", id="wrong type"),
        pytest.param(("version: 1", "version: 0"), "version: Input should be greater than", id="version 0"),
        pytest.param(("version: 1", "version: 1\n    version: 2"), "key 'version' is given twice", id="key given twice"),
        pytest.param(("a: {files: [a.jsonl]}", ""), "1 domain given", id="one domain"),
        pytest.param(("files: [a.jsonl]", "files: []"), "domains.a.files: List should have at least 1 item", id="no files"),
        pytest.param(("files: [a.jsonl]", "files: [none.jsonl]"), "domains.a.files: no file 'none.jsonl'", id="missing file"),
        pytest.param(("files: [a.jsonl]", "files: ['none*.jsonl']"), "domains.a.files: no file 'none*.jsonl'", id="pattern without files"),
        pytest.param(
            ("files: [a.jsonl]", "files: [a.jsonl], text_field: x, template: '{y}'"), "text_field or template, not both", id="two texts"
        ),
        pytest.param(("files: [a.jsonl]", "files: [a.jsonl], template: hello"), "names no field", id="template without fields"),
        pytest.param(
            ("files: [a.jsonl]", "files: [a.jsonl], sha256: {b.jsonl: a" + "0" * 63 + "}"), "not one of files", id="digest of a stray file"
        ),
        pytest.param(
            ("files: [a.jsonl]", "files: [a.jsonl], text_field: body"),
            "a.jsonl:1: no field 'body'; the row has id, text",
            id="missing field",
        ),
        pytest.param(("files: [a.jsonl]", "files: [a.jsonl], id_field: key"), "a.jsonl:1: no field 'key'", id="missing id"),
        pytest.param(("files: [a.jsonl]", "files: [a.jsonl, a.jsonl]"), "id 'a1' is given twice (domains a and a)", id="duplicate id"),
        pytest.param(("files: [b.jsonl]", "files: [a.jsonl]"), "id 'a1' is given twice (domains a and b)", id="duplicate id over domains"),
        pytest.param(("files: [a.jsonl]", "files: [task.yaml]"), "format not told by the suffix", id="unknown suffix"),
        pytest.param(("files: [a.jsonl]", "dataset: some/where, split: test"), "domains.a.revision: required key is missing", id="no pin"),
    ],
)
def test_errors_name_file_and_field(folder, change, told):
    message = problem(folder, TWO.replace(*change))
    assert told in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"", "domains.a: no documents", id="empty domain"),
        pytest.param(b'{"id": 1, "text": "x"}\n{"id": ', "a.jsonl:2: not JSON", id="bad line"),
        pytest.param(b'{"id": 1, "text": "x"}\n[1]\n', "a.jsonl:2: a line is a JSON object", id="not an object"),
        pytest.param(b'{"id": 1, "text": "x"}\n{"id": 2, "text": "\xe9"}\n', "a.jsonl:2: not UTF-8", id="wrong encoding"),
        pytest.param(b'{"id": "e", "text": "  "}\n', "domains.a: no documents (1 rows have no text)", id="empty text"),
        pytest.param(b'{"id": "e", "text": 7}\n', "a.jsonl:1: field 'text' is int, expected text", id="text is a number"),
    ],
)
def test_bad_content_names_file_and_line(folder, content, told):
    (folder / "a.jsonl").write_bytes(content)
    assert told in problem(folder, TWO)


@pytest.mark.parametrize(
    ("row", "fields", "told"),
    [
        pytest.param({"text": ["x"]}, "", "field 'text' is a list, expected text", id="text is a list"),
        pytest.param({"text": "a \ud83d"}, "", r"field 'text' holds half of a surrogate pair (\ud83d at character 2)", id="surrogate"),
        pytest.param({"text": "a", "id": "\udc00"}, "", "field 'id' holds half of a surrogate pair", id="surrogate in an id"),
        pytest.param({"text": "a", "choices": ["x", "\udc00"]}, "", "field 'choices[1]' holds half", id="surrogate in a choice"),
        pytest.param({"text": "a", "source_document": "\udc00"}, "", "field 'source_document' holds half", id="surrogate in a source"),
        pytest.param({"text": "a", "id": {"a": 1}}, "", "field 'id' is an object", id="id is an object"),
        pytest.param({"text": "a", "id": " "}, "", "field 'id' is empty", id="empty id"),
        pytest.param({"text": "a", "synthetic": "false"}, "", "field 'synthetic' is 'false', expected true or false", id="no truth value"),
        pytest.param({"q": "a", "c": None}, "template: '{q} {c}'", "field 'c' is null", id="null in a template"),
        pytest.param({"q": {"a": 1}}, "template: '{q}'", "field 'q' is an object", id="object in a template"),
        pytest.param({"q": [["a"]]}, "template: '{q}'", "field 'q[0]' is a list", id="list of lists in a template"),
        pytest.param({"q": [None]}, "template: '{q}'", "field 'q[0]' is null", id="list with null in a template"),
        pytest.param({"q": True}, "template: '{q}'", "field 'q' is bool", id="truth value in a template"),
        pytest.param({"text": "a", "c": {"text": ["x"]}}, "choices_fields: [c]", "field 'c' is an object, expected a list", id="choices"),
        pytest.param({"text": "a", "c": {"x": 1}}, "answer_field: c", "field 'c' is an object", id="answer is an object"),
    ],
)
def test_fields_that_are_no_text_are_named_by_row(folder, row, fields, told):
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    message = problem(folder, TWO.replace("files: [a.jsonl]", f"files: [a.jsonl], {fields}" if fields else "files: [a.jsonl]"))
    assert f"a.jsonl:1: {told}" in message or (f"{folder / 'a.jsonl'}:1: " in message and told in message)
    assert "\n" not in message


def test_numbers_and_lists_of_text_are_text_in_a_template(folder):
    rows(folder / "a.jsonl", {"q": 3, "c": ["x", 2.5], "id": None, "answer": {"not": "named"}, "source_document": 7})
    text = TWO.replace("files: [a.jsonl]", "files: [a.jsonl], template: '{q}: {c}'")
    document = read_documents(load_task(written(folder, text)))[0]
    assert document == Document("a/a.jsonl:1", "a", "3: x\n2.5", source_document="7")


def test_ids_are_unique_within_their_file(folder):
    for name in "ab":
        rows(folder / f"{name}.jsonl", *({"id": number, "text": f"{name} {number}"} for number in range(2)))
    (folder / "c").mkdir()
    rows(folder / "c" / "a.jsonl", {"id": "own", "text": "x"})
    rows(folder / "c" / "b.jsonl", {"text": "no id"}, {"id": 0, "text": "y"})
    text = TWO.replace("[b.jsonl]", "[b.jsonl, c/a.jsonl, c/b.jsonl]")
    documents = read_documents(load_task(written(folder, text)))
    assert [document.id for document in documents] == [
        "a/a.jsonl:0", "a/a.jsonl:1", "b/b.jsonl:0", "b/b.jsonl:1", "own", "b/c/b.jsonl:1", "b/c/b.jsonl:0",
    ]  # fmt: skip
    assert [document.id for document in read_documents(load_task(written(folder, text)), limit=1)] == ["a/a.jsonl:0", "b/b.jsonl:0"]
    rows(folder / "b.jsonl", {"id": 1, "text": "x"}, {"id": 2, "text": "z"}, {"id": 1, "text": "y"})
    told = problem(folder, text)
    assert f"{folder / 'b.jsonl'}:3: id '1' is given twice" in told and f"first at {folder / 'b.jsonl'}:1" in told


def test_default_ids_of_files_of_one_name_are_told_apart(folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
        rows(folder / name / "train.jsonl", {"text": name})
    documents = read_documents(load_task(written(folder, TWO.replace("[a.jsonl]", "['*/train.jsonl']"))))
    assert [document.id for document in documents][:2] == ["a/x/train.jsonl:1", "a/y/train.jsonl:1"]


def test_what_is_no_regular_file_is_refused(folder):
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    assert "this is a pipe, socket or device" in problem(folder, TWO.replace("a.jsonl", "pipe.jsonl"))
    assert "this is a folder" in problem(folder, TWO.replace("a.jsonl", "folder.jsonl"))
    assert "no name of a file" in problem(folder, TWO.replace("[a.jsonl]", "['**x']"))
    (folder / "data").mkdir()
    hub = TWO.replace("files: [a.jsonl]", "dataset: ./data, split: train, revision: main")
    os.mkfifo(folder / "data" / "train.parquet")
    assert "train.parquet is a pipe, socket or device" in problem(folder, hub)
    (folder / "data" / "train.parquet").unlink()
    assert "cannot be read" in problem(folder, hub) and "Log in" not in problem(folder, hub)
    assert "is no folder" in problem(folder, hub.replace("./data", "./none"))


def test_files_are_read_within_bounds(folder, monkeypatch):
    (folder / "n.jsonl.gz").write_bytes(gzip.compress(b"\n" * (local.BLANK_LINES + 100)))
    assert "lines are empty; this is no file of rows" in problem(folder, TWO.replace("a.jsonl", "n.jsonl.gz"))
    monkeypatch.setattr(local, "ROW_BYTES", 1000)
    (folder / "l.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + b" " * 5000))
    assert "l.jsonl.gz:2: a line of more than 1,000 bytes" in problem(folder, TWO.replace("a.jsonl", "l.jsonl.gz"))
    (folder / "t.txt.gz").write_bytes(gzip.compress(b"x" * 5000))
    assert "one text of more than 1,000 bytes" in problem(folder, TWO.replace("a.jsonl", "t.txt.gz"))
    monkeypatch.setattr(local, "FILE_BYTES", 30)
    assert "more than 30 bytes" in problem(folder, TWO)
    monkeypatch.setattr(local, "FILE_BYTES", 10_000)
    monkeypatch.setattr(local, "ROWS", 1)
    assert "more than 1 rows" in problem(folder, TWO)
    limited = load_task(written(folder, TWO))
    assert len(read_documents(limited, limit=1)) == 2, "what is beyond the limit is not read"


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        pytest.param('{"text": "a"}\n'.encode("utf-16"), "x.jsonl", "it looks like UTF-16", id="UTF-16"),
        pytest.param("text".encode("utf-16-le"), "x.txt", "holds NUL characters", id="UTF-16 without a mark"),
        pytest.param(b'{"text": "a", "n": NaN}\n', "x.jsonl", "x.jsonl:1: not strict JSON", id="NaN"),
        pytest.param(b"[" * 10_000, "x.jsonl", "x.jsonl:1: nested more than 64 deep", id="deep"),
        pytest.param(gzip.compress(b'{"text": "a"}\n')[:-5], "x.jsonl.gz", "damaged gzip", id="cut gzip"),
    ],
)
def test_files_of_another_kind_are_told_in_a_line(folder, content, name, told):
    (folder / name).write_bytes(content)
    message = problem(folder, TWO.replace("a.jsonl", name))
    assert told in message and "\n" not in message


def test_line_ends_and_marks_of_windows_are_no_text(folder):
    (folder / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1, "text": "x"}\r\n\r\n{"id": 2, "text": "y"}\r\n')
    assert [document.text for document in read_documents(load_task(written(folder, TWO)))][:2] == ["x", "y"]


def test_damaged_archives(folder):
    (folder / "a.jsonl.gz").write_bytes(b"no gzip")
    assert "damaged gzip" in problem(folder, TWO.replace("a.jsonl", "a.jsonl.gz"))
    (folder / "a.parquet").write_bytes(b"no parquet")
    assert "not readable as parquet" in problem(folder, TWO.replace("a.jsonl", "a.parquet"))


def test_bad_task_files(tmp_path):
    with pytest.raises(TaskError, match="no task is called 'nothing'; there are embedded, full, smoke"):
        load_task("nothing")
    with pytest.raises(TaskError, match="no such task file"):
        load_task(tmp_path / "none.yaml")
    for content, told in (
        ("- 1", "a task is a mapping"),
        ("a: [", "not readable as YAML"),
        ("a: !!python/object:os.x {}", "not readable as YAML"),
    ):
        with pytest.raises(TaskError, match=told):
            load_task(written(tmp_path, content))


# ---------------------------------------------------------------- hub data sets, on local files with the true column names


def test_hub_rows_without_text_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, texts in (("a", ["one", None, "", "two"]), ("b", ["three", "four", "five"])):
        (tmp_path / name).mkdir()
        pd.DataFrame({"text": texts, "number": range(len(texts))}).to_parquet(tmp_path / name / "train.parquet")
    text = """
        name: t
        version: 1
        domains:
          a: {dataset: ./a, split: train, revision: main, id_field: number}
          b: {dataset: ./b, split: train, revision: main, id_field: number}
    """
    task = load_task(written(tmp_path, text))
    reading = read_task(task)
    assert [document.id for document in reading.documents] == ["a/0", "a/3", "b/0", "b/1", "b/2"]
    assert reading.without_text == {"a": 2}
    assert task_facts(task, reading)["note"] == "rows without text were left out: a (2)"
    pd.DataFrame({"q": ["x", "y"], "c": ["z", None]}).to_parquet(tmp_path / "a" / "train.parquet")
    changed = text.replace("id_field: number}", "template: '{q} {c}'}", 1)
    with pytest.raises(TaskError, match=r"data set './a' row 1: field 'c' is null"):
        read_documents(load_task(written(tmp_path, changed)))


def test_unreachable_hub_is_an_error_or_the_embedded_sample(monkeypatch):
    def offline(*_):
        raise hub_tasks.UnreachableError("data set 'x' cannot be read: offline")

    monkeypatch.setattr(hub_tasks, "_load", offline)
    with pytest.raises(TaskError, match=r"offline.*embedded fallback"):
        read_documents(load_task("full"))
    with pytest.warns(UserWarning, match="EMBEDDED sample in place of task 'full'"):
        documents = read_documents(load_task("full"), limit=2, embedded_fallback=True)
    assert len(documents) == 16
    assert all(document.stand_in for document in documents)


def test_fallback_needs_the_same_domains(folder, monkeypatch):
    def offline(*_):
        raise hub_tasks.UnreachableError("offline")

    monkeypatch.setattr(hub_tasks, "_load", offline)
    task = load_task(written(folder, TWO.replace("files: [a.jsonl]", "dataset: x/y, split: test, revision: main")))
    with pytest.raises(TaskError, match="cannot stand in: it has no domain 'a'"):
        read_documents(task, embedded_fallback=True)


def test_offline_mode_of_the_library_is_told(tmp_path):
    code = (
        "from dbes.tasks.task import load_task, read_documents\nfrom dbes.errors import TaskError\n"
        "try:\n    read_documents(load_task('full'))\nexcept TaskError as e:\n    print(e)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "domains.math: data set 'MathArena/aime_2025' (revision main) cannot be read" in told.stdout


# ---------------------------------------------------------------- separability


def corpus(generator: np.random.Generator, words: dict[str, list[str]], size: int = 20) -> list[Document]:
    return [Document(f"{domain}{n}", domain, " ".join(generator.choice(names, 12))) for domain, names in words.items() for n in range(size)]


def test_separability_of_disjoint_words_is_one_and_of_equal_words_is_chance():
    generator = np.random.default_rng(0)
    apart = corpus(generator, {"a": ["cat", "dog"], "b": ["sun", "moon"], "c": ["red", "blue"]})
    assert separability(apart) == 1.0
    same = corpus(generator, {name: ["cat", "dog", "sun", "moon"] for name in "abcd"}, size=150)
    told = word_separability(same)
    assert told.chance == 0.25
    assert abs(told.accuracy - 0.25) < 0.08
    assert np.isclose(np.mean(list(told.recall.values())), told.accuracy)


def test_separability_against_scikit_learn():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    generator = np.random.default_rng(1)
    words = ["cat", "dog", "sun", "moon", "red"]
    documents = corpus(generator, {"a": [*words, "cat", "dog"], "b": [*words, "sun"], "c": [*words, "red", "sun", "cat", "moon"]}, size=40)
    labels = np.array(["abc".index(document.domain) for document in documents])
    texts = [document.text for document in documents]
    part = fold_of(labels, [document.id for document in documents], folds=5, seed=3)
    counts = CountVectorizer().fit_transform(texts)
    right = np.zeros(len(texts), dtype=bool)
    for fold in range(5):
        model = MultinomialNB(alpha=1.0, fit_prior=False).fit(counts[part != fold], labels[part != fold])
        right[part == fold] = model.predict(counts[part == fold]) == labels[part == fold]
    assert 0.4 < right.mean() < 0.95
    assert word_separability(documents, seed=3).accuracy == right.mean()
    assert word_counts(texts).sum() == counts.sum()


def test_folds_keep_a_source_text_together():
    labels = np.array([0] * 6 + [1] * 6)
    groups = ["x", "x", "x", "y", "z", "z", "u", "v", "v", "w", "w", "w"]
    part = fold_of(labels, groups, folds=3, seed=0)
    assert all(len(set(part[[i for i, g in enumerate(groups) if g == name]])) == 1 for name in groups)
    assert set(part[:6]) == set(part[6:]) == {0, 1, 2}


def test_too_few_documents_have_no_separability():
    told = word_separability([Document("1", "a", "x"), Document("2", "b", "y"), Document("3", "b", "z")])
    assert np.isnan(told.accuracy)
    assert told.folds == 1


# ---------------------------------------------------------------- the rest


def test_template_fields():
    assert template_fields("{a}\n{b}: x") == ["a", "b"]


def test_tasks_are_found_from_anywhere_and_import_is_light(tmp_path):
    code = (
        "import sys, dbes.tasks.task as b\n"
        "print([t.name for t in b.list_tasks()], len(b.read_documents(b.load_task('smoke'))))\n"
        "print([m for m in ('torch', 'datasets', 'pandas', 'transformers', 'sklearn') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["['embedded', 'full', 'smoke'] 32", "[]"]
    assert [task.name for task in list_tasks()] == ["embedded", "full", "smoke"]
