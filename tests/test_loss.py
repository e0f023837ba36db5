"""Loss, accuracy and ablation beside specialization: against naive loops, planted structure, and what must not be found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import discovered, tiny_model
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dbes
from dbes.comparison.relation import spearman
from dbes.errors import SettingError, TraceError
from dbes.evaluation.harness import definition, require_harness, write_items
from dbes.evaluation.measuring import items_of
from dbes.measures import DomainAblation, DomainLoss, Measured, Measures
from dbes.models import load_model
from dbes.models.head import next_token_nats
from dbes.recording.record import record_documents
from dbes.reporting.export import entry_row, relation_lines
from dbes.reporting.leaderboard import render_leaderboard
from dbes.reporting.page import render_page
from dbes.scoring.counts import Counts
from dbes.scoring.losses import ablation_by_domain, loss_by_domain
from dbes.scoring.masks import Masks, halves_of, matched
from dbes.tasks.entries import Item
from dbes.tasks.task import Task, load_task, read_documents
from dbes.trace.loss import LOSS_FILE, DocumentLoss, read_loss
from dbes.trace.types import RoutingShape

WINDOW = 48


def plain_nats(model: PreTrainedModel, ids: list[int]) -> float:
    """Of all tokens but the first, from the logits of one plain forward."""
    with torch.no_grad():
        logarithms = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logarithms[place - 1, ids[place]]) for place in range(1, len(ids)))


@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_bits_and_bytes_are_those_of_a_loop_over_documents(
    tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path, batch_size: int | str
) -> None:
    task = load_task(tiny_task)
    documents = read_documents(task, limit=1)
    loaded = load_model(tiny_checkpoint, dtype="float64")
    loaded.model.set_experts_implementation("eager")
    found = record_documents(
        loaded, documents, domains=tuple(task.domains), window=WINDOW, loss=True, batch_size=batch_size, output_path=tmp_path / "trace"
    )
    assert found.loss is not None
    for place, document in enumerate(documents):
        ids = loaded.tokenizer(document.text)["input_ids"]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        assert len(windows) > 1
        bits = sum(plain_nats(loaded.model, window) for window in windows) / math.log(2)
        assert found.loss.bits[place] == pytest.approx(bits, rel=1e-12)
        # byte-level tokens without merges: one byte each, and the first of every window is not predicted
        assert found.loss.text_bytes[place] == len(document.text.encode()) - len(windows)
    kept = read_loss(tmp_path / "trace", found.trace.provenance, documents=len(documents))
    assert kept is not None
    np.testing.assert_array_equal(kept.bits, found.loss.bits)
    plain = record_documents(loaded, documents, domains=tuple(task.domains), window=WINDOW, batch_size=batch_size)
    for one, other in zip(plain.trace, found.trace, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
    (tmp_path / "trace" / LOSS_FILE).write_bytes((tmp_path / "trace" / LOSS_FILE).read_bytes()[:-1] + b"x")
    with pytest.raises(TraceError, match="not as it was written"):
        read_loss(tmp_path / "trace", found.trace.provenance, documents=len(documents))


@pytest.mark.parametrize(
    "family", [name if name in ("olmoe", "llama4_text") else pytest.param(name, marks=pytest.mark.slow) for name in discovered()]
)
def test_the_head_in_pieces_gives_what_the_whole_model_gives(family: str) -> None:
    model = tiny_model(family).eval()
    ids, mask = torch.randint(1, 100, (2, 12), generator=torch.Generator().manual_seed(0)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    rows = torch.arange(21)
    with torch.no_grad():
        found = next_token_nats(model, {"input_ids": ids, "attention_mask": mask}, rows, most=128 * 5)
        logarithms = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    wanted = [0.0 if row % 12 == 0 else -float(logarithms[row // 12, row % 12 - 1, ids.flatten()[row]]) for row in rows.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def shape_of(domain: list[int], *, names: tuple[str, ...] = ("a", "b"), experts: int = 6) -> RoutingShape:
    return RoutingShape(
        layers=(3,), experts=(experts,), top_k=(2,), domains=names, document_domain=np.asarray(domain),
        document_ids=tuple(f"text {place}" for place in range(len(domain))), document_source=None,
    )  # fmt: skip


def test_loss_by_domain_by_hand() -> None:
    loss = DocumentLoss(np.asarray([8.0, 24.0, 8.0, 5.0]), np.asarray([8, 8, 16, 5]))
    found = loss_by_domain(loss, shape_of([0, 0, 0, 1]))
    value = found["a"].bits_per_byte
    assert (found["a"].sources, found["a"].text_bytes, value.value) == (3, 32, 1.25)
    left = np.asarray([32 / 24, 16 / 24, 32 / 16])
    error = math.sqrt(2 / 3 * float(np.square(left - left.mean()).sum()))
    assert value.high - value.value == pytest.approx(4.302652729696142 * error)  # Student's t with two degrees of freedom
    assert found["b"].bits_per_byte.value == 1.0
    assert math.isnan(found["b"].bits_per_byte.low)


def test_cells_are_matched_by_load_in_their_layer() -> None:
    specialist = np.asarray([[True, True, False, False, False, False]])
    share = np.asarray([[0.30, 0.25, 0.20, 0.15, 0.08, 0.02]])
    own, control = matched(specialist, np.asarray([[2.0, 3.0, 1, 1, 1, 1]]), share, shape_of([0, 1]))
    # expert 1 has the higher lift; with expert 0 the specialists would carry more than all others
    assert own == ((3, 1),)
    assert control == ((3, 2), (3, 5))  # 0.20, and 0.02 brings it closer to 0.25 than 0.08 or 0.15
    assert matched(np.zeros((1, 6), bool), share, share, shape_of([0, 1])) == ((), ())


def test_halves_share_out_every_domain_and_do_not_depend_on_order() -> None:
    shape = shape_of([0] * 7 + [1] * 8)
    half = halves_of(shape)
    assert [int(half[shape.document_domain == domain].sum()) for domain in (0, 1)] == [3, 4]
    turned = halves_of(RoutingShape(**(vars(shape) | {
        "document_ids": shape.document_ids[::-1], "document_domain": shape.document_domain[::-1]})))  # fmt: skip
    np.testing.assert_array_equal(turned[::-1], half)


def masks_of(domain: np.ndarray) -> Masks:
    cells = (((3, 0),), ((3, 1),))
    return Masks(
        shape=shape_of(domain.tolist()), half=np.arange(len(domain)) % 2, own=(cells, cells), control=(cells, cells),
        load=np.full((2, 2, 2), 0.25),
    )  # fmt: skip


def test_effects_are_ratios_of_sums_and_noise_is_none() -> None:
    rng = np.random.default_rng(0)
    domain = np.repeat([0, 1], 40)
    sizes = rng.integers(50, 200, 80)
    base = sizes * 2.0
    own, control = base + sizes * rng.normal(0.1, 0.05, (2, 80)), base + sizes * rng.normal(0.1, 0.05, (2, 80))
    own[0, :40] += 0.5 * sizes[:40]
    found = ablation_by_domain(masks_of(domain), base=base, own=own, control=control, text_bytes=sizes)
    a = found["a"]
    assert (a.finding, found["b"].finding) == ("drives", "no effect")
    inside = (own[0, :40] - base[:40]).sum() / sizes[:40].sum()
    outside = (own[0, 40:] - base[40:]).sum() / sizes[40:].sum()
    against = [(control[0, part] - base[part]).sum() / sizes[part].sum() for part in (slice(40), slice(40, 80))]
    assert a.beyond is not None and a.selectivity is not None and a.inside is not None
    assert a.inside.value == pytest.approx(inside)
    assert a.beyond.value == pytest.approx(inside - against[0])
    assert a.selectivity.value == pytest.approx(inside - against[0] - (outside - against[1]))
    everywhere = own.copy()
    everywhere[0] = base + 0.6 * sizes + rng.normal(0, 1, 80)
    other = ablation_by_domain(masks_of(domain), base=base, own=everywhere, control=control, text_bytes=sizes)
    assert other["a"].finding == "not alone"


DOMAINS = ("law", "code", "math")
WORDS_EACH, HIDDEN = 10, 16


def planted_model(*, inert: bool) -> tuple[OlmoeForCausalLM, PreTrainedTokenizerFast]:
    """Expert d runs for the words of domain d alone and makes them likely; experts 3 to 7 share the second slot and give nothing."""
    vocabulary = {"?": 0} | {f"{name}{word}": 1 + 10 * place + word for place, name in enumerate(DOMAINS) for word in range(WORDS_EACH)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    model = OlmoeForCausalLM(OlmoeConfig(
        vocab_size=len(vocabulary), hidden_size=HIDDEN, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )).eval()  # fmt: skip
    layer = model.model.layers[0]
    with torch.no_grad():
        for part in (layer.self_attn.o_proj.weight, layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            part.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for token in range(1, len(vocabulary)):
            domain, word = divmod(token - 1, WORDS_EACH)
            model.model.embed_tokens.weight[token, [domain, 3 + word % 5]] = 1.0
            model.lm_head.weight[token, 8 + domain] = 1.0
        for expert in range(8):
            layer.mlp.gate.weight[expert, expert] = 0.5 if expert < 3 else 0.4
        for domain in () if inert else range(3):
            layer.mlp.experts.gate_up_proj[domain, [0, 4], domain] = 1.0
            layer.mlp.experts.down_proj[domain, 8 + domain, 0] = 1.0
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="?")


def words_task() -> Task:
    rng = np.random.default_rng(0)
    texts = {
        name: [" ".join(f"{name}{word}" for word in rng.integers(0, WORDS_EACH, rng.integers(20, 40))) for _ in range(28)]
        for name in DOMAINS
    }
    return Task(name="words", version=1, window=64, domains=texts)


@pytest.mark.parametrize("inert", [False, True])
def test_an_expert_that_a_domain_needs_is_found_and_an_inert_one_is_not(tmp_path: Path, inert: bool) -> None:
    model, tokenizer = planted_model(inert=inert)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    result = dbes.evaluate(model, tokenizer=tokenizer, tasks=words_task(), ablate=True, permutations=200, output_path=tmp_path)
    assert result.measures is not None
    found = result.measures.ablation
    assert {each.finding for each in found.values()} == {"no effect" if inert else "drives"}
    for each in found.values():
        assert each.cells == (1, 1)
        assert each.sources == 28
        assert each.beyond is not None and each.outside is not None and each.control_inside is not None
        assert each.control_load == pytest.approx(each.load, rel=0.2)
        assert each.outside.value == pytest.approx(0, abs=1e-5)
        if inert:
            assert each.beyond.value == 0
            assert each.beyond.p == 1
        else:
            assert each.beyond.value > 0.1
    for name, part in model.state_dict().items():
        assert torch.equal(part, before[name])
    page = render_page(result)
    verdict = "no effect beyond cells of the same load" if inert else "its specialists drive it"
    for name in DOMAINS:
        assert f"{name}: {verdict}" in page


def test_what_is_lacking_is_added_to_a_finished_result(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"id": f"{index}", "text": f"Which? {'xyz'[index % 3]}", "question": "Which one of them?",
             "choices": ["x", "yy", "z z"], "answer": ["x", "yy", "z z"][index % 3]} for index in range(8)]  # fmt: skip
    for name, kept in (("one", rows), ("two", [{part: row[part] for part in ("id", "text")} for row in rows])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    fields = "id_field: id, text_field: text, question_field: question, answer_field: answer, choices_fields: [choices]"
    domains = [f"  one: {{files: [one.jsonl], {fields}}}", "  two: {files: [two.jsonl], id_field: id, text_field: text}"]
    path = tmp_path / "task.yaml"
    path.write_text("\n".join(["name: items", "version: 1", "window: 64", "domains:", *domains]), "utf-8")
    asked = {"tasks": path, "permutations": 20, "output_path": tmp_path / "out"}
    first = dbes.evaluate(str(tiny_checkpoint), loss=True, **asked)
    assert first.folder is not None and first.recording is not None and first.measures is not None
    shards = {file: file.stat().st_mtime_ns for file in (first.folder / "trace").glob("shard-*")}
    second = dbes.evaluate(str(tiny_checkpoint), loss=True, accuracy=True, **asked)
    assert shards == {file: file.stat().st_mtime_ns for file in (first.folder / "trace").glob("shard-*")}
    assert second.measures is not None
    assert second.measures.loss == first.measures.loss
    assert set(second.measures.accuracy) == {"one"}
    own = second.measures.accuracy["one"]
    assert (own.items, own.chance) == (8, pytest.approx(1 / 3))
    # a naive loop: every choice after the question
    loaded = load_model(tiny_checkpoint)
    question = loaded.tokenizer("Which one of them?")["input_ids"]
    likely = []
    for choice in ("x", "yy", "z z"):
        whole = loaded.tokenizer(f"Which one of them? {choice}")["input_ids"]
        likely.append(plain_nats(loaded.model, question) - plain_nats(loaded.model, whole))
    per_byte = [nats / size for nats, size in zip(likely, (1, 2, 3), strict=True)]
    for measured, scores in ((own.accuracy, likely), (own.accuracy_per_byte, per_byte)):
        assert measured.value == sum(index % 3 == int(np.argmax(scores)) for index in range(8)) / 8
        assert measured.low < measured.value < measured.high or measured.value in (0, 1)
    with pytest.raises(SettingError, match="use --engine memory"):
        dbes.evaluate(str(tiny_checkpoint), loss=True, engine="streaming", **asked)


def test_definitions_for_the_harness_name_its_documented_keys(tmp_path: Path) -> None:
    write_items([Item("Which? ", (" a", "b"), 1)], tmp_path / "items.jsonl")
    assert json.loads((tmp_path / "items.jsonl").read_text("utf-8")) == {"question": "Which?", "choices": ["a", "b"], "right": 1}
    found = definition("dbes_law", tmp_path / "items.jsonl")
    assert found["output_type"] == "multiple_choice"
    assert [found[f"doc_to_{part}"] for part in ("text", "choice", "target")] == ["question", "choices", "right"]
    assert found["dataset_kwargs"]["data_files"][found["test_split"]] == str(tmp_path / "items.jsonl")
    assert [metric["metric"] for metric in found["metric_list"]] == ["acc", "acc_bytes"]


def test_a_missing_harness_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbes.evaluation.harness.find_spec", lambda _: None)
    with pytest.raises(SettingError, match=r"pip install 'dbes\[lm-eval\]'"):
        require_harness()


def test_only_documents_with_an_answer_among_choices_are_items() -> None:
    documents = read_documents(load_task("embedded"))
    found = items_of(documents)
    assert set(found) == {"medicine"}
    assert len(found["medicine"]) == sum(document.choices is not None for document in documents)


def test_a_rank_correlation_is_that_of_scipy_and_says_nothing_of_three() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 9))
    other[:2] = 1.0  # ties
    rho, low, high = spearman(one, other)
    assert rho == pytest.approx(spearmanr(one, other)[0])
    reach = 1.959963984540054 * math.sqrt((1 + rho**2 / 2) / 6)
    assert (low, high) == pytest.approx((math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)))
    assert all(math.isnan(value) for value in spearman(one[:3], other[:3]))
    assert all(math.isnan(value) for value in spearman(one, np.ones(9)))


@pytest.mark.parametrize("count", [3, 5])
def test_models_are_set_against_their_loss(tmp_path: Path, count: int) -> None:
    texts = {name: [f"{name} text {place} of some words" for place in range(6)] for name in ("a", "b", "c", "d")}
    domains, ids = tuple(texts), [f"{name}{place}" for name, own in texts.items() for place in range(len(own))]
    rng = np.random.default_rng(0)
    for model in range(count):
        hits = rng.integers(1, 9, (24, 1, 4)) * 4
        hits[np.arange(24), 0, np.repeat(np.arange(4), 6)] += 40 * (model + 1)
        counts = Counts.from_arrays(hits, domains=domains, document_domain=np.repeat(np.arange(4), 6), top_k=1, document_ids=ids,
                                    provenance={"model": f"m{model}", "task": {"name": "t", "version": 1, "fingerprint": "f"}})  # fmt: skip
        result = dbes.score(counts, permutations=20, output_path=tmp_path / f"m{model}")
        loss = {name: DomainLoss(sources=6, text_bytes=9, bits_per_byte=Measured(value=3 - model / 9 + place, low=0.0, high=9.0))
                for place, name in enumerate(domains)}  # fmt: skip
        result.model_copy(update={"measures": Measures(loss=loss)}).save(tmp_path / f"m{model}")
    found = dbes.compare(tmp_path)
    (relation,) = found.relations
    assert (relation.of, relation.models) == ("loss", count)
    (line,) = relation_lines(found)
    assert all("accuracy" not in entry_row(entry, found) for entry in found.entries)
    if count < 4:
        assert "3 models, of which nothing can be said" in line
    else:
        assert relation.rho == pytest.approx(-1)
        assert relation.within_models == 5
        assert -1 <= relation.within_low <= relation.within <= relation.within_high <= 1
        assert "Spearman -1.00" in line
    page = render_leaderboard(found)
    assert "Specialization against bits per byte" in page
    assert "Specialization against accuracy" not in page


def test_measures_survive_json() -> None:
    value = Measured(value=1.5, low=math.nan, high=2.0)
    measures = Measures(
        loss={"law": DomainLoss(sources=2, text_bytes=3, bits_per_byte=value)}, ablation={"law": DomainAblation(cells=(0, 2))}
    )
    again = Measures.model_validate_json(measures.model_dump_json())
    assert math.isnan(again.loss["law"].bits_per_byte.low)
    assert again.ablation == {"law": again.ablation["law"]}
    assert (again.mean_loss, again.mean_accuracy) == (1.5, None)
