"""What the experiment on several checkpoints says: the checkpoint is the unit, so that its interval is over checkpoints.

    python reports/intervention/checkpoints.py DIR       # after reports/intervention/checkpoints.sh DIR

For every target and arm: the logarithm of its gain over that of full finetuning stopped early at equal forgetting, on each checkpoint; the
mean of these with a 95 % interval by Student's t over checkpoints, as a factor; and which trajectory of full finetuning was best where the
arm was compared: where that is the slowest, a finer grid could be better still.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from dbes.reporting.arms import FULL, SLOWER


def best_full(arms: list[dict[str, Any]], forgetting: float) -> str:
    """The trajectory of full finetuning that gained most until it forgot so much, by its mean curve."""
    gains = {}
    for arm in arms:
        if arm["arm"] in (FULL, *SLOWER):
            lost, gained = zip(*sorted((point["forgetting"], point["gain"]) for point in arm["curve"]), strict=True)
            gains[arm["arm"]] = float(np.interp(forgetting, lost, gained))
    return max(gains, key=lambda name: gains[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    outcomes = sorted(parser.parse_args().folder.glob("outcome*/intervention.json"))
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    bests: dict[tuple[str, str], list[str]] = defaultdict(list)
    gains: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for path in outcomes:
        outcome = json.loads(path.read_text("utf-8"))
        for each in outcome["skipped"]:
            print(f"{path.parent.name}: {each['target']}, {each['arm']}: {each['reason'].split(';')[0]}")
        for target, found in outcome["targets"].items():
            for arm in found["arms"]:
                matched = arm.get("matched")
                if matched is None:
                    continue
                key = target, arm["arm"]
                bests[key].append(best_full(found["arms"], matched["forgetting"]))
                gains[key].append((matched["gain"]["value"], matched["full"]["value"]))
                if matched["ratio"] is not None:
                    ratios[key].append(float(np.log(matched["ratio"]["value"])))
    for key, logs in ratios.items():
        target, arm = key
        each = np.asarray(logs)
        reach = t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
        low, middle, high = np.exp([each.mean() - reach, each.mean(), each.mean() + reach])
        told = ", ".join(f"{gain:.3f} / {full:.3f} ({best})" for (gain, full), best in zip(gains[key], bests[key], strict=True))
        print(
            f"{target}, {arm}: {middle:.2f} [{low:.2f}, {high:.2f}] times over {len(each)} checkpoints "
            f"({', '.join(f'{np.exp(log):.2f}' for log in each)}); gain of the arm / of full finetuning: {told}"
        )


if __name__ == "__main__":
    main()
