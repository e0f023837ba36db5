"""Bits per byte and accuracy against a plain forward, one text at a time."""

import math

import numpy as np
import pytest
import torch
from families import character_tokenizer, tiny_model

from dbes.errors import FinetuneError
from dbes.finetuning.evaluation import measure
from dbes.tasks.entries import Entry, Item


def entries(texts, items=()):
    made = [Entry(id=str(place), source=str(place), segments=((text, True),)) for place, text in enumerate(texts)]
    return made + [Entry(id=f"i{place}", source="i", segments=(("ab", True),), item=item) for place, item in enumerate(items)]


def nats_of(model, ids, first):
    """Nats of the tokens from number ``first`` on."""
    with torch.no_grad():
        logarithms = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logarithms[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_bits_per_byte_are_those_of_single_texts():
    model, tokenizer = tiny_model("olmoe"), character_tokenizer()
    texts = ["the quick brown fox", "a", "jumps over", "the lazy dog. " * 3]
    found = measure(model, tokenizer, {"one": entries(texts)}, length=64, batch_tokens=50)["one"]
    nats = sum(nats_of(model, tokenizer(text)["input_ids"], 1) for text in texts)
    assert found.tokens == sum(map(len, texts))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert found.nats_per_token == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.entries == 4 and found.items == 0 and found.accuracy is None


def test_long_texts_are_read_in_runs_that_count_every_token_once():
    model, tokenizer = tiny_model("olmoe"), character_tokenizer()
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    ids = tokenizer(text)["input_ids"]
    found = measure(model, tokenizer, {"one": entries([text])}, length=21)["one"]
    nats = sum(nats_of(model, ids[start : start + 21], 1) for start in range(0, len(ids) - 1, 20))
    assert found.tokens == len(text)
    assert found.nats_per_token * found.tokens == pytest.approx(nats, rel=1e-5)


def test_accuracy_is_that_of_the_likelihood_of_choices():
    model, tokenizer = tiny_model("olmoe"), character_tokenizer()
    random = np.random.default_rng(0)
    items = [
        Item("why " + chr(97 + int(random.integers(26))), tuple("".join(map(chr, random.integers(97, 123, n))) for n in (2, 5, 9)), right)
        for right in random.integers(0, 3, 12).tolist()
    ]
    found = measure(model, tokenizer, {"one": entries(["ab"], items)}, length=64)["one"]
    likely = likely_per_byte = 0
    for item in items:
        asked = len(tokenizer(item.question)["input_ids"])
        scores = [-nats_of(model, tokenizer(f"{item.question} {choice}")["input_ids"], asked) for choice in item.choices]
        likely += int(np.argmax(scores)) == item.right
        likely_per_byte += int(np.argmax([score / len(choice) for score, choice in zip(scores, item.choices, strict=True)])) == item.right
    assert found.items == 12
    assert (found.accuracy, found.accuracy_per_byte) == (likely / 12, likely_per_byte / 12)
    assert 0 < likely_per_byte < 12, "the items tell right from wrong"


def test_measuring_leaves_the_model_in_its_mode_and_without_gradients():
    model = tiny_model("olmoe").train()
    measure(model, character_tokenizer(), {"one": entries(["abc"])}, length=64)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_model_whose_loss_is_no_number_is_refused():
    model = tiny_model("olmoe")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FinetuneError, match="domain one: the model's loss on held-out texts is nan"):
        measure(model, character_tokenizer(), {"one": entries(["abc"])}, length=64)
    with pytest.raises(FinetuneError, match="no token to predict"):
        measure(tiny_model("olmoe"), character_tokenizer(special=False), {"one": entries(["a"])}, length=64)
