"""Every rule against plain loops over tokens, budgets, planted specialists, noise, and what cannot be chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import naive
import numpy as np
import pytest
import simulate
from scipy import stats

from dbes.errors import PathError, SettingError
from dbes.paths.evidence import Evidence, gather
from dbes.paths.rules import RULES, Rule, score_cells, smallest_sets
from dbes.paths.search import chosen_cells, find_path
from dbes.paths.selection import choose, random_load_matched
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts

RECORDING = naive.random_recording(4, documents=(14, 13, 14), length=(20, 30), experts=(8, 6, 9), effect=1.2)
EVIDENCE = gather(RECORDING.trace(), permutations=300)


def cells(path_cells: object) -> set[tuple[int, int]]:
    return {tuple(map(int, cell)) for cell in path_cells}  # pyright: ignore[reportGeneralTypeIssues]


def of_statistics(statistics: simulate.LayerCounts, *, permutations: int = 60, seed: int = 0) -> Evidence:
    return Evidence(counts=Counts.of(statistics), routes=None, permutations=permutations, seed=seed)


def usage_by_loops(domain: int) -> list[list[float]]:
    """p[d,l,e], token by token."""
    found = []
    for layer, width in enumerate(RECORDING.experts):
        counts, slots = [0] * width, 0
        for token, document in enumerate(RECORDING.document):
            if RECORDING.domain[document] == domain:
                for expert in RECORDING.ids[token, layer]:
                    counts[expert] += 1
                    slots += 1
        found.append([count / slots for count in counts])
    return found


USAGE = [usage_by_loops(domain) for domain in range(3)]


def esft_by_the_paper(recording: naive.Recording, domain: int, *, gate: bool, reach: float) -> set[tuple[int, int]]:
    """ESFT section 3.2 read again: average over samples of the average over tokens; take experts from the top until p is reached."""
    chosen = set()
    for layer, width in enumerate(recording.experts):
        samples = []
        for document in np.flatnonzero(recording.domain == domain):
            rows = np.flatnonzero(recording.document == document)
            score = [0.0] * width
            for token in rows:
                for slot, expert in enumerate(recording.ids[token, layer]):
                    score[expert] += (recording.weights[token, layer, slot] if gate else 1 / recording.slots(layer)) / len(rows)
            samples.append(score)
        ranked = sorted(((math.fsum(s[e] for s in samples) / len(samples), e) for e in range(width)), key=lambda pair: (-pair[0], pair[1]))
        reached = 0.0
        for score, expert in ranked:
            if reached >= reach - 1e-9:
                break
            chosen.add((recording.layers[layer], expert))
            reached += score
    return chosen


def esft_by_its_code(recording: naive.Recording, domain: int, *, gate: bool, reach: float) -> set[tuple[int, int]]:
    """As ESFT's scores were published: means over all tokens, rounded to 4 digits; experts from the top until the sum reaches p."""
    rows = np.flatnonzero(recording.domain[recording.document] == domain)
    chosen = set()
    for layer, width in enumerate(recording.experts):
        score = [0.0] * width
        for token in rows:
            for slot, expert in enumerate(recording.ids[token, layer]):
                score[expert] += float(recording.weights[token, layer, slot]) if gate else 1 / recording.slots(layer)
        rounded = {expert: round(score[expert] / len(rows), 4) for expert in range(width)}
        reached = 0.0
        for expert, share in sorted(rounded.items(), key=lambda pair: pair[1], reverse=True):
            if reached >= reach - 1e-9:
                break
            chosen.add((recording.layers[layer], expert))
            reached += share
    return chosen


LENGTHS = naive.random_recording(21, documents=(4, 4, 5), length=(5, 200), experts=(24, 30, 24), layers=3, top_k=4, effect=1.0, missing=0)
SOFTMAX = replace(LENGTHS, weights=(LENGTHS.weights * np.float32(0.4)).astype(np.float16).astype(np.float32))
"""Texts of very different lengths; gate weights of a token sum to 0.4, as where the model does not normalise its top-k."""


@pytest.mark.parametrize(("rule", "reach"), [("esft-token", 0.2), ("esft-gate", 0.1)])
def test_esft_sets_by_its_code_and_by_the_papers_text(rule: Rule, reach: float, tmp_path: Path) -> None:
    trace = SOFTMAX.trace()
    trace.save(tmp_path / "trace")
    found = {}
    for average, expected in (("tokens", esft_by_its_code), ("samples", esft_by_the_paper)):
        for domain, source in product(range(3), (trace, tmp_path / "trace")):
            path = find_path(source, domain=f"domain{domain}", rule=rule, average=average, resamples=2, trajectories=0)
            found[average, domain] = cells(path.cells)
            assert found[average, domain] == expected(SOFTMAX, domain, gate=rule == "esft-gate", reach=reach)
            assert path.average == average and path.stability is not None
    assert any(found["tokens", domain] != found["samples", domain] for domain in range(3))


def test_gate_weights_of_a_half_are_those_of_its_texts() -> None:
    evidence = gather(SOFTMAX.trace(), permutations=10)
    half = evidence.half(seed=3, permutations=10)
    kept = [evidence.shape.document_ids.index(name) for name in half.shape.document_ids]
    assert half.gates is not None and evidence.gates is not None and 0 < len(kept) < len(evidence.gates)
    np.testing.assert_array_equal(half.gates, evidence.gates[kept])


def test_counts_alone_know_gate_weights_that_sum_to_1() -> None:
    normal = replace(SOFTMAX, weights=LENGTHS.weights)
    found = [find_path(source, domain="domain0", rule="esft-gate", resamples=0) for source in (normal.trace(), counts_of(normal.trace()))]
    assert found[0].cells == found[1].cells


def test_an_unknown_average_is_named() -> None:
    with pytest.raises(SettingError, match="average"):
        find_path(EVIDENCE, domain="domain0", rule="esft-token", average="texts")


@pytest.mark.parametrize(("average", "expected"), [("tokens", {(0, 0)}), ("samples", {(0, 0), (0, 1)})])
def test_the_code_rounds_shares_before_it_adds_them_up(average: str, expected: set[tuple[int, int]]) -> None:
    """19,996 of 100,000 slots are 0.2 of them in 4 digits, and the set is full; as they are, a second expert is needed."""
    hits = np.array([[[19_996, 16_004, 16_000, 16_000, 16_000, 16_000]]])
    counts = Counts.from_arrays(hits, domains=("law",), document_domain=[0], top_k=2)
    assert cells(find_path(counts, domain="law", rule="esft-token", average=average, resamples=0).cells) == expected


def test_esft_cut_by_a_budget_keeps_the_largest_shares() -> None:
    score = score_cells(EVIDENCE, 0, "esft-token")
    whole, cut = (chosen_cells(EVIDENCE, 0, "esft-token", budget=budget) for budget in (None, 0.1))
    assert cut.sum() == 2 < whole.sum() and score[cut].min() >= score[whole & ~cut].max()


@pytest.mark.parametrize(
    ("share", "reach", "expected"),
    [
        pytest.param([0.5, 0.3, 0.2], 0.5, [True, False, False], id="reached exactly"),
        pytest.param([0.5, 0.3, 0.2], 0.51, [True, True, False], id="just missed"),
        pytest.param([0.1, 0.1, 0.8], 0.9, [True, False, True], id="equal shares: the lower expert"),
        pytest.param([0.1] * 10, 0.3, [True] * 3 + [False] * 7, id="rounding adds no expert"),
        pytest.param([1.0, 0.0, 0.0], 1.0, [True, False, False], id="never an unused expert"),
    ],
)
def test_smallest_sets_by_hand(share: list[float], reach: float, expected: list[bool]) -> None:
    assert smallest_sets(np.array([share]), reach)[0].tolist() == expected


@pytest.mark.parametrize("domain", range(3))
def test_scores_by_plain_loops(domain: int) -> None:
    slots = [sum(RECORDING.domain[d] == domain for d in RECORDING.document) * RECORDING.slots(layer) for layer in range(3)]
    found = {rule: score_cells(EVIDENCE, domain, rule) for rule in ("target-load", "load", "lift", "bottom", "specialization")}
    specialist = EVIDENCE.specialists.at_least(1.0)
    for layer, width in enumerate(RECORDING.experts):
        for expert in range(width):
            p = USAGE[domain][layer][expert]
            bar = sum(USAGE[other][layer][expert] for other in range(3)) / 3
            assert found["target-load"][layer, expert] == pytest.approx(p)
            assert found["load"][layer, expert] == pytest.approx(bar)
            assert found["bottom"][layer, expert] == pytest.approx(-p)
            assert found["lift"][layer, expert] == (pytest.approx(p / bar) if bar * slots[layer] >= 10 else -math.inf)
            own = p * math.log(p / bar) if specialist[domain, layer, expert] else -math.inf
            assert found["specialization"][layer, expert] == pytest.approx(own)
        for scores in found.values():
            assert (scores[layer, width:] == -math.inf).all(), "experts that a narrow layer does not have"
    assert specialist[domain].any()


def test_contributions_add_up_to_the_domains_specialization() -> None:
    usage, bar = EVIDENCE.usage, EVIDENCE.usage.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = np.nan_to_num(usage * np.log(usage / bar))
    divergence = naive.divergences([USAGE[d][0] for d in range(3)])
    np.testing.assert_allclose(parts[:, 0].sum(axis=-1), divergence)


@pytest.mark.parametrize(("budget", "count"), [(0.001, 1), (1 / 23, 1), (0.1, 2), (0.15, 3), (0.5, 11), (1.0, 23)])
def test_a_budget_is_never_exceeded_but_by_one_cell(budget: float, count: int) -> None:
    path = find_path(EVIDENCE, domain="domain1", rule="target-load", budget=budget, resamples=0, trajectories=0)
    assert len(path.cells) == count and path.share == pytest.approx(count / 23)
    ranked = sorted(((-USAGE[1][layer][e], layer, e) for layer, width in enumerate(RECORDING.experts) for e in range(width)))
    assert cells(path.cells) == {(RECORDING.layers[layer], e) for _, layer, e in ranked[:count]}
    slots = [(len(rows), rows) for rows in USAGE[1]]
    assert path.coverage == pytest.approx(sum(-p for p, _, _ in ranked[:count]) / len(slots))


def test_a_budget_counts_parameters_where_experts_differ_in_size() -> None:
    score = np.array([[3.0, 2.0], [1.0, 0.5]])
    sizes, experts = np.array([10.0, 1.0]), np.array([2, 2])
    chosen = choose(score, score, sizes=sizes, experts=experts, budget=0.5)
    assert chosen.tolist() == [[True, False], [False, False]], "the second cell would hold 20 of 22 parameters"
    assert choose(score, score, sizes=sizes, experts=experts, budget=0.96).sum() == 3


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, math.nan])
def test_budgets_that_are_no_share_are_refused(budget: float) -> None:
    with pytest.raises(PathError, match="above 0 and at most 1"):
        find_path(EVIDENCE, domain="domain0", rule="load", budget=budget)


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(SettingError, match="called 'law'; there are domain0"):
        find_path(EVIDENCE, domain="law")
    with pytest.raises(SettingError, match="called 'best'; there are specialization"):
        find_path(EVIDENCE, domain="domain0", rule="best")
    with pytest.raises(PathError, match="sets no limit of its own"):
        find_path(EVIDENCE, domain="domain0", rule="load", budget=None)
    for rule in ("gradient", "causal"):
        with pytest.raises(PathError, match="give it"):
            find_path(EVIDENCE, domain="domain0", rule=rule)
    with pytest.raises(PathError, match="not with itself"):
        find_path(EVIDENCE, domain="domain0", rule="random-load-matched", match="random-load-matched")
    unweighted = gather(replace(RECORDING, weights=None).trace())
    with pytest.raises(PathError, match="no gate weights"):
        find_path(unweighted, domain="domain0", rule="esft-gate")


def test_noise_has_no_specialization_path_beyond_the_rate() -> None:
    about = simulate.population(11, domains=4, layers=2, experts=32, top_k=4, effect=0.5)
    runs, empty = 40, 0
    for run in range(runs):
        random = np.random.default_rng((run, 3))
        evidence = of_statistics(simulate.shuffled(simulate.draw_statistics(about, random, documents=20, tokens=80), random), seed=run)
        try:
            find_path(evidence, domain="domain0", resamples=0, trajectories=0)
        except PathError as problem:
            assert "no cell passes" in str(problem)
            empty += 1
    assert runs - empty <= stats.binom.ppf(0.999, runs, 0.05)


def test_planted_specialists_are_the_path() -> None:
    about = simulate.population(11, domains=4, layers=2, experts=32, top_k=4, effect=0.0, skew=0.2)
    usage = about.usage.copy()
    for layer, expert in ((0, 3), (1, 9)):
        group = slice(expert // 8 * 8, expert // 8 * 8 + 8)
        own = usage[2, layer, expert]
        usage[2, layer, group] *= (0.25 - 4 * own) / (0.25 - own)
        usage[2, layer, expert] = 4 * own
    planted = replace(about, usage=usage, concentration=40.0)
    for run in range(5):
        evidence = of_statistics(simulate.draw_statistics(planted, np.random.default_rng((run, 4)), documents=40), permutations=200)
        path = find_path(evidence, domain="domain2", budget=2 / 64, resamples=5, trajectories=0)
        assert cells(path.cells) == {(0, 3), (1, 9)}
        assert path.stability is not None and path.stability > 0.9
        assert all(path.coverage > overlap.coverage for overlap in path.overlap.values())  # pyright: ignore[reportOperatorIssue]


def test_stability_of_a_choice_without_a_reason_is_its_share() -> None:
    about = simulate.population(12, domains=3, layers=2, experts=32, top_k=4, effect=0.0, skew=0.0, concentration=2.0)
    found = []
    for run in range(6):
        evidence = of_statistics(simulate.draw_statistics(about, np.random.default_rng((run, 6)), documents=40, tokens=40))
        found.append(find_path(evidence, domain="domain0", rule="target-load", budget=0.25, resamples=8, trajectories=0).stability)
    # a half shares half of its texts with the whole, so more than the 0.25 of chance and far from 1
    assert 0.3 < np.mean(found) < 0.75


def test_other_domains_overlap_by_hand() -> None:
    hits = np.zeros((4, 1, 4), np.float32)
    hits[:2, 0] = [40, 40, 10, 10]
    hits[2:, 0] = [40, 10, 40, 10]
    statistics = simulate.of_hits(hits, hits.sum(axis=(1, 2)).astype(int), np.repeat([0, 1], 2), domains=2, top_k=1)
    path = find_path(of_statistics(statistics), domain="domain0", rule="target-load", budget=0.5, resamples=0, trajectories=0)
    assert path.coverage == pytest.approx(0.8) and path.overlap["domain1"].coverage == pytest.approx(0.5)
    assert path.overlap["domain1"].jaccard == pytest.approx(1 / 3)


def test_where_every_expert_is_used_by_every_token_nothing_is_special() -> None:
    recording = naive.random_recording(6, documents=(5, 5), experts=2, top_k=2, length=(30, 40))
    evidence = gather(recording.trace(), permutations=40)
    with pytest.raises(PathError, match="no cell passes"):
        find_path(evidence, domain="domain0")
    assert len(find_path(evidence, domain="domain0", rule="target-load", budget=0.5, resamples=0).cells) == 3


def test_a_domain_of_one_text_has_no_specialists_and_one_without_tokens_is_refused() -> None:
    single = gather(naive.random_recording(8, documents=(6, 1), length=(60, 80), effect=2.0).trace(), permutations=40)
    with pytest.raises(PathError, match="no cell passes"):
        find_path(single, domain="domain1")
    assert find_path(single, domain="domain1", rule="lift").stability is None
    recording = naive.random_recording(8, documents=(6, 2), length=(60, 80))
    silent = recording.take(np.flatnonzero(recording.document < 6))
    with pytest.raises(PathError, match="'domain1' has no tokens"):
        find_path(gather(silent.trace(), permutations=40), domain="domain1")


def test_load_matched_random_cells_carry_the_same_load_outside_the_set() -> None:
    random = np.random.default_rng(0)
    load = random.dirichlet(np.ones(60) * 3).reshape(4, 15)
    exists = np.ones((4, 15), bool)
    chosen = load >= np.sort(load.ravel())[-9]
    sets = [random_load_matched(chosen, load, exists, seed=seed) for seed in range(30)]
    for drawn in sets:
        assert not (drawn & chosen).any()
        assert load[drawn].sum() == pytest.approx(load[chosen].sum(), rel=0.02)
    assert len({drawn.tobytes() for drawn in sets}) == 30
    often = np.mean(sets, axis=0)[~chosen]
    assert often.max() - often.min() < 0.75, "every cell outside may be drawn"
    assert np.array_equal(sets[3], random_load_matched(chosen, load, exists, seed=3))
    with pytest.raises(PathError, match="smaller budget"):
        random_load_matched(load >= np.median(load), load, exists, seed=0)


def test_random_is_seeded_and_of_the_budget() -> None:
    one, again, other = (find_path(EVIDENCE, domain="domain0", rule="random", seed=seed, trajectories=0) for seed in (1, 1, 2))
    assert one.cells == again.cells != other.cells and len(one.cells) == 3


def test_all_and_bottom() -> None:
    assert len(find_path(EVIDENCE, domain="domain0", rule="all", trajectories=0).cells) == 23
    top, bottom = (chosen_cells(EVIDENCE, 0, rule, budget=0.2) for rule in ("target-load", "bottom"))
    assert EVIDENCE.usage[0][bottom].max() <= EVIDENCE.usage[0][top].min()


@pytest.mark.parametrize("rule", ["gradient", "gradient-contrast", "gradient-layer", "causal"])
def test_rules_on_tables_of_the_model_by_hand(rule: Rule) -> None:
    random = np.random.default_rng(2)
    table = random.gamma(1, 1, EVIDENCE.hits.shape)
    evidence = replace(EVIDENCE, gradients=table, effects=table)
    found = score_cells(evidence, 1, rule)
    for layer, width in enumerate(RECORDING.experts):
        for expert in range(width):
            own, rest = table[1, layer, expert], (table[0, layer, expert] + table[2, layer, expert]) / 2
            if rule == "gradient-layer":
                parts = [table[d, layer, expert] / sum(table[d, layer]) for d in range(3)]
                own, rest = parts[1], (parts[0] + parts[2]) / 2
            assert found[layer, expert] == pytest.approx(own if rule == "gradient" else own - rest)


def test_every_rule_is_known() -> None:
    tables = np.random.default_rng(3).gamma(1, 1, EVIDENCE.hits.shape)
    evidence = replace(EVIDENCE, gradients=tables, effects=tables)
    for rule in RULES:
        path = find_path(evidence, domain="domain2", rule=rule, budget=0.2, match="target-load", resamples=2)
        assert path.rule == rule and path.cells and 0 < path.coverage <= 1 + 1e-12  # pyright: ignore[reportOptionalOperand]
