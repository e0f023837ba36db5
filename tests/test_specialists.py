"""The specialist test: planted specialists are found, and on pure noise there is none beyond the false-discovery rate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
import simulate
from scipy import stats

from dbes.scoring import specialists
from dbes.scoring.counting import count_routes
from dbes.scoring.counts import Counts, LayerCounts
from dbes.scoring.descriptive import random_halves
from dbes.scoring.score import score
from dbes.scoring.specialists import LIFTS, RARE_HITS, SpecialistTable, find_specialists, half_labels, layer_specialists
from dbes.scoring.tables import read_usage


def examined(statistics: LayerCounts, *, permutations: int = 200, seed: int = 0) -> SpecialistTable:
    return find_specialists(Counts.of(statistics), permutations=permutations, seed=seed)


def noise(seed: int, *, documents: int = 20, domains: int = 4, layers: int = 2, experts: int = 32) -> LayerCounts:
    """Documents of a router that does specialize, under shuffled labels: every discovery is false."""
    about = simulate.population(11, domains=domains, layers=layers, experts=experts, top_k=4, effect=0.5)
    random = np.random.default_rng((seed, 3))
    return simulate.shuffled(simulate.draw_statistics(about, random, documents=documents, tokens=80), random)


def unequal(about: simulate.Population, random: np.random.Generator, *, documents: int, tokens: tuple[float, ...]) -> LayerCounts:
    """Documents of exactly ``tokens`` [domains] tokens each."""
    domains, layers, experts = about.shape
    domain = np.repeat(np.arange(domains), documents)
    size = np.asarray(tokens, int)[domain]
    hits = random.multinomial(size[:, None, None], simulate.document_usage(about, domain, random)).reshape(len(domain), layers, experts)
    return simulate.of_hits(hits, size, domain, domains=domains, top_k=about.top_k)


PLANTED = ((0, 0, 3), (1, 1, 9), (2, 0, 17))


def planted(seed: int, *, lift: float = 3.0, documents: int = 30) -> LayerCounts:
    """Noise, but for three experts that one domain uses ``lift`` times as much as the mixture does (domain, layer, expert)."""
    about = simulate.population(11, domains=8, layers=2, experts=32, top_k=4, effect=0.0, skew=0.2)
    usage = about.usage.copy()
    for domain, layer, expert in PLANTED:
        group = slice(expert // 8 * 8, expert // 8 * 8 + 8)
        own = usage[domain, layer, expert]
        raised = own * 7 * lift / (8 - lift)  # p / mean(p, 7 x own) = lift
        usage[domain, layer, group] *= (0.25 - raised) / (0.25 - own)
        usage[domain, layer, expert] = raised
    return simulate.draw_statistics(
        replace(about, usage=usage, concentration=40.0), np.random.default_rng((seed, 4)), documents=documents, tokens=100
    )


def lift_by_loops(hits: np.ndarray, domain: np.ndarray, at: tuple[int, int]) -> tuple[float, float]:
    """Lift of an expert in a domain and the distance to the ends of its interval, from hits [documents, experts] of one layer."""
    (own, expert), domains = at, int(domain.max()) + 1
    shares, spreads, counts = [], [], []
    for each in range(domains):
        members = hits[domain == each]
        slots, count = members.sum(axis=1), len(members)
        shares.append(float(members[:, expert].sum() / slots.sum()))
        residual = math.fsum((members[i, expert] - shares[-1] * slots[i]) ** 2 for i in range(count))
        spreads.append(count / (count - 1) * residual / float(slots.sum()) ** 2)
        counts.append(count)
    bar = sum(shares) / domains
    if not bar:
        return math.nan, math.nan
    lift = shares[own] / bar
    parts = [((1 - lift / domains) ** 2 if each == own else (lift / domains) ** 2) * spreads[each] for each in range(domains)]
    if not sum(parts):
        return lift, 0.0
    degrees = sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return lift, float(stats.t.ppf(0.975, degrees)) * math.sqrt(sum(parts)) / bar


def test_table_by_plain_loops() -> None:
    recording = naive.random_recording(4, documents=(14, 13, 14), length=(20, 30), effect=1.2)
    statistics = count_routes(recording.trace()).whole()
    table = examined(statistics, permutations=300)
    p, sums, hits = naive.profile(recording), naive.of_domain(recording, naive.hits(recording)), np.array(naive.hits(recording))
    half = random_halves(recording.domain, seed=0)
    labels = half_labels(recording.domain, half, permutations=300, seed=0)
    tests = [layer_specialists(sums, half, labels) for sums in Counts.of(statistics).layers()]
    cut = max(float(each) for each in table.p[table.q <= 0.05])
    several = set()
    for domain, layer, expert in np.ndindex(table.p.shape):
        at = (domain, layer, expert)
        bar = naive.mixture([rows[layer] for rows in p])
        slots = [math.fsum(sums[each][layer]) for each in range(3)]
        assert table.hits[at] == sums[domain][layer][expert]
        assert table.share[at] == pytest.approx(p[domain][layer][expert], abs=1e-12)
        others = 4 / sum(1 / slots[each] for each in range(3) if each != domain)
        assert table.unknown[at] == (bar[expert] * min(slots[domain], others) < RARE_HITS)
        sides = [lift_by_loops(hits[half == side, layer], recording.domain[half == side], (domain, expert)) for side in (0, 1)]
        each_p = [float(tests[layer].halves[side].p[domain, 0, expert]) for side in (0, 1)]
        if table.unknown[at]:
            assert math.isnan(table.p[at]) and not table.specialist[at]
            continue
        assert table.p[at] == pytest.approx(min(1, 2 * min(each_p)))
        chose = [2 * each <= cut for each in each_p]
        several.add(tuple(chose))
        asked = [side for side in (0, 1) if chose[1 - side]] or [0, 1]
        lift, error = (sum(sides[side][index] for side in asked) / len(asked) for index in (0, 1))
        found = (table.lift[at], table.lift_low[at], table.lift_high[at])
        assert found == pytest.approx((lift, max(lift - error, 0), lift + error))
        assert table.replicated[at] == (sides[0][0] > 1 and sides[1][0] > 1)
        assert table.specialist[at] == (table.q[at] <= 0.05 and bool(table.replicated[at]) and lift >= 1.5)
        assert table.at_least(1.0)[at] == (table.q[at] <= 0.05 and bool(table.replicated[at]))
    assert {(True, True), (False, False)} < several, "some cell is chosen by one half only"
    made = ~np.isnan(table.p)
    np.testing.assert_allclose(table.q[made], stats.false_discovery_control(table.p[made]))


def test_labels_are_permuted_inside_each_half() -> None:
    domain = np.repeat([0, 1, 2], [5, 4, 6])
    half = random_halves(domain, seed=2)
    labels = half_labels(domain, half, permutations=40, seed=3)
    own = domain + 3 * half
    for side in (0, 1):
        assert (np.sort(labels[:, half == side], axis=1) == np.sort(own[half == side])).all()
        assert len(np.unique(labels[:, half == side], axis=0)) > 20


def test_a_domain_is_compared_with_others_only_where_they_have_tokens_enough() -> None:
    """Two domains of 20 texts each: 3 tokens a text leave the other domain nothing to be compared with, however long its texts are."""
    about = simulate.population(0, domains=2, layers=1, experts=32, top_k=4, effect=0.0)
    table = examined(unequal(about, np.random.default_rng(0), documents=20, tokens=(3, 3000)))
    assert table.unknown[1].mean() > 0.5 and (table.unknown[0] == table.unknown[1]).all()


def test_rare_and_dead_experts_are_unknown_not_specialists() -> None:
    hits = np.zeros((8, 1, 4), np.float32)
    hits[:, 0, 0] = 100
    hits[:4, 0, 1] = 2  # never in the other domain, but too rare to tell
    statistics = simulate.of_hits(hits, hits.sum(axis=(1, 2)).astype(int), np.repeat([0, 1], 4), domains=2, top_k=1)
    table = examined(statistics, permutations=50)
    assert table.unknown[0, 0].tolist() == [False, True, True, True]
    assert not table.specialist.any()
    assert np.isnan(table.p[:, 0, 1:]).all()


def test_experts_that_a_narrow_layer_does_not_have_are_neither_tested_nor_unknown() -> None:
    recording = naive.random_recording(3, documents=(5, 5), experts=(4, 9), layers=2, length=(120, 150), skew=0.3)
    table = examined(count_routes(recording.trace()).whole())
    assert not table.unknown[:, 0, 4:].any() and np.isnan(table.p[:, 0, 4:]).all()
    assert np.isfinite(table.p[:, 0, :4]).all()


def test_one_document_in_a_domain_cannot_be_tested() -> None:
    recording = naive.random_recording(8, documents=(6, 1), length=(60, 80), effect=2.0)
    table = examined(count_routes(recording.trace()).whole())
    assert np.isnan(table.p).all() and not table.specialist.any()


def test_a_direction_that_one_half_contradicts_is_not_replicated() -> None:
    hits = np.full((8, 1, 2), 50, np.float32)
    half = random_halves(np.repeat([0, 1], 4), seed=0)
    first = (np.arange(8) < 4) & (half == 0)
    hits[first, 0, 0] += 40
    hits[(np.arange(8) < 4) & (half == 1), 0, 0] -= 5
    statistics = simulate.of_hits(hits, hits.sum(axis=(1, 2)).astype(int), np.repeat([0, 1], 4), domains=2, top_k=1)
    table = examined(statistics)
    assert table.lift[0, 0, 0] > 1 and not table.replicated[0, 0, 0] and not table.specialist.any()


def runs_with_discovery(runs: int, **size: int) -> int:
    """Runs on pure noise in which at least one specialist was named, of the significant with lift above 1."""
    return sum(bool(examined(noise(run, **size), seed=run).specialist.any()) for run in range(runs))


def test_noise_has_no_specialists_beyond_the_rate() -> None:
    runs = 60
    assert runs_with_discovery(runs) <= stats.binom.ppf(0.999, runs, 0.05)


def test_planted_specialists_are_found_and_others_are_not() -> None:
    found, false, runs = 0, 0, 12
    for run in range(runs):
        table = examined(planted(run), seed=run)
        names = {tuple(map(int, at)) for at in np.argwhere(table.specialist)}
        found += len(names & set(PLANTED))
        # Raising one expert lowers its group elsewhere only in the domain itself, so other domains gain a little there: real lifts.
        false += sum((layer, expert // 8) not in {(at[1], at[2] // 8) for at in PLANTED} for _, layer, expert in names)
        for at in PLANTED:
            assert table.lift_low[at] > 1
    assert found >= 0.9 * runs * len(PLANTED)
    assert false <= stats.binom.ppf(0.999, runs * len(PLANTED), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [20, 80])
def test_noise_has_no_specialists_beyond_the_rate_in_400_runs(documents: int) -> None:
    runs = 400
    assert runs_with_discovery(runs, documents=documents, experts=64) <= stats.binom.ppf(0.999, runs, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("documents", "tokens"),
    [(20, (3, 150)), (40, (3, 150)), (80, (3, 150)), (40, (3, 3000)), (20, (15, 150)), (20, (3, *(150,) * 7)), (40, (30, 300, 30, 300))],
)
def test_unequal_lengths_make_no_specialists(documents: int, tokens: tuple[float, ...]) -> None:
    runs = 400
    about = simulate.population(11, domains=len(tokens), layers=2, experts=32, top_k=4, effect=0.0)
    tables = [
        examined(unequal(about, np.random.default_rng((run, 6)), documents=documents, tokens=tokens), seed=run) for run in range(runs)
    ]
    for lift in LIFTS[:2]:
        assert sum(bool(table.at_least(lift).any()) for table in tables) <= stats.binom.ppf(0.999, runs, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effect", "concentration", "documents", "tokens"),
    [
        (0.3, 12, 20, (100,) * 4), (0.8, 12, 20, (100,) * 4), (1.5, 12, 20, (100,) * 4), (0.2, 12, 80, (100,) * 4),
        (0.8, 12, 20, (15, 30, 100, 300)), (0.5, 12, 40, (10, 150)), (0.8, 12, 80, (3, 150)), (0.4, 3, 40, (100,) * 4),
    ],
)  # fmt: skip
def test_lift_intervals_of_chosen_cells_hold_the_true_lift(
    effect: float, concentration: float, documents: int, tokens: tuple[float, ...]
) -> None:
    """Winner's curse: intervals from all documents hold it in half of the chosen cells. Ends that are averaged hold it rather too often."""
    runs, held = 400, {1.0: [], 1.5: []}
    for run in range(runs):
        about = simulate.population(run, domains=len(tokens), layers=1, experts=32, top_k=4, effect=effect, concentration=concentration)
        true = about.usage / about.usage.mean(axis=0)
        table = examined(unequal(about, np.random.default_rng((run, 5)), documents=documents, tokens=tokens), seed=run)
        for lift, found in held.items():
            found += ((table.lift_low <= true) & (true <= table.lift_high))[table.at_least(lift)].tolist()
    for found in held.values():
        assert len(found) > 100
        assert 0.90 - 2 * math.sqrt(0.09 / len(found)) <= np.mean(found) <= 0.995


def test_a_result_lists_the_strongest_specialists_of_every_domain_and_counts_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    about = simulate.population(11, domains=4, layers=2, experts=32, top_k=4, effect=1.2)
    trace = simulate.draw_trace(about, np.random.default_rng(0), documents=12, tokens=120)
    every = score(trace, permutations=60, output_path=tmp_path / "every")
    assert every.companions["specialists"]["not_listed"] == 0
    monkeypatch.setattr(specialists, "LISTED_SPECIALISTS", 9)
    few = score(trace, permutations=60, output_path=tmp_path / "few")
    found = few.companions["specialists"]
    assert len(few.specialists) == 9 and found["specialists"] == len(every.specialists)
    assert found["not_listed"] == len(every.specialists) - 9
    by_domain = {name: [each for each in every.specialists if each.domain == name] for name in trace.shape.domains}
    assert min(map(len, by_domain.values())) >= 3
    for name, strongest in by_domain.items():
        listed = [each for each in few.specialists if each.domain == name]
        assert 2 <= len(listed) <= 3 and listed == strongest[: len(listed)]
    assert [each.lift for each in few.specialists] == sorted((each.lift for each in few.specialists), reverse=True)
    tables = [read_usage(tmp_path / name, result) for name, result in (("every", every), ("few", few))]
    assert tables[0] is not None and tables[1] is not None
    assert tables[0].equals(tables[1]) and tables[1]["specialist"].sum() == len(every.specialists)
