"""Answers are those of the model's own generate, their routes those of one forward over text and answer, whatever shares a batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import character_tokenizer, tiny_model

import dbes
from dbes.comparison.compare import compare, phase_differences
from dbes.errors import DbesError, RecordingError, SettingError
from dbes.models import LoadedModel, load_model
from dbes.models.sites import find_sites
from dbes.recording import decode
from dbes.recording.batches import Window
from dbes.recording.chat import Template
from dbes.recording.decode import sampled
from dbes.recording.forward import ForwardEngine, record_batch
from dbes.recording.generation import Generation
from dbes.recording.record import record_documents
from dbes.results import load_result
from dbes.scoring.counting import counts_of
from dbes.scoring.loops import find_loops, repeated_tokens, without_loops
from dbes.scoring.score import score
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, PROMPT, TEMPLATE

TOKENS = 6
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[me]<think>{% endif %}"


@dataclass(frozen=True)
class Text:
    id: str
    domain: str
    text: str


def texts(*lengths: int) -> list[Text]:
    random = np.random.default_rng(0)
    return [Text(f"d{place}", "ab"[place % 2], "".join(map(chr, random.integers(40, 120, size)))) for place, size in enumerate(lengths)]


TEXTS = texts(30, 18, 30, 9)


def loaded_in_float64(family: str) -> LoadedModel:
    """Batches of other shapes round otherwise: in float64 that is far below any margin between two tokens or experts."""
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    return load_model(model, tokenizer=character_tokenizer())


def recorded(loaded: LoadedModel, documents: list[Text] = TEXTS, **changes: Any) -> Trace:
    asked = {"domains": ["a", "b"], "window": 64, "generation": Generation(TOKENS), "control": 1, **changes}
    return record_documents(loaded, documents, **asked).trace


def columns(trace: Trace) -> dict[str, np.ndarray]:
    names = ("ids", "token_ids", "phase", "positions", "document")
    found = {name: np.concatenate([getattr(routes, name) for routes in trace]) for name in names}
    return {**found, "ids": np.sort(found["ids"], axis=-1)}


def same(one: Trace, two: Trace) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(columns(one).values(), columns(two).values(), strict=True))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v4", "nemotron_h")]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", *SLOW])
def test_answers_are_those_of_generate_and_their_routes_those_of_a_forward(family: str) -> None:
    loaded = loaded_in_float64(family)
    trace = recorded(loaded, batch_size=3)
    assert same(trace, recorded(loaded, batch_size=1)) and same(trace, recorded(loaded, batch_size="auto"))
    rows, model = columns(trace), loaded.model
    forward = ForwardEngine(
        loaded=loaded, sites=find_sites(model), before=(1,), after=(), seed=0, control=0, stiffness=False, window=200
    )
    for place, document in enumerate(TEXTS):
        mine = {name: column[rows["document"] == place] for name, column in rows.items()}
        given = len(document.text)
        assert mine["phase"].tolist() == [PROMPT] * given + [GENERATED] * (len(mine["phase"]) - given)
        assert mine["positions"].tolist() == list(range(len(mine["phase"])))
        prompt = torch.tensor([[1, *mine["token_ids"][:given].tolist()]])
        answer = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)
        answer = answer[0, prompt.shape[1] :].tolist()
        expected = answer[: answer.index(2)] if 2 in answer else answer[:-1]  # neither the end nor what was never fed
        assert mine["token_ids"][given:].tolist() == expected
        block = record_batch(forward, [Window(place, document.id, 0, mine["token_ids"])])
        assert np.array_equal(np.sort(block.routes["ids"].astype(mine["ids"].dtype), axis=-1), mine["ids"])


def test_sampling_depends_on_seed_document_and_place_alone() -> None:
    loaded = loaded_in_float64("olmoe")
    asked = Generation(TOKENS, temperature=1.5, top_p=0.9, seed=3)
    trace = recorded(loaded, generation=asked, batch_size=3)
    assert same(trace, recorded(loaded, generation=asked, batch_size=1))
    assert not same(trace, recorded(loaded, generation=Generation(TOKENS, temperature=1.5, top_p=0.9, seed=4)))
    turned = recorded(loaded, TEXTS[::-1], generation=asked)
    first, last = columns(trace), columns(turned)
    assert np.array_equal(first["token_ids"][first["document"] == 0], last["token_ids"][last["document"] == len(TEXTS) - 1])


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits, draws = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]]).repeat(20_000, 1), (torch.arange(20_000).double() + 0.5) / 20_000
    chances = (logits[0].double() / 0.7).softmax(-1)
    found = torch.bincount(sampled(logits, draws, temperature=0.7, top_p=1.0), minlength=5) / 20_000
    assert torch.allclose(found.double(), chances, atol=1e-4)
    kept = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])  # 3 alone has 0.71 of the probability, with 1 it has 0.88
    found = torch.bincount(sampled(logits, draws, temperature=0.7, top_p=0.8), minlength=5) / 20_000
    assert torch.allclose(found.double(), chances * kept / (chances * kept).sum(), atol=1e-4)
    assert sampled(logits[:1], torch.tensor([1 - 2**-53]).double(), temperature=0.7, top_p=0.8).tolist() == [3]


def with_chat(template: str = CHAT) -> LoadedModel:
    loaded = loaded_in_float64("olmoe")
    loaded.tokenizer.chat_template = template
    return loaded


def test_tokens_of_the_template_are_a_phase_of_their_own_and_never_scored() -> None:
    loaded = with_chat()
    trace = recorded(loaded, template=Template(loaded.tokenizer, "be brief"))
    rows = columns(trace)
    for place, document in enumerate(TEXTS):
        mine = rows["document"] == place
        shown = {phase: loaded.tokenizer.decode(rows["token_ids"][mine & (rows["phase"] == phase)]).replace(" ", "") for phase in (0, 2)}
        assert shown[PROMPT] == document.text
        assert shown[TEMPLATE].replace("<unk>", "") == "[system]bebrief[user][me]<think>"  # the line break is no token of this tokenizer
    scored = int((rows["phase"] != TEMPLATE).sum())
    assert int(counts_of(trace).tokens.sum()) == scored < trace.tokens
    assert int(counts_of(trace, phase=PROMPT).tokens.sum()) == sum(len(document.text) for document in TEXTS)
    without = Trace(
        shape=trace.shape, provenance=trace.provenance, loaded=tuple(part.take(part.phase != TEMPLATE) for part in trace)
    )
    one, two = (counts_of(each) for each in (trace, without))
    assert all(np.array_equal(one.read(layer).hits, two.read(layer).hits) for layer in range(len(trace.shape.layers)))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHAT.replace("m['content']", "m['content'] | upper"), "chat template cannot be applied"),
        ("{{ raise_exception('no system') }}", "'d0'.*no system"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_words(template: Any, told: str) -> None:
    loaded = with_chat(template)
    with pytest.raises(RecordingError, match=told):
        recorded(loaded, template=Template(loaded.tokenizer))


def test_blanks_that_a_template_takes_away_are_no_text() -> None:
    loaded = with_chat(CHAT.replace("m['content']", "m['content'] | trim"))
    trace = recorded(loaded, [Text("d0", "a", "  abc "), Text("d1", "b", "xyz")], template=Template(loaded.tokenizer))
    rows = columns(trace)
    assert loaded.tokenizer.decode(rows["token_ids"][(rows["document"] == 0) & (rows["phase"] == PROMPT)]).replace(" ", "") == "abc"


def test_texts_are_cut_at_the_end_to_leave_room_for_the_answer() -> None:
    loaded = loaded_in_float64("olmoe")
    documents = texts(125, 20)
    trace = recorded(loaded, documents, window=1000)
    rows = columns(trace)
    assert trace.provenance["documents_cut"] == 1
    assert ((rows["document"] == 0) & (rows["phase"] == PROMPT)).sum() == 128 - TOKENS - 1
    with pytest.raises(RecordingError, match="128 positions"):
        recorded(loaded, documents, generation=Generation(127))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"generate": 0}, "generate 0"),
        ({"generate": -3}, "generate -3"),
        ({"generate": 4, "temperature": -1.0}, "temperature -1.0"),
        ({"generate": 4, "top_p": 0.0}, "top_p 0.0"),
        ({"generate": 4, "top_p": 1.1}, "top_p 1.1"),
        ({"generate": 4, "engine": "streaming"}, "every token of an answer would read all weights"),
        ({"generate": 4, "system": "x"}, "apply_chat_template"),
        ({"temperature": 1.0}, "give generate"),
        ({"apply_chat_template": True}, "give generate"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(asked: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=told):
        dbes.evaluate("embedded", output_path=tmp_path, **asked)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_generate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_in_float64("olmoe")
    monkeypatch.setattr(type(loaded.model), "can_generate", classmethod(lambda _: False))
    with pytest.raises(RecordingError, match="cannot generate"):
        recorded(loaded)


def test_a_killed_recording_is_resumed_to_the_same_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_in_float64("olmoe")
    documents = texts(*range(20, 44, 2))
    monkeypatch.setattr("dbes.recording.record.SHARD_TOKENS", 200)
    monkeypatch.setattr("dbes.recording.units.ACCELERATOR_BATCH_TOKENS", 1)
    whole = recorded(loaded, documents, output_path=tmp_path / "whole")
    answer, calls = decode.answer, []

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(decode, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        recorded(loaded, documents, output_path=tmp_path / "killed")
    resumed = recorded(loaded, documents, output_path=tmp_path / "killed")
    assert same(whole, resumed) and resumed.provenance == whole.provenance
    assert [entry.sha256 for entry in resumed.entries] == [entry.sha256 for entry in whole.entries]
    with pytest.raises(DbesError):
        recorded(loaded, documents, output_path=tmp_path / "whole", generation=Generation(TOKENS - 1))


def test_repeats_are_found_where_they_are() -> None:
    def naive(tokens: list[int], size: int) -> list[bool]:
        inside = [False] * len(tokens)
        for start in range(1, len(tokens) - size + 1):
            if any(tokens[start : start + size] == tokens[before : before + size] for before in range(start)):
                inside[start : start + size] = [True] * size
        return inside

    random = np.random.default_rng(1)
    for size in (2, 3, 8):
        for alphabet in (2, 3, 50):
            tokens = random.integers(0, alphabet, 40)
            assert repeated_tokens(tokens, size=size).tolist() == naive(tokens.tolist(), size)
    assert not repeated_tokens(np.arange(8)).any() and not repeated_tokens(np.zeros(0, int)).any()


def test_planted_loops_inflate_ngram_expertise_and_can_be_dropped() -> None:
    random, documents, given, written = np.random.default_rng(2), 24, 40, 60
    token_ids, ids, phase = [], [], []
    for document in range(documents):
        tokens = random.integers(0, 200, given + written)
        if document % 2:  # the answer is one token, time and again
            tokens[given + 5 :] = tokens[given + 5]
        token_ids.append(tokens)
        ids.append(np.stack([tokens * 7 % 8, (tokens * 7 + 1 + tokens // 8 % 6) % 8], axis=1)[:, None])
        phase.append([PROMPT] * given + [GENERATED] * written)
    trace = Trace.from_arrays(
        np.concatenate(ids), document=np.repeat(np.arange(documents), given + written), domain=np.arange(documents) // 12,
        domains=["a", "b"], layers=[0], experts=8, token_ids=np.concatenate(token_ids), phase=np.concatenate(phase),
        weights=np.tile([0.7, 0.3], (documents * (given + written), 1, 1)),
    )  # fmt: skip
    loops = find_loops(trace)
    assert loops.looping.tolist() == [bool(document % 2) for document in range(documents)]
    values = {drop: score(trace, phase="generated", permutations=10, drop_loops=drop).record("ngram_expertise_2").value for drop in (0, 1)}
    straight = score(trace, phase="prompt", permutations=10).record("ngram_expertise_2").value
    assert values[0] > 0.4 and abs(values[1] - straight) < 0.05
    kept = columns(without_loops(trace, loops))
    assert ((kept["document"] % 2 == 1) & (kept["phase"] == GENERATED)).sum() == 0
    assert (kept["phase"] == PROMPT).sum() == documents * given


def test_one_evaluation_holds_prompt_and_generated_text_side_by_side(
    tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
) -> None:
    from dbes.reporting.page import write_page
    from dbes.reporting.phases import answer_rows

    asked: dict[str, Any] = {"tasks": str(tiny_task), "limit": 4, "permutations": 20, "output_path": tmp_path}
    result = dbes.evaluate(tiny_checkpoint, generate=9, **asked)
    folder = result.folder
    assert folder is not None and folder.name == "tiny-limit4-generate9"
    phases, found = result.companions["phases"], {name: load_result(folder / name) for name in ("prompt", "generated")}
    assert phases["prompt"]["tokens"] + phases["generated"]["tokens"] == result.recording.tokens  # pyright: ignore[reportOptionalMemberAccess]
    entry = compare([folder]).entries[0]
    tests = {each.metric: each for each in phase_differences(entry)}
    for metric, row in phases["metrics"].items():
        assert row["prompt"] == found["prompt"].record(metric).score and row["generated"] == found["generated"].record(metric).score
        if (test := tests[metric].test) is not None:
            assert row["difference"] == pytest.approx(test.difference) and row["p"] == pytest.approx(test.p)
            assert (row["low"], row["high"]) == pytest.approx((test.low, test.high))
    assert len(answer_rows(result)) > 3 and "Prompt and generated text" in write_page(folder).read_text("utf-8")
    again = dbes.evaluate(tiny_checkpoint, generate=9, **asked)
    assert again.created == result.created
    (folder / "generated" / "result.json").unlink()
    assert dbes.evaluate(tiny_checkpoint, generate=9, **asked).companions["phases"] == phases
    with pytest.raises(DbesError, match="another generation"):
        dbes.evaluate(tiny_checkpoint, generate=9, temperature=1.0, **asked)
