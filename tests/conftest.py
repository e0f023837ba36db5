"""Shared fixtures: a tiny checkpoint with a tokenizer, and a task of local files."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = {
    "law": "court clause liability tenant statute party contract notice appeal remedy",
    "code": "def return import self value list index loop string print",
    "math": "prime integer sum triangle proof angle square root modulo divides",
}


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of 12 documents each, words drawn from a list of their own."""
    import numpy as np

    folder = tmp_path_factory.mktemp("task")
    rng = np.random.default_rng(0)
    lines = ["name: tiny", "version: 1", "description: words", "window: 64", "domains:"]
    for domain, words in WORDS.items():
        rows = [
            {"id": f"{domain}-{index}", "text": " ".join(rng.choice(words.split(), size=int(rng.integers(30, 90))))} for index in range(12)
        ]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        lines += [f"  {domain}:", f"    files: [{domain}.jsonl]", "    text_field: text", "    id_field: id"]
    path = folder / "tiny.yaml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained OLMoE of 3 layers, 8 experts, top-2, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-olmoe"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a grid in this process, one after the other, from pickled jobs as a worker gets them: a worker takes seconds to start."""
    from dbes.testbed import grid

    def run_jobs(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *, tell: Callable[[int, int, Any], None], **_: Any) -> None:
        for place, job in enumerate(jobs):
            called, given = pickle.loads(pickle.dumps((work, job)))
            tell(place + 1, place, called(*given))

    monkeypatch.setattr(grid, "run_jobs", run_jobs)
