"""Options of evaluate(): their names and types, and how answers are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from dbes.errors import SettingError
from dbes.scoring.own import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dbes.recording.generation import Generation

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); the stage names what is being done."""


class Answers(TypedDict, total=False):
    """Arguments of `evaluate` for answers: tokens of each at most (None: there are none), how tokens are chosen (temperature 0: the most
    probable one), whether documents are given in the model's chat template, its system message, and whether answers that repeat
    themselves are left out of the scores."""

    generate: int | None
    temperature: float
    top_p: float
    generation_seed: int
    apply_chat_template: bool
    system: str | None
    drop_loops: bool


class Further(Answers, total=False):
    """Arguments of `evaluate` for what stands beside the scores.

    Attributes:
        loss: measure bits per byte of every domain in the same pass.
        accuracy: measure how often the right choice of multiple-choice items is the likeliest; "lm-eval": by the harness.
        ablate: mask every domain's specialists, and other cells of the same load, and measure what is lost, in other texts.
        metrics: of your own, see `dbes.Metric`.
        name: what result, page and leaderboard call the model; by default hub id, name of the folder, or class.
        base_url: of the server, with engine "openai"; api_key_env: variable of the environment that holds its key.
        engine_args: with engine "vllm", ``name=value`` pairs separated by commas, such as ``tensor_parallel_size=8``.
        strata: score strata of tokens too, and test whether they differ: ``entropy``, ``position``, ``token-class``, ``frequency``.
    """

    loss: bool
    accuracy: bool | Literal["lm-eval"]
    ablate: bool
    metrics: Sequence[Metric]
    strata: Sequence[str]
    name: str | None
    base_url: str | None
    api_key_env: str | None
    engine_args: str | None


class Options(Further, total=False):
    """Arguments of `evaluate` beside model and tasks."""

    tokenizer: PreTrainedTokenizerBase | None
    output_path: str | Path
    revision: str | None
    limit: int | None
    dtype: str
    device_map: str | None
    batch_size: int | Literal["auto"]
    seed: int
    permutations: int
    trust_remote_code: bool
    engine: Literal["auto", "memory", "streaming", "vllm", "openai"]
    max_memory: int | str | None
    overwrite: bool
    save_trace: bool
    embedded_fallback: bool
    progress: Progress | None


ANSWERS: dict[str, Any] = {"generate": None, "temperature": 0.0, "top_p": 1.0, "generation_seed": 0}
"""Arguments of `evaluate` that say how answers are generated, and what they are when none is given."""

GENERATION = ("generation", "chat_template", "system", "drop_loops")
"""Settings that a result has where answers were generated."""


def generation_of(
    *, generate: int | None, temperature: float, top_p: float, generation_seed: int, chat_template: bool = False,
    system: str | None = None, drop_loops: bool = False, engine: str = "auto", **_: Any,
) -> Generation | None:  # fmt: skip
    """How answers are generated, if any are.

    Raises:
        SettingError: a value that nothing can be generated with, or one that says nothing without another.
    """
    from dbes.recording.generation import Generation

    if generate is None:
        asked = {
            "temperature": temperature != 0, "top_p": top_p != 1, "generation_seed": generation_seed != 0, "system": system is not None,
            "apply_chat_template": chat_template, "drop_loops": drop_loops,
        }  # fmt: skip
        if given := [name for name, there in asked.items() if there]:
            raise SettingError(f"{given[0]}: says how answers are generated or scored; give generate, the number of their tokens, too")
        return None
    if system is not None and not chat_template:
        raise SettingError("system: a system message has its place in a chat template; give apply_chat_template too")
    if engine in ("vllm", "openai"):
        raise SettingError(f"generate: with engine {engine!r} given text is recorded only; let the server answer, and import its responses")
    if engine == "streaming":
        raise SettingError(
            "generate: with engine 'streaming' every token of an answer would read all weights from disk anew; use engine 'memory'"
        )
    return Generation(tokens=generate, temperature=temperature, top_p=top_p, seed=generation_seed)
