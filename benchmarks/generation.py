"""What recording costs while a model answers: the same greedy tokens from `generate` alone and recorded, in turn, in one process.

Run as ``python benchmarks/generation.py [--tokens 32] [--prompts 16] [--length 64] [--rounds 5]``. The two are timed one after the other in
every round, and the ratio is that of each round, so that what else the machine does hits both; on a CPU
it is the process's own time that counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM

from dbes.models import LoadedModel, load_model
from dbes.models.sites import find_sites
from dbes.recording.batches import Window
from dbes.recording.decode import GenerationEngine, answer
from dbes.recording.forward import ForwardEngine
from dbes.recording.generation import Generation
from dbes.shipped import EMBEDDED_MODEL


def middling(tokenizer: object, size: int) -> LoadedModel:
    """An untrained OLMoE of 8 layers, 64 experts, top-8, hidden size 512."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=size, hidden_size=512, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        num_experts=64, num_experts_per_tok=8, max_position_embeddings=1024, pad_token_id=1, eos_token_id=0,
    )  # fmt: skip
    return load_model(OlmoeForCausalLM(config).eval(), tokenizer=tokenizer)  # pyright: ignore[reportArgumentType]


def timed(run: Callable[[], object]) -> float:
    clock = time.perf_counter if torch.accelerator.is_available() else time.process_time
    started = clock()
    run()
    return clock() - started


def measure(name: str, loaded: LoadedModel, *, tokens: int, prompts: int, length: int, rounds: int) -> None:
    random = np.random.default_rng(0)
    model: Any = loaded.model
    rows = model.config.get_text_config().vocab_size
    texts = [random.integers(5, rows, length).astype(np.int32) for _ in range(prompts)]
    windows = [Window(place, str(place), 0, text) for place, text in enumerate(texts)]
    ids = torch.from_numpy(np.stack(texts)).long().to(model.device)
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=1, eos_token_id=None)

    def plain() -> None:
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    for told, stiffness, control in (("ids and weights", False, 0), ("and stiffness", True, 0), ("and 3 random routers", True, 3)):
        base = ForwardEngine(
            loaded=loaded, sites=find_sites(model), before=(), after=(), seed=0, control=control, stiffness=stiffness, window=length
        )
        engine = GenerationEngine(base=base, generation=Generation(tokens))
        answer(engine, windows)
        plain()
        pairs = [(timed(plain), timed(lambda engine=engine: answer(engine, windows))) for _ in range(rounds)]
        ratios = sorted(recorded / alone for alone, recorded in pairs)
        speed = prompts * tokens / median(alone for alone, _ in pairs)
        print(
            f"{name}: {told}: {100 * (median(ratios) - 1):+.1f} % time (rounds {100 * (ratios[0] - 1):+.1f} to "
            f"{100 * (ratios[-1] - 1):+.1f} %), generate alone {speed:,.0f} tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option, usual in (("tokens", 32), ("prompts", 16), ("length", 64), ("rounds", 5)):
        parser.add_argument(f"--{option}", type=int, default=usual)
    asked = vars(parser.parse_args())
    embedded = load_model(str(EMBEDDED_MODEL), name="embedded")
    measure("embedded", embedded, **asked)
    measure("8 layers, 64 experts, hidden 512", middling(embedded.tokenizer, embedded.config["vocab_size"]), **asked)


if __name__ == "__main__":
    main()
