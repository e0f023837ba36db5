"""Streaming against the whole model in memory and against accelerate's disk offload, on a random checkpoint of OLMoE's shape.

    python benchmarks/streaming.py --layers 8 --experts 16 --scale 0.5 --max-memory 2GiB
    python benchmarks/streaming.py --layers 16 --experts 64 --max-memory 4GiB     # the shape of OLMoE-1B-7B, 14 GB

Each way runs in a process of its own. Tokens/s are of the recording alone; bytes are what the process read from files while recording
(``rchar`` of /proc/self/io), over the size of the checkpoint; memory is the peak of the resident set since the process began (``VmHWM``;
``ru_maxrss`` would count what the process that made the checkpoint held). Checkpoint and trace lie in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 1024, 50304
WINDOW = 1024


@dataclass(frozen=True)
class Text:
    id: str
    domain: str
    text: str


def texts(tokens: int) -> list[Text]:
    """Random words of 3 letters, one token each, in texts of up to a window."""
    random, found = np.random.default_rng(0), []
    while tokens > 0:
        length = min(tokens, int(random.integers(WINDOW // 2, WINDOW + 1)))
        words = random.integers(0, 1000, length)
        found.append(Text(f"text-{len(found)}", "ab"[len(found) % 2], " ".join(f"w{word:03}" for word in words)))
        tokens -= length
    return found


def make(folder: Path, *, layers: int, experts: int, scale: float, shard: str = "1GB") -> None:
    """A random bf16 checkpoint, with a tokenizer of 1,000 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    hidden = int(HIDDEN * scale)
    config = OlmoeConfig(
        hidden_size=hidden, intermediate_size=int(INTERMEDIATE * scale), num_hidden_layers=layers, num_experts=experts,
        num_experts_per_tok=min(8, experts), num_attention_heads=16, num_key_value_heads=16, vocab_size=int(VOCABULARY * scale),
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = OlmoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)
    words = Tokenizer(WordLevel({"<unk>": 0, **{f"w{word:03}": word + 1 for word in range(1000)}}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def run(way: str, checkpoint: Path, *, tokens: int, dtype: str, max_memory: str) -> dict[str, Any]:
    """One way in this process."""
    from dbes.models import load_model, load_tokenizer
    from dbes.recording.record import record_documents
    from dbes.wording import bytes_of

    started, documents, most = time.perf_counter(), texts(tokens), bytes_of(max_memory, option="--max-memory")
    if way == "offload":
        loaded = load_model(offloaded(checkpoint, dtype, most), tokenizer=load_tokenizer(str(checkpoint)))
    else:
        loaded = load_model(checkpoint, dtype=dtype, layerwise=way == "streaming")
    ready, read = time.perf_counter(), read_so_far()
    options = {"max_memory": most} if way == "streaming" else {}
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as output:
        done = record_documents(loaded, documents, domains=("a", "b"), window=WINDOW, output_path=Path(output) / "trace", **options)
    return {
        "tokens": done.tokens,
        "tokens_per_second": done.tokens_per_second,
        "loading_seconds": ready - started,
        "read": read_so_far() - read,
        "weights_read": done.bytes_read,
        "peak": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024,
    }


def offloaded(checkpoint: Path, dtype: str, room: int) -> Any:
    """The model with what does not fit into ``room`` bytes on disk, as accelerate dispatches it."""
    folder = checkpoint.parent / "offload"
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), device_map="auto", max_memory={"cpu": room}, offload_folder=folder
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--scale", type=float, default=0.5, help="of hidden sizes and vocabulary")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--offload-tokens", type=int, default=1024, help="disk offload reads the checkpoint once per batch")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-memory", default="2GiB")
    parser.add_argument("--ways", default="memory,streaming,offload")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; by default the folder for temporary files")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        way, checkpoint, tokens = given.run.split(",")
        print(json.dumps(run(way, Path(checkpoint), tokens=int(tokens), dtype=given.dtype, max_memory=given.max_memory)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        checkpoint = Path(folder) / "checkpoint"
        make(checkpoint, layers=given.layers, experts=given.experts, scale=given.scale)
        size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        print(f"checkpoint {size / 1e9:.2f} GB, {given.dtype}, streaming in {given.max_memory}")
        for way in given.ways.split(","):
            tokens = given.offload_tokens if way == "offload" else given.tokens
            words = [sys.executable, __file__, "--dtype", given.dtype, "--max-memory", given.max_memory]
            answer = subprocess.run([*words, "--run", f"{way},{checkpoint},{tokens}"], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(answer.stdout.splitlines()[-1])
            print(
                f"{way:10} {found['tokens']:7,} tokens {found['tokens_per_second']:8.1f} tokens/s, peak {found['peak'] / 2**30:5.2f} GiB, "
                f"read {found['read'] / size:5.2f} of the checkpoint while recording, {found['loading_seconds']:5.1f} s to load",
                flush=True,
            )


if __name__ == "__main__":
    main()
