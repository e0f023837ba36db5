"""Batches: what they hold, in what order, and that a step's batch depends on nothing but the step."""

import json

import numpy as np
import pytest
from testbed_mix import BOUNDARY, tiny_mix

from dbes.errors import MixError
from dbes.testbed.mix import Batches, Text, cut_sequences, is_heldout, overlap_domains, read_texts, tokenize_mix
from dbes.testbed.settings import MixSettings
from dbes.testbed.vocabulary import BOUNDARY as BOUNDARY_TOKEN
from dbes.testbed.vocabulary import train_tokenizer

SMALL = {"tokens_per_step": 256, "lengths": (32,)}


def batches(steps=6, seed=0, mix=None, **settings):
    return Batches(mix or tiny_mix(), MixSettings(**{**SMALL, **settings}), steps=steps, seed=seed)


@pytest.mark.parametrize("order", ["one_domain", "mixed"])
def test_every_batch_holds_every_domain_equally_often(order):
    draw = batches(order=order)
    for step in range(6):
        batch = draw(step)
        assert batch.tokens.shape == (8, 32)
        assert np.bincount(batch.domain, minlength=4).tolist() == [2, 2, 2, 2]


def test_order_decides_what_a_micro_batch_sees_and_nothing_else():
    apart, together = batches(order="one_domain")(2), batches(order="mixed")(2)
    assert len(set(apart.domain[:2])) == 1
    assert len(set(together.domain[:4])) == 4
    assert sorted(map(tuple, apart.tokens.tolist())) == sorted(map(tuple, together.tokens.tolist()))


def test_a_batch_depends_on_the_step_alone():
    forward, again = batches(steps=40), batches(steps=40)
    for step in range(40):
        forward(step)
    assert np.array_equal(forward(7).tokens, again(7).tokens), "also after later passes over the data"
    assert not np.array_equal(forward(7).tokens, batches(steps=40, seed=1)(7).tokens)


def test_sequences_carry_the_label_of_their_words():
    batch = batches()(0)
    for row, domain in zip(batch.tokens, batch.domain, strict=True):
        own = row[row >= 40]
        assert set((own - 40) // 50) == {domain}


def test_one_pass_holds_every_token_once_and_every_document_starts_a_sequence():
    domain = tiny_mix().training[0]
    sequences = cut_sequences(domain, 32, boundary=BOUNDARY, generator=np.random.default_rng(0))
    starts = {tuple(domain.document(index)[:32]) for index in range(len(domain))}
    assert starts <= {tuple(row) for row in sequences}
    whole = sum(len(domain.document(index)) // 32 * 32 for index in range(len(domain)))
    rest = len(domain.tokens) - whole + len(domain)
    assert sequences.size == whole + rest // 32 * 32
    assert (sequences == BOUNDARY).sum() == rest // 32 * 32 // (rest // len(domain))


def test_lengths_alternate_with_equal_tokens():
    draw = batches(lengths=(32, 64))
    assert [draw(step).tokens.shape for step in range(3)] == [(8, 32), (4, 64), (8, 32)]


def test_unequal_weights_are_kept_over_steps():
    names = tiny_mix().domains
    draw = batches(steps=50, domains=names, weights=(4.0, 2.0, 1.0, 1.0))
    counts = sum(np.bincount(draw(step).domain, minlength=4) for step in range(50))
    assert counts.tolist() == [200, 100, 50, 50]
    odd = batches(steps=50, domains=names, weights=(5.0, 3.0, 1.0, 1.0))
    counts = sum(np.bincount(odd(step).domain, minlength=4) for step in range(50))
    assert np.abs(counts - np.asarray([200, 120, 40, 40])).max() <= 1


def test_unstratified_batches_vary():
    draw = batches(steps=20, stratified=False)
    assert len({tuple(np.bincount(draw(step).domain, minlength=4)) for step in range(20)}) > 3


def test_leaving_out_a_domain_does_not_change_the_others():
    names = tiny_mix().domains
    some, every = batches(domains=names[:2], tokens_per_step=128)(0), batches()(0)
    assert sorted(map(tuple, some.tokens[some.domain == 0].tolist())) == sorted(map(tuple, every.tokens[every.domain == 0].tolist()))


def test_overlap_mixes_in_other_domains_at_the_asked_share():
    mix = tiny_mix()
    settings = MixSettings(overlap=0.3, span=8)
    generator = np.random.default_rng(0)
    rows = np.stack([mix.training[0].tokens[start : start + 64] for start in range(0, 1600, 8)])
    changed = np.stack([overlap_domains(row, mix.training, 0, settings, generator) for row in rows])
    assert (changed >= 90).mean() == pytest.approx(0.3 * 0.7, abs=0.03)
    soft = batches(overlap=0.5, span=8)
    assert np.array_equal(soft(1).tokens, soft(1).tokens)
    assert not np.array_equal(soft(1).tokens, batches()(1).tokens)


def test_a_stratified_batch_that_cannot_hold_all_domains_is_refused():
    with pytest.raises(MixError, match="cannot hold 3 domains equally"):
        batches(domains=tiny_mix().domains[:3])


def test_unknown_domains_and_a_domain_too_small_are_named():
    with pytest.raises(MixError, match="nothing"):
        batches(domains=("nothing",))
    with pytest.raises(MixError, match=r"domain domain0: .* fewer than one sequence of 4096"):
        batches(mix=tiny_mix(documents=2), tokens_per_step=16384, lengths=(4096,))


def text(index, source=None, domain="a", content="some words of a text, and then some more words"):
    return Text(id=f"{domain}{index}", domain=domain, source=source or f"{domain}-{index}", text=f"{content} {index}")


def test_split_is_by_source_and_a_share_of_them():
    held = [is_heldout(f"source {index}", share=0.1) for index in range(5000)]
    assert 0.08 < np.mean(held) < 0.12
    assert is_heldout("source 1", share=1.0)
    assert not is_heldout("source 1", share=0.0)


def test_tokenizer_is_the_same_for_the_same_texts_and_reads_any_text():
    texts = {"a": [text(index) for index in range(40)], "b": [text(index, domain="b", content="ein anderer Satz") for index in range(40)]}
    first, second = (train_tokenizer(texts, vocabulary=280, max_positions=64) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 280
    strange = "12 π 日本\n\tx"
    ids = first(strange)["input_ids"]
    assert first.decode(ids) == strange
    assert first.eos_token == BOUNDARY_TOKEN and first.eos_token_id == 0 and first.eos_token_id not in ids


def test_bytes_of_tokens_add_up_to_the_text():
    texts = {name: [text(index, domain=name, content="größer 日本 text") for index in range(60)] for name in ("a", "b")}
    tokenizer = train_tokenizer(texts, vocabulary=270, max_positions=64)
    mix = tokenize_mix(texts, tokenizer, heldout_share=0.3)
    whole = sum(len(one.text.encode()) for of in texts.values() for one in of)
    tokens = np.concatenate([domain.tokens for domain in (*mix.training, *mix.heldout)])
    assert mix.token_bytes[tokens].sum() == whole
    assert mix.digest == tokenize_mix(texts, tokenizer, heldout_share=0.3).digest
    assert mix.digest != tokenize_mix(texts, tokenizer, heldout_share=0.2).digest


def test_a_domain_without_heldout_or_training_documents_is_named():
    texts = {"a": [text(0, source="one"), text(1, source="one")]}
    tokenizer = train_tokenizer(texts, vocabulary=270, max_positions=64)
    side = "training" if is_heldout("one", share=0.5) else "held-out"
    with pytest.raises(MixError, match=f"domain a: no {side} documents"):
        tokenize_mix(texts, tokenizer, heldout_share=0.5)


def test_files_are_read_and_their_faults_named(tmp_path):
    good = {"id": "1", "domain": "a", "source_document": "s", "text": "a line\u2028 and its end"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(good, ensure_ascii=False) + "\n", "utf-8")
    assert read_texts(path)[0].text == good["text"]
    path.write_text(json.dumps(good) + "\n{\n", "utf-8")
    with pytest.raises(MixError, match=r"a\.jsonl:2: not JSON"):
        read_texts(path)
    path.write_text(json.dumps({**good, "text": " "}), "utf-8")
    with pytest.raises(MixError, match="no text"):
        read_texts(path)
    with pytest.raises(MixError, match=r"none\.jsonl: no such file"):
        read_texts(tmp_path / "none.jsonl")
