#!/usr/bin/env bash
# The experiment on protected paths on five checkpoints that differ in their seeds (initial weights, data and its order).
#
#     reports/intervention/checkpoints.sh DIR
#
# trains them below DIR and runs `dbes intervene` on each; what is there is not made again. Then
#     python reports/intervention/checkpoints.py DIR
# says what holds over checkpoints. Needs `dbes` on the path.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
for seed in 0 1 2 3 4; do
  if [ ! -f "checkpoint$seed/config.json" ]; then
    sed "s/^seed: 0/seed: $seed/; s/^data_seed: 0/data_seed: $seed/" "$here/checkpoints/global_batch.yaml" > "checkpoint$seed.yaml"
    dbes testbed train --config "checkpoint$seed.yaml" --mix packages --out "checkpoint$seed"
  fi
  dbes intervene --out "outcome$seed" --model "checkpoint$seed" --texts mix:packages --domain python --domain german --domain french \
    --new french --config "$here/checkpoints.yaml" --processes "${PROCESSES:-2}"
done
