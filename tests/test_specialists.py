"""The specialist test: planted specialists are found, and on pure noise there is none beyond the false-discovery rate."""

from __future__ import annotations

import math
from dataclasses import replace

import naive
import numpy as np
import pytest
import simulate
from scipy import stats

from dbes.scoring.counting import count_routes
from dbes.scoring.counts import Counts, LayerCounts
from dbes.scoring.descriptive import random_halves
from dbes.scoring.resampling import clustered_usage
from dbes.scoring.specialists import RARE_HITS, SpecialistTable, find_specialists, lift_interval


def examined(statistics: LayerCounts, *, permutations: int = 60, seed: int = 0) -> SpecialistTable:
    return find_specialists(Counts.of(statistics), permutations=permutations, seed=seed)


def noise(seed: int, *, documents: int = 20, domains: int = 4, layers: int = 2, experts: int = 32) -> LayerCounts:
    """Documents of a router that does specialize, under shuffled labels: every discovery is false."""
    about = simulate.population(11, domains=domains, layers=layers, experts=experts, top_k=4, effect=0.5)
    random = np.random.default_rng((seed, 3))
    return simulate.shuffled(simulate.draw_statistics(about, random, documents=documents, tokens=80), random)


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


def test_table_by_plain_loops() -> None:
    recording = naive.random_recording(4, documents=(6, 5, 6), length=(40, 60), effect=1.2)
    statistics = count_routes(recording.trace()).whole()
    table = examined(statistics)
    p, sums, hits = naive.profile(recording), naive.of_domain(recording, naive.hits(recording)), np.array(naive.hits(recording))
    half = random_halves(recording.domain, seed=0)
    for domain in range(3):
        for layer in range(3):
            bar = naive.mixture([rows[layer] for rows in p])
            slots = math.fsum(sums[domain][layer])
            for expert in range(8):
                at = (domain, layer, expert)
                assert table.hits[at] == sums[domain][layer][expert]
                assert table.share[at] == pytest.approx(p[domain][layer][expert], abs=1e-12)
                lift = p[domain][layer][expert] / bar[expert] if bar[expert] else math.nan
                assert table.lift[at] == pytest.approx(lift, abs=1e-12, nan_ok=True)
                assert table.unknown[at] == (bar[expert] * slots < RARE_HITS)
                sides = []
                for side in (0, 1):
                    shares = []
                    for other in range(3):
                        rows = hits[(recording.domain == other) & (half == side), layer].sum(axis=0)
                        shares.append(rows[expert] / rows.sum())
                    sides.append(shares[domain] > sum(shares) / 3)
                assert table.replicated[at] == all(sides)
    made = ~np.isnan(table.p)
    np.testing.assert_allclose(table.q[made], stats.false_discovery_control(table.p[made]))
    np.testing.assert_array_equal(made, ~table.unknown)
    expected = (np.nan_to_num(table.q, nan=1) <= 0.05) & (np.nan_to_num(table.lift) > 1) & table.replicated & ~table.unknown
    np.testing.assert_array_equal(table.specialist, expected)


def test_lift_interval_by_plain_loops() -> None:
    recording = naive.random_recording(5, documents=(6, 5, 6), length=(40, 60))
    statistics = count_routes(recording.trace()).whole()
    low, high = lift_interval(*clustered_usage(statistics))
    hits = np.array(naive.hits(recording))
    for layer in range(3):
        shares, spreads = np.zeros((3, 8)), np.zeros((3, 8))
        for domain in range(3):
            members = hits[recording.domain == domain, layer]
            slots, count = members.sum(axis=1), len(members)
            shares[domain] = members.sum(axis=0) / slots.sum()
            for expert in range(8):
                residual = math.fsum((members[i, expert] - shares[domain, expert] * slots[i]) ** 2 for i in range(count))
                spreads[domain, expert] = count / (count - 1) * residual / slots.sum() ** 2
        bar = shares.mean(axis=0)
        for domain in range(3):
            for expert in range(8):
                ratio = shares[domain, expert] / bar[expert]
                rest = spreads[:, expert].sum() - spreads[domain, expert]
                error = math.sqrt((1 - ratio / 3) ** 2 * spreads[domain, expert] + (ratio / 3) ** 2 * rest) / bar[expert]
                assert low[domain, layer, expert] == pytest.approx(max(ratio - 1.96 * error, 0))
                assert high[domain, layer, expert] == pytest.approx(ratio + 1.96 * error)


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
def test_lift_intervals_hold_the_true_lift() -> None:
    about = simulate.population(13, domains=4, layers=1, experts=32, top_k=4, effect=0.4)
    true = about.usage / about.usage.mean(axis=0)
    held = []
    for run in range(400):
        statistics = simulate.draw_statistics(about, np.random.default_rng((run, 5)), documents=40)
        low, high = lift_interval(*clustered_usage(statistics))
        held.append(((low <= true) & (true <= high)).mean())
    assert 0.92 <= np.mean(held) <= 0.98
