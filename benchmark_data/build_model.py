"""Train the embedded checkpoint from a seed, and write its model card from the facts measured in training.

python benchmark_data/build_model.py --train-data build/train --out benchmark_data/model --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from dbes.errors import MixError  # noqa: E402
from dbes.files import sha256_of, write_json, write_text  # noqa: E402
from dbes.testbed.heldout import Heldout, measure  # noqa: E402
from dbes.testbed.mix import Mix, Text, is_heldout, read_texts, tokenize_mix  # noqa: E402
from dbes.testbed.settings import MixSettings, ModelSettings, OptimizerSettings, RoutingSettings, TrainSettings  # noqa: E402
from dbes.testbed.training import LOG, train  # noqa: E402
from dbes.testbed.vocabulary import train_tokenizer  # noqa: E402

DOMAINS = ("math", "science", "medicine", "law", "finance", "code", "software_engineering", "general")
HELDOUT_SHARE = 0.04
"""Share of training-side sources kept out of training, to measure losses on; evaluation documents are other sources still."""

RECIPE = TrainSettings(
    # Half the steps at 128 tokens, the others at 256 and 512, from the beginning: evaluation windows are up to 512 tokens.
    mix=MixSettings(domains=DOMAINS, lengths=(128, 256, 128, 256, 128, 512, 128, 256), order="mixed"),
    model=ModelSettings(size="4m", vocabulary=4096, experts=16, top_k=2, router_std=0.02, max_positions=512),
    routing=RoutingSettings(router="learned", balancing="aux_loss", scope="global_batch", coefficient=0.05),
    optimizer=OptimizerSettings(steps=1600, learning_rate=4e-3, warmup=40, weight_decay=0.1),
)


def train_embedded(train_data: Path, out: Path, *, seed: int = 0, work: Path | None = None, steps: int | None = None) -> Path:
    """Train the embedded checkpoint and write it whole: weights in bfloat16, config, tokenizer, log, facts and model card.

    Args:
        train_data: folder with one ``<domain>.jsonl`` per domain.
        work: where the resumable state lies; by default ``state`` beside the data. A killed run resumes from there.
        steps: fewer steps than the recipe's, for a trial; the card then says so.

    Raises:
        MixError: a domain's file is missing or cannot be read.
        TrainingError: the loss is not finite, or the work folder holds another run.
    """
    work = work or train_data / "state"
    texts = read_training(train_data)
    settings = RECIPE.model_copy(update={"seed": seed, "data_seed": seed})
    if steps is not None:
        settings = settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"steps": steps})})
    training_texts = {
        name: [text for text in of_domain if not is_heldout(text.source, share=HELDOUT_SHARE)] for name, of_domain in texts.items()
    }
    tokenizer = train_tokenizer(training_texts, vocabulary=settings.model.vocabulary, max_positions=settings.model.max_positions)
    mix = tokenize_mix(texts, tokenizer, heldout_share=HELDOUT_SHARE)
    print(f"{sum(len(domain.tokens) for domain in mix.training):,} training tokens of {len(mix.domains)} domains", file=sys.stderr)
    trained = train(settings, mix, folder=work, progress=_say)
    # The losses are those of the weights as saved; computed in float32, which every CPU does fast.
    model = trained.model
    nn.Module.float(nn.Module.bfloat16(model))  # in place
    heldout = measure(model, mix, routing=settings.routing, length=512, documents=10_000)
    out.mkdir(parents=True, exist_ok=True)
    nn.Module.bfloat16(model)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    shutil.copyfile(work / LOG, out / "training_log.jsonl")
    facts = _facts(settings, mix, texts, train_data, heldout, trained.log, trained.cpu_seconds, model.num_parameters())
    write_json(out / "training.json", facts)
    write_text(out / "README.md", model_card(facts))
    return out


def read_training(folder: Path) -> dict[str, list[Text]]:
    """The training texts of every domain."""
    texts = {name: read_texts(folder / f"{name}.jsonl") for name in DOMAINS}
    for name, of_domain in texts.items():
        wrong = {text.domain for text in of_domain} - {name}
        if wrong:
            raise MixError(f"{folder / name}.jsonl: documents of domain {sorted(wrong)} in the file of {name}")
    return texts


def _say(record: Mapping[str, Any]) -> None:
    entropy = np.mean(record["load_entropy"])
    line = f"step {record['step']:5d}  loss {record['loss']:.3f}  load entropy {entropy:.3f}  {record['tokens_per_second']} tokens/s"
    print(line, file=sys.stderr, flush=True)


def _facts(
    settings: TrainSettings,
    mix: Mix,
    texts: Mapping[str, Sequence[Text]],
    train_data: Path,
    heldout: Heldout,
    log: list[dict[str, Any]],
    seconds: float,
    parameters: int,
) -> dict[str, Any]:
    """What the card and the tests want to know, measured; as JSON values."""
    licences = {name: _licences(train_data / f"{name}.jsonl") for name in DOMAINS}
    domains = {}
    for index, name in enumerate(mix.domains):
        domains[name] = {
            "sha256": sha256_of(train_data / f"{name}.jsonl"),
            "documents": len(texts[name]),
            "training_documents": len(mix.training[index]),
            "training_tokens": len(mix.training[index].tokens),
            "heldout_documents": len(mix.heldout[index]),
            "heldout_bits_per_byte": round(float(heldout.bits_per_byte[index]), 4),
            "heldout_nats_per_token": round(float(heldout.nats_per_token[index]), 4),
            "licences": licences[name],
        }
    return {
        "settings": settings.model_dump(mode="json"),
        "identity": settings.identity(mix.digest),
        "mix_digest": mix.digest,
        "domains": domains,
        "heldout_bits_per_byte": round(float(np.mean(heldout.bits_per_byte)), 4),
        "heldout_nats_per_token": round(float(np.mean(heldout.nats_per_token)), 4),
        "tokens": settings.optimizer.steps * settings.mix.tokens_per_step,
        "cpu_seconds": round(seconds),
        "parameters": parameters,
        "heldout_share": HELDOUT_SHARE,
        "first": log[0],
        "last": log[-1],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
        },
    }


def _licences(path: Path) -> dict[str, int]:
    with path.open(encoding="utf-8") as lines:
        return dict(Counter(json.loads(line).get("licence", "") for line in lines).most_common())


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

    python benchmark_data/build_model.py --train-data build/train --out benchmark_data/model --seed {settings.seed}

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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-data", type=Path, required=True, help="folder with one JSONL file per domain")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="folder of the resumable state")
    parser.add_argument("--steps", type=int, default=None, help="fewer steps than the recipe, for a trial")
    given = parser.parse_args(arguments)
    print(train_embedded(given.train_data, given.out, seed=given.seed, work=given.work, steps=given.steps))


if __name__ == "__main__":
    main()
