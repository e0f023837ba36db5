"""The analysis on simulated experiments: equal arms show no advantage, planted ones are found, intervals hold the truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from intervention_records import BYTES, OTHERS, experiment
from scipy import stats

from dbes.intervention.analysis import analyse
from dbes.intervention.outcomes import Curves, Measured, best_within, curves_of, figure, log_ratio, matched, pareto, strata_of
from dbes.scoring.resampling import jackknife

EQUAL = {
    "specialization": (0.2, 0.05),
    "lift": (0.2, 0.05),
    "target-load": (0.2, 0.05),
    "random-load-matched": (0.2, 0.05),
    "full": (0.4, 0.1),
}


def outcome(truth: dict[str, tuple[float, float]], seed: int) -> dict:
    found = analyse(*experiment(truth, np.random.default_rng(seed)))
    json.dumps(found, allow_nan=False)
    return found["targets"]["a"]


def arm(found: dict, name: str) -> dict:
    return next(row for row in found["arms"] if row["arm"] == name)


def test_equal_arms_show_no_advantage() -> None:
    runs = 40
    verdicts = [outcome(EQUAL, seed)["verdict"] for seed in range(runs)]
    allowed = stats.binom.ppf(0.999, runs, 0.05)
    for key in ("beats_target_load", "beats_random_load_matched", "beats_full"):
        assert sum(bool(verdict[key]) for verdict in verdicts) <= allowed, key
    plain = next(verdict for verdict in verdicts if not any(verdict[key] for key in ("beats_target_load", "beats_full")))
    assert "no advantage over target load" in plain["text"] and "no path gains more than full" in plain["text"]


def test_a_planted_gain_is_found_and_nothing_else() -> None:
    truth = {**EQUAL, "specialization": (0.3, 0.05)}
    for seed in range(10):
        found = outcome(truth, seed)
        verdict = found["verdict"]
        assert verdict["beats_target_load"] == verdict["beats_random_load_matched"] == verdict["beats_full"] == ["specialization at 15%"]
        assert verdict["beats_full_clearly"] == ["specialization at 15%"], "1.5 times what full finetuning gains"
        assert arm(found, "specialization")["matched"]["ratio"]["value"] == pytest.approx(1.5, rel=0.1)
        row = next(r for r in found["contrasts"] if r["arm"] == "specialization" and r["control"] == "target-load")
        assert row["matched"]["value"] == pytest.approx(0.1, abs=0.03) and row["matched_holm"] <= 0.05


def test_more_gain_for_more_forgetting_is_no_advantage() -> None:
    truth = {**EQUAL, "specialization": (0.3, 0.075), "lift": (0.1, 0.025)}
    found = [outcome(truth, seed) for seed in range(10)]
    assert sum(bool(one["verdict"]["beats_target_load"]) for one in found) <= 2
    row = next(r for r in found[0]["contrasts"] if r["arm"] == "specialization" and r["control"] == "target-load")
    assert row["gain"]["low"] > 0.05 and abs(row["matched"]["value"]) < 0.03


def test_protection_is_compared_with_the_same_cells_and_protected_arms_with_protected_controls() -> None:
    """All protected arms alike forget a fifth: what wins is protection, not a rule."""
    truth = {**EQUAL, **{f"{rule}-protected": (0.2, 0.01) for rule in ("specialization", "target-load", "random-load-matched")}}
    truth["full-protected"] = (0.4, 0.02)
    allowed = stats.binom.ppf(0.999, 20, 0.05)
    wins, gained, ratios = 0, [], []
    for seed in range(20):
        found = outcome(truth, seed)
        pairs = {(row["arm"], row["control"]) for row in found["contrasts"]}
        assert ("specialization-protected", "target-load-protected") in pairs
        assert all(arm.endswith("-protected") == control.endswith("-protected") for arm, control in pairs)
        wins += bool(found["verdict"]["beats_target_load"])
        twins = {row["arm"]: row for row in found["protection"]}
        assert set(twins) == {name for name in truth if name.endswith("-protected")}
        assert all(row["control"] == name.removesuffix("-protected") and row["matched_holm"] <= 0.05 for name, row in twins.items())
        gained.append(twins["specialization-protected"]["matched"]["value"])
        assert found["verdict"]["beats_full_clearly"] == ["specialization-protected at 15%", "target-load-protected at 15%"]
        ratios.append(arm(found, "full-protected")["matched"]["ratio"]["value"])
        whole = analyse(*experiment(truth, np.random.default_rng(seed)))["verdict"]
        assert "on 1 of 1 target, 0 of them without protection; protected paths keep the domains whose text they had." in whole
    assert wins <= allowed
    assert np.median(gained) == pytest.approx(0.16, abs=0.02), "0.2 against 0.04, which the same cells gain at a forgetting of 0.01"
    assert np.median(ratios) == pytest.approx(5, rel=0.15)


def with_cells(seed: int, cells: dict[str, list[tuple[int, int]]], **change: dict) -> dict:
    """The outcome of equal arms that trained these cells; arms of the same cells have the same records."""
    about, records, masks = experiment(EQUAL, np.random.default_rng(seed))
    by_cells: dict = {}
    told = []
    for arm, record in records:
        arm = arm.model_copy(update={"cells": tuple(cells.get(arm.name, ())), **change.get(arm.name, {})})
        told.append((arm, by_cells.setdefault((arm.cells or arm.name, arm.seed), record)))
    return analyse(about, told, masks)


def test_arms_of_the_same_cells_are_no_contrast_and_no_test() -> None:
    other = {"lift": [(0, 0), (1, 4)], "random-load-matched": [(1, 6), (1, 7)]}
    found = with_cells(0, {"specialization": [(0, 0), (0, 1)], "target-load": [(0, 0), (0, 1)], **other})
    target = found["targets"]["a"]
    rows = {row["arm"]: row for row in target["contrasts"] if row["control"] == "target-load"}
    same, tested = rows["specialization"], rows["lift"]
    assert same["same_cells"] and same["overlap"] == 1.0 and "matched_holm" not in same and "gain_holm" not in same
    assert same["matched"] == same["gain"] == {"value": None, "low": None, "high": None, "p": None}
    assert not tested["same_cells"] and tested["overlap"] == pytest.approx(1 / 3, abs=1e-5)
    assert tested["matched_holm"] == pytest.approx(tested["matched"]["p"], rel=1e-4), "one test only: nothing to correct"
    assert "(same cells, no contrast: specialization at 15%)" in target["verdict"]["text"]
    only = with_cells(0, {name: [(0, 0), (0, 1)] for name in ("specialization", "lift", "target-load")})
    told = only["targets"]["a"]["verdict"]["text"]
    assert "same cells as target load, no contrast: specialization at 15%, lift at 15%" in told
    assert "no advantage over target load" not in told
    assert only["verdict"].startswith("No rule chose other cells than target load: no contrast;")


def test_the_same_cells_trained_in_another_way_are_a_contrast() -> None:
    cells = {name: [(0, 0), (0, 1)] for name in ("specialization", "lift", "target-load")}
    found = with_cells(0, cells, lift={"rank": 4}, specialization={"layer_rates": ((0, 2.0),)})
    rows = [row for row in found["targets"]["a"]["contrasts"] if row["control"] == "target-load"]
    assert [(row["overlap"], row["same_cells"]) for row in rows] == [(1.0, False)] * 2
    assert "no advantage over target load (arms share 100% of their cells with it)" in found["targets"]["a"]["verdict"]["text"]


def test_without_target_load_nothing_is_said_of_it() -> None:
    truth = {name: effect for name, effect in EQUAL.items() if name != "target-load"}
    assert analyse(*experiment(truth, np.random.default_rng(0)))["verdict"].startswith("Nothing was compared with target load;")


def test_counts_keep_every_digit() -> None:
    about, records, masks = experiment(EQUAL, np.random.default_rng(0))
    records = [(arm, {**record, "trainable_parameters": 3_942_528, "optimizer_bytes": 123_456_789_012}) for arm, record in records]
    row = arm(analyse(about, records, masks)["targets"]["a"], "lift")
    assert row["trainable_parameters"] == 3_942_528 and row["optimizer_bytes"] == 123_456_789_012


def test_an_arm_that_hardly_trains_is_not_better_for_forgetting_nothing() -> None:
    found = outcome({**EQUAL, "specialization": (0.02, -0.01)}, 0)
    row = next(r for r in found["contrasts"] if r["arm"] == "specialization" and r["control"] == "target-load")
    assert row["matched"]["low"] > 0 and row["matched_holm"] <= 0.05 and row["gained"] < 0.5 * row["control_gain"]
    assert found["verdict"]["beats_target_load"] == []


def test_intervals_of_gain_hold_the_truth() -> None:
    held, runs = 0, 50
    for seed in range(runs):
        gain = arm(outcome({"specialization": (0.2, 0.05), "full": (0.4, 0.1)}, seed), "specialization")["gain"]
        held += gain["low"] <= 0.2 <= gain["high"]
    assert held >= stats.binom.ppf(0.001, runs, 0.95)


def test_gain_by_hand() -> None:
    """Two seeds, two documents of the target, one other domain of one document."""
    base = {"a": np.array([300.0, 500.0]), "b": np.array([400.0])}
    nats = {"a": np.array([[[290.0, 480.0]], [[280.0, 490.0]]]), "b": np.array([[[404.0]], [[408.0]]])}
    sizes = {"a": np.array([100.0, 200.0]), "b": np.array([100.0])}
    measured = Measured(nats=nats, seconds=np.array([[1.0], [2.0]]))
    curves = curves_of(measured, "a", ["b"], base=base, sizes=sizes)
    strata = strata_of(2, 2, 1)
    assert strata.tolist() == [-1, 0, 0, 1, 1]
    nat = math.log(2)
    whole = (10 + 20 + 20 + 10) / 2 / 300 / nat
    gains = [whole, 30 / 300 / nat, 30 / 300 / nat, 15 / 200 / nat, 15 / 100 / nat]
    np.testing.assert_allclose(curves.gain[:, 1], gains)
    np.testing.assert_allclose(curves.forgetting[:, 1], [6 / 100 / nat, 8 / 100 / nat, 4 / 100 / nat, 6 / 100 / nat, 6 / 100 / nat])
    assert (curves.gain[:, 0] == 0).all() and (curves.worst == curves.forgetting).all()


def test_worst_is_the_domain_that_forgets_most() -> None:
    about, records, _ = experiment({"lift": (0.2, 0.05)}, np.random.default_rng(0), seeds=2)
    for _, record in records:
        for point in record["curve"]:
            point["nats"]["c"] = [value + 0.5 * BYTES * math.log(2) for value in point["nats"]["c"]]
    about["settings"]["seeds"] = 2
    found = arm(analyse(about, records, [])["targets"]["a"], "lift")
    assert found["worst_forgetting"]["value"] == pytest.approx(0.55, abs=0.1)
    assert found["forgetting"]["value"] == pytest.approx(0.05 + 0.5 / len(OTHERS), abs=0.05)


def test_variance_is_the_stratified_jackknife() -> None:
    random = np.random.default_rng(1)
    strata = strata_of(5, 1, 7)
    replicates = random.normal(1.0, 0.1, len(strata))
    error = jackknife(replicates[0], replicates[1:], strata[1:]).error
    found = figure(replicates, strata)
    terms = [(n - 1) * np.var(replicates[strata == label]) for label, n in ((0, 5), (2, 7))]
    freedom = sum(terms) ** 2 / (terms[0] ** 2 / 4 + terms[1] ** 2 / 6)
    assert found.high - found.value == pytest.approx(error * stats.t.ppf(0.975, freedom))  # pyright: ignore[reportOptionalOperand]
    assert found.p == pytest.approx(2 * stats.t.sf(found.value / error, freedom))


def test_one_seed_and_one_document_leave_no_interval() -> None:
    found = figure(np.array([0.3]), strata_of(1, 1))
    assert (found.value, found.low, found.high, found.p) == (0.3, None, None, None)


def test_identical_arms_differ_by_exactly_nothing() -> None:
    found = figure(np.zeros(6), strata_of(5))
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)


def line(*points: tuple[float, float]) -> Curves:
    """A trajectory of (forgetting, gain) points after the start."""
    forgetting, gain = (np.array([[0.0, *(point[side] for point in points)]]) for side in (0, 1))
    return Curves(gain=gain, forgetting=forgetting, worst=forgetting)


@pytest.mark.parametrize(
    ("curve", "limit", "expected"),
    [
        pytest.param(line((0.1, 1.0)), 0.05, 0.5, id="half way on the first stretch"),
        pytest.param(line((0.1, 1.0), (0.3, 1.5)), 0.2, 1.25, id="between two points"),
        pytest.param(line((0.1, 1.0)), 0.5, 1.0, id="never beyond the end"),
        pytest.param(line((0.1, 1.0), (0.2, 0.8)), 0.2, 1.0, id="stopped before it gets worse"),
        pytest.param(line((0.1, -0.2), (0.3, 1.0)), 0.05, 0.0, id="not training at all is better"),
        pytest.param(line((-0.1, 0.4), (0.2, 1.0)), 0.0, 0.6, id="forgets less than nothing at first"),
        pytest.param(line((0.2, 0.5), (0.05, 0.9), (0.4, 1.2)), 0.05, 0.9, id="comes back to less forgetting"),
    ],
)
def test_best_within_a_forgetting_by_hand(curve: Curves, limit: float, expected: float) -> None:
    assert best_within(curve, np.array([limit]))[0] == pytest.approx(expected)


def test_matched_compares_where_neither_side_is_extrapolated() -> None:
    short, long, slow = line((0.1, 1.0)), line((0.2, 1.0), (0.4, 1.6)), line((0.05, 0.4), (0.1, 0.7))
    gained, other, level = matched(short, long)
    assert (gained[0], other[0], level[0]) == pytest.approx((1.0, 0.5, 0.1))
    gained, other, level = matched(long, short)
    assert (gained[0], other[0], level[0]) == pytest.approx((0.5, 1.0, 0.1))
    assert matched(short, long, slow)[1][0] == pytest.approx(0.7), "the better of the two is what must be beaten"
    assert matched(line((-0.1, 0.3)), long)[2][0] == 0.0


def test_pareto_by_hand() -> None:
    assert pareto([(1.0, 0.1), (0.5, 0.2), (1.2, 0.2), (1.0, 0.1), (0.1, 0.0)]) == [True, False, True, True, True]


def test_a_ratio_with_nothing_is_not_given() -> None:
    strata = strata_of(3)
    assert log_ratio(np.array([1.0, 1, 1, 1]), np.array([0.0, 1, 1, 1]), strata) is None
    found = log_ratio(np.array([2.0, 2.1, 1.9, 2.0]), np.array([1.0, 1.0, 1.0, 1.0]), strata)
    assert found is not None and found.value == pytest.approx(2.0) and found.low is not None and found.low > 1


def test_full_finetuning_stopped_at_equal_compute_is_read_off_its_trajectory() -> None:
    found = arm(outcome(EQUAL, 0), "specialization")["equal_compute"]
    full = {point["step"]: point for point in arm(outcome(EQUAL, 0), "full")["curve"]}
    assert found["seconds"] == pytest.approx(4.0) and found["gain"] == pytest.approx(full[20]["gain"], abs=1e-4)


def test_arms_that_miss_a_seed_wait_and_failed_runs_are_named() -> None:
    about, records, _ = experiment(EQUAL, np.random.default_rng(0))
    kept = [(a, r) for a, r in records if (a.name, a.seed) != ("lift", 3)]
    kept = [(a, {**r, "status": "failed", "error": "the loss is NaN or infinite at step 3"} if a.name == "full" else r) for a, r in kept]
    found = analyse(about, kept, [])["targets"]["a"]
    assert {row["arm"] for row in found["arms"]} == {"specialization", "target-load", "random-load-matched"}
    assert len(found["failed"]) == 5 and "matched" not in arm(found, "specialization")


def masked(seed: int, *, inside: float) -> dict:
    """Cells whose mask adds ``inside`` bits per byte in the domain and 0.1 elsewhere; six controls that add 0.1 everywhere."""
    random = np.random.default_rng(seed)
    about, _, _ = experiment({"full": (0.4, 0.1)}, random, seeds=1)
    bits = BYTES * math.log(2)

    def nats(inside: float) -> dict[str, list[float]]:
        effect = {name: inside if name == "a" else 0.1 for name in about["base"]}
        return {n: [v + bits * random.normal(effect[n], 0.02) for v in values] for n, values in about["base"].items()}

    job = {"target": "a", "rule": "lift", "budget": 0.15, "cells": [[0, 1]], "controls": [[[0, 2], [0, 3]]] * 6}
    return analyse(about, [], [{"job": job, "nats": nats(inside), "controls": [nats(0.1) for _ in range(6)]}])["masks"][0]


def test_masks_tell_drivers_from_bystanders() -> None:
    found = masked(0, inside=0.3)
    assert found["inside"]["value"] == pytest.approx(0.3, abs=0.03) and found["control_cells"] == 2
    assert found["control_inside"]["value"] == pytest.approx(0.1, abs=0.03) and found["outside"]["value"] == pytest.approx(0.1, abs=0.03)
    assert found["difference"]["low"] > 0.15
    held = [found["difference"]["low"] <= 0 <= found["difference"]["high"] for found in (masked(seed, inside=0.1) for seed in range(40))]
    assert sum(held) >= stats.binom.ppf(0.001, 40, 0.95)
