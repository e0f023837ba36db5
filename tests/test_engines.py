"""Any engine gives the same trace: whatever the order of its blocks, killed and resumed, and a lie is refused with words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TOP_K
from test_recording import contents, joined, loaded_model, record, written

from dbes.errors import RecordingError, TraceError
from dbes.models.sites import find_sites, score_reason
from dbes.recording import ledger
from dbes.recording import record as recording
from dbes.recording.record import record_with
from dbes.trace.blocks import STORED, Block, Contents, Work
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, NOISE_SCALES, PROMPT, TokenRoutes

LAYERS, EXPERTS, SLOTS, ZERO = (1, 4, 5), (5, 7, 4), (2, 3, 2), (0, 2, 0)
"""Three layers of which no two are alike; the second has two experts that compute nothing."""


@dataclass(frozen=True)
class Sentence:
    id: str
    domain: str
    text: str = "unused"


def truth(lengths: Sequence[int], answers: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Random routes of documents, one dict of arrays [tokens, ...] each, as an engine would see them."""
    random, documents = np.random.default_rng(5), []
    for length, answer in zip(lengths, answers, strict=True):
        tokens = length + answer
        ids = np.full((tokens, 3, 3), -1)
        for token in range(tokens):
            for column in range(3):
                chosen = random.permutation(EXPERTS[column] + ZERO[column])[: SLOTS[column] - int(random.random() < 0.2)]
                ids[token, column, : len(chosen)] = chosen
        per_layer = (tokens, 3)
        documents.append(
            {
                "token_ids": random.integers(0, 90, tokens),
                "phase": np.array([PROMPT] * length + [GENERATED] * answer, np.uint8),
                "ids": ids,
                "weights": random.random((tokens, 3, 3)).astype(np.float32),
                "logit_margins": random.normal(size=per_layer).astype(np.float32),
                "logit_stable": random.integers(0, 8, per_layer).astype(np.uint8),
                "selection_margins": random.random(per_layer).astype(np.float32),
                "scaled_margins": random.random(per_layer).astype(np.float32),
                "kept": random.integers(0, 3, (*per_layer, len(NOISE_SCALES))).astype(np.uint8),
                "control": random.random((*per_layer, 8)).argsort(axis=2)[..., :2] % 4,
            }
        )
        documents[-1]["control"][..., 1] = (documents[-1]["control"][..., 0] + 1) % 4
    return documents


Order = Callable[[Work, list[dict[str, np.ndarray]]], Iterator[tuple[list[tuple[int, int]], list[int]]]]
"""Yields what a block holds: (place of the document in the work, position) of each row, and the columns."""


def step_by_step(work: Work, documents: list[dict[str, np.ndarray]]) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
    """As generation does: each text whole, then one token of every answer that has not ended."""
    sizes = [len(document["ids"]) for document in documents]
    for place, text in enumerate(work.texts):
        yield [(place, position) for position in range(len(text))], [0, 1, 2]
    for step in range(max(sizes)):
        rows = [(place, len(work.texts[place]) + step) for place, size in enumerate(sizes) if len(work.texts[place]) + step < size]
        if rows:
            yield rows, [0, 1, 2]


def layer_by_layer(work: Work, documents: list[dict[str, np.ndarray]]) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
    """As streaming does, with all rows in disorder and some layers before others."""
    random = np.random.default_rng(work.first)
    rows = [(place, position) for place, document in enumerate(documents) for position in range(len(document["ids"]))]
    blocks = [(part, column) for column in range(3) for part in np.array_split(random.permutation(len(rows)), 3) if len(part)]
    for index in random.permutation(len(blocks)):
        part, column = blocks[index]
        yield [rows[row] for row in part], [column]


def row_by_row(_: Work, documents: list[dict[str, np.ndarray]]) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
    for place, document in enumerate(documents):
        for position in reversed(range(len(document["ids"]))):
            yield [(place, position)], [2, 0, 1]


@dataclass(frozen=True)
class Scripted:
    """An engine that tells given routes in a given order."""

    documents: list[dict[str, np.ndarray]]
    order: Order
    lie: Callable[[Block], Block | list[Block]] | None = None
    asked: list[int] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=lambda: {"model": "scripted", "dtype": "float32"})

    @property
    def contents(self) -> Contents:
        return Contents(layers=LAYERS, experts=EXPERTS, top_k=SLOTS, zero_experts=ZERO, gives=frozenset(STORED), control=1, answer=6)

    def blocks(self, work: Work) -> Iterator[Block]:
        self.asked.append(work.first)
        mine = self.documents[work.first : work.first + len(work.texts)]
        for number, (rows, columns) in enumerate(self.order(work, mine)):
            block = self.block(work.first, rows, columns)
            found = self.lie(block) if self.lie is not None and number == 0 else block
            yield from found if isinstance(found, list) else [found]

    def block(self, first: int, rows: list[tuple[int, int]], columns: list[int]) -> Block:
        def of(name: str, *where: Any) -> np.ndarray:
            return np.stack([self.documents[first + place][name][position][*where] for place, position in rows])

        slots = max(SLOTS[column] for column in columns)  # narrower than the widest layer where only others are told
        return Block(
            document=np.array([first + place for place, _ in rows]),
            positions=np.array([position for _, position in rows]),
            token_ids=of("token_ids"),
            phase=of("phase"),
            layers=tuple(LAYERS[column] for column in columns),
            routes={
                **{name: of(name, columns, slice(slots)) for name in ("ids", "weights")},
                **{name: of(name, columns) for name in STORED if name != "weights" and columns != [2]},
            },
            control={"ids": of("control", columns)[:, :, None], "weights": np.full((len(rows), len(columns), 1, 2), 0.25)},
        )

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:
        return f"{missing} of {tokens} in layer {layer}"


LENGTHS, ANSWERS = (4, 1, 7, 3, 5, 2), (2, 0, 6, 0, 1, 5)


def scripted(order: Order = layer_by_layer, *, answers: Sequence[int] = ANSWERS, **options: Any) -> Scripted:
    return Scripted(truth(LENGTHS, answers), order, **options)


def told(engine: Scripted, folder: Path | None = None, **options: Any) -> recording.Recording:
    documents = [Sentence(f"text-{index}", "ab"[index % 2]) for index in range(len(LENGTHS))]
    texts = [document["token_ids"][:length].astype(np.int32) for document, length in zip(engine.documents, LENGTHS, strict=True)]
    return record_with(engine, documents, texts, domains=("a", "b"), output_path=folder, **options)


def in_loops(documents: list[dict[str, np.ndarray]], *, without_scores: int | None) -> dict[str, np.ndarray]:
    """The rows of a trace written down token by token."""
    rows: dict[str, list[Any]] = {}
    for index, document in enumerate(documents):
        for position in range(len(document["ids"])):
            row = {name: array[position] for name, array in document.items() if name != "control"}
            ids, weights = np.full((3, 3), 255), np.zeros((3, 3), np.float16)
            for column in range(3):
                for slot in range(3):
                    if 0 <= row["ids"][column, slot] < EXPERTS[column]:
                        ids[column, slot], weights[column, slot] = row["ids"][column, slot], row["weights"][column, slot]
            row |= {"document": index, "positions": position, "ids": ids, "weights": weights}
            if without_scores is not None:
                for name in ("logit_margins", "selection_margins", "scaled_margins", "logit_stable", "kept"):
                    row[name] = row[name].copy()
                    row[name][without_scores] = 255 if name in ("logit_stable", "kept") else np.nan
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in rows.items()}


def assert_same(routes: TokenRoutes, expected: Mapping[str, np.ndarray]) -> None:
    assert routes.arrays().keys() == expected.keys()
    for name, array in routes.arrays().items():
        np.testing.assert_array_equal(array, expected[name].astype(array.dtype), err_msg=name)


@pytest.mark.parametrize("order", [step_by_step, layer_by_layer, row_by_row])
@pytest.mark.parametrize("answers", [ANSWERS, (0,) * 6], ids=["answers", "texts alone"])
def test_any_order_of_blocks_is_written_as_in_plain_loops(order: Order, answers: tuple[int, ...], tmp_path: Path) -> None:
    engine, progress = scripted(order, answers=answers), []
    done = told(engine, tmp_path, progress=lambda now, _: progress.append(now))
    assert_same(joined(done.trace), in_loops(engine.documents, without_scores=2 if order is layer_by_layer else None))
    total = sum(LENGTHS) + sum(answers)
    assert done.tokens == total == done.trace.tokens and progress[-1] == total and progress == sorted(progress)
    control = joined(Trace.load(tmp_path).control)
    np.testing.assert_array_equal(control.phase, joined(done.trace).phase)
    np.testing.assert_array_equal(np.sort(control.ids[..., :2]), np.sort(np.concatenate([d["control"] for d in engine.documents])))
    assert (control.ids[..., 2] == 255).all() and (control.weights[..., :2] == 0.25).all()
    reasons = {"5": f"{total} of {total} in layer 5"} if order is layer_by_layer else {}
    assert done.trace.provenance["scores_missing"] == reasons and done.trace.provenance["model"] == "scripted"
    assert_same(joined(told(engine).trace), joined(done.trace).arrays())


@pytest.mark.parametrize("order", [step_by_step, layer_by_layer])
def test_killed_after_any_shard_ends_with_the_same_bytes(order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(order), tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert [name for name in whole if name.startswith("shard")] == [f"shard-0000{number}.safetensors" for number in range(4)]
    write = ledger.write_shard
    for killed in range(8):  # before each shard of the trace and of the control
        done = iter(range(killed, -1, -1))

        def failing(*given: Any, done: Iterator[int] = done, **options: Any) -> Any:
            if next(done) == 0:
                raise KeyboardInterrupt
            return write(*given, **options)

        folder = tmp_path / str(killed)
        monkeypatch.setattr(ledger, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            told(scripted(order), folder)
        monkeypatch.setattr(ledger, "write_shard", write)
        engine = scripted(order)
        resumed = told(engine, folder)
        assert contents(folder) == whole
        assert len(engine.asked) == 4 - killed // 2  # whole shards are not asked for again
        assert resumed.tokens == sum(entry.tokens for entry in resumed.trace.entries[killed // 2 :])
    with pytest.raises(TraceError, match="another seed"):
        told(scripted(order, settings={"seed": 1}), folder)


def routes(**changes: Any) -> Callable[[Block], Block]:
    """A block of which one value of an array is another; None takes the array away."""

    def change(block: Block) -> Block:
        found = {name: array.copy() for name, array in block.routes.items()}
        for name, value in changes.items():
            if value is None:
                del found[name]
            elif callable(value):
                found[name] = value(found[name])
            else:
                found[name][(0,) * found[name].ndim] = value
        return replace(block, routes=found)

    return change


def rows(keep: slice | list[int], **changes: Any) -> Callable[[Block], Block]:
    """A block with only some of its rows, or with others."""

    def change(block: Block) -> Block:
        about = {name: getattr(block, name)[keep] for name in ("document", "positions", "token_ids", "phase")}
        about |= {name: value(about[name]) for name, value in changes.items()}
        both = ({name: array[keep] for name, array in given.items()} for given in (block.routes, block.control))
        return replace(block, **about, **dict(zip(("routes", "control"), both, strict=True)))

    return change


LIES = {
    "a row is missing": (rows(slice(1, None)), r"document 'text-0', token 0, did not come at layer 1; 3 of \d+ tokens x layers"),
    "a layer is missing": (lambda _: [], r"document 'text-0', token 0, did not come at layer 1; 12 of"),
    "a block twice": (lambda block: [block, block], r"document 'text-0', token 0, came twice at layer 1"),
    "a row twice": (rows([0, 1, 1, 2, 3]), r"document 'text-0', token 1, came twice at layer 1"),
    "a layer that there is not": (lambda block: replace(block, layers=(1, 4, 6)), r"a block of layers \[1, 4, 6\], expected"),
    "a layer twice": (lambda block: replace(block, layers=(1, 1, 5)), r"a block of layers \[1, 1, 5\], expected each once"),
    "fewer layers than arrays": (lambda block: replace(block, layers=(1, 4)), r"ids has shape \(4, 3, 3\), expected \(4, 2, 3\)"),
    "an id out of range": (routes(ids=5), r"ids out of range at layer 1: 5, but the layer has 5 experts"),
    "an id below -1": (routes(ids=-2), r"ids out of range at layer 1: -2"),
    "an expert twice": (routes(ids=lambda ids: np.broadcast_to([0, 0, -1], ids.shape)), r"expert 0 stands twice in row 0 at layer 1"),
    "too many experts": (routes(ids=lambda ids: np.broadcast_to([0, 1, 2], ids.shape)), r"row of layer 1 has more than top_k = 2"),
    "ids that are floats": (routes(ids=lambda ids: ids.astype(float)), "ids has dtype float64, expected integers"),
    "NaN weight": (routes(weights=np.nan), "layer 1: NaN or infinity in the router's output, in document 'text-0', token 0;"),
    "weight beyond float16": (routes(weights=1e6), "layer 1: NaN or infinity in the router's output"),
    "no weights": (routes(weights=None), "a block of .* expected .*'weights'"),
    "no ids": (routes(ids=None), "a block of .* expected .*'ids'"),
    "an unknown array": (lambda block: replace(block, routes={**block.routes, "entropy": np.zeros(4)}), "'entropy'"),
    "kept above top-k": (routes(kept=9), "kept above 3"),
    "other counts": (rows(slice(None), positions=lambda at: at + 3), r"document 'text-0', token \d, has another token id than before"),
    "another document": (rows(slice(None), document=lambda at: at + 1), r"document 'text-1'"),
    "another phase": (rows(slice(None), phase=lambda phase: phase + np.uint8(3)), "phase 3, expected"),
    "positions below 0": (rows(slice(None), positions=lambda at: at - 1), r"document 'text-0': a token at -1, expected"),
    "an answer that is too long": (rows([0], positions=lambda at: at + 40), "a token at 40, expected no more than 10 tokens"),
    "a gap in the answer": (
        lambda block: [block, rows([0], positions=lambda at: at + 9, phase=lambda _: np.array([GENERATED], np.uint8))(block)],
        "document 'text-0', token 8, did not come, but a later one did",
    ),
    "an answer that is no answer": (lambda block: [block, rows([0], positions=lambda at: at + 4)(block)], "token 4, has another phase"),
    "rows that do not fit": (lambda block: replace(block, positions=block.positions[:2]), r"positions has shape \(2,\), expected \(4,\)"),
    "after the end": (
        lambda block: [block, rows([0], document=lambda at: at + 6)(block)],
        r"a block of document 6, asked were 0 to 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_engine_that_lies_is_refused_with_words(lie: str, tmp_path: Path) -> None:
    change, words = LIES[lie]
    engine = scripted(step_by_step, answers=(0,) * 6, lie=change)
    with pytest.raises(RecordingError, match=rf"scripted: .*{words}|^{words}"):
        told(engine, tmp_path / "trace")
    assert not list((tmp_path / "trace").glob("shard*"))


@dataclass(frozen=True)
class Replayed:
    """A recorded trace told again, one layer at a time for many rows in disorder, as if another engine had run the model."""

    trace: Trace
    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contents(self) -> Contents:
        shape = self.trace.shape
        return Contents(layers=shape.layers, experts=shape.experts, top_k=shape.top_k, gives=frozenset(STORED), control=3)

    @property
    def identity(self) -> Mapping[str, Any]:
        found = ("scores_missing", "logits_missing", "slots_without_expert")
        return {name: value for name, value in self.trace.provenance.items() if name not in found}

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:
        sites = {site.layer: site for site in find_sites(loaded_model(self.family).model)}
        return score_reason(sites[layer], missing, tokens)

    def blocks(self, work: Work) -> Iterator[Block]:
        random = np.random.default_rng(work.first)
        whole, controls = joined(self.trace), [joined(draw) for draw in self.trace.controls]
        mine = np.flatnonzero((whole.document >= work.first) & (whole.document < work.first + len(work.texts)))
        shuffled = random.permutation(mine)
        for column in random.permutation(len(self.trace.shape.layers)):
            for low, high in pairwise([0, *sorted(random.integers(0, len(mine), 3)), len(mine)]):
                here = shuffled[low:high]

                def ids(of: TokenRoutes, here: np.ndarray = here, column: int = column) -> np.ndarray:
                    found = of.ids[here, column : column + 1]
                    return np.where(found == np.iinfo(found.dtype).max, -1, found.astype(np.int64))

                yield Block(
                    document=whole.document[here],
                    positions=whole.positions[here],
                    token_ids=whole.token_ids[here],
                    phase=whole.phase[here],
                    layers=(self.trace.shape.layers[column],),
                    routes={"ids": ids(whole), **{name: getattr(whole, name)[here, column : column + 1] for name in STORED}},
                    control={
                        "ids": np.stack([ids(draw) for draw in controls], axis=2),
                        "weights": np.stack([draw.weights[here, column : column + 1] for draw in controls], axis=2),
                    },
                )


@pytest.mark.parametrize("family", ["olmoe", "longcat_flash", "deepseek_v4"])
def test_the_forward_and_a_streaming_engine_write_the_same_bytes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    documents, tokenizer = written(), loaded_model(family).tokenizer
    trace = record(family, documents, output_path=tmp_path / "forward").trace
    texts = [np.asarray(tokenizer(document.text, add_special_tokens=False)["input_ids"], np.int32) for document in documents]
    record_with(
        Replayed(trace, family),
        documents,
        texts,
        domains=("a", "b"),
        spelled=lambda ids: {token: trace.vocabulary[token] for token in ids},
        output_path=tmp_path / "streaming",
    )
    found = contents(tmp_path / "streaming")
    assert found == contents(tmp_path / "forward") and len(found) > 6


def test_the_forward_engine_records_what_a_plain_loop_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document at a time through OLMoE's own ``output_router_logits``, put together by hand."""
    monkeypatch.setattr(recording, "SHARD_TOKENS", 60)
    documents, loaded = written(), loaded_model("olmoe")
    trace = record("olmoe", documents, window=100, output_path=tmp_path).trace
    shards = list(trace)
    assert len(shards) > 2 and [shard.document[0] for shard in shards] == [entry.first_document for entry in trace.entries]
    found, row = joined(trace), 0
    for index, document in enumerate(documents):
        ids = loaded.tokenizer(document.text)["input_ids"]
        with torch.inference_mode():
            layers = loaded.model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
        for position, token in enumerate(ids[1:]):  # the first is <s>
            about = (found.document[row], found.positions[row], found.token_ids[row], found.phase[row])
            assert about == (index, position, token, PROMPT)
            for column, logits in enumerate(layers):
                scores = logits[1 + position].softmax(dim=-1)
                values, best = scores.topk(TOP_K + 1)
                if values[TOP_K - 1] - values[TOP_K] < 1e-5:
                    continue  # rounding decides
                weights = dict(zip(best[:TOP_K].tolist(), values[:TOP_K].tolist(), strict=True))
                assert set(found.ids[row, column].tolist()) == weights.keys()
                for expert, weight in zip(found.ids[row, column].tolist(), found.weights[row, column].tolist(), strict=True):
                    assert weight == pytest.approx(weights[expert], rel=2e-3)  # float16
            row += 1
    assert row == len(found)
