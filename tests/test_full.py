"""The full benchmark, on folders in the layout of the hub; the hub's own answers come from a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hub_folders import write_hub
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import FileError, TaskError
from dbes.tasks import hub as hub_tasks
from dbes.tasks.cautions import cautions
from dbes.tasks.prepare import prepare
from dbes.tasks.task import Document, list_tasks, load_task, read_documents, read_task, task_facts, task_fingerprint, tasks_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's data sets as folders; only where a name of the hub lies is put in place of the real thing."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_hub(tmp_path / "hub")
    real = hub_tasks._resolved

    def resolved(task_file, source, where):
        if source.dataset.startswith((".", "/")):
            return real(task_file, source, where)
        if not (root / source.dataset).is_dir():
            raise hub_tasks.UnreachableError(f"{where}: not there")
        return hub_tasks.Resolved(path=str(root / source.dataset), revision=COMMIT)

    monkeypatch.setattr(hub_tasks, "_resolved", resolved)
    return root


def task_with(folder: Path, source: str, name: str = "t") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"name: {name}\nversion: 1\ndomains:\n  a: {source}\n  b: [one, two]\n", "utf-8")
    return path


def problem(folder: Path, source: str) -> str:
    with pytest.raises(TaskError) as caught:
        read_documents(load_task(task_with(folder, source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what is read


@pytest.mark.usefixtures("hub")
def test_full_task_reads_the_true_columns():
    reading = read_task(load_task("full"))
    found = {(document.domain, document.source): document for document in reading.documents}
    assert Counter(document.domain for document in reading.documents) == {
        "math": 3, "science": 1, "medicine": 2, "law": 2, "finance": 1, "code": 3, "software_engineering": 1, "general": 2,
    }  # fmt: skip
    # both competitions number their problems from 1, so the name of the source tells them apart
    assert [each.id for each in reading.documents][:3] == ["math/aime_2025:1", "math/aime_2025:2", "math/hmmt_feb_2026:1"]
    assert found["math", "hmmt_feb_2026"].answer == "$\\sqrt{2}$"
    assert found["science", "sciq"] == Document(
        "science/sciq:1", "science", "Because of it.\nWhich?", "Which?", "d", ("d", "a", "b", "c"), source="sciq"
    )
    assert found["medicine", "medqa"] == Document(
        "test-00000", "medicine", "A patient.\np\nq\nr\ns", "A patient.", "2", ("p", "q", "r", "s"), source="medqa"
    )
    assert found["medicine", "pubmed_qa"].text == "Do they?\nOne.\nTwo."
    assert found["law", "legalbench_hearsay"] == Document(
        "law/legalbench_hearsay:0", "law", "On the issue of", "On the issue of", "Yes", source="legalbench_hearsay"
    )
    assert found["law", "legalbench_contract_nli"].text == "No licence is granted."
    assert found["finance", "finance_math"].text == "How much?\n| a | b |\n| 1 | 2 |"
    assert found["finance", "finance_math"].answer == "3.5"
    assert found["code", "code_generation_lite"].text == "Write a program."
    assert found["code", "humaneval"].text == "def f():\n    return 1"
    assert found["code", "mbpp"].id == "11" and found["code", "mbpp"].text == "Remove it.\ndef g(): ..."
    assert found["software_engineering", "swe_bench_verified"].answer == "diff"
    assert found["general", "hle"].id == "h1"
    told = cautions(reading.documents)["texts of one collection only, whose style can pass for the domain"]
    assert told == {"science": "sciq", "finance": "finance_math", "software_engineering": "swe_bench_verified"}
    assert found["general", "mmlu"].text == "Where?\na\nb\nc\nd" and found["general", "mmlu"].choices == ("a", "b", "c", "d")


@pytest.mark.usefixtures("hub")
def test_a_limit_is_shared_out_among_the_sources_of_a_domain():
    found = read_documents(load_task("full"), limit=2)
    assert [each.source for each in found if each.domain == "math"] == ["aime_2025", "hmmt_feb_2026"]
    assert [each.source for each in found if each.domain == "code"] == ["code_generation_lite", "humaneval"]


@pytest.mark.usefixtures("hub")
def test_rows_are_filtered_sampled_and_streamed(tmp_path):
    rows = [{"t": f"text {n}", "kind": "odd" if n % 2 else "even", "n": n} for n in range(40)]
    (tmp_path / "data").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "data" / "train.parquet")
    base = "dataset: ./data, split: train, revision: null, text_field: t"

    def texts(more: str) -> list[str]:
        found = read_documents(load_task(task_with(tmp_path, f"{{{base}{more}}}")))
        return [each.text for each in found if each.domain == "a"]

    assert texts(", filter: {kind: odd, n: [1, 2, 3]}") == ["text 1", "text 3"]
    sample = texts(", limit: 5, seed: 3")
    assert len(set(sample)) == 5 and sample != [f"text {n}" for n in range(5)]
    assert sample == texts(", limit: 5, seed: 3") != texts(", limit: 5, seed: 4")
    assert texts(", limit: 3, streaming: true") == ["text 0", "text 1", "text 2"]
    stream = texts(", limit: 5, seed: 3, streaming: true")
    assert len(set(stream)) == 5 and stream == texts(", limit: 5, seed: 3, streaming: true") != [f"text {n}" for n in range(5)]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{dataset: allenai/sciq, split: train, revision: null}", "Unknown split \"train\". Should be one of ['test']"),
        ("{dataset: cais/mmlu, config: none, split: test, revision: null}", "BuilderConfig 'none' not found. Available: ['all']"),
        (
            "{dataset: allenai/sciq, split: test, revision: null, template: '{title}'}",
            "no field 'title'; it has question, distractor3, distractor1, distractor2, correct_answer, support",
        ),
        ("{dataset: allenai/sciq, split: test, revision: null, text_field: support, require: [image]}", "no field 'image'"),
        ("{dataset: qiaojin/pubmed_qa, split: train, revision: null, template: '{context.none}'}", "context: no field 'none'; the row has"),
        ("{dataset: x/none, split: test, revision: null}", "domains.a: data set 'x/none': not there"),
        ("{dataset: allenai/sciq, split: test}", "domains.a.revision: required key is missing (line 4)"),
        ("{dataset: allenai/sciq, split: test, revision: null, seed: 1}", "seed: draws limit rows at random, so give limit too"),
        ("\n    sources:\n      - {source: x, texts: [a]}\n      - {texts: [b]}", "each needs a `source` of its own"),
        (
            "\n    sources:\n      - source: x\n        texts: [a]\n        colour: red",
            "domains.a.sources.0.colour: unknown key (line 8)",
        ),
    ],
)
def test_what_a_task_asks_in_vain_is_told(tmp_path, source, told):
    message = problem(tmp_path, source)
    assert told in message and str(tmp_path / "t.yaml") in message


def test_a_script_is_told_with_what_to_read_in_its_place(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.py").write_text("raise SystemExit('never run')", "utf-8")
    told = problem(tmp_path, "{dataset: ./bench, split: test, revision: null}")
    assert "is a loading script (bench.py); datasets 5 runs none" in told and "refs/convert/parquet" in told


# ---------------------------------------------------------------- what the hub says


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does when asked for a data set: gated, script-based, unknown; or hangs up."""

    asked: Counter[str]

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/datasets/").partition("?")[0]
        self.asked[name] += 1
        if name == "x/silent":
            self.connection.close()
            return
        about = {"id": name, "sha": COMMIT, "gated": "manual" if name == "x/gated" else False}
        about["siblings"] = [{"rfilename": "script.py" if name == "x/script" else "README.md"}]
        known = name in ("x/gated", "x/script")
        body = json.dumps(about if known else {"error": "Repository not found"}).encode()
        self.send_response(200 if known else 404 if name == "x/none" else 401)
        self.send_header("X-Error-Code", {"x/none": "RepoNotFound", "x/refused": "GatedRepo"}.get(name, ""))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


ASKING = """
import sys
from dbes.errors import TaskError
from dbes.tasks.task import Task, read_documents
for name in sys.argv[1:]:
    source = {"dataset": name, "split": "test", "revision": None}
    try:
        read_documents(Task(name="t", version=1, domains={"a": source, "b": ["x"]}))
    except TaskError as error:
        print(error)
"""


def test_gates_scripts_and_silence_are_told_and_the_hub_is_asked_once(tmp_path):
    """A hub that does not answer costs one attempt; the libraries by themselves would try six times and wait between."""
    handler = type("Asked", (Hub,), {"asked": Counter()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = ["x/gated", "x/refused", "x/script", "x/none", "x/silent"]
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", ASKING, *names], env=env, capture_output=True, text=True, check=True)
        server.shutdown()
    gated, refused, script, none, silent = done.stdout.splitlines()
    for told, name in ((gated, "x/gated"), (refused, "x/refused")):
        assert f"is gated: accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login`" in told
    assert "is a loading script (script.py); datasets 5 runs none" in script
    assert "the hub has none of this name" in none
    assert "the hub cannot be reached, and the cache does not hold it" in silent
    assert {name: handler.asked[name] for name in names} == dict.fromkeys(names, 1), done.stderr


# ---------------------------------------------------------------- a prepared copy


@pytest.mark.usefixtures("hub")
def test_a_prepared_copy_is_the_same_benchmark_without_the_hub(tmp_path, monkeypatch):
    task = load_task("full")
    before = read_documents(task)
    where, _ = prepare(task, tmp_path / "out")
    monkeypatch.setattr(hub_tasks, "documents", None)  # whoever asks the hub now fails
    copy = load_task(tmp_path / "out")
    assert copy.path == where.resolve() and load_task(where).domains == copy.domains
    assert read_documents(copy) == before
    assert task_fingerprint(copy, before) == task_fingerprint(task, before)
    card = (tmp_path / "out" / "CARD.md").read_text("utf-8")
    assert "| science | sciq | allenai/sciq test | " + COMMIT + " | CC BY-NC 3.0 | 1 | 2 (support is empty) |" in card
    assert "1 (image is filled)" in card and "## Missing" not in card
    assert "do not pass on code/code_generation_lite, general/hle**" in card
    text = tmp_path / "out" / "data" / "law" / "legalbench_hearsay.jsonl"
    text.write_text(text.read_text("utf-8").replace("issue", "tissue"), "utf-8")
    with pytest.raises(TaskError, match="the file was altered"):
        read_documents(copy)


DYING = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dbes.tasks import task as tasks
from dbes.tasks.cautions import cautions
from dbes.tasks.prepare import prepare
read, seen = tasks.read_source, []
def dying(*arguments):
    seen.append(0)
    if len(seen) == 2:
        os.kill(os.getpid(), 9)
    return read(*arguments)
import dbes.tasks.prepare
dbes.tasks.prepare.read_source = dying
prepare(tasks.load_task(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_a_killed_preparation_is_gone_on_with(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"of {name}"}) + "\n", "utf-8")
    path = tmp_path / "t.yaml"
    path.write_text("name: t\nversion: 1\ndomains:\n  a: {files: [one.jsonl]}\n  b: {files: [two.jsonl]}\n", "utf-8")
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", DYING, str(Path(__file__).parent), str(path), str(out)], capture_output=True)
    assert done.returncode == -9
    assert not (out / "t.yaml").exists() and (out / "data/a/source-1.jsonl").is_file() and not (out / "data/b").exists()
    _, found = prepare(load_task(path), out)
    assert [(each.domain, each.again) for each in found] == [("a", True), ("b", False)]
    assert [each.text for each in read_documents(load_task(out))] == ["of one", "of two"]
    (out / "data/a/source-1.jsonl").write_text("{", "utf-8")  # half of it
    (tmp_path / "two.jsonl").write_text('{"text": "altered"}\n', "utf-8")
    _, found = prepare(load_task(path), out)
    assert [each.again for each in found] == [False, False]
    assert [each.text for each in read_documents(load_task(out))] == ["of one", "altered"]
    assert not [each for each in out.rglob("*") if each.name.startswith(".")]
    (tmp_path / "blocked").write_text("a file", "utf-8")
    with pytest.raises((FileError, OSError)):
        prepare(load_task(path), tmp_path / "blocked")


def test_sources_that_cannot_be_had_are_named_and_may_be_left_out(hub, tmp_path):
    for name in ("cais/hle", "yale-nlp/FinanceMath"):
        (hub / name).rename(hub / f"{name}-gone")
    out = tmp_path / "out"
    with pytest.raises(TaskError) as caught:
        prepare(load_task("full"), out)
    told = str(caught.value)
    assert "2 sources of 14 could not be had: finance/finance_math: data set 'yale-nlp/FinanceMath': not there; general/hle:" in told
    assert "--allow-missing" in told and not (out / "full.yaml").exists()
    done = CliRunner().invoke(app, ["tasks", "prepare", "full", "--out", str(out), "--allow-missing"])
    assert done.exit_code == 0, done.output
    assert done.output.count("there already") == 12 and "Without general/hle, so scores are not those of the whole task" in done.output
    copy = load_task(out)
    assert "finance" not in copy.domains and set(copy.missing) == {"finance/finance_math", "general/hle"}
    assert "prepared without finance/finance_math, general/hle" in task_facts(copy, read_task(copy))["note"]
    card = (out / "CARD.md").read_text("utf-8")
    assert "* general/hle: data set 'cais/hle': not there" in card and "Domains left out: finance." in card
    (hub / "cais/hle-gone").rename(hub / "cais/hle")
    _, found = prepare(load_task("full"), out, allow_missing=True)
    assert [each.name for each in found if not each.again] == ["finance_math", "hle"]
    assert set(load_task(out).missing) == {"finance/finance_math"}


@pytest.mark.usefixtures("hub")
def test_a_copy_of_one_domain_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"1 domain could be prepared, at least 2 are needed; data set 'x/none': not there"):
        prepare(load_task(task_with(tmp_path, "{dataset: x/none, split: test, revision: null}")), tmp_path / "out", allow_missing=True)


def test_every_source_of_the_full_task_says_licence_and_gate():
    parts = load_task("full").parts()
    assert all(part.licence and part.source for _, part in parts)
    assert [part.source for _, part in parts if part.gated] == ["hle"]
    done = CliRunner().invoke(app, ["tasks"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for _, part in parts:
        assert f"{part.source} " in done.output and (part.licence or "")[:10] in done.output
    assert done.output.count("log in, do not pass on") == 1


# ---------------------------------------------------------------- groups


def test_groups_hold_tasks_and_groups(tmp_path, monkeypatch):
    task_with(tmp_path, "[x, y]", "mine")
    (tmp_path / "inner.yaml").write_text("group: [mine.yaml, smoke]\n", "utf-8")
    (tmp_path / "outer.yaml").write_text("description: all\ngroup: [embedded, inner.yaml, mine.yaml]\n", "utf-8")
    assert tasks_of(tmp_path / "outer.yaml") == ["embedded", tmp_path / "mine.yaml", "smoke"]
    assert tasks_of("smoke") == ["smoke"]
    monkeypatch.chdir(tmp_path)  # a task is named in results as it was given
    assert tasks_of("mine.yaml") == ["mine.yaml"] and tasks_of("inner.yaml") == [Path("mine.yaml"), "smoke"]
    with pytest.raises(TaskError, match=r"inner.yaml: a group of tasks, where one task is needed; name one of .*mine.yaml, smoke"):
        load_task(tmp_path / "inner.yaml")
    assert all(task.name != "group" for task in list_tasks())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("group: [smoke, u.yaml]", "a group that holds itself (t.yaml > u.yaml > t.yaml)"),
        ("group: []", "group: List should have at least 1 item"),
        ("group: [smoke]\ncolour: red", "colour: unknown key (line 2)"),
        ("group: [nothing]", "no task is called 'nothing'"),
        ("group: [none.yaml]", "none.yaml: no such task file"),
    ],
)
def test_a_group_that_cannot_be_used_is_told(tmp_path, content, told):
    (tmp_path / "u.yaml").write_text("group: [t.yaml]", "utf-8")
    (tmp_path / "t.yaml").write_text(content, "utf-8")
    with pytest.raises(TaskError) as caught:
        tasks_of(tmp_path / "t.yaml")
    assert told in str(caught.value)


@pytest.mark.slow
def test_a_group_is_evaluated_task_by_task(tmp_path, tiny_checkpoint):
    for name in ("one", "two"):
        task = {"name": name, "version": 1, "domains": {"a": {"texts": ["x y z", "x x"]}, "b": {"texts": ["u v", "w"]}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task), "utf-8")
    (tmp_path / "both.yaml").write_text("group: [one.yaml, two.yaml]", "utf-8")
    command = ["evaluate", "--model", str(tiny_checkpoint), "--tasks", str(tmp_path / "both.yaml"), "--permutations", "20"]
    done = CliRunner().invoke(app, [*command, "--format", "json", "--output-path", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    assert [result["task"]["name"] for result in json.loads(done.stdout)] == ["one", "two"]
