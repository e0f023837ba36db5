"""The engine that lets a transformers model answer texts: batches of them decoded with a key-value cache, recorded step by step.

The tokens are those of the model's own ``generate``, whose forwards are watched. What a router decided for a token is known when the token
is fed to the model; the last token of an answer never is, nor is anything after an end-of-sequence token. Neither is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from dbes.errors import RecordingError, out_of_memory
from dbes.models import LoadedModel
from dbes.models.execution import input_device
from dbes.models.hooks import Decision, watching
from dbes.models.sites import max_positions
from dbes.models.windows import embedding_rows, padded, padding_id, refuse_unknown
from dbes.recording.batches import Window, first_batch
from dbes.recording.chat import Template
from dbes.recording.forward import Coming, ForwardEngine, columns_of, fetched, keys_of, sent, stacked
from dbes.recording.generation import Generation
from dbes.trace.blocks import Block, Contents, Work
from dbes.trace.types import GENERATED, PROMPT, TEMPLATE

HELD_ROWS = 256
"""Rows of decoding steps whose routing is worked out together: a step alone has too few to be worth the calls."""


@dataclass(frozen=True, kw_only=True)
class GenerationEngine:
    """A model that answers each text.

    Attributes:
        base: the engine of given texts; a window of it holds any prompt.
        template: bool [tokens] of each document, which tokens are the chat template's; empty: none are.
        chat: what identifies the chat template; None: texts are given as they are.
        cut: documents that were cut at their end to leave room for an answer.
        end: tokens that end an answer.
    """

    base: ForwardEngine
    generation: Generation
    template: Sequence[np.ndarray] = ()
    chat: Mapping[str, Any] | None = None
    cut: int = 0
    end: tuple[int, ...] = ()

    @property
    def contents(self) -> Contents:
        return replace(self.base.contents, answer=self.generation.tokens - 1)

    @property
    def identity(self) -> dict[str, Any]:
        return self.base.identity

    @property
    def settings(self) -> dict[str, Any]:
        about = {"generation": asdict(self.generation), "chat_template": self.chat, "end_of_answer": list(self.end)}
        return {**self.base.settings, **about, "documents_cut": self.cut}

    def score_reason(self, layer: int, missing: int, tokens: int) -> str:
        return self.base.score_reason(layer, missing, tokens)

    def blocks(self, work: Work) -> Iterator[Block]:
        """Prompts of about one length are answered together; where memory does not suffice, the batch is halved for the rest."""
        windows, base = self.base.windows(work), self.base
        by_count, budget, extra = base.batch_size is not None, base.budget, base.extra + self.generation.tokens
        reduced: int | None = None
        while windows:
            count = first_batch(windows, budget, by_count=by_count, batching=base.batching, extra=extra)
            try:
                blocks = answer(self, windows[:count])
            except RuntimeError as problem:
                if out_of_memory(problem) is None:
                    raise
                if count == 1:
                    raise RecordingError(
                        f"one text of {len(windows[0])} tokens and its answer do not fit in memory; ask for fewer tokens or another dtype"
                    ) from problem
                budget = reduced = (count if by_count else min(budget, count * (len(windows[0]) + extra))) // 2
                continue
            yield from (replace(block, reduced=reduced) for block in blocks)
            windows = windows[count:]

    def phases(self, window: Window) -> np.ndarray:
        """uint8 [tokens] of a prompt."""
        if not self.template:
            return np.full(len(window), PROMPT, np.uint8)
        return np.where(self.template[window.document], TEMPLATE, PROMPT).astype(np.uint8)


def generating(
    base: ForwardEngine, generation: Generation, texts: Sequence[np.ndarray], template: tuple[Template, Sequence[np.ndarray]] | None,
    *, names: Callable[[int], str],
) -> tuple[GenerationEngine, list[np.ndarray]]:  # fmt: skip
    """The engine, and the texts as they are given to the model: of at most a window, and of what the answer leaves of its positions.

    Longer ones are cut at the end of the text, before what the chat template puts after it.

    Args:
        texts: int32 [tokens] of each document, the tokens of the chat template among them.
        template: the chat template, and bool [tokens] of each document, which of its tokens are the template's.

    Raises:
        RecordingError: a model that cannot generate, or has no room for text and answer; a document that lost its text.
    """
    model = base.loaded.model
    _refuse(base.loaded)
    base = replace(base, after=(), before=base.before if template is None else ())
    limit, tokens, rows = max_positions(model), generation.tokens, embedding_rows(model)
    prompts, marks, cut = [], [], 0
    for place, text in enumerate(texts):
        mark = np.zeros(len(text), bool) if template is None else template[1][place]
        refuse_unknown(text, rows, base.loaded.tokenizer, name=names(place))
        own = int((~mark).sum())
        if not own:
            raise RecordingError(f"{names(place)} has no tokens of its own inside the chat template; give it a text or take it out")
        room = base.window if limit is None else min(base.window, limit - tokens - base.extra - int(mark.sum()))
        if room < 1:
            raise RecordingError(
                f"{names(place)}: the model has {limit} positions; an answer of {tokens} tokens and {base.extra + int(mark.sum())} tokens "
                "around the text leave none for the text: choose a shorter answer"
            )
        kept = mark | (np.cumsum(~mark) <= room)
        cut += own > room
        prompts.append(text[kept])
        marks.append(mark[kept])
    engine = GenerationEngine(
        base=replace(base, window=max(map(len, prompts))),
        generation=generation,
        template=() if template is None else marks,
        chat=None if template is None else template[0].settings,
        cut=cut,
        end=end_of_answer(base.loaded),
    )
    return engine, prompts


def _refuse(loaded: LoadedModel) -> None:
    model, told = loaded.model, "texts can be recorded without --generate"
    if loaded.layerwise is not None:
        raise RecordingError(f"{loaded.name}: its layers are read from disk one at a time, for every token of an answer anew; {told}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise RecordingError(f"{loaded.name}: an encoder with a decoder; answers are generated by decoders alone: {told}")
    if not model.can_generate():
        raise RecordingError(f"{loaded.name}: {type(model).__name__} cannot generate text; {told}")


def end_of_answer(loaded: LoadedModel) -> tuple[int, ...]:
    """Ids of the tokens that end a text, as the model has them, or its tokenizer."""
    model = loaded.model
    places = (getattr(model, "generation_config", None), model.config.get_text_config(), loaded.tokenizer)
    found = next((value for place in places if (value := getattr(place, "eos_token_id", None)) is not None), ())
    return tuple(int(value) for value in np.atleast_1d(np.asarray(found, np.int64)))


def answer(engine: GenerationEngine, windows: Sequence[Window]) -> list[Block]:
    """Answer the prompts together.

    Returns:
        the routes of every token of the prompts, and of every token of the answers that was fed to the model.

    Raises:
        RecordingError: a layer that did not fire once a forward, or for another number of tokens.
    """
    base, generation = engine.base, engine.generation
    model: Any = base.loaded.model
    device = input_device(model)
    padding = padding_id(base.loaded.tokenizer, embedding_rows(model))
    ids, mask = padded([np.asarray([*base.before, *window.token_ids]) for window in windows], padding=padding, left=True)
    watch = _Watch(engine, windows, ids.shape[1])
    scores = base.stiffness or any(site.adapter == "embedding" for site in base.sites)
    config = GenerationConfig(
        max_new_tokens=generation.tokens, do_sample=False, use_cache=True, pad_token_id=padding, eos_token_id=list(engine.end) or None
    )
    chosen = [_Drawn(generation, [window.document_id for window in windows], ids.shape[1])] if generation.temperature > 0 else []
    handle = model.register_forward_pre_hook(watch.before, with_kwargs=True)
    try:
        with torch.inference_mode(), _own_config(model, config), watching(base.sites, watch.observe, scores=scores, proven=base.proven):
            model.generate(
                input_ids=sent(ids, device), attention_mask=sent(mask, device), generation_config=config, logits_processor=chosen
            )
    finally:
        handle.remove()
    return watch.done()


@contextmanager
def _own_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside the block nothing that the checkpoint would like (sampling, penalties) is added to what was asked."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


@dataclass
class _Watch:
    """What the routers decided in the forwards of one batch.

    Attributes:
        width: tokens of a prompt, padding and special tokens included.
        fed: tokens of the step that were given to the model, [answers] each, since the last block.
        held: of each site, its decisions in these steps.
        place: of the first of these steps in the answers.
        open: bool [answers], which had not ended before it.
    """

    engine: GenerationEngine
    windows: Sequence[Window]
    width: int
    blocks: list[Block] = field(default_factory=list)
    fed: list[Tensor] = field(default_factory=list)
    place: int = 0

    def __post_init__(self) -> None:
        sites = self.engine.base.sites
        self.held: list[list[Decision]] = [[] for _ in sites]
        self.first: dict[str, dict[int, Tensor]] = {}
        self.fired: list[int] | None = None
        self.tokens = self.columns = 0
        self.open = np.ones(len(self.windows), bool)
        self.on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def prompting(self) -> bool:
        return not self.fed and self.place == 0

    def before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if self.fired is None:
            if ids.shape != (len(self.windows), self.width):
                raise RecordingError("the model's generate does not read a prompt in one forward; dbes cannot tell which token is which")
        else:
            self._fired()
            if self.prompting:
                self._prompts()
            elif len(self.fed) * len(self.windows) >= HELD_ROWS:
                self._steps()
            self.fed.append(ids[:, -1])
        self.fired, self.tokens, self.columns = [0] * len(self.held), ids.numel(), ids.shape[1]

    def observe(self, index: int, decision: Decision) -> None:
        site, base = self.engine.base.sites[index], self.engine.base
        assert self.fired is not None
        self.fired[index] += 1
        if len(decision.ids) != self.tokens:
            raise RecordingError(
                f"layer {site.layer}: {len(decision.ids)} tokens were routed, the step has {self.tokens}; dbes cannot tell which token is "
                f"which in {site.name}"
            )
        if self.prompting:
            for name, column in columns_of(base, index, decision, *self._rows(decision.ids.device)).items():
                self.first.setdefault(name, {})[index] = column
        else:
            self.held[index].append(decision if self.columns == 1 else _rows_of(decision, slice(self.columns - 1, None, self.columns)))

    def done(self) -> list[Block]:
        self._fired()
        if self.prompting:
            self._prompts()
        self._steps()
        return self.blocks

    def _fired(self) -> None:
        for site, count in zip(self.engine.base.sites, self.fired or (), strict=True):
            if count != 1:
                raise RecordingError(f"layer {site.layer} ({site.name}) routed {count} times in one step of generation, expected once")

    def _rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows of the prompts' text among those of the first forward, and their noise."""
        if device not in self.on:
            ends = (1 + np.arange(len(self.windows))) * self.width
            rows = [np.arange(end - len(window), end) for end, window in zip(ends, self.windows, strict=True)]
            self.on[device] = sent(np.concatenate(rows), device), sent(keys_of(self.windows), device)
        return self.on[device]

    def _prompts(self) -> None:
        phase = np.concatenate([self.engine.phases(window) for window in self.windows])
        self._add(self.windows, self.first, phase)
        self.first = {}

    def _steps(self) -> None:
        """The block of the steps that are held, of answers that had not ended and of tokens before their last."""
        fed = torch.stack(self.fed, dim=1).cpu().numpy() if self.fed else np.zeros((len(self.windows), 0), np.int64)
        most = self.engine.generation.tokens - 1 - self.place
        windows, rows = [], []
        for number, window in enumerate(self.windows):
            ended = np.isin(fed[number], self.engine.end)
            count = min(int(np.argmax(ended)) if ended.any() else len(ended), most) if self.open[number] else 0
            self.open[number] &= not ended.any()
            if count:
                start = len(window) + self.place
                windows.append(Window(window.document, window.document_id, start, fed[number, :count].astype(np.int32)))
                rows.append(number + len(self.windows) * np.arange(count))
        held, columns = self.held, dict[str, dict[int, Tensor]]()
        self.place, self.fed, self.held = self.place + fed.shape[1], [], [[] for _ in held]
        if not windows:
            return
        for index, decisions in enumerate(held):
            whole, device = _joined(decisions), decisions[0].ids.device
            given = sent(np.concatenate(rows), device), sent(keys_of(windows), device)
            for name, column in columns_of(self.engine.base, index, whole, *given).items():
                columns.setdefault(name, {})[index] = column
        self._add(windows, columns, np.full(sum(map(len, windows)), GENERATED, np.uint8))

    def _add(self, windows: Sequence[Window], columns: Mapping[str, dict[int, Tensor]], phase: np.ndarray) -> None:
        layers = self.engine.contents.layers
        copies = fetched({name: stacked(by_site, len(layers)) for name, by_site in columns.items()})
        self.blocks.append(replace(Coming(windows, layers, *copies).block(), phase=phase))


def _rows_of(decision: Decision, rows: slice) -> Decision:
    each: dict[str, Any] = {part.name: getattr(decision, part.name) for part in fields(Decision)}
    taken: dict[str, Any] = {name: value if value is None else value[rows] for name, value in each.items()}
    return Decision(**taken)


def _joined(decisions: Sequence[Decision]) -> Decision:
    """Decisions of one site, one after the other; what one of them does not have is unknown for all."""

    def column(name: str) -> Any:
        parts = [getattr(decision, name) for decision in decisions]
        alike = all(part is not None and part.shape[1:] == parts[0].shape[1:] for part in parts)
        return torch.cat(parts) if alike else None

    whole: dict[str, Any] = {part.name: column(part.name) for part in fields(Decision)}
    return Decision(**whole)


class _Drawn(LogitsProcessor):
    """Leaves of every answer the one token that was drawn, which `generate` then takes as the most probable."""

    def __init__(self, generation: Generation, documents: Sequence[str], width: int) -> None:
        self.generation, self.documents, self.width = generation, documents, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.width
        draws = torch.tensor([self.generation.draw(each, place) for each in self.documents], dtype=torch.float64)
        picked = sampled(scores, draws.to(scores.device), temperature=self.generation.temperature, top_p=self.generation.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked[:, None], 0.0)


def sampled(logits: Tensor, draws: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Token ids, int64 [answers]. Each draw is looked up in the sum of the probabilities in order of the vocabulary, where rounding of
    the logits moves it least.

    Args:
        logits: [answers, vocabulary].
        draws: float64 [answers], in [0, 1).
    """
    chances = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        ranked, order = chances.sort(dim=-1, descending=True, stable=True)
        kept = ranked.cumsum(dim=-1) - ranked < top_p
        chances = torch.zeros_like(chances).scatter_(1, order, ranked * kept)
    reached = chances.cumsum(dim=-1)
    found = (reached <= (draws * reached[:, -1])[:, None]).sum(dim=-1)
    last = chances.shape[1] - 1 - (chances > 0).flip(1).int().argmax(dim=-1)
    return found.minimum(last)
