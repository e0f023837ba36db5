#!/usr/bin/env bash
# Build the wheel, install it with its dependencies alone in a new environment, and use it from a folder of its own.
#
#     tests/wheel.sh PYTHON
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "$1")
work=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null || true; wait; rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1
unset PYTHONPATH

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$root"
wheel=$(echo "$work"/dbes-*.whl)
size=$(wc -c < "$wheel")
echo "$(basename "$wheel"): $size bytes"
test "$size" -lt 12000000

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check --constraint "$root/constraints.txt" "$wheel"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/venv/bin/python" - "$root" "$work/venv" << 'END'
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import dbes

root, venv = map(Path, sys.argv[1:])
assert Path(dbes.__file__).is_relative_to(venv), dbes.__file__
assert not [place for place in sys.path if place and Path(place).is_relative_to(root)], sys.path
assert files("dbes").joinpath("py.typed").is_file()
names = {file.name for file in distribution("dbes").files}
assert {"LICENSE", "CARD.md", "smoke.yaml"} <= names, sorted(names)
END

dbes() { echo "dbes $*"; "$work/venv/bin/dbes" "$@"; }
dbes tasks > tasks.txt
grep --quiet smoke tasks.txt && grep --quiet embedded tasks.txt
dbes doctor embedded
# Every arm of the smoke grid and its workers, with one seed and a tenth of the steps.
cat > short_grid.py << 'END'
from dataclasses import replace

from dbes.cli import app
from dbes.testbed import grid
from dbes.testbed.settings import OptimizerSettings

if __name__ == "__main__":
    smoke = grid.preset("smoke")
    short = {"optimizer": OptimizerSettings(steps=8, warmup=1)}
    arms = {name: run.model_copy(update={"settings": run.settings.model_copy(update=short)}) for name, run in smoke.arms.items()}
    grid.preset = lambda _: replace(smoke, seeds=1, arms=arms)
    app(["testbed", "run", "--preset", "smoke", "--out", "testbed"])
END
"$work/venv/bin/python" short_grid.py > testbed.txt 2>&1 &
testbed=$!
dbes evaluate --tasks smoke --output-path results
result=$(dirname "$(find results -name result.json)")
test -s "$result/report.html"
dbes paths "$result" --domain law --out law.json
dbes finetune --paths law.json --data task:law --out tuned --steps 2 --lr 1e-3 --seq-len 64 --tasks smoke --limit 2
test -s tuned/finetune.json
wait $testbed || { cat testbed.txt; exit 1; }
test -s testbed/report/index.html
echo "the wheel works"
