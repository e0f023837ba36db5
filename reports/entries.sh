#!/usr/bin/env bash
# Makes the results in reports/entries again: trains the testbed's checkpoints, evaluates the models, scores the baselines.
# Usage: reports/entries.sh WORK, with dbes and python of one environment on the PATH. What is in WORK already is not made again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
cd "$1"

for config in "$root"/reports/testbed/checkpoints/*.yaml; do
  name=$(basename "$config" .yaml)
  test -d "$name" || dbes testbed train --config "$config" --mix embedded --out "$name"
done

test -d dbes-embedded-untrained || MODEL="$root/benchmark_data/model" python - <<'PY'
import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

torch.manual_seed(0)
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(os.environ["MODEL"])).save_pretrained("dbes-embedded-untrained")
AutoTokenizer.from_pretrained(os.environ["MODEL"]).save_pretrained("dbes-embedded-untrained")
PY

publish() {  # FOLDER NAME: what an entry consists of
  mkdir -p "$root/reports/entries/$2"
  for file in result.json replicates.safetensors expert_usage.parquet matrices.safetensors; do
    cp "$1/$file" "$root/reports/entries/$2/$file"
  done
}

for model in embedded ./dbes-embedded-untrained ./testbed-*; do
  dbes evaluate --model "$model" --tasks embedded --output-path results
done
for folder in results/*/*/embedded; do
  publish "$folder" "$(basename "$(dirname "$(dirname "$folder")")")"
done

trace=$(echo results/dbes-embedded/*/embedded/trace)
for router in reference uniform collapsed hash; do
  dbes score "$trace" --router "$router" --output-path "baselines/$router"
  publish "baselines/$router" "$router-router"
done
