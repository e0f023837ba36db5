"""Traces: what is refused and why, what a folder of shards promises, and that nothing is ever half-written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as encode_safetensors

import dbes.files
from dbes.errors import DbesError, TraceError
from dbes.scoring.score import score
from dbes.trace import store
from dbes.trace.manifest import MANIFEST, SEAL, ShardEntry, digest
from dbes.trace.shards import validate_routes
from dbes.trace.store import CONTROL, Trace
from dbes.trace.types import TokenRoutes, storage_dtype
from dbes.trace.writer import VOCABULARY, TraceWriter


def arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of ``from_arrays`` for 4 tokens, 2 layers, top-2 of 3 experts, 2 documents, with some of them changed."""
    ids = np.array([[[0, 1], [1, 2]], [[1, 2], [0, 2]], [[2, 0], [2, 1]], [[0, 2], [1, 0]]])
    given: dict[str, Any] = {
        "ids": ids,
        "document": np.array([0, 0, 1, 1]),
        "domain": np.array([0, 1]),
        "domains": ("law", "code"),
        "layers": (2, 5),
        "experts": 3,
    }
    return given | changes


def build(**changes: Any) -> Trace:
    given = arrays(**changes)
    return Trace.from_arrays(given.pop("ids"), **given)


def rows_of(trace: Trace) -> TokenRoutes:
    (routes,) = tuple(trace)
    return routes


def same_routes(first: TokenRoutes, second: TokenRoutes) -> None:
    assert first.arrays().keys() == second.arrays().keys()
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(array, second.arrays()[name])
        assert array.dtype == second.arrays()[name].dtype


# ------------------------------------------------------------------------------------------------------------ from arrays


def changed_ids(*place: int, value: int) -> np.ndarray:
    ids = arrays()["ids"].copy()
    ids[place] = value
    return ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"ids": np.zeros((4, 2), int)}, "expected integers", id="ids with two axes"),
        pytest.param({"ids": np.zeros((4, 2, 2))}, "expected integers", id="ids that are floats"),
        pytest.param({"ids": changed_ids(1, 0, 0, value=3)}, "out of range", id="id as large as E"),
        pytest.param({"ids": changed_ids(1, 0, 0, value=-2)}, "out of range", id="id below -1"),
        pytest.param({"experts": (3, 2)}, "out of range at layer 5", id="id as large as its layer's E"),
        pytest.param({"ids": changed_ids(1, 1, 0, value=2)}, "twice in row 1 at layer 5", id="duplicate ids in a row"),
        pytest.param({"ids": np.zeros((4, 2, 2), int)}, "did not record routing", id="all zero"),
        pytest.param({"layers": (2,)}, "2 layers, but 1 layer numbers", id="too few layer numbers"),
        pytest.param({"experts": (3,)}, "1 expert counts", id="too few expert counts"),
        pytest.param({"layers": (5, 2)}, "ascending and distinct", id="layers descending"),
        pytest.param({"layers": (2, 2)}, "ascending and distinct", id="a layer twice"),
        pytest.param({"domain": np.array([0, 2])}, "domain", id="domain out of range"),
        pytest.param({"domain": np.array([0, -1])}, "domain", id="domain negative"),
        pytest.param({"domain": np.array([], int)}, "domain", id="no documents"),
        pytest.param({"domain": np.array([[0, 1]])}, "domain", id="domain with two axes"),
        pytest.param({"domain": np.array([0.0, 1.0])}, "domain", id="domain that is not an integer"),
        pytest.param({"document": np.array([0, 0, 1])}, "document: expected 4", id="document of another length"),
        pytest.param({"document": np.array([0, 0, 1, 2])}, "indices below 2", id="document out of range"),
        pytest.param({"document": np.array([0, 0, 1, -1])}, "indices below 2", id="document negative"),
        pytest.param({"document": np.array([0.0, 0.0, 0.5, 1.0])}, "document", id="document that is not an integer"),
        pytest.param({"document_ids": ("a",)}, "1 document ids for 2 documents", id="too few document ids"),
        pytest.param({"weights": np.ones((4, 2))}, "weights: expected shape", id="weights that do not fit"),
        pytest.param({"margins": np.ones((4, 2, 2))}, "margins: expected shape", id="margins of another shape"),
        pytest.param({"token_ids": np.ones(3)}, "token_ids: expected shape", id="token ids of another shape"),
        pytest.param({"phase": np.ones((4, 1))}, "phase: expected shape", id="phase of another shape"),
        pytest.param({"positions": np.arange(3)}, "positions: expected shape", id="positions of another shape"),
        pytest.param({"kept": np.ones((4, 2))}, "kept: expected shape", id="kept of another shape"),
        pytest.param({"selection_margins": np.ones(4)}, "selection_margins: expected shape", id="selection margins of another shape"),
        pytest.param({"scaled_margins": np.ones(4)}, "scaled_margins: expected shape", id="scaled margins of another shape"),
    ],
)
def test_arrays_that_no_router_can_have_produced_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        build(**changes)


def test_missing_slots_may_repeat_in_a_row() -> None:
    trace = build(ids=np.full((4, 2, 2), -1))
    assert (rows_of(trace).ids == 255).all()


def test_rows_are_put_in_order_of_document_and_position() -> None:
    order = np.array([2, 0, 3, 1])
    given = arrays(positions=np.array([0, 1, 0, 1]), token_ids=np.array([10, 11, 12, 13]))
    shuffled = {name: given[name][order] for name in ("ids", "document", "positions", "token_ids")}
    same_routes(rows_of(build(**given | shuffled)), rows_of(build(**given)))


def test_without_positions_the_order_of_the_rows_counts() -> None:
    interleaved = build(document=np.array([1, 0, 1, 0]))
    routes = rows_of(interleaved)
    assert routes.document.tolist() == [0, 0, 1, 1]
    assert routes.positions.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(routes.ids, arrays()["ids"][[1, 3, 0, 2]])


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        pytest.param(16, np.uint8, id="few experts"),
        pytest.param(255, np.uint8, id="the last that leaves a mark for missing slots"),
        pytest.param(256, np.uint16, id="one more"),
    ],
)
def test_every_expert_id_and_the_missing_mark_fit(experts: int, dtype: type) -> None:
    assert storage_dtype(experts) is dtype
    trace = Trace.from_arrays(np.array([[[experts - 1, -1]]]), document=[0], domain=[0], domains=["a"], layers=[0], experts=experts)
    found = rows_of(trace).ids
    assert found.dtype == dtype and found[0, 0].tolist() == [experts - 1, np.iinfo(dtype).max]


def test_slots_of_a_layer_are_never_more_than_its_experts() -> None:
    trace = Trace.from_arrays(np.array([[[0, -1], [3, 1]]]), document=[0], domain=[0], domains=["a"], layers=[0, 1], experts=(1, 4))
    assert trace.shape.top_k == (1, 2)
    assert (trace.shape.width, trace.shape.slots) == (4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda routes: {"ids": routes.ids[:, :1]}, "ids has shape", id="a layer too few"),
        pytest.param(lambda routes: {"positions": routes.positions[:2]}, r"positions has shape \(2,\)", id="rows that do not fit"),
        pytest.param(lambda _: {"weights": np.ones((4, 2, 1), np.float16)}, r"weights has shape \(4, 2, 1\)", id="weights that do not fit"),
        pytest.param(lambda routes: {"document": routes.document[::-1].copy()}, "must ascend", id="documents out of order"),
    ],
)
def test_routes_that_contradict_the_shape_are_refused(change: Any, message: str) -> None:
    trace = build()
    with pytest.raises(TraceError, match=message):
        validate_routes(replace(rows_of(trace), **change(rows_of(trace))), trace.shape, where="here")


# ---------------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def recording() -> naive.Recording:
    return naive.random_recording(1, documents=(3, 3), length=(20, 30), missing=0.2)


def shards_of(trace: Trace, folder: Path, *, finish: bool = True) -> TraceWriter:
    """The trace written as one shard per two documents."""
    routes = rows_of(trace)
    writer = TraceWriter(folder, trace.shape, {"model": "m"})
    for start in range(0, len(trace.shape.document_domain), 2):
        writer.write(routes.take((routes.document >= start) & (routes.document < start + 2)))
    if finish:
        writer.finish()
    return writer


def test_a_saved_trace_is_the_same_trace(recording: naive.Recording, tmp_path: Path) -> None:
    trace = recording.trace(provenance={"model": "m"}, document_ids=[f"text-{i}" for i in range(6)], control=recording.trace())
    saved = replace(trace, vocabulary={3: "drei", 1: "eins"}).save(tmp_path / "trace")
    assert saved.path == tmp_path / "trace"
    assert saved.provenance == {"model": "m"} and saved.vocabulary == {1: "eins", 3: "drei"}
    assert saved.shape.document_ids == trace.shape.document_ids
    assert saved.tokens == trace.tokens
    same_routes(rows_of(saved), rows_of(trace))
    assert saved.control is not None
    same_routes(rows_of(saved.control), rows_of(trace))
    assert score(saved, permutations=5).to_dataframe().equals(score(trace, permutations=5).to_dataframe())


@pytest.mark.parametrize(("scale", "kind"), [(1.0, np.float16), (1e5, np.float32), (1e-4, np.float32)])
def test_a_large_trace_is_saved_in_shards_of_whole_documents_with_the_weights_of_a_recording(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scale: float, kind: type
) -> None:
    monkeypatch.setattr(store, "SHARD_TOKENS", 100)
    random = np.random.default_rng(0)
    document = np.repeat(np.arange(40), random.integers(5, 60, 40))
    ids = np.argsort(random.random((len(document), 2, 8)), axis=-1)[..., :2]
    weights = (scale * random.dirichlet((2, 2), ids.shape[:2])).astype(np.float32)
    given = {"domain": np.arange(40) % 2, "domains": ("law", "code"), "layers": (0, 1), "experts": 8}
    trace = Trace.from_arrays(ids, document=document, weights=weights, **given)
    saved = trace.save(tmp_path)
    pieces = list(saved)
    assert len(pieces) == len(list(tmp_path.glob("shard-*.safetensors"))) >= len(document) // 100
    assert max(map(len, pieces)) <= 100
    assert all(one.document[-1] < other.document[0] for one, other in pairwise(pieces))
    np.testing.assert_array_equal(np.concatenate([piece.ids for piece in pieces]), rows_of(trace).ids)
    kept = np.concatenate([piece.weights for piece in pieces])
    assert kept.dtype == kind
    np.testing.assert_allclose(kept, weights, rtol=2.0**-11, atol=2.0**-25)


def test_a_trace_of_several_shards_scores_like_one(recording: naive.Recording, tmp_path: Path) -> None:
    trace = recording.trace()
    shards_of(trace, tmp_path)
    loaded = Trace.load(tmp_path)
    assert len(loaded.entries) == 3 and loaded.tokens == trace.tokens
    assert score(loaded, permutations=5).to_dataframe().equals(score(trace, permutations=5).to_dataframe())


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("shard-*"))[0]


def flip_a_byte(folder: Path) -> None:
    content = bytearray(first_shard(folder).read_bytes())
    content[-1] ^= 1
    first_shard(folder).write_bytes(bytes(content))


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change the manifest and seal it again."""
    path = folder / MANIFEST
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != SEAL} | changes
    path.write_text(json.dumps(content | {SEAL: digest(content)}))


def claim(folder: Path, content: bytes, **changes: Any) -> None:
    """Put other content in the first shard, with a manifest that agrees with it."""
    import hashlib

    first_shard(folder).write_bytes(content)
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    shards[0] |= {"sha256": hashlib.sha256(content).hexdigest()} | changes
    edit_manifest(folder, shards=shards)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(flip_a_byte, "sha256 differs", id="altered"),
        pytest.param(lambda folder: first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-7]), "truncated", id="truncated"),
        pytest.param(lambda folder: first_shard(folder).write_bytes(b""), "truncated", id="empty"),
        pytest.param(lambda folder: claim(folder, b"no safetensors"), "not a shard", id="not safetensors"),
        pytest.param(
            lambda folder: claim(folder, encode_safetensors({"other": np.zeros(3)})), "not a shard", id="safetensors of something else"
        ),
        pytest.param(
            lambda folder: claim(folder, first_shard(folder).read_bytes(), tokens=7), "the manifest says 7", id="another number of tokens"
        ),
        pytest.param(lambda folder: first_shard(folder).unlink(), "missing", id="missing"),
        pytest.param(lambda folder: edit_manifest(folder, schema_version=2), "schema_version 2; this dbes reads 1", id="another version"),
        pytest.param(lambda folder: edit_manifest(folder, complete=False), "not finished \\(3 shards so far\\)", id="unfinished"),
        pytest.param(lambda folder: edit_manifest(folder, extra=1), "extra", id="unknown field"),
        pytest.param(lambda folder: edit_manifest(folder, experts="many"), "experts", id="field of another type"),
        pytest.param(lambda folder: (folder / MANIFEST).write_text("{"), "not JSON", id="manifest that is not JSON"),
        pytest.param(lambda folder: (folder / MANIFEST).write_text("[1]"), "expected a JSON object", id="manifest that is a list"),
        pytest.param(lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not UTF-8", id="manifest that is not text"),
        pytest.param(lambda folder: (folder / MANIFEST).unlink(), "not a trace folder", id="no manifest"),
        pytest.param(lambda folder: edit_manifest(folder, experts=[3, 3, 3]), "out of range", id="ids above the number of experts"),
        pytest.param(lambda folder: (folder / VOCABULARY).write_text("{"), "vocabulary.json: not JSON", id="vocabulary that is not JSON"),
        pytest.param(lambda folder: edit_manifest(folder, document_domain=[0, 0, 0, 1, 1, 9]), "document_domain", id="unknown domain"),
        pytest.param(lambda folder: edit_manifest(folder, document_ids=["a"]), "document_ids", id="document ids that do not fit"),
        pytest.param(lambda folder: edit_manifest(folder, layers=[1]), "layers", id="layers that do not fit"),
    ],
)
def test_a_damaged_folder_is_refused(recording: naive.Recording, tmp_path: Path, damage: Any, message: str) -> None:
    shards_of(recording.trace(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TraceError, match=message):
        list(Trace.load(tmp_path))


def entries(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    change(shards)
    edit_manifest(folder, shards=shards)


def rewritten(folder: Path, **changes: Callable[[np.ndarray], np.ndarray] | np.ndarray | None) -> None:
    """Change, add or leave out arrays of the first shard, with a manifest that agrees."""
    arrays = parse_safetensors(first_shard(folder).read_bytes())
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = np.ascontiguousarray(change(arrays[name]) if callable(change) else change)
    claim(folder, encode_safetensors(arrays), tokens=len(arrays.get("document", ())))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_manifest(f, shards=[]), "complete, but documents 0 to 5 are in no shard"),
        (lambda f: entries(f, lambda s: s.append(s[0])), "shards: a file is named twice"),
        (lambda f: entries(f, lambda s: s.insert(0, s[0])), "shards: a file is named twice"),
        (lambda f: entries(f, lambda s: s.reverse()), r"shards\.0: documents 4 to 5, expected them to go on from 0"),
        (lambda f: entries(f, lambda s: s.pop()), "documents 4 to 5 are in no shard"),
        (lambda f: entries(f, lambda s: s.pop(1)), r"shards\.1: documents 4 to 5, expected them to go on from 2"),
        (lambda f: entries(f, lambda s: s[0].update(last_document=2)), "go on from 3"),
        (lambda f: entries(f, lambda s: s[2].update(last_document=9)), "they hold 10 documents, document_ids names 6"),
        (lambda f: entries(f, lambda s: s[1].update(name="../shard-00000.safetensors")), r"shards\.1\.name"),
        (lambda f: entries(f, lambda s: s[1].update(name="/etc/passwd")), r"shards\.1\.name"),
        (lambda f: entries(f, lambda s: s[1].update(name="shard-00001.safetensors\n")), r"shards\.1\.name"),
        (lambda f: entries(f, lambda s: s[1].update(tokens=-1)), r"shards\.1\.tokens"),
        (lambda f: entries(f, lambda s: s[1].update(tokens=1)), "the manifest says 1 tokens"),
        (lambda f: entries(f, lambda s: s[1].update(sha256="00")), r"shards\.1\.sha256"),
        (lambda f: (entries(f, lambda s: (s[0].update(last_document=2), s[1].update(first_document=3)))), "the manifest says 3 to 3"),
        (lambda f: edit_manifest(f, layers=[4, 4, 5]), "ascending and distinct"),
        (lambda f: edit_manifest(f, domains=["a", "a"]), "domains: 'a' is given twice"),
        (lambda f: edit_manifest(f, document_ids=["a"] * 6), "document_ids: 'a' is given twice"),
        (lambda f: edit_manifest(f, document_source=["a"] * 5), "document_source has 5 entries"),
        (lambda f: edit_manifest(f, top_k=[0, 0, 0]), "top_k"),
        (lambda f: edit_manifest(f, top_k=[99, 2, 2]), "top_k 99 of"),
        (lambda f: edit_manifest(f, top_k=[1, 1, 1]), "has more than top_k = 1 experts"),
        (lambda f: edit_manifest(f, experts=[0, 0, 0]), "experts"),
        (lambda f: edit_manifest(f, experts=[10**30, 8, 8]), "experts"),
        (lambda f: edit_manifest(f, provenance={"versions": [1]}), "versions"),
        (lambda f: edit_manifest(f, provenance={"task": "law"}), "task"),
        (lambda f: edit_manifest(f, provenance={"revision": 7}), "revision"),
        (lambda f: (f / VOCABULARY).write_text('{"x": "y"}'), "expected token ids with their texts"),
        (lambda f: (f / VOCABULARY).write_text('{"1": 5}'), "expected token ids with their texts"),
        (lambda f: (f / VOCABULARY).write_text("[]"), "expected token ids with their texts"),
        (lambda f: os.mkfifo(f / VOCABULARY), "a pipe, socket or device"),
        (lambda f: (first_shard(f).unlink(), os.mkfifo(f / "shard-00000.safetensors")), "a pipe, socket or device"),
        (lambda f: ((f / MANIFEST).unlink(), os.mkfifo(f / MANIFEST)), "a pipe, socket or device"),
        (lambda f: rewritten(f, positions=None), "positions missing"),
        (lambda f: rewritten(f, extra=np.zeros(3)), "unknown extra"),
        (lambda f: rewritten(f, positions=lambda a: a.astype(np.float32)), "positions has dtype float32, expected integers"),
        (lambda f: rewritten(f, positions=lambda a: a[::-1]), "positions must ascend"),
        (lambda f: rewritten(f, positions=lambda a: a - 1), "positions must ascend"),
        (lambda f: rewritten(f, document=lambda a: a + 1), "rows of documents 1 to 2, the manifest says 0 to 1"),
        (lambda f: rewritten(f, ids=lambda a: a.astype(np.int64)), "ids has dtype int64"),
        (lambda f: rewritten(f, ids=lambda a: a[..., :1]), "ids has shape"),
        (lambda f: rewritten(f, weights=lambda a: a * np.float32("nan")), "weights hold NaN"),
        (lambda f: rewritten(f, token_ids=lambda a: a - 10**6), "token_ids below 0"),
        (lambda f: rewritten(f, phase=np.full(2, 2, np.uint8)), "phase has shape"),
        (lambda f: rewritten(f, logit_stable=np.full((2, 3), 9, np.uint8)), "logit_stable has shape"),
    ],
)  # fmt: skip
def test_a_manifest_or_shard_that_cannot_be_true_is_refused(
    recording: naive.Recording, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    shards_of(recording.trace(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TraceError, match=message) as told:
        list(Trace.load(tmp_path))
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_labels_that_somebody_changed_are_noticed_and_old_manifests_stay_readable(recording: naive.Recording, tmp_path: Path) -> None:
    shards_of(recording.trace(), tmp_path)
    path = tmp_path / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))  # another form of the same values
    assert Trace.load(tmp_path).tokens == recording.trace().tokens
    path.write_text(json.dumps(content | {"document_domain": content["document_domain"][::-1]}))
    with pytest.raises(TraceError, match="was changed after it was written"):
        Trace.load(tmp_path)
    path.write_text(json.dumps({name: value for name, value in content.items() if name != SEAL}))
    assert Trace.load(tmp_path).tokens == recording.trace().tokens


def test_a_control_of_other_documents_is_refused(recording: naive.Recording, tmp_path: Path) -> None:
    shards_of(recording.trace(), tmp_path)
    shards_of(recording.trace(), tmp_path / CONTROL)
    edit_manifest(tmp_path / CONTROL, document_domain=[0, 1, 0, 1, 0, 1])
    with pytest.raises(TraceError, match="control: document_domain are not those of the trace"):
        Trace.load(tmp_path)


def test_documents_without_tokens_at_the_end_are_kept(tmp_path: Path) -> None:
    trace = build(domain=np.array([0, 1, 1]))
    assert len(trace.save(tmp_path).shape.document_ids) == 3


def test_a_shard_that_cannot_be_read_is_named(recording: naive.Recording, tmp_path: Path) -> None:
    shards_of(recording.trace(), tmp_path)
    loaded = Trace.load(tmp_path)
    first_shard(tmp_path).unlink()
    with pytest.raises(TraceError, match=r"shard-00000.*cannot be read"):
        list(loaded)


def test_an_interrupted_recording_goes_on_and_ends_the_same(recording: naive.Recording, tmp_path: Path) -> None:
    trace = recording.trace()
    routes = rows_of(trace)
    shards_of(trace, tmp_path / "whole")
    first = TraceWriter(tmp_path / "resumed", trace.shape, {"model": "m"})
    first.write(routes.take(routes.document < 2))
    (tmp_path / "resumed" / ".shard-00001.safetensors.part").write_bytes(b"half")  # what a kill may leave behind
    with pytest.raises(TraceError, match="not finished"):
        Trace.load(tmp_path / "resumed")
    again = TraceWriter(tmp_path / "resumed", trace.shape, {"model": "m"})
    assert (again.shards, again.next_document, again.tokens) == (1, 2, int((routes.document < 2).sum()))
    for start in (2, 4):
        again.write(routes.take((routes.document >= start) & (routes.document < start + 2)))
    again.finish(provenance={"counted": True})
    resumed, whole = Trace.load(tmp_path / "resumed"), Trace.load(tmp_path / "whole")
    assert resumed.entries == whole.entries
    assert resumed.provenance == {"model": "m", "counted": True}


def test_shards_can_be_forgotten_and_empty_documents_counted_as_done(recording: naive.Recording, tmp_path: Path) -> None:
    trace = recording.trace()
    routes = rows_of(trace)
    writer = TraceWriter(tmp_path, trace.shape, {})
    writer.write(routes.take(routes.document < 2), last_document=3)
    assert writer.next_document == 4
    writer.write(routes.take(routes.document >= 4))
    writer.keep(writer.entries[:1])
    assert (writer.shards, writer.next_document) == (1, 4)
    assert TraceWriter(tmp_path, trace.shape, {}).shards == 1


@pytest.mark.parametrize("other", ["provenance", "shape", "complete", "shard gone"])
def test_another_recording_in_the_folder_is_not_gone_on_with(recording: naive.Recording, tmp_path: Path, other: str) -> None:
    trace = recording.trace()
    shards_of(trace, tmp_path, finish=other == "complete")
    if other == "shard gone":
        first_shard(tmp_path).unlink()
    shape = replace(trace.shape, domains=("x", "y")) if other == "shape" else trace.shape
    with pytest.raises(TraceError, match="another recording"):
        TraceWriter(tmp_path, shape, {"model": "another" if other == "provenance" else "m"})


def test_a_full_disk_leaves_no_half_written_shard(recording: naive.Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recording.trace()
    routes = rows_of(trace)
    writer = TraceWriter(tmp_path, trace.shape, {"model": "m"})
    writer.write(routes.take(routes.document < 2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dbes.files.os, "fsync", full)
    with pytest.raises(DbesError, match="No space"):
        writer.write(routes.take(routes.document >= 2))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    again = TraceWriter(tmp_path, trace.shape, {"model": "m"})
    again.write(routes.take(routes.document >= 2))
    again.finish()
    assert Trace.load(tmp_path).tokens == trace.tokens


def test_a_trace_without_tokens_can_be_saved(recording: naive.Recording, tmp_path: Path) -> None:
    saved = recording.take(np.zeros(0, int)).trace().save(tmp_path / "empty")
    assert saved.tokens == 0
    assert score(saved, permutations=2).recording is not None


def test_a_control_beside_the_trace_is_loaded_with_it(recording: naive.Recording, tmp_path: Path) -> None:
    shards_of(recording.trace(), tmp_path)
    shards_of(recording.trace(), tmp_path / CONTROL)
    assert Trace.load(tmp_path).control is not None


def test_entries_say_which_documents_they_hold(recording: naive.Recording, tmp_path: Path) -> None:
    shards_of(recording.trace(), tmp_path)
    entries: tuple[ShardEntry, ...] = Trace.load(tmp_path).entries
    assert [(entry.first_document, entry.last_document) for entry in entries] == [(0, 1), (2, 3), (4, 5)]


def test_a_shard_is_checked_once_and_again_when_the_file_was_touched(recording: naive.Recording, tmp_path: Path) -> None:
    trace = recording.trace()
    shards_of(trace, tmp_path)
    loaded = Trace.load(tmp_path)
    list(loaded)
    (first, *_) = loaded.with_columns("token_ids")
    assert first.arrays().keys() == {"ids", "document", "positions", "token_ids"}
    np.testing.assert_array_equal(first.ids, next(iter(loaded)).ids)
    flip_a_byte(tmp_path)
    with pytest.raises(TraceError, match="sha256 differs"):
        list(loaded.with_columns("token_ids"))
