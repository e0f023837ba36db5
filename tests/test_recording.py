"""A recording is the same whatever the batches, survives being killed, and refuses what it cannot vouch for."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EXPERTS, LAYERS, TOP_K, character_tokenizer, discovered, representatives, tiny_model
from mock_remote_moe import MockMoeConfig, MockMoeForCausalLM
from rounding import assert_same_routes

from dbes.errors import ModelError, RecordingError, TraceError
from dbes.models import LoadedModel, load_model
from dbes.models.execution import base_of
from dbes.models.hooks import watching
from dbes.models.sites import find_sites
from dbes.models.windows import special_tokens
from dbes.recording import batching, forward, ledger
from dbes.recording import record as recording
from dbes.recording.batches import Window
from dbes.recording.forward import Coming, ForwardEngine, record_batch
from dbes.recording.record import record_documents
from dbes.trace.blocks import STORED, Contents
from dbes.trace.store import Trace
from dbes.trace.types import TokenRoutes

ALONE = {"doge"}
"""Families whose routing mixes the tokens of a batch: recorded one document at a time."""

PADDING_SIDE = {"doge", "deepseek_v4"}
"""Families whose routing depends on the side of the padding (measured upstream); dbes always pads right."""


@dataclass(frozen=True)
class Document:
    id: str
    domain: str
    text: str


def written(count: int = 6, seed: int = 0, longest: int = 60) -> list[Document]:
    random = np.random.default_rng(seed)
    texts = ["".join(chr(code) for code in random.integers(33, 120, random.integers(3, longest))) for _ in range(count)]
    return [Document(f"text-{index}", "ab"[index % 2], text) for index, text in enumerate(texts)]


@functools.cache
def loaded_model(family: str = "olmoe") -> LoadedModel:
    model = MockMoeForCausalLM(MockMoeConfig()).eval() if family == "mock" else tiny_model(family)
    return load_model(model, tokenizer=character_tokenizer())


def record(family: str, documents: Sequence[Document], **options: Any) -> recording.Recording:
    return record_documents(loaded_model(family), documents, domains=("a", "b"), **{"window": 40, **options})


def joined(trace: Trace) -> TokenRoutes:
    shards = list(trace)
    return TokenRoutes(**{name: np.concatenate([shard.arrays()[name] for shard in shards]) for name in shards[0].arrays()})


def hits(trace: Trace) -> dict[str, np.ndarray]:
    """Counts [layers, experts] of each document, by its id."""
    routes, shape = joined(trace), trace.shape
    counts = {}
    for index, name in enumerate(shape.document_ids):
        ids = routes.ids[routes.document == index]
        layers = [np.bincount(ids[:, column].ravel(), minlength=256)[: shape.width] for column in range(len(shape.layers))]
        counts[name] = np.stack(layers)
    return counts


@pytest.mark.parametrize("family", [*representatives(discovered()), "mock"])
def test_batches_and_order_change_no_count(family: str) -> None:
    documents = written()
    together = record(family, documents)
    assert together.batching == ("one at a time" if family in ALONE else "padded")
    assert_same_routes(together.trace, record(family, documents, batch_size=1).trace)
    assert_same_routes(together.trace, record(family, documents[::-1], batch_size=3).trace)
    routes = joined(together.trace)
    tokens = sum(len(document.text) for document in documents)
    assert len(routes) == together.tokens == tokens  # the <s> before each window is not there
    assert 1 not in routes.token_ids
    assert (np.diff(routes.document) >= 0).all()
    control = joined(together.trace.control)
    np.testing.assert_array_equal(control.document, routes.document)
    assert set(hits(together.trace.control)) == {document.id for document in documents}


@pytest.mark.parametrize("family", representatives(family for family in discovered() if family not in PADDING_SIDE))
def test_the_side_of_the_padding_changes_no_count(family: str) -> None:
    model = loaded_model(family).model
    short, long = torch.randint(5, 120, (1, 9)), torch.randint(5, 120, (1, 21))
    counts = []
    for left in (False, True):
        padding = torch.zeros(1, 12, dtype=torch.long)
        rows = [torch.cat([padding, short] if left else [short, padding], dim=1), long]
        mask = torch.cat([(rows[0] != 0).long(), torch.ones_like(long)])
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        kept: list[np.ndarray] = []

        def observe(_: int, decision: Any, mask: torch.Tensor = mask, kept: list[np.ndarray] = kept) -> None:
            kept.append(np.bincount(decision.ids[mask.flatten().bool()].flatten().numpy(), minlength=32))

        with torch.inference_mode(), watching(find_sites(model), observe):
            base_of(model)(input_ids=torch.cat(rows), attention_mask=mask, position_ids=places, use_cache=False)
        counts.append(np.stack(kept))
    np.testing.assert_array_equal(counts[0], counts[1])


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "longcat_flash"])
def test_everything_recorded_is_the_same_whatever_the_batches(family: str) -> None:
    documents = written(8)
    one, other = record(family, documents), record(family, documents, batch_size=1)
    for first, second in ((one.trace, other.trace), (one.trace.control, other.trace.control)):
        for name, array in joined(first).arrays().items():
            expected = joined(second).arrays()[name]
            if name in ("ids", "weights"):
                array, expected = np.sort(array, axis=-1), np.sort(expected, axis=-1)
            if array.dtype.kind == "f":
                np.testing.assert_allclose(array.astype(float), expected.astype(float), rtol=5e-3, atol=1e-4, err_msg=name)
            else:
                assert (array != expected).mean() < 2e-3, name  # a flip exactly at a noise threshold


def test_what_is_recorded() -> None:
    documents = written()
    trace = record("olmoe", documents, provenance={"task": "words", "task_version": 1}).trace
    routes = joined(trace)
    assert trace.shape.layers == (0, 1, 2, 3) and set(trace.shape.experts) == {EXPERTS} and set(trace.shape.top_k) == {TOP_K}
    assert routes.ids.shape == (len(routes), LAYERS, TOP_K) and routes.ids.dtype == np.uint8
    assert routes.weights.dtype == np.float16 and (routes.weights > 0).all()
    assert (routes.selection_margins >= 0).all() and (routes.scaled_margins >= 0).all()
    assert np.allclose(routes.logit_margins > 0, routes.selection_margins > 0)  # softmax keeps the order of logits
    assert routes.kept.min() >= 0 and routes.kept.max() <= TOP_K
    assert (routes.kept[..., 0].mean() >= routes.kept[..., 3].mean()) and (routes.logit_stable <= 0b111).all()
    text = {document.id: document.text for document in documents}
    for index, name in enumerate(trace.shape.document_ids):
        spelled = "".join(trace.vocabulary[token] for token in routes.token_ids[routes.document == index])
        assert spelled == text[name]
        np.testing.assert_array_equal(routes.positions[routes.document == index], np.arange(len(text[name])))
    facts = trace.provenance
    assert facts["special_tokens_excluded"] == {"before": [1], "after": []}
    assert (facts["dtype"], facts["window"], facts["control"], facts["task"]) == ("float32", 40, 3, "words")
    assert {"model", "revision", "attention", "device", "tokenizer_sha256", "versions"} <= facts.keys()
    assert facts["scores_missing"] == {} and facts["slots_without_expert"] == {}
    assert trace.control.provenance["router"] == "random"


def test_margins_agree_with_the_logits_the_model_returns() -> None:
    """An independent way to OLMoE's logits and scores (a softmax): ``output_router_logits``."""
    document = written(1)[0]
    loaded, routes = loaded_model("olmoe"), joined(record("olmoe", [document], window=100).trace)
    with torch.inference_mode():
        ids = torch.tensor([loaded.tokenizer(document.text)["input_ids"]])
        layers = loaded.model(input_ids=ids, output_router_logits=True).router_logits
    for column, logits in enumerate(layers):
        ordered, scores = (values.sort(dim=-1, descending=True)[0][1:].numpy() for values in (logits, logits.softmax(dim=-1)))
        np.testing.assert_allclose(routes.logit_margins[:, column], ordered[:, 1] - ordered[:, 2], rtol=2e-3, atol=1e-4)
        margins = scores[:, 1] - scores[:, 2]
        np.testing.assert_allclose(routes.selection_margins[:, column], margins, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(routes.scaled_margins[:, column], margins / scores.std(axis=-1), rtol=2e-3, atol=1e-4)
        best = logits.topk(TOP_K, dim=-1)[1][1:].sort(dim=-1)[0].numpy()
        np.testing.assert_array_equal(np.sort(routes.ids[:, column]), best)


def test_choosing_every_expert_leaves_nothing_to_flip() -> None:
    model = tiny_model("olmoe", num_experts=2)
    routes = joined(record_documents(load_model(model, tokenizer=character_tokenizer()), written(), domains=("a", "b"), window=40).trace)
    assert np.isnan(routes.selection_margins).all() and np.isnan(routes.logit_margins).all() and (routes.kept == 2).all()


def test_bfloat16_records() -> None:
    loaded = load_model(tiny_model("olmoe").to(torch.bfloat16), tokenizer=character_tokenizer())
    trace = record_documents(loaded, written(), domains=("a", "b"), window=40).trace
    assert trace.provenance["dtype"] == "bfloat16" and (joined(trace).selection_margins >= 0).all()


def test_missing_scores_have_reasons_and_idle_slots_are_reported() -> None:
    hashed = record("deepseek_v4", written()).trace
    assert set(hashed.provenance["scores_missing"]) == {"0", "1", "2"}
    routes = joined(hashed)
    assert np.isnan(routes.selection_margins[:, :3]).all() and not np.isnan(routes.selection_margins[:, 3]).any()
    assert (routes.kept[:, :3] == 255).all()
    zero = record("longcat_flash", written()).trace
    assert set(zero.provenance["slots_without_expert"]) == {"0", "1"}
    routes = joined(zero)
    idle = (routes.ids == 255).mean(axis=(0, 2))
    np.testing.assert_allclose(idle, list(zero.provenance["slots_without_expert"].values()))
    assert (routes.weights[routes.ids == 255] == 0).all()


def test_parts_can_be_left_out() -> None:
    plain = record("olmoe", written(), control=False, stiffness=False).trace
    assert plain.control is None and joined(plain).kept is None
    assert_same_routes(plain, record("olmoe", written()).trace)


def test_draws_of_the_control_are_different_routers() -> None:
    trace = record("olmoe", written()).trace
    assert len(trace.controls) == 3
    for one, other in combinations(trace.controls, 2):
        assert (joined(one).ids != joined(other).ids).mean() > 0.3


def test_the_control_is_a_frozen_random_router() -> None:
    one, again, other = (record("olmoe", written(), seed=seed).trace.control for seed in (0, 0, 1))
    np.testing.assert_array_equal(joined(one).ids, joined(again).ids)
    assert (joined(one).ids != joined(other).ids).mean() > 0.3
    loaded = loaded_model("olmoe")
    sites = find_sites(loaded.model)
    engine = ForwardEngine(loaded=loaded, sites=sites, before=(1,), after=(), seed=0, control=2, stiffness=False, window=40)
    hidden = torch.zeros(1, 32)
    matrix, second = (engine.random_router(0, draw, hidden) for draw in range(2))
    assert matrix.shape == (32, EXPERTS) and not torch.equal(matrix, engine.random_router(1, 0, hidden))
    assert abs(float(torch.corrcoef(torch.stack([matrix.flatten(), second.flatten()]))[0, 1])) < 0.2
    assert float(matrix.std() / engine.sites[0].router.weight.data.std()) == pytest.approx(1, abs=0.15)
    # the choice is the top-k of the product with the router's own input
    seen: list[Any] = []
    with torch.inference_mode(), watching(engine.sites, lambda index, decision: seen.append(decision) if index == 0 else None):
        base_of(loaded.model)(input_ids=torch.tensor([[1, *range(10, 30)]]), use_cache=False)
    block = record_batch(engine, [Window(0, "x", 0, np.arange(10, 30, dtype=np.int32))])
    for draw, router in enumerate((matrix, second)):
        expected = (seen[0].hidden @ router).topk(TOP_K, dim=-1)[1][1:]
        np.testing.assert_array_equal(np.sort(block.control["ids"][:, 0, draw]), np.sort(expected.numpy()))


def test_more_tokens_than_positions_are_cut_into_windows_of_one_document() -> None:
    document = Document("long", "a", written(1, longest=4)[0].text * 200)
    trace = record("olmoe", [document], window=4096).trace
    assert trace.provenance["window"] == 127  # 128 positions, one for <s>
    routes = joined(trace)
    assert len(routes) == len(document.text) and set(routes.document) == {0}
    np.testing.assert_array_equal(routes.positions, np.arange(len(document.text)))


def lent(tokenizer: Any) -> LoadedModel:
    """The tiny OLMoE with another tokenizer."""
    return replace(loaded_model(), tokenizer=tokenizer)


def test_padding_beyond_the_embedding_changes_nothing() -> None:
    tokenizer = character_tokenizer()
    rows = loaded_model().model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<extra {index}>" for index in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == rows
    documents = written()
    expected, found = record("olmoe", documents), record_documents(lent(tokenizer), documents, domains=("a", "b"), window=40)
    assert np.array_equal(joined(expected.trace).ids, joined(found.trace).ids)


def test_a_token_beyond_the_embedding_is_named_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    rows = loaded_model().model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<extra {index}>" for index in range(rows - len(tokenizer))])
    tokenizer.add_tokens(["<|tool|>"])
    monkeypatch.setattr("dbes.recording.record.find_batching", lambda *_: pytest.fail("a forward"))
    documents = [*written(), Document("long", "b", "ab<|tool|>")]
    told = rf"document 'long' \(domain 'b'\): token '<\|tool\|>' \(id {rows}, at position 2\) is beyond"
    with pytest.raises(RecordingError, match=told):
        record_documents(lent(tokenizer), documents, domains=("a", "b"), window=40)
    with pytest.raises(RecordingError, match=r"document 'half' \(domain 'a'\): the tokenizer .*half of a surrogate pair"):
        record("olmoe", [Document("half", "a", "x \ud83d"), *written()])


def test_a_decode_that_fails_does_not_lose_the_recording(tmp_path: Path) -> None:
    class Strange(Exception):
        pass

    class Mute(type(character_tokenizer())):
        def decode(self, *_: Any, **__: Any) -> str:
            raise Strange("no")

    tokenizer = Mute(tokenizer_object=character_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    trace = record_documents(lent(tokenizer), [Document("x", "a", "ab")], domains=("a", "b"), window=40, output_path=tmp_path).trace
    assert set(Trace.load(tmp_path).vocabulary.values()) == {"a", "b"} == set(trace.vocabulary.values())


def test_special_tokens_are_told_by_place_not_by_id() -> None:
    assert special_tokens(character_tokenizer()) == ((1,), ())
    assert special_tokens(character_tokenizer(special=False)) == ((), ())
    loaded = loaded_model("olmoe")
    literal = Document("literal", "a", "one</s>two")
    routes = joined(record_documents(loaded, [literal], domains=("a",), window=40).trace)
    assert routes.token_ids.tolist().count(2) == 1 and len(routes) == 7


def test_on_disk_and_in_memory_are_the_same(tmp_path: Path) -> None:
    memory, disk = record("olmoe", written()).trace, record("olmoe", written(), output_path=tmp_path / "trace").trace
    for first, second in ((memory, disk), (memory.control, disk.control)):
        for name, array in joined(first).arrays().items():
            np.testing.assert_array_equal(array, joined(second).arrays()[name], err_msg=name)
    assert memory.provenance == disk.provenance and memory.vocabulary == disk.vocabulary
    with pytest.raises(TraceError, match="holds another recording"):
        record("olmoe", written(5), output_path=tmp_path / "trace")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_progress_and_speed_are_told() -> None:
    told: list[tuple[int, int]] = []
    done = record("olmoe", written(), batch_size=2, progress=lambda now, total: told.append((now, total)))
    assert told[-1] == (done.tokens, done.tokens) and [now for now, _ in told] == sorted(now for now, _ in told)
    assert done.tokens_per_second > 0 and done.documents == 6


@pytest.mark.parametrize("stop_at", ["a shard of a control", "a control is complete", "the trace is complete"])
def test_resuming_where_two_traces_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str) -> None:
    """Killed between the trace's shard and a control's, and between finishing one and another."""
    monkeypatch.setattr(recording, "SHARD_TOKENS", 60)
    record("olmoe", written(), output_path=tmp_path / "whole")
    where, name, calls = {
        "a shard of a control": (ledger, "write_shard", 3),
        "a control is complete": (ledger.TraceWriter, "finish", 2),
        "the trace is complete": (ledger, "discard", 4),  # of the manifests that the controls might have, and of the units
    }[stop_at]
    real, left = getattr(where, name), iter(range(calls, 0, -1))

    def failing(*given: Any, **options: Any) -> Any:
        if next(left) == 1:
            raise KeyboardInterrupt
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing)
        with pytest.raises(KeyboardInterrupt):
            record("olmoe", written(), output_path=tmp_path / "cut")
    if stop_at == "the trace is complete":
        assert_same_routes(Trace.load(tmp_path / "cut"), Trace.load(tmp_path / "whole"))
        return
    with pytest.raises(TraceError, match="not finished"):
        Trace.load(tmp_path / "cut")
    record("olmoe", written(), output_path=tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_recording as tests
tests.torch.set_num_threads(1)
tests.recording.SHARD_TOKENS = 200
forward = tests.forward
real = forward.begin_batch
def slowly(*given):
    time.sleep(0.2)
    return real(*given)
forward.begin_batch = slowly
tests.record("olmoe", tests.written(40), output_path=sys.argv[2])
"""


def test_a_killed_recording_resumes_and_ends_with_the_identical_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)])
    deadline = time.monotonic() + 120
    while not (folder / "shard-00001.safetensors").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(TraceError, match="not finished"):
        Trace.load(folder)
    before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setattr(recording, "SHARD_TOKENS", 200)
        record("olmoe", written(40), output_path=folder)
        record("olmoe", written(40), output_path=tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before  # not recorded again
    resumed = {name: content for name, content in contents(folder).items() if not name.endswith(".part")}
    assert resumed == contents(tmp_path / "whole")
    assert len([name for name in resumed if name.startswith("shard")]) > 3


@pytest.mark.parametrize("batch_size", ["auto", 5])
def test_memory_running_out_halves_the_budget_for_the_rest_of_the_unit(monkeypatch: pytest.MonkeyPatch, batch_size: Any) -> None:
    real, asked = forward.begin_batch, []

    def limited(engine: ForwardEngine, windows: Sequence[Window]) -> Coming:
        asked.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(engine, windows)

    documents = [Document(f"text-{index}", "ab"[index % 2], chr(60 + index) * (60 - index)) for index in range(12)]
    expected = record("olmoe", documents, window=100, batch_size=batch_size).trace
    monkeypatch.setattr(forward, "begin_batch", limited)
    found = record("olmoe", documents, window=100, batch_size=batch_size).trace
    assert_same_routes(expected, found)
    failed = [count for count in asked if count > 2]
    assert sum(asked) - sum(failed) == 12 and asked[: len(failed)] == failed == sorted(failed, reverse=True)  # never tried again
    assert all(after <= before // 2 for before, after in pairwise(failed))
    reduced = found.provenance["batches_reduced_to"]
    assert reduced.keys() == {"0"} and reduced["0"] == (2 if batch_size == 5 else failed[-1] * 61 // 2)
    assert "batches_reduced_to" not in expected.provenance

    def hopeless(*_: Any) -> Coming:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(forward, "begin_batch", hopeless)
    with pytest.raises(RecordingError, match=r"one window of 60 tokens does not fit in memory"):
        record("olmoe", documents, window=100)


def test_what_may_share_a_batch_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real = batching._tried

    def counted(engine: ForwardEngine, *others: Any) -> Any:
        tried.append(engine.loaded.name)
        return real(engine, *others)

    monkeypatch.setattr(batching, "_tried", counted)
    monkeypatch.setattr(batching, "_known", {})
    documents = [Document(f"text-{index}", "a", "some words to read") for index in range(3)]
    short = [*documents, Document("short", "a", "ab")]
    for texts, times in ((short, 1), (short, 2), (documents, 3), (documents, 3), (short, 3)):  # a short text tells of itself alone
        record("olmoe", texts)
        assert len(tried) == times
    record_documents(load_model(tiny_model("olmoe"), tokenizer=character_tokenizer()), documents, domains=("a",), window=40)
    assert len(tried) == 3  # other weights, the same class and config
    record("mixtral", documents)
    record_documents(load_model(tiny_model("olmoe").bfloat16(), tokenizer=character_tokenizer()), documents, domains=("a",), window=40)
    assert len(tried) == 5

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record("olmoe", documents, output_path=tmp_path)
    monkeypatch.setattr(batching, "_known", {})  # as in another process
    trace = record("olmoe", documents, output_path=tmp_path).trace
    assert len(tried) == 5 and trace.provenance["batching"] == "padded"


class TestErrors:
    """Each says what was wrong and where, and nothing is written for what can be known beforehand."""

    def test_empty_text(self, tmp_path: Path) -> None:
        with pytest.raises(RecordingError, match=r"document 'empty' \(domain 'b'\) has no tokens"):
            record("olmoe", [*written(2), Document("empty", "b", "")], output_path=tmp_path / "trace")
        assert not (tmp_path / "trace").exists()

    def test_no_documents(self) -> None:
        with pytest.raises(RecordingError, match="no documents"):
            record("olmoe", [])

    def test_unknown_domain(self) -> None:
        with pytest.raises(RecordingError, match=r"domain 'c', expected one of \['a', 'b'\]"):
            record("olmoe", [Document("x", "c", "text")])

    @pytest.mark.parametrize("options", [{"window": 0}, {"batch_size": 0}])
    def test_sizes(self, options: dict[str, int]) -> None:
        with pytest.raises(RecordingError, match="at least"):
            record("olmoe", written(), **options)

    def test_dense_model(self, tmp_path: Path) -> None:
        import transformers

        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
        dense = load_model(transformers.LlamaForCausalLM(config), tokenizer=character_tokenizer())
        with pytest.raises(ModelError, match="not a Mixture-of-Experts"):
            record_documents(dense, written(), domains=("a", "b"), window=8, output_path=tmp_path / "trace")
        assert not (tmp_path / "trace").exists()

    def test_nan_in_the_router(self, tmp_path: Path) -> None:
        model = tiny_model("olmoe")
        with torch.no_grad():
            model.model.layers[2].mlp.gate.weight[3] = torch.nan
        loaded = load_model(model, tokenizer=character_tokenizer())
        with pytest.raises(RecordingError, match=r"layer 2: NaN or infinity in the router's output, in document"):
            record_documents(loaded, written(), domains=("a", "b"), window=8, output_path=tmp_path / "trace")
        assert not list(tmp_path.rglob("shard*"))

    def test_a_nan_in_one_document_names_it(self) -> None:
        model = tiny_model("olmoe")
        with torch.no_grad():
            model.model.embed_tokens.weight[4 + ord("~") - 32] = torch.nan
        loaded = load_model(model, tokenizer=character_tokenizer())
        documents = [*written(4), Document("broken", "a", "ab~cd")]
        with pytest.raises(RecordingError, match="layer 0: NaN or infinity in the router's output, in document 'broken'"):
            record_documents(loaded, documents, domains=("a", "b"), window=40)

    def test_a_layer_that_does_not_fire(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("olmoe")
        block = model.model.layers[1].mlp
        real = type(block).forward
        monkeypatch.setattr(type(block), "forward", lambda self, hidden: hidden if self is block else real(self, hidden))
        with pytest.raises(RecordingError, match=r"layer 1 \(model.layers.1.mlp\) routed 0 times in one forward"):
            record_documents(load_model(model, tokenizer=character_tokenizer()), written(), domains=("a", "b"), window=8)

    def test_a_layer_with_wrong_ids(self) -> None:
        model = tiny_model("deepseek_v4")
        model.model.layers[0].mlp.gate.tid2eid.zero_()
        with pytest.raises(RecordingError, match=r"expert 0 stands twice in row \d+ at layer 0"):
            record_documents(load_model(model, tokenizer=character_tokenizer()), written(), domains=("a", "b"), window=8)


def test_recordings_are_values() -> None:
    done = record("olmoe", written())
    assert replace(done, seconds=0.0).tokens_per_second == 0.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_tokens() -> None:
    benchmark = Path(__file__).parents[1] / "benchmarks" / "recording.py"

    def peak(tokens: int) -> float:
        command = [sys.executable, str(benchmark), "--memory", str(tokens)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    # what is buffered fills up at first; from there on routes that were kept would add their own size
    held = Contents(layers=tuple(range(8)), experts=(64,) * 8, top_k=(8,) * 8, gives=frozenset(STORED), control=3).bytes_per_token
    assert (peak(400_000) - peak(100_000)) * 2**20 < 300_000 * held / 2


@pytest.mark.parametrize("block", ["mixtral", "shared", "sorted", "switch"])
def test_experts_that_are_modules_are_recorded_alike_in_any_batch(block: str) -> None:
    torch.manual_seed(0)
    slots = 1 if block == "switch" else 2
    model = MockMoeForCausalLM(MockMoeConfig(block=block, num_experts_per_tok=slots)).eval()
    loaded = load_model(model, tokenizer=character_tokenizer())
    one = record_documents(loaded, written(), domains=("a", "b"), window=40)
    assert_same_routes(one.trace, record_documents(loaded, written(), domains=("a", "b"), window=40, batch_size=1).trace)
    routes = joined(one.trace)
    assert one.trace.provenance["scores_missing"] == {} and (routes.weights > 0).all() and (routes.selection_margins >= 0).all()


def test_a_router_that_draws_random_numbers_is_refused() -> None:
    model = MockMoeForCausalLM(MockMoeConfig(block="noisy")).eval()
    with pytest.raises(RecordingError, match="the same text is routed to other experts every time it is read"):
        record_documents(load_model(model, tokenizer=character_tokenizer()), written(), domains=("a", "b"), window=40)
