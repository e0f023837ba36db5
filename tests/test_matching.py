"""Traces cut to equal lengths, and what they show of a router that looks at the position alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dbes.comparison.compare import compare
from dbes.errors import SettingError, TraceError
from dbes.results import Result
from dbes.scoring.counting import count_routes
from dbes.scoring.portions import word_covered
from dbes.scoring.score import score
from dbes.trace.matching import MATCHED, match_lengths, matched_lengths
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, PROMPT


def by_position(seed: int, *, texts: int = 24, short: int = 60, long: int = 300, answer: int = 0, control: bool = False) -> Trace:
    """Two domains of unlike lengths under a router that takes other experts in the first 50 tokens than later; words know nothing."""
    random = np.random.default_rng(seed)
    domain = np.repeat([0, 1], texts)
    size = np.where(domain == 0, random.integers(short // 2, short, len(domain)), random.integers(long // 2, long, len(domain))) + answer
    document = np.repeat(np.arange(len(domain)), size)
    positions = np.concatenate([np.arange(n) for n in size])
    usage = random.dirichlet(np.ones(12), 2)
    ids = np.where(positions < 50, random.choice(12, len(document), p=usage[0]), random.choice(12, len(document), p=usage[1]))
    about = {
        "document": document, "domain": domain, "domains": ["short", "long"], "layers": [0], "experts": 12,
        "phase": np.where(positions < (size - answer)[document], PROMPT, GENERATED), "token_ids": random.integers(0, 30, len(document)),
    }  # fmt: skip
    beside = Trace.from_arrays(random.integers(0, 12, (len(document), 1, 1)), **about) if control else None
    return Trace.from_arrays(ids[:, None, None], **about, control=beside, vocabulary={3: "word"}, provenance={"model": "by position"})


def lengths(trace: Trace, domain: int) -> list[int]:
    tokens = count_routes(trace, plain=True).tokens
    return sorted(tokens[trace.shape.document_domain == domain].tolist())


def test_domains_of_equal_size_get_exactly_the_same_lengths() -> None:
    random = np.random.default_rng(0)
    length, domain = random.integers(1, 200, 60), random.permutation(np.arange(60) % 3)
    kept = matched_lengths(length, domain)
    ranked = np.stack([np.sort(length[domain == each]) for each in range(3)])
    for each in range(3):
        np.testing.assert_array_equal(np.sort(kept[domain == each]), ranked.min(axis=0))
    assert (kept <= length).all()


def test_domains_of_other_sizes_get_the_same_quantiles() -> None:
    kept = matched_lengths(np.array([10, 20, 30, 5, 5, 25, 25, 100, 100]), np.array([0, 0, 0, 1, 1, 1, 1, 1, 1]))
    assert kept[:3].tolist() == [5, 20, 30]
    assert kept[3:].tolist() == [5, 5, 20, 20, 30, 30]


def test_lengths_that_agree_are_left_alone() -> None:
    length = np.array([7, 3, 3, 7])
    np.testing.assert_array_equal(matched_lengths(length, np.array([0, 0, 1, 1])), length)


def test_documents_and_domains_without_tokens_are_left_out() -> None:
    kept = matched_lengths(np.array([0, 10, 20, 8, 12, 0]), np.array([0, 0, 0, 1, 1, 2]))
    assert kept.tolist() == [0, 8, 12, 8, 12, 0]


def test_a_cut_trace_has_the_beginnings_of_the_texts(tmp_path: Path) -> None:
    trace = by_position(1, control=True)
    for source in (trace, trace.save(tmp_path / "trace")):
        found = match_lengths(source)
        assert lengths(found, 0) == lengths(found, 1) == lengths(trace, 0)
        assert found.tokens == sum(len(routes) for routes in found) < trace.tokens
        assert found.control is not None
        assert lengths(found.control, 1) == lengths(found, 1)
        assert found.vocabulary == trace.vocabulary
        (whole,) = trace
        rows = np.concatenate([routes.ids for routes in found])
        assert found.kept is not None
        np.testing.assert_array_equal(rows, whole.ids[whole.positions < found.kept[whole.document]])
        chosen = np.arange(len(trace.shape.document_ids)) % 3 == 0
        part = np.concatenate([routes.document for routes in found.documents(chosen)])
        assert np.array_equal(np.unique(part), np.flatnonzero(chosen))
        assert len(part) == found.kept[chosen].sum()
    again = match_lengths(trace).save(tmp_path / "cut")
    assert again.tokens == match_lengths(trace).tokens
    assert again.provenance[MATCHED]["tokens"] == again.tokens


def test_a_router_that_follows_the_position_scores_0_on_matched_lengths() -> None:
    trace = by_position(2)
    whole, matched = (score(trace, match=match, permutations=199).record("specialization") for match in ("none", "length"))
    assert whole.p == 0.005
    assert whole.score_low > 0.01
    assert matched.p > 0.05
    assert matched.score_low < 0 < matched.score_high


def test_the_result_says_what_was_cut(tmp_path: Path) -> None:
    trace = by_position(3).save(tmp_path / "trace")
    score(tmp_path / "trace", permutations=0)
    result = score(tmp_path / "trace", match="length", permutations=0, output_path=tmp_path / "out")
    found = result.settings["matched"]
    assert result.settings["match"] == "length"
    assert found["documents"] == 48
    assert found["documents_cut"] == 24
    assert found["tokens_before"] == trace.tokens
    assert result.recording is not None
    assert found["tokens"] == result.recording.tokens == sum(each.tokens for each in result.task.domains.values())
    assert f"{found['tokens']:,} of {trace.tokens:,} tokens are left" in result.warnings[0]
    assert score(tmp_path / "trace", permutations=0).recording != result.recording, "counts of the whole trace stay those of the whole"


def test_results_of_cut_texts_do_not_stand_beside_those_of_whole_texts(tmp_path: Path) -> None:
    trace = by_position(4).save(tmp_path / "trace")
    for name, match in (("one", "none"), ("two", "none"), ("cut", "length")):
        score(trace, match=match, permutations=0, output_path=tmp_path / "results" / name)
    found = compare([tmp_path / "results"])
    assert len(found.entries) == 2
    assert "match length instead of none" in found.apart[0].reason


def test_prompts_are_matched_by_their_own_lengths() -> None:
    trace = by_position(5, answer=40)
    result = score(trace, match="length", phase="prompt", permutations=0)
    tokens = {name: each.tokens for name, each in result.task.domains.items()}
    assert tokens["short"] == tokens["long"]
    assert result.settings["matched"]["tokens"] == sum(tokens.values())


def test_what_cannot_be_matched_is_refused() -> None:
    trace = by_position(6, answer=10)
    with pytest.raises(SettingError, match="length"):
        score(trace, match="words")
    with pytest.raises(SettingError, match="match"):
        score(trace, match="")
    with pytest.raises(SettingError, match="begins where the prompt ends"):
        score(trace, match="length", phase="generated")
    with pytest.raises(TraceError, match="match length needs the trace"):
        score(count_routes(trace), match="length")


def test_bigrams_explain_what_tokens_alone_do_not() -> None:
    """A router that looks at a token and the one before it, over domains that differ in their pairs only."""
    random = np.random.default_rng(7)
    domain = np.repeat([0, 1], 30)
    size = np.full(60, 120)
    words = np.empty((60, 120), np.int64)
    words[:, 0] = random.integers(0, 4, 60)
    for place in range(1, 120):
        step = np.where(random.random(60) < 0.6, np.where(domain == 0, 1, 3), random.integers(0, 4, 60))
        words[:, place] = (words[:, place - 1] + step) % 4
    before = np.concatenate([np.zeros((60, 1), np.int64), words[:, :-1]], axis=1)
    ids = np.where(np.arange(120) == 0, 0, 4 * before + words).reshape(-1, 1, 1)
    trace = Trace.from_arrays(
        ids, document=np.repeat(np.arange(60), size), domain=domain, domains=["up", "down"], layers=[0], experts=16,
        token_ids=words.ravel(),
    )  # fmt: skip
    found: dict[str, Result] = {name: score(trace, surrogate=name, permutations=0) for name in ("token", "bigram")}
    token, bigram = (each.record("specialization") for each in found.values())
    assert token.contextual_low > 0.9 * token.corrected
    assert bigram.contextual == pytest.approx(0, abs=1e-9)
    assert token.corrected == bigram.corrected
    assert [each.settings["surrogate"] for each in found.values()] == ["token", "bigram"]
    assert word_covered(found["bigram"]) == found["bigram"].companions["surrogate_covered"]["bigram"]["all"] > 0.9
    with pytest.raises(SettingError, match="bigram"):
        score(trace, surrogate="pair")
