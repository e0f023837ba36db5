"""Texts in the files that people have: CSV, JSON arrays, lines, conversations, instructions; and a task begun from a folder of them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import TaskError
from dbes.tasks import local
from dbes.tasks.draft import draft_task, write_draft
from dbes.tasks.task import load_task, read_documents, read_task, task_facts


def read(path: Path, kind: local.Format | None = None) -> list[dict]:
    return [row for _, row in local.rows(path, kind)]


def task_of(folder: Path, source: str, rest: str = "['other text', 'and another']"):
    path = folder / "task.yaml"
    path.write_text(f"name: mine\nversion: 1\ndomains:\n  a: {source}\n  b: {rest}\n", "utf-8")
    return load_task(path)


def texts_of(folder: Path, source: str) -> list[str]:
    return [document.text for document in read_documents(task_of(folder, source)) if document.domain == "a"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@given(table=st.lists(st.tuples(*[st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\0"), max_size=12)] * 2)))
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, delimiter, end, table) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([["text", "label"], *table])
    # inside quotes too, a line ends as the file's lines do
    assert read(path) == [{"text": text, "label": label} for text, label in table]


def test_rows_of_a_csv_know_their_lines_and_hold_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"one, with ""quotes""\nand a break",x\r\n\r\nsecond,y\r\n')
    found = list(local.rows(tmp_path / "rows.csv", None))
    assert found == [(3, {"text": 'one, with "quotes"\nand a break', "label": "x"}), (5, {"text": "second", "label": "y"})]
    with gzip.open(tmp_path / "rows.tsv.gz", "wt") as file:
        file.write("text\tlabel\na, b\tc\n")
    assert read(tmp_path / "rows.tsv.gz") == [{"text": "a, b", "label": "c"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"text,label\nx\n", "rows.csv:2: 1 values, but the first line names 2 columns"),
        (b"text,text\nx,y\n", "rows.csv:1: two columns are called 'text'"),
        (b'text\n"never closed\n', "rows.csv:2: not CSV (unexpected end of data)"),
        (b'text\n"a"b\n', "rows.csv:2: not CSV"),
        (b"text\n\xe9\n", "rows.csv:2: not UTF-8"),
        (b"body,label\nx,y\n", "rows.csv:2: no field 'text', and no messages"),
    ],
)
def test_a_csv_that_cannot_be_read_names_file_and_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(TaskError) as caught:
        texts_of(tmp_path, "{files: [rows.csv]}")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "array.json").write_text("\ufeff \n" + json.dumps(rows, indent=1), "utf-8")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "texts.json").write_text('["one", "two"]', "utf-8")
    for name in ("array", "lines", "texts"):
        assert texts_of(tmp_path, f"{{files: [{name}.json]}}") == ["one", "two"]


def test_every_line_is_a_text_where_the_task_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one fish\n\n  two\u2028fish \n", "utf-8")
    assert texts_of(tmp_path, "{files: [a.txt], format: lines}") == ["one fish", "two\u2028fish"]
    assert len(texts_of(tmp_path, "{files: [a.txt]}")) == 1


def test_conversations_instructions_and_prompts_are_read_whole(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hello"}]},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "output": "Hello"},
        {"prompt": "The sky is", "completion": " blue"},
        {"conversations": []},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    task = task_of(tmp_path, "{files: [rows.json]}")
    reading = read_task(task)
    found = [document.text for document in reading.documents if document.domain == "a"]
    assert found == ["Hi\n\nHello", "Hi\n\nHello", "Add.\n\n1 and 2\n\n3", "Greet.\n\nHello", "The sky is blue"]
    assert reading.without_text == {"a": 1}


def test_rows_without_text_are_left_out_and_counted_wherever_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,id\none,1\n,2\n  ,3\ntwo,4\n", "utf-8")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n{"text": "three"}\n', "utf-8")
    reading = read_task(task_of(tmp_path, "{files: [rows.csv, null.jsonl]}", rest="['x', ' ', 'y']"))
    assert [document.text for document in reading.documents] == ["one", "two", "three", "x", "y"]
    assert reading.without_text == {"a": 3, "b": 1}
    assert task_facts(task_of(tmp_path, "{files: [rows.csv]}"), reading)["note"] == "rows without text were left out: a (3), b (1)"


def test_a_task_is_begun_from_a_folder_and_reads_what_lies_in_it(tmp_path: Path) -> None:
    """Sub-folders are domains, at any depth, of any format; names that a task cannot have become ones that it can."""
    (tmp_path / "law: old" / "deep").mkdir(parents=True)
    (tmp_path / "law: old" / "one.txt").write_text("a contract", "utf-8")
    (tmp_path / "law: old" / "deep" / "two.txt").write_text("a statute", "utf-8")
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "rows.csv").write_text("label,body\nx,a lemma and its proof\ny,a theorem\n", "utf-8")
    with gzip.open(tmp_path / "math" / "more.jsonl.gz", "wt") as file:
        file.write('{"label": "z", "body": "a number"}\n')
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden", "utf-8")
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["tasks", "init", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert f"Next: dbes tasks validate {tmp_path}/task.yaml" in done.output.replace("\n", "")
    found: dict[str, list[str]] = {}
    for document in read_documents(load_task(tmp_path / "task.yaml")):
        found.setdefault(document.domain, []).append(document.text)
    assert {domain: sorted(texts) for domain, texts in found.items()} == {
        "law- old": ["a contract", "a statute"],
        "math": ["a lemma and its proof", "a number", "a theorem"],
    }
    assert CliRunner().invoke(app, ["tasks", "validate", str(tmp_path / "task.yaml")]).exit_code == 0
    again = CliRunner().invoke(app, ["tasks", "init", str(tmp_path)])
    assert again.exit_code == 2 and "there already" in again.output


def test_files_of_a_folder_without_sub_folders_are_domains_and_the_task_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("law", "math"):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n', "utf-8")
    (tmp_path / "tasks").mkdir()
    where = write_draft(folder, tmp_path / "tasks" / "mine.yaml")
    assert [(document.domain, document.text) for document in read_documents(load_task(where))] == [("law", "law"), ("math", "math")]
    assert yaml.safe_load(draft_task(folder))["domains"] == {"law": {"files": ["law.jsonl"]}, "math": {"files": ["math.jsonl"]}}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "0 domain with files"),
        ({"law/a.pdf": "x", "math/a.txt": "x"}, "1 domain with files"),
        ({"a:b/a.txt": "x", "a;b/a.txt": "y"}, "two domains would be called 'a-b'"),
        ({"law/a.jsonl": '{"id": 1}\n', "math/a.txt": "x"}, "no field of its first row holds a text; it has id"),
    ],
)
def test_a_folder_of_which_no_task_can_be_made_is_told(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(TaskError, match=told):
        write_draft(tmp_path)
    assert not (tmp_path / "task.yaml").exists()
