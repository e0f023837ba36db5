"""Speed and memory of recording, measured as ratios within one run, on a random 260 M-parameter OLMoE.

Against the usual loop (one document at a time through the causal LM with ``output_router_logits=True``), and against the same
batches in a plain forward. Usage: ``python benchmarks/recording.py [results.json] [--documents N] [--threads N]``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from dbes.models import LoadedModel, find_sites, load_model
from dbes.recording.batches import Window, automatic_budget, batches
from dbes.recording.forward import ForwardEngine
from dbes.recording.record import record_documents

VOCABULARY = 50_304


@dataclass(frozen=True)
class Document:
    id: str
    domain: str
    text: str


def random_model(*, hidden: int = 512, layers: int = 8, experts: int = 64, intermediate: int = 256) -> LoadedModel:
    """A random OLMoE: 260 M parameters by default, top-8 of 64."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=experts,
        num_experts_per_tok=8,
    )
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1")
    return load_model(OlmoeForCausalLM(config), tokenizer=fast)


def log_normal_documents(count: int, *, seed: int = 0, median: float = 180, spread: float = 0.9) -> list[Document]:
    """Documents whose lengths in tokens are log-normal, in two domains."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(median), spread, count), 8, 2048).astype(int)
    texts = [" ".join(f"w{token}" for token in random.integers(2, VOCABULARY, length)) for length in lengths]
    return [Document(f"d{index}", ("a", "b")[index % 2], text) for index, text in enumerate(texts)]


def timed(work: Callable[[Path], object], folder: Path) -> tuple[float, float]:
    """Seconds on the clock, and seconds of processor time, which other work on the machine disturbs less."""
    start, processor = time.perf_counter(), time.process_time()
    work(folder)
    return time.perf_counter() - start, time.process_time() - processor


@torch.inference_mode()
def usual_loop(loaded: LoadedModel, documents: list[Document]) -> None:
    for document in documents:
        inputs = loaded.tokenizer(document.text, return_tensors="pt", return_token_type_ids=False)
        logits = loaded.model(**inputs, output_router_logits=True).router_logits
        _ = [layer.topk(8, dim=-1).indices for layer in logits]


@torch.inference_mode()
def plain_forward(loaded: LoadedModel, documents: list[Document], *, with_head: bool) -> None:
    """The batches that recording makes, through the model alone."""
    sites = find_sites(loaded.model)
    engine = ForwardEngine(loaded=loaded, sites=sites, before=(), after=(), seed=0, control=False, stiffness=False, window=2048)
    windows = []
    for index, document in enumerate(documents):
        ids = np.asarray(loaded.tokenizer(document.text)["input_ids"], np.int32)
        windows += [Window(index, document.id, start, ids[start : start + 2048]) for start in range(0, len(ids), 2048)]
    budget = automatic_budget(loaded, engine.sites)
    for batch in batches(windows, budget, by_count=False, batching="padded", extra=0):
        inputs, _ = engine.inputs(batch)
        (loaded.model if with_head else loaded.model.model)(**inputs, use_cache=False)


def record(loaded: LoadedModel, documents: list[Document], folder: Path, *, control: bool = True, stiffness: bool = True) -> None:
    record_documents(loaded, documents, domains=("a", "b"), window=2048, output_path=folder, control=control, stiffness=stiffness)


def peak_memory(tokens: int) -> float:
    """Peak resident MB of recording this many tokens with a tiny model, in a process of its own."""
    command = [sys.executable, __file__, "--memory", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(tokens: int) -> None:
    torch.set_num_threads(1)
    loaded = random_model(hidden=32, layers=8, experts=64, intermediate=8)
    documents = log_normal_documents(tokens // 250, spread=0.3, median=240)
    with tempfile.TemporaryDirectory() as folder:
        record_documents(loaded, documents, domains=("a", "b"), window=2048, output_path=Path(folder) / "trace")
    # not getrusage: its peak is inherited from the process that started this one
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--largest", type=int, default=1_000_000, help="tokens of the larger memory run")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory:
        measure_memory(chosen.memory)
        return
    torch.set_num_threads(chosen.threads)
    loaded, documents = random_model(), log_normal_documents(chosen.documents)
    tokens = sum(len(document.text.split()) for document in documents)
    ways: dict[str, Callable[[Path], object]] = {
        "usual_loop": lambda _: usual_loop(loaded, documents),
        "plain_forward": lambda _: plain_forward(loaded, documents, with_head=True),
        "plain_forward_without_head": lambda _: plain_forward(loaded, documents, with_head=False),
        "recording": lambda folder: record(loaded, documents, folder),
        "recording_routes_only": lambda folder: record(loaded, documents, folder, control=False, stiffness=False),
    }
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    for turn in range(chosen.rounds):  # in turns, so that a busy machine is busy for all of them; the best of each counts
        for name, work in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                spent, busy = timed(work, Path(folder) / "trace")
            seconds[name] = min(spent, seconds.get(name, spent))
            processor[name] = min(busy, processor.get(name, busy))
            print(
                f"{turn + 1}/{chosen.rounds} {name}: {tokens / spent:.0f} tokens/s, {tokens / busy:.0f} per processor second",
                file=sys.stderr,
            )
    small, large = peak_memory(10_000), peak_memory(chosen.largest)
    result = {
        "parameters": loaded.parameters,
        "documents": len(documents),
        "tokens": tokens,
        "dtype": loaded.dtype,
        "threads": chosen.threads,
        "tokens_per_second": {name: round(tokens / spent, 1) for name, spent in seconds.items()},
        "recording_times_as_fast_as": {
            other: {
                "clock": round(seconds[other] / seconds["recording"], 3),
                "processor": round(processor[other] / processor["recording"], 3),
            }
            for other in ways
            if other != "recording"
        },
        "peak_memory_mb": {"10000 tokens": round(small, 1), f"{chosen.largest} tokens": round(large, 1), "growth": round(large - small, 1)},
    }
    print(json.dumps(result, indent=1))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
