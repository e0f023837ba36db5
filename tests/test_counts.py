"""Counts as a value: layer by layer, in files, merged, made elsewhere; and that an evaluation reads its trace once."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from naive import Recording
from rich.console import Console
from safetensors.numpy import load_file
from safetensors.numpy import save as encode_safetensors
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.comparison.entries import read_entries
from dbes.errors import TraceError
from dbes.files import sha256_of
from dbes.paths.evidence import read_evidence
from dbes.reporting.page import render_page, write_page
from dbes.reporting.terminal import render
from dbes.results import RESULT_FILE
from dbes.scoring import counting, sampling
from dbes.scoring.counting import count_routes, counts_of
from dbes.scoring.counts import Counts, LayerCounts
from dbes.scoring.merging import OTHER_GROUPS
from dbes.scoring.sampling import even_documents
from dbes.scoring.score import score, score_tables
from dbes.scoring.tables import save_scores
from dbes.trace import shards, store
from dbes.trace.joining import join_traces
from dbes.trace.store import Trace

CASES = naive.cases()
SOME = ("plain", "layers of different width", "documents without tokens", "without weights, margins and token ids", "k = 1")
few = settings(max_examples=15, deadline=None, derandomize=True)


def arrays(value: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """All arrays inside some sums."""
    found = {}
    for entry in fields(value):
        part = getattr(value, entry.name)
        if isinstance(part, np.ndarray):
            found[prefix + entry.name] = part
        elif is_dataclass(part) and entry.name != "shape":
            found |= arrays(part, f"{entry.name}.")
    return found


def assert_same(found: LayerCounts, expected: LayerCounts, *, but: tuple[str, ...] = (), rtol: float = 0) -> None:
    here, there = arrays(found), arrays(expected)
    assert set(here) == set(there)
    for name in set(here) - set(but):
        np.testing.assert_allclose(here[name], there[name], rtol=rtol, err_msg=name)


def naive_hits(recording: Recording) -> np.ndarray:
    """Hits by plain loops, filled up to the widest layer."""
    widest = max(recording.experts)
    return np.array([[[*row, *[0] * (widest - len(row))] for row in document] for document in naive.hits(recording)])


def told(records: Any) -> list[str]:
    """Records as text, in which NaN equals NaN."""
    return [record.model_dump_json() for record in records]


def named(recording: Recording, prefix: str = "text", **more: Any) -> Trace:
    return recording.trace(document_ids=[f"{prefix}-{number}" for number in range(len(recording.domain))], **more)


# ---------------------------------------------------------------------------------------------------------- layer by layer


@pytest.mark.parametrize("name", SOME)
def test_a_layer_alone_is_the_same_layer_of_all(name: str) -> None:
    recording = CASES[name]
    counts = count_routes(recording.trace())
    whole = counts.whole()
    for column, experts in enumerate(recording.experts):
        layer = counts.layer(column)
        assert layer.shape.layers == (recording.layers[column],) and layer.hits.shape[1:] == (1, experts)
        np.testing.assert_array_equal(layer.hits[:, 0], whole.hits[:, column, :experts])
        np.testing.assert_array_equal(layer.hits[:, 0], naive_hits(recording)[:, column, :experts])
    np.testing.assert_array_equal(counts.by_domain(lambda sums: sums.hits), whole.by_domain(whole.hits))


def test_documents_are_chosen_and_added_up_layer_by_layer() -> None:
    recording = CASES["plain"]
    sources = [f"source-{number // 2}" for number in range(len(recording.domain))]
    counts = count_routes(named(recording, document_source=sources))
    kept = np.array([0, 2, 3, 7])
    assert_same(counts.take(kept).whole(), counts.whole().take(kept))
    units = counts.by_unit()
    assert_same(units.whole(), counts.whole().by_unit())
    hits = naive_hits(recording)
    for number, name in enumerate(units.shape.document_ids):
        own = [
            index
            for index, source in enumerate(sources)
            if source == name and recording.domain[index] == units.shape.document_domain[number]
        ]
        np.testing.assert_array_equal(units.layer(1).hits[number, 0], hits[own, 1].sum(axis=0))


@pytest.mark.parametrize("name", SOME)
def test_rows_in_files_hold_what_rows_in_memory_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = CASES[name].trace()
    expected = count_routes(trace).whole()
    monkeypatch.setattr(counting, "MEMORY_BYTES", 0)
    monkeypatch.setattr(counting, "STRETCH_TOKENS", 40)
    assert_same(count_routes(trace).whole(), expected)


def test_a_control_is_counted_without_groups_and_sample() -> None:
    counts = count_routes(CASES["plain"].trace(), plain=True)
    found = counts.layer(0).ngrams
    assert counts.sample is None and not counts.grouped and found is not None
    assert found.groups is None and found.grouped is None and found.in_group is None


# ---------------------------------------------------------------------------------------------------------- sample


def test_of_a_large_trace_the_documents_of_the_sample_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = naive.random_recording(1, documents=(30, 10, 20), length=(20, 21))
    trace = named(recording)
    whole = count_routes(trace).sample
    assert whole is not None and whole.whole
    monkeypatch.setattr(sampling, "KEPT_TOKENS", 100)
    monkeypatch.setattr(sampling, "SAMPLE_TOKENS", 600)
    monkeypatch.setattr(even_documents, "__kwdefaults__", {"limit": 600})
    monkeypatch.setattr(store, "SHARD_TOKENS", 300)
    saved = trace.save(tmp_path / "trace")
    assert len(saved.entries) > 2
    expected = whole.of(even_documents(trace.shape, count_routes(trace).tokens))
    assert expected is not None and expected.tokens <= 600
    for one in (trace, saved, Trace.load(tmp_path / "trace")):
        found = count_routes(one).sample
        assert found is not None and not found.whole
        for name, array in expected.routes.arrays().items():
            np.testing.assert_array_equal(found.routes.arrays()[name], array)
        np.testing.assert_array_equal(found.primary, expected.primary)
        assert found.weighted is not None and recording.weights is not None
        rows = np.flatnonzero(np.isin(recording.document, np.unique(found.routes.document)))[found.weighted]
        np.testing.assert_array_equal(found.weights, recording.weights[rows].astype(np.float32))


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", SOME)
def test_saved_counts_are_read_again_whole(name: str, tmp_path: Path) -> None:
    trace = named(CASES[name], vocabulary={0: "a", 1: b"\xe4"}, control=named(CASES[name]))
    counts = counts_of(trace)
    found = counts.save(tmp_path / "counts")
    assert_same(found.whole(), counts.whole())
    assert found.control is not None and counts.control is not None
    assert_same(found.control.whole(), counts.control.whole())
    assert (found.texts, found.vocabulary, found.phase, found.notes) == (counts.texts, counts.vocabulary, None, ())
    assert score(found, permutations=20).model_dump_json(exclude={"created"}) == score(trace, permutations=20).model_dump_json(
        exclude={"created"}
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda folder: (folder / "layer-001.safetensors").unlink(), "missing", id="a layer is gone"),
        pytest.param(lambda folder: _flip(folder / "layer-001.safetensors"), "sha256 differs", id="a layer was altered"),
        pytest.param(lambda folder: _flip(folder / "sample.safetensors"), "sha256 differs", id="the sample was altered"),
        pytest.param(lambda folder: _edit(folder, tokens=[1] * 9), "was changed after it was written", id="edited"),
        pytest.param(lambda folder: _edit(folder, schema_version=99), "schema_version 99", id="another version"),
        pytest.param(lambda folder: _edit(folder, more=1), "more", id="an unknown field"),
        pytest.param(lambda folder: (folder / "counts.json").unlink(), "no counts.json", id="none"),
    ],
)
def test_damaged_counts_are_refused(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    counts_of(CASES["plain"].trace()).save(tmp_path / "counts")
    damage(tmp_path / "counts")
    with pytest.raises(TraceError, match=words):
        found = Counts.load(tmp_path / "counts")
        assert found.sample is not None
        found.whole()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        pytest.param("layer-001", {"windows": np.zeros((9, 5), np.uint8)}, "windows is uint8", id="windows of another size"),
        pytest.param("layer-001", {"hits": np.zeros((8, 8), np.uint8)}, "hits is uint8", id="fewer documents"),
        pytest.param("layer-001", {"other": np.zeros(9, np.uint8)}, "other is uint8", id="an unknown array"),
        pytest.param("sample", {"primary": np.zeros((3, 3), np.int16)}, "primary has shape", id="primaries of other tokens"),
        pytest.param("sample", {"other": np.zeros(3, np.int16)}, "other", id="an unknown column"),
    ],
)
def test_files_with_other_arrays_are_refused_though_their_hash_is_right(
    name: str, change: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    counts_of(CASES["plain"].trace()).save(tmp_path / "counts")
    path = tmp_path / "counts" / f"{name}.safetensors"
    path.write_bytes(encode_safetensors(load_file(path) | change))
    about = json.loads((tmp_path / "counts" / "counts.json").read_text())
    del about["sha256"]
    about["files"][path.name] = sha256_of(path)
    (tmp_path / "counts" / "counts.json").write_text(json.dumps(about))
    found = Counts.load(tmp_path / "counts")
    with pytest.raises(TraceError, match=words):
        found.layer(1) if name == "layer-001" else found.sample


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "counts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- read once


class Reads:
    """Shards whose content was read, whole or in part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        whole, opened = shards.read_bytes, store.safetensors.safe_open

        def read_bytes(path: Path, **more: Any) -> bytes:
            self.paths.append("/".join(path.parts[-2:]))
            return whole(path, **more)

        def safe_open(path: Path, **more: Any) -> Any:
            self.paths.append("/".join(path.parts[-2:]))
            return opened(path, **more)

        monkeypatch.setattr(shards, "read_bytes", read_bytes)
        monkeypatch.setattr(store, "safetensors", type("", (), {"safe_open": staticmethod(safe_open)}))


def test_an_evaluation_reads_every_shard_once_and_what_follows_reads_none(
    tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    result = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path, permutations=20)
    folder = next(tmp_path.rglob(RESULT_FILE)).parent
    assert sorted(reads.paths) == [
        *["control/shard-00000.safetensors"] * 3,
        "trace/shard-00000.safetensors",
    ]  # each draw of the control once
    reads.paths.clear()
    again = score(Trace.load(folder / "trace"), permutations=20)
    evidence = read_evidence(folder)
    write_page(folder)
    assert reads.paths == []
    assert told(again.calibrated) == told(result.calibrated) and again.specialists == result.specialists
    assert evidence.hits.sum() == 2 * 3 * sum(facts.tokens for facts in result.task.domains.values())


def test_counts_of_another_recording_are_not_used(tmp_path: Path) -> None:
    first, second = named(CASES["plain"]), named(CASES["missing slots"])
    saved = first.save(tmp_path / "first")
    counts_of(saved)
    other = second.save(tmp_path / "second")
    shutil.copytree(tmp_path / "first" / "counts", tmp_path / "second" / "counts")
    assert_same(counts_of(other).whole(), count_routes(second).whole())
    assert_same(Counts.load(tmp_path / "second" / "counts" / "all").whole(), count_routes(second).whole())


def test_damaged_counts_beside_a_trace_are_made_again(tmp_path: Path) -> None:
    trace = named(CASES["plain"]).save(tmp_path / "trace")
    counts_of(trace)
    _edit(tmp_path / "trace" / "counts" / "all", tokens=[3] * 9)
    assert_same(counts_of(trace).whole(), count_routes(trace).whole())
    assert Counts.load(tmp_path / "trace" / "counts" / "all").tokens.sum() == trace.tokens


def test_where_nothing_can_be_written_counts_are_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = named(CASES["plain"]).save(tmp_path / "trace")
    (tmp_path / "trace" / "counts").write_text("not a folder")
    monkeypatch.setattr(counting, "MEMORY_BYTES", 0)
    assert_same(counts_of(trace).whole(), count_routes(CASES["plain"].trace()).whole())


def test_phases_have_counts_of_their_own(tmp_path: Path) -> None:
    recording = replace(CASES["plain"], phase=(np.arange(len(CASES["plain"].document)) % 2).astype(np.uint8))
    trace = named(recording).save(tmp_path / "trace")
    for phase in (None, 0, 1):
        for _ in range(2):
            found = counts_of(trace, phase=phase)
            assert found.tokens.sum() == (recording.phase >= 0 if phase is None else recording.phase == phase).sum()
    with pytest.raises(TraceError, match="these are the counts of generated tokens"):
        score(counts_of(trace, phase=1), phase="prompt")


def test_the_command_line_scores_a_folder_of_counts(tmp_path: Path) -> None:
    trace = named(CASES["plain"])
    counts_of(trace).save(tmp_path / "counts")
    asked = ["score", str(tmp_path / "counts"), "--permutations", "20", "--format", "json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0
    expected = json.loads(score(trace, permutations=20).model_dump_json())
    assert json.loads(done.stdout)["calibrated"] == expected["calibrated"]
    refused = CliRunner().invoke(app, [*asked, "--router", "uniform"])
    assert refused.exit_code == 1 and "these are counts" in refused.output


# ---------------------------------------------------------------------------------------------------------- merge


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Recording, np.ndarray]:
    """A recording, and to which of three parts each document belongs."""
    recording = naive.random_recording(draw(st.integers(0, 500)), missing=draw(st.sampled_from([0.0, 0.3])))
    part = draw(st.lists(st.integers(0, 2), min_size=len(recording.domain), max_size=len(recording.domain)))
    return recording, np.array(part)


def some_documents(recording: Recording, chosen: np.ndarray) -> Trace:
    rows = np.flatnonzero(np.isin(recording.document, chosen))
    part = replace(
        recording.take(rows), domain=recording.domain[chosen], document=np.searchsorted(chosen, recording.document[rows]).astype(int)
    )
    return part.trace(document_ids=[f"text-{number}" for number in chosen])


@few
@given(cuts())
def test_any_split_of_documents_merges_to_the_whole(cut: tuple[Recording, np.ndarray]) -> None:
    recording, part = cut
    parts = [count_routes(some_documents(recording, np.flatnonzero(part == number))) for number in np.unique(part)]
    merged, whole = Counts.merge(parts), count_routes(named(recording))
    order = np.array([whole.shape.document_ids.index(name) for name in merged.shape.document_ids])
    assert sorted(order) == list(range(len(order)))
    expected = whole.whole()
    sums = merged.whole()
    for name, array in arrays(sums).items():
        there = arrays(expected)[name]
        there = there if name == "ngrams.groups" else there[order]
        known = ~np.isnan(array) if name in ("ngrams.grouped", "ngrams.in_group") else np.ones(array.shape, bool)
        assert known.all() or OTHER_GROUPS in merged.notes
        np.testing.assert_allclose(array[known], there[known], rtol=1e-6, err_msg=name)
    assert merged.texts.distinct == whole.texts.distinct
    assert merged.sample is not None and whole.sample is not None and merged.sample.tokens == whole.sample.tokens


@few
@given(st.integers(0, 500), st.integers(0, 10_000))
def test_documents_that_were_counted_in_parts_are_added_up(seed: int, other: int) -> None:
    recording = naive.random_recording(seed)
    part = np.random.default_rng(other).integers(0, 2, len(recording.document))
    merged = Counts.merge([count_routes(named(recording.take(np.flatnonzero(part == number)))) for number in (0, 1)])
    whole = count_routes(named(recording))
    assert merged.shape.document_ids == whole.shape.document_ids
    windows = ("neighbours", "overlap_any", "overlap_share", *(f"ngrams.{name}" for name in naive_windows))
    assert_same(merged.whole(), whole.whole(), but=windows, rtol=1e-6)


naive_windows = ("windows", "alike", "distinct_windows", "distinct_alike", "grouped", "in_group")


def test_merged_counts_are_scored_as_one_recording(tmp_path: Path) -> None:
    recording = naive.random_recording(3, documents=(6, 6, 6), length=(20, 40), effect=2.0)
    odd = np.arange(18) % 2
    parts = [counts_of(some_documents(recording, np.flatnonzero(odd == number))).save(tmp_path / str(number)) for number in (0, 1)]
    order = np.argsort(odd, kind="stable")
    whole = some_documents_in_order(recording, order)
    found, expected = score(Counts.merge(parts), permutations=50), score(whole, permutations=50)
    for metric in ("specialization", "der", "domain_isolation"):
        assert found.record(metric).score == pytest.approx(expected.record(metric).score, rel=1e-9)
        assert found.record(metric).p == expected.record(metric).p
    assert [each.tokens for each in found.specialists] == [each.tokens for each in expected.specialists]


def some_documents_in_order(recording: Recording, order: np.ndarray) -> Trace:
    place = np.argsort(order)
    moved = replace(recording, document=place[recording.document], domain=recording.domain[order])
    return moved.trace(document_ids=[f"text-{number}" for number in order])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"experts": 9}, "experts", id="experts"),
        pytest.param({"top_k": 1}, "top_k", id="top-k"),
        pytest.param({"layers": (0, 5)}, "layers", id="layers"),
        pytest.param({"domains": ("a", "c")}, "domains", id="domains"),
        pytest.param({"provenance": {"model": "other"}}, "another model", id="model"),
        pytest.param({"document_domain": [1, 0]}, "another domain", id="a document of another domain"),
        pytest.param({"document_ids": None}, None, id="mere numbers beside names"),
    ],
)
def test_other_counts_cannot_be_merged(change: dict[str, Any], words: str | None) -> None:
    hits = np.zeros((2, 2, 9), int)
    hits[..., :2] = 3
    about: dict[str, Any] = {
        "domains": ("a", "b"), "document_domain": [0, 1], "layers": (0, 1), "experts": 8, "top_k": 2, "tokens": [6, 6],
        "document_ids": ["x", "y"], "provenance": {"model": "one"},
    }  # fmt: skip

    def made(**about: Any) -> Counts:
        return Counts.from_arrays(hits[..., : about["experts"]], **about)

    if words is None:
        assert len(Counts.merge([made(**about), made(**about | change)]).tokens) == 4
        with pytest.raises(TraceError, match="only numbers"):
            Counts.merge([made(**about | change), made(**about | change)])
        return
    with pytest.raises(TraceError, match=words):
        Counts.merge([made(**about), made(**about | change)])


# ---------------------------------------------------------------------------------------------------------- made elsewhere


def made_elsewhere(recording: Recording, **more: Any) -> Counts:
    return Counts.from_arrays(
        naive_hits(recording), domains=recording.domains, document_domain=recording.domain, layers=recording.layers,
        experts=recording.experts, top_k=recording.ids.shape[2], tokens=np.bincount(recording.document), **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "layers of different width"])
def test_counts_made_elsewhere_give_the_values_of_the_trace(name: str) -> None:
    recording = CASES[name]
    found, expected = score(made_elsewhere(recording), permutations=30), score(recording.trace(), permutations=30)
    assert found.published["rs"] == expected.published["rs"] and found.published["di"] == expected.published["di"]
    for metric in ("specialization", "der", "domain_isolation"):
        tokens = dict.fromkeys(("lexical", "contextual", "contextual_low", "contextual_high", "position"), math.nan)
        assert told([found.record(metric)]) == told([expected.record(metric).model_copy(update=tokens)])
    assert np.isnan(found.record("stiffness").value) and np.isnan(found.record("ngram_expertise_2").value)
    assert any("made from counts" in warning for warning in found.warnings)
    assert not any("no gate weights" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"hits": np.full((2, 1, 3), np.nan)}, "finite", id="NaN"),
        pytest.param({"hits": np.array([[[-1, 1, 0]], [[1, 1, 0]]])}, "not below 0", id="below 0"),
        pytest.param({"hits": np.array([[[0.5, 1.5, 0]], [[1, 1, 0]]])}, "whole numbers", id="fractions"),
        pytest.param({"hits": np.zeros((2, 3))}, "expected \\[documents, layers, experts\\]", id="two axes"),
        pytest.param({"hits": np.zeros((2, 2, 3))}, "hits: expected numbers", id="another number of layers"),
        pytest.param({"tokens": [1, 3]}, "more than its 1 tokens x top_k 2", id="too many hits"),
        pytest.param({"hits": np.array([[[4, 0, 0]], [[1, 1, 0]]]), "tokens": [3, 3]}, "at most once", id="an expert twice in a token"),
        pytest.param({"document_domain": [0]}, "document_domain", id="a domain too few"),
        pytest.param({"document_domain": [0, 2]}, "document_domain", id="no such domain"),
        pytest.param({"experts": 2}, "hits: expected numbers", id="more experts than the layer has"),
        pytest.param({"top_k": 4}, "top_k 4 of 3 experts", id="top_k"),
        pytest.param({"mass": np.full((2, 1, 3), -1.0)}, "mass: expected finite", id="mass below 0"),
        pytest.param({"document_ids": ["x", "x"]}, "given twice", id="ids"),
    ],
)
def test_impossible_counts_are_refused(change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {
        "hits": np.array([[[2, 2, 2]], [[1, 1, 0]]]), "domains": ("a", "b"), "document_domain": [0, 1], "layers": (0,), "experts": 3,
        "top_k": 2,
    }  # fmt: skip
    assert Counts.from_arrays(**right).tokens.tolist() == [3, 1]
    shortest = {name: value for name, value in right.items() if name not in ("layers", "experts")}
    assert Counts.from_arrays(**shortest).shape.experts == (3,)
    with pytest.raises(TraceError, match=words):
        Counts.from_arrays(**right | change)


def test_counts_of_domains_have_values_but_neither_intervals_nor_tests(tmp_path: Path) -> None:
    recording = CASES["plain"]
    hits = np.array(naive.of_domain(recording, naive.hits(recording)))
    tokens = np.bincount(recording.domain[recording.document], minlength=3)
    counts = Counts.from_domains(
        hits, domains=recording.domains, layers=recording.layers, experts=8, top_k=2, tokens=tokens, provenance={"model": "elsewhere"}
    )
    scores = score_tables(counts.save(tmp_path / "counts"), permutations=100)
    found, expected = scores.result, score(recording.trace(), permutations=0)
    for name in ("rs", "ner", "ner_entropy", "di"):
        assert found.published[name] == expected.published[name], name
    for metric in ("specialization", "specialization_normalized", "der", "domain_isolation"):
        record = found.record(metric)
        assert record.value == pytest.approx(expected.record(metric).value, rel=1e-12) and record.reference > 0
        assert all(np.isnan(getattr(record, name)) for name in ("null", "p", "corrected", "ci_low", "ci_high", "score", "score_low"))
    assert not found.specialists and scores.replicates == {}
    assert all(facts.documents == facts.sources == 0 for facts in found.task.domains.values())
    assert [facts.tokens for facts in found.task.domains.values()] == tokens.tolist()
    assert "counts of documents" in found.verdict and any("only counts of whole domains" in warning for warning in found.warnings)
    assert not any("has no tokens" in warning or "has one document" in warning for warning in found.warnings)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(found))
    shown = console.export_text()
    assert "0 documents" not in shown and "documents unknown" in shown
    page = render_page(found)
    assert "only counts of whole domains" in page and "0 documents" not in page
    save_scores(scores, tmp_path, found)
    entries, apart = read_entries([tmp_path])
    assert not apart and entries[0].problem == "only counts of whole domains were scored: no test can be made"


# ---------------------------------------------------------------------------------------------------------- join


def halves(recording: Recording, **more: Any) -> list[Trace]:
    """The first and the second half of a recording's documents, each a trace with a control."""
    found = []
    for start, stop in ((0, 4), (4, len(recording.domain))):
        rows = np.flatnonzero((recording.document >= start) & (recording.document < stop))
        part = replace(recording.take(rows), domain=recording.domain[start:stop], document=recording.document[rows] - start)
        about = {"document_ids": [f"text-{number}" for number in range(start, stop)], **more}
        about["document_source"] = [f"source-{number // 2}" for number in range(start, stop)]
        found.append(part.trace(control=part.trace(**about), vocabulary={start: "word", 100: "both"}, **about))
    return found


@pytest.mark.parametrize("where", ["memory", "disk", "one of each"])
def test_joined_traces_are_one_recording(where: str, tmp_path: Path) -> None:
    recording = CASES["plain"]
    parts = halves(recording)
    sources = [f"source-{number // 2}" for number in range(len(recording.domain))]
    whole = named(recording, document_source=sources, control=named(recording, document_source=sources))
    for index in {"memory": [], "disk": [0, 1], "one of each": [1]}[where]:
        parts[index] = parts[index].save(tmp_path / str(index))
    joined = join_traces(parts, provenance={"seed": 3})
    assert joined.tokens == whole.tokens > 0 and joined.provenance["seed"] == 3
    assert joined.shape.document_ids == whole.shape.document_ids and joined.shape.document_source == whole.shape.document_source
    assert dict(joined.vocabulary) == {0: "word", 4: "word", 100: "both"}
    for one in (joined, joined.save(tmp_path / "joined")):
        assert one.control is not None and whole.control is not None
        for found, expected in ((one, whole), (one.control, whole.control)):
            assert_same(count_routes(found).whole(), count_routes(expected).whole())
        assert told(score(one, permutations=30).calibrated) == told(score(whole, permutations=30).calibrated)


def test_joined_documents_without_names_are_numbered_on() -> None:
    trace = CASES["plain"].trace()
    joined = join_traces([trace, trace])
    assert joined.shape.document_ids == tuple(map(str, range(2 * len(trace.shape.document_ids))))
    assert joined.tokens == 2 * trace.tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda trace: replace(trace, control=None), "1 of 2 traces have a random-router control", id="a control too few"),
        pytest.param(lambda trace: replace(trace, vocabulary={100: "other"}), "of different tokenizers", id="another tokenizer"),
        pytest.param(lambda trace: replace(trace, shape=replace(trace.shape, domains=("x", "y", "z"))), "domains", id="other domains"),
        pytest.param(lambda trace: replace(trace, shape=replace(trace.shape, experts=(9, 9, 9))), "experts", id="other experts"),
        pytest.param(
            lambda trace: replace(trace, shape=replace(trace.shape, document_ids=("text-0", *trace.shape.document_ids[1:]))),
            "'text-0' is in 2 of the traces",
            id="a document twice",
        ),
    ],
)
def test_traces_that_do_not_belong_together_are_not_joined(change: Callable[[Trace], Trace], words: str) -> None:
    first, second = halves(CASES["plain"])
    with pytest.raises(TraceError, match=words):
        join_traces([first, change(second)])
