"""Naming the domain of unseen texts from their routing: the rule, what it finds, and that the length of a text tells it nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
import simulate
from scipy import sparse
from sklearn.naive_bayes import MultinomialNB

from dbes.results import load_result
from dbes.scoring.counting import count_routes
from dbes.scoring.decoding import Decoder, calibration, decoded_words, mean_share, rule
from dbes.scoring.score import score
from dbes.trace.store import Trace

COMPANION = {"accuracy", "accuracy_low", "accuracy_high", "bits", "texts", "chance", "bag_of_words", "bag_of_words_texts"}


def drawn(seed: int, lengths: list[list[int]], *, effect: float, concentration: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    """Hits [texts, experts] and domains of texts of given lengths, one list for each domain."""
    about = simulate.population(seed, domains=len(lengths), layers=1, experts=32, effect=effect, concentration=concentration)
    random = np.random.default_rng(seed)
    domain = np.repeat(np.arange(len(lengths)), [len(each) for each in lengths])
    usage = simulate.document_usage(about, domain, random)
    hits = random.multinomial(np.concatenate(lengths)[:, None, None], usage).reshape(len(domain), 32)
    return hits.astype(np.float32), domain


def test_the_rule_follows_its_formula_pair_by_pair() -> None:
    hits, domain = drawn(0, [[5, 30, 9], [40, 8, 20, 11]], effect=0.5)
    hits[:, 3] = 0
    usage = hits.sum(axis=0) / hits.sum()
    own = np.stack([hits[domain == each].sum(axis=0) for each in range(2)]).astype(float)
    squares = np.stack([(hits[domain == each] ** 2).sum(axis=0) for each in range(2)]).astype(float)
    sizes = np.array([(hits[domain == each].sum(axis=1) ** 2).sum() for each in range(2)]).astype(float)
    weight, norm = rule(own, squares, sizes)
    for d in range(2):
        for e in range(32):
            expected = own[d, e] / own[d].sum() / usage[e] - 1 if usage[e] > 0 else 0.0
            assert weight[d, e] == pytest.approx(expected)
        texts = hits[domain == d].astype(float)
        above = below = 0.0
        for i in range(len(texts)):
            for j in range(len(texts)):
                if i != j:
                    n, m = texts[i].sum(), texts[j].sum()
                    above += sum((texts[i, e] - n * usage[e]) * (texts[j, e] - m * usage[e]) / usage[e] for e in range(32) if usage[e] > 0)
                    below += n * m
        assert norm[d] == pytest.approx(above / below)


def test_every_text_is_named_by_texts_of_other_parts() -> None:
    hits, domain = drawn(1, [[50] * 11, [60] * 13, [40] * 17], effect=0.6)
    decoder = Decoder(domain, 3, seed=4)
    found = decoder.add(hits)
    assert [np.bincount(decoder.fold[domain == d]).tolist() for d in range(3)] == [[3, 2, 2, 2, 2], [3, 3, 3, 2, 2], [4, 4, 3, 3, 3]]
    right = np.zeros(len(domain))
    for fold in range(5):
        train, held = decoder.fold != fold, decoder.fold == fold
        assert not set(np.flatnonzero(train)) & set(np.flatnonzero(held))
        own, squares, sizes = (
            np.stack([each[train & (domain == d)].sum(axis=0) for d in range(3)])
            for each in (hits.astype(float), hits.astype(float) ** 2, hits.sum(axis=1).astype(float) ** 2)
        )
        weight, norm = rule(own, squares, sizes)
        scores = hits[held] @ weight.T - hits[held].sum(axis=1, keepdims=True) / 2 * norm
        right[held] = scores.argmax(axis=1) == domain[held]
    assert found.accuracy == pytest.approx(np.mean([right[domain == d].mean() for d in range(3)]))
    assert Decoder(domain, 3, seed=4).add(hits) == found
    assert (Decoder(domain, 3, seed=5).fold != decoder.fold).any()


def test_it_finds_what_naive_bayes_finds_where_texts_are_of_one_length() -> None:
    ours, theirs, texts = 0.0, 0.0, 0
    for seed in range(10):
        hits, domain = drawn(seed, [[100] * 20] * 4, effect=0.25)
        decoder = Decoder(domain, 4, seed=seed)
        ours += decoder.add(hits).accuracy * len(domain)
        for fold in range(5):
            train, held = decoder.fold != fold, decoder.fold == fold
            theirs += (MultinomialNB(fit_prior=False).fit(hits[train], domain[train]).predict(hits[held]) == domain[held]).sum()
        texts += len(domain)
    assert 0.5 < theirs / texts < 0.95
    # Two rules of equal power on the same texts: they differ in some texts, either way.
    assert abs(ours - theirs) / texts < 2 * math.sqrt(0.25 / texts)


def test_the_length_of_a_text_says_nothing_of_its_domain() -> None:
    """Equal routing, 60 against 600 tokens: naive Bayes is above chance, the rule is not."""
    ours, theirs, bits = [], [], []
    for seed in range(60):
        hits, domain = drawn(seed, [[60] * 20, [600] * 20], effect=0.0, concentration=1e6)
        # One usage for both domains: population draws the load for all of them alike when there is no effect.
        decoder = Decoder(domain, 2, seed=seed)
        found = decoder.add(hits)
        ours.append(found.accuracy)
        bits.append(found.bits)
        right = np.zeros(len(domain), bool)
        for fold in range(5):
            train, held = decoder.fold != fold, decoder.fold == fold
            right[held] = MultinomialNB(fit_prior=False).fit(hits[train], domain[train]).predict(hits[held]) == domain[held]
        theirs.append(right.mean())
    error = np.std(ours, ddof=1) / math.sqrt(len(ours))
    assert abs(np.mean(ours) - 0.5) < 3.5 * error
    assert np.mean(theirs) - 0.5 > 5 * np.std(theirs, ddof=1) / math.sqrt(len(theirs))
    assert -0.05 <= np.mean(bits) <= 0.01


@pytest.mark.parametrize("concentration", [2.0, 1e6])
def test_noise_gives_chance_and_no_bits(concentration: float) -> None:
    found = []
    for seed in range(40):
        hits, domain = drawn(seed, [[30, 100, 300, 60] * 5] * 4, effect=0.0, concentration=concentration)
        found.append(Decoder(domain, 4, seed=seed).add(hits))
    accuracy, bits = np.array([each.accuracy for each in found]), np.array([each.bits for each in found])
    assert abs(accuracy.mean() - 0.25) < 3.5 * accuracy.std(ddof=1) / math.sqrt(len(found))
    assert -0.05 <= bits.mean() <= 0.01


def test_planted_domains_are_found_and_layers_add_up() -> None:
    decoder, domain = None, np.repeat(np.arange(4), 25)
    for layer in range(4):
        hits, domain = drawn(layer, [[60] * 25] * 4, effect=0.3)
        decoder = decoder or Decoder(domain, 4, seed=0)
        decoder.add(hits)
    assert decoder is not None and len(decoder.layers) == 4
    together = decoder.together()
    for found in decoder.layers:
        assert found.accuracy_low > 0.25
        assert found.accuracy_low < found.accuracy < found.accuracy_high
        assert 0 < found.bits < together.bits < 2
        assert found.accuracy < together.accuracy


def test_counts_in_a_sparse_matrix_give_the_same() -> None:
    hits, domain = drawn(2, [[60] * 6, [30] * 9], effect=0.4)
    dense, thin = Decoder(domain, 2, seed=0).add(hits), Decoder(domain, 2, seed=0).add(sparse.csr_matrix(hits.astype(float)))
    assert [dense.accuracy, dense.bits] == pytest.approx([thin.accuracy, thin.bits])


def test_a_router_that_chooses_nothing_ties() -> None:
    domain = np.repeat([0, 1, 2], 7)
    hits = np.zeros((21, 8), np.float32)
    hits[:, 2:4] = np.random.default_rng(0).integers(5, 500, (21, 1))
    found = Decoder(domain, 3, seed=0).add(hits)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.bits == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lengths", [[[50] * 8], [[50] * 8, [50]]])
def test_one_domain_or_a_domain_of_one_text_is_nan(lengths: list[list[int]]) -> None:
    hits, domain = drawn(0, lengths, effect=0.5)
    decoder = Decoder(domain, len(lengths), seed=0)
    for found in (decoder.add(hits), decoder.together()):
        assert all(map(math.isnan, (found.accuracy, found.accuracy_low, found.accuracy_high, found.bits)))
        assert found.texts == len(domain)


def test_a_domain_of_two_texts_has_an_accuracy_only() -> None:
    hits, domain = drawn(0, [[200] * 2, [200] * 9], effect=1.0)
    found = Decoder(domain, 2, seed=0).add(hits)
    assert 0 <= found.accuracy <= 1 and math.isnan(found.bits)


def test_bits_never_pass_those_of_certainty() -> None:
    domain = np.repeat([0, 1, 2, 3], 30)
    found = Decoder(domain, 4, seed=0).add(np.eye(4, dtype=np.float32)[domain] * 100)
    assert found.accuracy == found.accuracy_high == 1
    assert 1.8 < found.bits <= 2


def test_calibration_is_the_likeliest_scale_of_smoothed_labels() -> None:
    random = np.random.default_rng(0)
    domain = np.repeat([0, 1, 2], [10, 20, 30])
    scores = random.normal(0, 1, (60, 3)) + np.eye(3)[domain]

    def likelihood(scale: float) -> float:
        total = 0.0
        for row, own in zip(scores, domain, strict=True):
            logs = [scale * each - math.log(sum(math.exp(scale * other) for other in row)) for each in row]
            total += sum((61 if d == own else 1) / 63 * logs[d] for d in range(3)) / (domain == own).sum()
        return total

    best = calibration(scores, domain)
    assert likelihood(best) > max(likelihood(best * 0.99), likelihood(best * 1.01))
    assert calibration(-scores, domain) == 0
    assert calibration(np.zeros((60, 3)), domain) == 0


def test_the_interval_of_one_domain_is_wilsons() -> None:
    share, low, high = mean_share(np.array([1.0] * 8 + [0.0] * 2), np.zeros(10, int), 1)
    assert (share, low, high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)  # Wilson (1927), 8 of 10


def companion(trace: Trace, **options: object) -> dict[str, dict]:
    return score(trace, permutations=0, **options).companions["decoding"]  # type: ignore[arg-type]


def test_a_result_tells_it_for_every_layer_beside_words_and_chance(tmp_path: Path) -> None:
    trace = naive.random_recording(3, documents=(6, 7, 8), length=(40, 60)).trace()
    result = score(trace, permutations=2, output_path=tmp_path)
    found = result.companions["decoding"]
    assert set(found["model"]) == COMPANION
    assert list(found["by_layer"]) == [str(layer) for layer in trace.shape.layers]
    assert all(set(each) == COMPANION for each in found["by_layer"].values())
    assert found["model"]["chance"] == pytest.approx(1 / 3)
    assert found["model"]["texts"] == found["model"]["bag_of_words_texts"] == 21
    assert 0 <= found["model"]["bag_of_words"] <= 1
    assert load_result(tmp_path).companions["decoding"] == found


def test_the_ideal_router_names_every_text() -> None:
    trace = naive.random_recording(3, documents=(6, 7, 8), length=(100, 120), experts=12).trace()
    assert companion(trace, router="reference")["model"]["accuracy"] == 1


def test_documents_of_one_source_are_one_text() -> None:
    recording = naive.random_recording(3, documents=(8, 8), length=(40, 60))
    trace = recording.trace()
    found = companion(trace)
    sources = tuple(f"text{index // 2}" for index in range(16))
    joined = companion(recording.trace(document_source=sources))
    assert found["model"]["texts"] == 16 and joined["model"]["texts"] == joined["model"]["bag_of_words_texts"] == 8


def test_results_without_it_load_and_damaged_ones_do_not(tmp_path: Path) -> None:
    trace = naive.random_recording(3, documents=(3, 3), length=(20, 30)).trace()
    path = score(trace, permutations=0, output_path=tmp_path).folder
    assert path is not None
    content = json.loads((tmp_path / "result.json").read_text())
    decoding = content["companions"].pop("decoding")
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert "decoding" not in load_result(tmp_path).companions
    content["companions"]["decoding"] = decoding | {"model": {"accuracy": "much"}}
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match="decoding"):
        load_result(tmp_path)


def test_without_texts_there_is_no_bag_of_words() -> None:
    recording = naive.random_recording(3, documents=(6, 7), length=(20, 30))
    found = companion(replace(recording, token_ids=None).trace())["model"]
    assert found["bag_of_words"] is None and found["bag_of_words_texts"] == 0
    assert 0 <= found["accuracy"] <= 1


def test_the_bag_of_words_is_of_the_texts_of_the_sample() -> None:
    recording = naive.random_recording(3, documents=(6, 6), length=(40, 50))
    domain = np.array(recording.domain)
    words = np.where(np.arange(len(recording.document)) % 2, domain[recording.document], 9)
    counts = count_routes(replace(recording, token_ids=words).trace())
    sample = counts.sample
    assert sample is not None
    assert decoded_words(sample, domain, 2, seed=0).accuracy == 1
    part = sample.of(np.isin(np.arange(12), (0, 1, 2, 5, 6, 11)))
    assert part is not None
    found = decoded_words(part, domain, 2, seed=0)
    assert (found.texts, found.accuracy) == (6, 1)
    few = sample.of(np.isin(np.arange(12), (0, 1, 2, 11)))
    assert few is not None
    assert math.isnan(decoded_words(few, domain, 2, seed=0).accuracy)
