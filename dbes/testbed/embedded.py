"""The checkpoint that ships with the repository: trained here, from a seed, by one command.

python -m dbes.testbed.embedded --train-data build/train --out benchmark_data/model --seed 0
"""

from __future__ import annotations

import argparse
import json
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

from dbes.errors import MixError
from dbes.files import sha256_of, write_json, write_text
from dbes.testbed.card import model_card
from dbes.testbed.heldout import Heldout, measure
from dbes.testbed.mix import Mix, Text, is_heldout, read_texts, tokenize_mix
from dbes.testbed.settings import MixSettings, ModelSettings, OptimizerSettings, RoutingSettings, TrainSettings
from dbes.testbed.training import LOG, train
from dbes.testbed.vocabulary import train_tokenizer

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
