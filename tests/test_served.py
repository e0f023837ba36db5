"""Models that a server runs: a stand-in with the exact contract, whose routing is that of a real model, and everything that goes wrong."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.errors import RecordingError, SettingError
from dbes.evaluation import servers
from dbes.evaluation.servers import HttpServer, arguments_of
from dbes.models.load import load_description, load_model
from dbes.recording.batches import Window
from dbes.recording.documents import plain_engine
from dbes.recording.forward import record_batch
from dbes.tasks.task import Document

TASK = "smoke"


class Routing:
    """What the experts of the embedded model are for a list of token ids: a real forward, one prompt at a time."""

    def __init__(self) -> None:
        self.loaded = load_model("embedded")
        engine = plain_engine(self.loaded, [Document(id="x", domain="a", text="words")], window=4096, batch_size=1, seed=0)
        self.engine = replace(engine, before=(), after=())
        self.lock = threading.Lock()

    def __call__(self, ids: list[int]) -> np.ndarray:
        with self.lock:
            return record_batch(self.engine, [Window(0, "x", 0, np.asarray(ids, np.int32))]).routes["ids"].astype(np.uint8)


@pytest.fixture(scope="module")
def routing() -> Routing:
    return Routing()


class Standin:
    """A server on the loopback address; ``fault`` says what it does wrong, and how often (None: always)."""

    def __init__(self, routing: Routing, kind: str = "vllm") -> None:
        self.routing, self.kind, self.fault, self.times, self.asked = routing, kind, "", None, 0
        self.models = ["embedded-as-served"]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths: dict[str, Any] = {"/v1/models": {"data": [{"id": name} for name in outer.models]}}
                paths["/version" if outer.kind == "vllm" else "/get_server_info"] = {"version": "0.33.0"}
                self.answer(paths.get(self.path), 404)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    ids = outer.routing.loaded.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                    self.answer({"tokens": [each + 1 for each in ids] if outer.fault == "tokenizer" else ids}, 404)
                    return
                outer.asked += 1
                fault = outer.fault
                if fault and outer.times is not None:
                    outer.times -= 1
                    fault = fault if outer.times >= 0 else ""
                if fault in ("500", "429", "400"):
                    self.answer(None, int(fault))
                elif fault == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                else:
                    self.answer(outer.completion(body["prompt"], fault), 500)

            def answer(self, content: Any, otherwise: int) -> None:
                data = json.dumps({"error": "so it is"} if content is None else content).encode()
                self.send_response(otherwise if content is None else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def completion(self, prompt: list[int], fault: str) -> dict[str, Any]:
        ids = self.routing(prompt)  # prompt + one token of output - 1 rows
        if fault == "rows":
            ids = ids[:-1]
        elif fault == "zeros":
            ids = np.zeros_like(ids)
        elif fault == "layers":
            ids = ids[:, :-1]
        elif fault == "experts":
            ids = np.where(ids == 3, 200, ids).astype(np.uint8)
        answer: dict[str, Any] = {"id": "cmpl-1", "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1}}
        if self.kind == "sglang":
            text = base64.b64encode(ids.astype("<i4").tobytes()).decode()
            return {**answer, "choices": [{"index": 0, "text": "a"}], "sglext": {"routed_experts": text}}
        choice: dict[str, Any] = {"index": 0, "text": "a", "prompt_token_ids": prompt, "token_ids": [5]}
        if fault == "other tokens":
            choice["prompt_token_ids"] = [each + 1 for each in prompt]
        if fault == "cached":
            split = ids.astype(np.int16)
            split[:2] = -1
            return {**answer, "prompt_routed_experts": split.tolist(), "choices": [{**choice, "routed_experts": []}]}
        if fault == "split":
            return {**answer, "prompt_routed_experts": ids.astype(np.int16).tolist(), "choices": [{**choice, "routed_experts": []}]}
        if fault != "none":
            file = io.BytesIO()
            np.save(file, ids)
            choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
        return {**answer, "choices": [choice]}


@pytest.fixture
def standin(routing: Routing) -> Iterator[Standin]:
    found = Standin(routing)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(servers.time, "sleep", waited.append)
    monkeypatch.setattr(HttpServer.__init__, "__kwdefaults__", {"key": None, "sleep": waited.append})
    return waited


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dbes.Result:
    where = tmp_path_factory.mktemp("memory")
    return dbes.evaluate("embedded", tasks=TASK, limit=4, batch_size=1, permutations=20, output_path=where)


def routes_of(result: dbes.Result) -> np.ndarray:
    trace = dbes.Trace.load(result.folder / "trace")
    return np.concatenate([np.sort(routes.ids, axis=-1) for routes in trace])


def served(standin: Standin, where: Path, **options: Any) -> dbes.Result:
    given = {"tasks": TASK, "limit": 4, "permutations": 20, "output_path": where, "engine": "openai", "base_url": standin.url}
    return dbes.evaluate("embedded", **(given | options))


@pytest.mark.parametrize(("kind", "fault"), [("vllm", ""), ("vllm", "split"), ("sglang", "")])
def test_a_server_gives_the_routes_of_the_model_it_runs(
    routing: Routing, kind: str, fault: str, expected: dbes.Result, tmp_path: Path
) -> None:
    standin = Standin(routing, kind)
    standin.fault = fault
    found = served(standin, tmp_path)
    np.testing.assert_array_equal(routes_of(found), routes_of(expected))
    for metric in ("specialization", "der", "domain_isolation"):
        assert found.record(metric).value == expected.record(metric).value
        assert np.isnan(found.record(metric).excess)
    assert np.isnan(found.record("stiffness").value)
    about = dbes.Trace.load(found.folder / "trace").provenance
    assert about["served_by"] == {"engine": f"openai ({kind})", "version": "0.33.0", "model": "embedded-as-served"}
    assert "dtype" not in about and found.model.dtype is None
    assert (found.folder / "result.json").is_file()
    asked = standin.asked
    assert served(standin, tmp_path).created == found.created and standin.asked == asked  # reused


def test_the_command_line_says_what_a_server_cannot_give(standin: Standin, tmp_path: Path) -> None:
    words = ["evaluate", "--engine", "openai", "--base-url", standin.url + "/v1/", "--tasks", TASK, "--limit", "4", "--permutations", "20"]
    ran = CliRunner().invoke(app, [*words, "--output-path", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert "stiffness is NaN" in " ".join(ran.output.split())
    assert len(list(tmp_path.rglob("report.html"))) == 1


@pytest.mark.parametrize("fault", ["500", "429", "cut"])
def test_what_passes_is_asked_again(standin: Standin, fault: str, expected: dbes.Result, tmp_path: Path, quick: list[float]) -> None:
    standin.fault, standin.times = fault, 3
    np.testing.assert_array_equal(routes_of(served(standin, tmp_path)), routes_of(expected))
    assert len(quick) >= 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [("500", "failed 5 times"), ("400", "refuses /v1/completions (400"), ("none", "no routed_experts"), ("rows", "rows of routing"),
     ("zeros", "all zero"), ("layers", "layers"), ("experts", "out of range"), ("other tokens", "other tokens"),
     ("cached", "prefix cach"), ("tokenizer", "another tokenizer")],
)  # fmt: skip
def test_what_a_server_does_wrong_is_one_line(standin: Standin, fault: str, words: str, tmp_path: Path) -> None:
    standin.fault = fault
    with pytest.raises(RecordingError) as problem:
        served(standin, tmp_path)
    assert words in str(problem.value) and "\n" not in str(problem.value)
    assert "127.0.0.1" in str(problem.value) or "openai" in str(problem.value) or fault in ("zeros", "experts")


def test_a_server_that_dies_is_named_and_a_rerun_resumes(
    routing: Routing, expected: dbes.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbes.recording.record.SHARD_TOKENS", 400)
    monkeypatch.setattr("dbes.recording.units.ACCELERATOR_BATCH_TOKENS", 400)
    monkeypatch.setattr("dbes.recording.units.SHARD_BYTES", 1)
    standin = Standin(routing)
    standin.fault, standin.times = "", None
    real = standin.completion

    def dying(prompt: list[int], fault: str) -> dict[str, Any]:
        if standin.asked > 6:
            raise ConnectionResetError
        return real(prompt, fault)

    monkeypatch.setattr(standin, "completion", dying)
    with pytest.raises(RecordingError, match="the same command resumes"):
        served(standin, tmp_path)
    first = standin.asked
    again = Standin(routing)
    np.testing.assert_array_equal(routes_of(served(again, tmp_path)), routes_of(expected))
    assert 0 < again.asked < len(expected.task.domains) * 4 and first > 6


def test_another_model_than_asked_is_refused(standin: Standin, tmp_path: Path) -> None:
    standin.models = ["one", "another"]
    with pytest.raises(RecordingError, match=r"serves .*'one'.* and not 'dbes-embedded'"):
        served(standin, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"engine": "openai"}, "give base_url"), ({"base_url": "http://x"}, "engine 'openai' only"),
     ({"engine": "vllm", "base_url": "http://x"}, "engine 'openai' only"), ({"engine": "openai", "base_url": "ftp://x"}, "http://HOST"),
     ({"engine": "openai", "base_url": "http://x", "loss": True}, "no logits"),
     ({"engine": "openai", "base_url": "http://x", "generate": 4}, "given text"),
     ({"engine": "openai", "base_url": "http://x", "api_key_env": "DBES_NO_SUCH_KEY"}, "DBES_NO_SUCH_KEY"),
     ({"engine": "vllm", "engine_args": "tensor_parallel_size"}, "name=value"), ({"engine": "vllm"}, "pip install 'dbes[vllm]'")],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as problem:
        dbes.evaluate("embedded", tasks=TASK, limit=4, output_path=tmp_path, **options)
    assert words in str(problem.value)


def test_arguments_of_an_engine() -> None:
    assert arguments_of("tensor_parallel_size=8, dtype=bfloat16,enforce_eager=true") == {
        "tensor_parallel_size": 8, "dtype": "bfloat16", "enforce_eager": True,
    }  # fmt: skip
    assert arguments_of(None) == {}


def test_vllm_in_this_process(routing: Routing, expected: dbes.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of the package: its attribute names, real routing. Dense layers are zeros in an array of all layers."""
    made: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            made.update(options)

        def generate(self, prompts: list[dict], sampling: Any, use_tqdm: bool) -> list[Any]:
            assert sampling == {"max_tokens": 1, "temperature": 0.0} and not use_tqdm
            salts = [each["cache_salt"] for each in prompts]
            assert len(set(salts)) == len(salts)
            return [
                types.SimpleNamespace(
                    request_id=str(number), prompt_token_ids=each["prompt_token_ids"],
                    outputs=[types.SimpleNamespace(token_ids=[7], routed_experts=routing(each["prompt_token_ids"]))],
                )
                for number, each in enumerate(prompts)
            ]  # fmt: skip

    package = types.ModuleType("vllm")
    package.__dict__.update(LLM=LLM, SamplingParams=lambda **options: options, __version__="0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", package)
    found = dbes.evaluate(
        "embedded", tasks=TASK, limit=4, permutations=20, output_path=tmp_path, engine="vllm", engine_args="tensor_parallel_size=2"
    )
    np.testing.assert_array_equal(routes_of(found), routes_of(expected))
    assert made["enable_return_routed_experts"] is True and made["tensor_parallel_size"] == 2
    about = dbes.Trace.load(found.folder / "trace").provenance["served_by"]
    assert about == {"engine": "vllm", "version": "0.33.0", "arguments": {"tensor_parallel_size": 2}}


def test_a_description_has_no_weights() -> None:
    found = load_description("embedded")
    assert all(parameter.is_meta for parameter in found.model.parameters())
    assert found.revision == load_model("embedded").revision


@pytest.mark.gpu
def test_real_vllm(tmp_path: Path) -> None:
    """``pytest -m gpu tests/test_served.py`` with vLLM installed: its routes are those of transformers but for close choices."""
    pytest.importorskip("vllm")
    found = dbes.evaluate("embedded", tasks=TASK, limit=4, output_path=tmp_path / "vllm", engine="vllm", engine_args="dtype=float32")
    ours = dbes.evaluate("embedded", tasks=TASK, limit=4, output_path=tmp_path / "memory", dtype="float32")
    assert (routes_of(found) == routes_of(ours)).all(axis=-1).mean() > 0.95
