"""The model card of a checkpoint trained here, from the facts measured in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dbes.testbed.settings import TrainSettings


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown with the recipe, the exact command, data hashes and measured losses; every number comes from ``training.json``."""
    settings = TrainSettings.model_validate(facts["settings"])
    model, routing, optimizer = settings.model, settings.routing, settings.optimizer
    domains: Mapping[str, Mapping[str, Any]] = facts["domains"]
    first, last = facts["first"], facts["last"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lengths = ", ".join(str(length) for length in settings.mix.lengths)
    entropy = ", ".join(f"{value:.3f}" for value in last["load_entropy"])
    per_domain = facts["tokens"] // len(domains)
    header = "domain | documents | training tokens | held-out documents | bits per byte | nats per token | licences | sha256 of the file"
    rows = "\n".join(_row(name, about) for name, about in domains.items())
    return f"""---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe, routing]
---
# olmoe-embedded: a small Mixture-of-Experts model with trained routing

An OLMoE-architecture causal language model of {facts["parameters"] / 1e6:.2f} M parameters: hidden 128, 4 layers, {model.experts} experts,
top-{model.top_k}, tied embeddings, {model.max_positions} positions, bfloat16 safetensors, and a byte-level BPE of {model.vocabulary:,} ids.
It exists so that routing can be measured offline, in seconds, on a model whose routing was learned and not made up.
It is far too small to answer questions: it continues text of its domains.

It loads in plain transformers: `AutoModelForCausalLM.from_pretrained("benchmark_data/model")`.

## Reproduce

    python -m dbes.testbed.embedded --train-data build/train --out benchmark_data/model --seed {settings.seed}

One CPU thread, {facts["cpu_seconds"]:,} CPU-seconds here; a killed run resumes from its last checkpoint with identical results.
Bit-identical weights need the same versions ({versions}) and the same kind of CPU.
Every setting stands in `training.json`, the log of every tenth step in `training_log.jsonl`.

## Recipe

* Data: {len(domains)} domains with equal weight, every global batch stratified (each domain equally often).
  {settings.mix.tokens_per_step:,} tokens a step, in sequences of one domain each, of {lengths} tokens in turn.
  Documents are cut from their own beginning; remainders are packed with `<|endoftext|>` after each document.
  Hash of all tokens: `{facts["mix_digest"]}`.
* {optimizer.steps:,} steps ({facts["tokens"]:,} tokens) of AdamW, betas {optimizer.beta1} and {optimizer.beta2}, weight decay
  {optimizer.weight_decay} on matrices; learning rate {optimizer.learning_rate} after {optimizer.warmup} steps of warm-up, then a cosine to
  {optimizer.final_share:.0%} of it; gradient norm clipped at {optimizer.clip}.
* Routers: learned, initialised at standard deviation {model.router_std}. Balancing: the auxiliary loss E sum(f P) of **each layer by
  itself** (1 when uniform), summed over layers, coefficient {routing.coefficient}, frequencies f over the whole global batch.
  No z-loss, no dropping, no noise.
* Tokenizer: trained on the training documents only, at most 500,000 bytes of each domain; digits stay single; no token is added to a text.

## Data and measured losses

The training documents are of the same kinds of source as the embedded benchmark's and disjoint from it by source document
(`benchmark_data/training_manifest.json` lists them; `tests/test_testbed_embedded.py` compares).
{facts["heldout_share"]:.0%} of the training-side sources, chosen by hash, were held out of training.
The losses are theirs: documents from their beginning, at most 512 tokens, the weights as saved (bfloat16), computed in float32.

| {header} |
|---|---|---|---|---|---|---|---|
{rows}

Mean over domains: {facts["heldout_bits_per_byte"]:.3f} bits per byte, {facts["heldout_nats_per_token"]:.3f} nats per token
(a uniform guess: {math.log(model.vocabulary):.2f}).
Training loss went from {first["loss"]:.2f} (step {first["step"]}) to {last["loss"]:.2f} (step {last["step"]});
load entropy by layer at the end {entropy} (1 is even).
About {per_domain:,} tokens of each domain were read, so the small domains were read several times and fit their training text better
than their held-out text.

## Licence

The weights and the other files of this folder are under Apache-2.0. No training document is part of it; the licences of the training
documents are listed above by domain (documents of each), the notices they ask for in `benchmark_data/CARD.md`.
"""


def _row(name: str, about: Mapping[str, Any]) -> str:
    licences = ", ".join(f"{licence} ({count:,})" for licence, count in about["licences"].items())
    return (
        f"| {name} | {about['documents']:,} | {about['training_tokens']:,} | {about['heldout_documents']:,} "
        f"| {about['heldout_bits_per_byte']:.3f} | {about['heldout_nats_per_token']:.3f} | {licences} | `{about['sha256']}` |"
    )
