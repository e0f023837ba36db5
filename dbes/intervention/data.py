"""Texts of an experiment: training, tuning and held-out documents of every domain, as tokens of the model.

Documents are split by source before anything is cut. A mix of the testbed keeps the split its checkpoints were trained with;
tasks and files hold out a fifth of their sources, as ``dbes finetune`` does. Paths are found on training documents only. Held-out
texts that hold a multiple-choice question are measured by accuracy too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from torch import Tensor

from dbes.errors import FinetuneError, InterventionError, MixError, SettingError
from dbes.evaluation.request import read_benchmark
from dbes.files import write_bytes
from dbes.intervention.settings import InterventionSettings
from dbes.models.choices import encode_choices
from dbes.models.encoding import Sample, cut_rows
from dbes.models.token_text import text_bytes
from dbes.models.windows import refuse_unknown, token_ids
from dbes.scoring.tables import read_safetensors
from dbes.tasks.entries import Entry, by_hash, entry_of_document, hold_out, read_entries
from dbes.testbed.mix import Text, TokenDocuments, is_heldout, read_texts
from dbes.testbed.mixes import HELDOUT_SHARE, mix_files
from dbes.text import clipped, unknown

TASK, MIX = "task:", "mix:"
TUNING_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Training and held-out texts by domain."""

    training: Mapping[str, tuple[Text, ...]]
    heldout: Mapping[str, tuple[Text, ...]]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.training)


@dataclass(frozen=True, kw_only=True)
class Part(TokenDocuments):
    """Documents of one domain for one use.

    Attributes:
        bytes: int64 [documents], bytes of text behind all but the first token of each.
    """

    bytes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Items:
    """Multiple-choice items as tokens: the question with choice i is ``tokens[starts[i]:starts[i + 1]]``, item after item.

    Attributes:
        tokens: int32 [tokens]; counted: bool [tokens], those of the choice.
        starts: int64 [1 + choices of all items]; bytes: int64 [choices of all items], UTF-8 bytes of each choice.
        choices: int64 [items], number of choices; right: int64 [items], index of the right one among them.
    """

    tokens: np.ndarray
    counted: np.ndarray
    starts: np.ndarray
    bytes: np.ndarray
    choices: np.ndarray
    right: np.ndarray

    def __len__(self) -> int:
        return len(self.right)

    def samples(self) -> list[Sample]:
        """One for every choice of every item."""
        ends = zip(self.starts[:-1], self.starts[1:], self.bytes.tolist(), strict=True)
        return [Sample(self.tokens[start:stop].astype(np.int64), self.counted[start:stop], size) for start, stop, size in ends]


ITEM_COLUMNS = tuple(column.name for column in fields(Items))


@dataclass(frozen=True, kw_only=True)
class ExperimentData:
    """Token documents of every domain.

    Attributes:
        parts: by (domain, ``train``, ``tuning``, ``heldout`` or ``protected``); training and protected documents whole, the others
            cut to one window. Protected are training documents of the domains that count as forgotten, where an arm needs them.
        boundary: token id between training documents.
        digest: sha256 over all of it.
        items: held-out items by domain; domains without any are left out.
    """

    domains: tuple[str, ...]
    parts: Mapping[tuple[str, str], Part]
    boundary: int
    digest: str
    items: Mapping[str, Items] = field(default_factory=dict)

    def without_items(self) -> ExperimentData:
        """The same documents, with the digest they have by themselves."""
        return replace(self, items={}, digest=digest_of(self.parts, {}))


def read_sources(texts: str, domains: Sequence[str], *, cache: Path) -> tuple[Texts, tuple[str, ...]]:
    """The texts of all domains, and the names of the targets.

    Args:
        texts: ``task:NAME`` (a task or its YAML), ``mix:NAME`` (a mix of the testbed) or a folder of ``<domain>.jsonl`` files.
        domains: targets: a domain of the texts, ``NAME=FILE`` (a fifth of its sources is held out) or ``NAME=TRAINING,HELDOUT``.

    Raises:
        SettingError: there is no such domain.
        InterventionError: a name twice, a source on both sides, too few texts.
        TaskError, MixError, FinetuneError: the texts cannot be read.
    """
    training, heldout = _of_mix(texts.removeprefix(MIX), cache) if not texts.startswith(TASK) else _of_task(texts.removeprefix(TASK))
    names = []
    for given in domains:
        name, equals, files = given.partition("=")
        names.append(name)
        if not equals:
            if name not in training:
                raise SettingError(f"{unknown(f'domain of {texts}', name, training)}; or give NAME=FILE")
            continue
        if name in training:
            raise InterventionError(f"domain {given!r}: {texts} has a domain {name!r} already; choose another name for the file")
        paths = files.split(",")
        entries = [_plain(entry, name, path) for path in paths[:1] for entry in read_entries(Path(path))]
        if len(paths) == 1:
            training[name], heldout[name] = _held_out(entries, where=files)
        else:
            training[name], heldout[name] = entries, [_plain(entry, name, paths[1]) for entry in read_entries(Path(paths[1]))]
            # a text that names no source has its id for one, which is unique only within its file
            both = {one.source for one in training[name] if one.source != one.id}
            both &= {one.source for one in heldout[name]}
            both |= {one.text for one in training[name]} & {one.text for one in heldout[name]}
            if both:
                raise InterventionError(f"{given}: {len(both)} texts or sources are in both files; held-out texts must be others")
    return Texts(
        training={name: tuple(of) for name, of in training.items()}, heldout={name: tuple(of) for name, of in heldout.items()}
    ), tuple(names)


Sides = tuple[dict[str, list[Text]], dict[str, list[Text]]]


def _of_mix(name: str, cache: Path) -> Sides:
    training: dict[str, list[Text]] = {}
    heldout: dict[str, list[Text]] = {}
    for domain, path in mix_files(name, cache).items():
        for side, kept in ((training, False), (heldout, True)):
            own = (replace(text, domain=domain) for text in read_texts(path))
            side[domain] = [text for text in own if is_heldout(text.source, share=HELDOUT_SHARE) is kept]
            if not side[domain]:
                raise MixError(f"{path}: no {'held-out' if kept else 'training'} documents; add documents of other sources")
    return training, heldout


def _of_task(name: str) -> Sides:
    benchmark = read_benchmark(name)
    training: dict[str, list[Text]] = {}
    heldout: dict[str, list[Text]] = {}
    for domain in benchmark.domains:
        own = [_plain(entry_of_document(document), domain, name) for document in benchmark.documents if document.domain == domain]
        training[domain], heldout[domain] = _held_out(own, where=f"{name}: {domain}")
    return training, heldout


def _held_out(texts: Sequence[Text], *, where: str) -> tuple[list[Text], list[Text]]:
    if len({text.id for text in texts}) != len(texts):
        raise InterventionError(f"{where}: two texts have the same id")
    return hold_out(texts, where=where)


def _plain(entry: Entry, domain: str, path: str) -> Text:
    if not entry.segments:
        raise FinetuneError(f"{path}: text {entry.id} is a conversation; the experiment measures plain text: give rows with a text")
    text = "".join(text for text, _ in entry.segments)
    return Text(id=entry.id, domain=domain, source=entry.source, text=text, item=entry.item)


def tokenize(
    texts: Texts, tokenizer: Any, *, targets: Sequence[str], settings: InterventionSettings, known: int | None = None
) -> ExperimentData:
    """The documents an experiment measures and trains on.

    Args:
        known: how many token ids the model knows (`dbes.models.windows.embedding_rows`); None leaves them unchecked.

    Raises:
        InterventionError: a domain has too little text; a token that the model does not know.
    """
    unknown = sorted(set(settings.protect_domains) - set(texts.domains))
    if unknown:
        raise InterventionError(f"protect_domains {unknown}: the texts have {', '.join(texts.domains)}")
    needed = settings.steps * settings.sequences * settings.length
    encode = _Encoder(tokenizer, known)
    parts: dict[tuple[str, str], Part] = {}
    items: dict[str, Items] = {}
    for domain in texts.domains:
        target = domain in targets
        wanted = settings.documents if target else settings.other_documents
        parts[domain, "heldout"] = _cut(texts.heldout[domain], encode, count=wanted, length=settings.length, where=domain)
        asking = [text for text in _in_order(texts.heldout[domain]) if text.item is not None][:wanted]
        if asking:
            items[domain] = _items(asking, encode, length=settings.length)
        if target:
            training, tuning = tuning_split(texts.training[domain])
            few = settings.tuning_documents
            parts[domain, "tuning"] = _cut(tuning, encode, count=few, length=settings.length, where=domain, least=1)
            parts[domain, "train"] = _whole(training, encode, tokens=2 * needed)
            if len(parts[domain, "train"].tokens) < 2 * settings.length:
                raise InterventionError(f"domain {domain}: fewer than {2 * settings.length} tokens to train on")
        if settings.protects and (domain in settings.protect_domains if settings.protect_domains else domain not in settings.new):
            own = tuning_split(texts.training[domain])[0] if target else texts.training[domain]
            part = parts[domain, "protected"] = _whole(own, encode, tokens=settings.protect_tokens)
            if len(part.tokens) < settings.length:
                raise InterventionError(
                    f"domain {domain}: {len(part.tokens)} tokens to protect it with, fewer than a sequence of {settings.length}; "
                    "raise protect_tokens, or leave it out of protect_domains"
                )
    boundary = tokenizer.eos_token_id
    if boundary is not None and known is not None and boundary >= known:
        boundary = None
    return ExperimentData(
        domains=texts.domains,
        parts=parts,
        boundary=int(boundary if boundary is not None else 0),
        digest=digest_of(parts, items),
        items=items,
    )


def digest_of(parts: Mapping[tuple[str, str], Part], items: Mapping[str, Items]) -> str:
    """sha256 over the documents; over the items too where there are any, so that texts without items keep their digest."""
    digest = hashlib.sha256()
    for (domain, name), part in sorted(parts.items()):
        digest.update(f"{domain}\0{name}\0".encode() + part.tokens.tobytes() + part.starts.tobytes())
    for domain, asked in sorted(items.items()):
        digest.update(f"{domain}\0items\0".encode() + b"".join(getattr(asked, column).tobytes() for column in ITEM_COLUMNS))
    return digest.hexdigest()


def tuning_split(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """(training, tuning) texts: a tenth of the sources, at least one, in which learning rates are chosen."""
    order = by_hash({text.source for text in texts}, "tuning\0")
    if len(order) < 2:
        raise InterventionError(f"domain {texts[0].domain}: one source text only; some must be left to choose learning rates by")
    kept = set(order[: max(1, round(TUNING_SHARE * len(order)))])
    return [text for text in texts if text.source not in kept], [text for text in texts if text.source in kept]


def _in_order(texts: Sequence[Text]) -> list[Text]:
    """By a hash of source and id, so that the first few are no particular part of a file."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{text.source}\0{text.id}".encode()).digest())


def _items(texts: Sequence[Text], encode: _Encoder, *, length: int) -> Items:
    """The items of some texts, at least one, every question with a choice in ``length`` tokens at most."""
    items, samples = [], []
    for text in texts:
        if text.item is not None:
            items.append(text.item)
            samples += encode_choices(text.item, encode.tokenizer, length=length, known=encode.known, where=text.name)
    return Items(
        tokens=np.concatenate([sample.ids for sample in samples]).astype(np.int32),
        counted=np.concatenate([sample.counted for sample in samples]),
        starts=np.cumsum([0, *(len(sample.ids) for sample in samples)]).astype(np.int64),
        bytes=np.asarray([sample.text_bytes for sample in samples], np.int64),
        choices=np.asarray([len(item.choices) for item in items], np.int64),
        right=np.asarray([item.right for item in items], np.int64),
    )


@dataclass(frozen=True)
class _Encoder:
    """Token ids of a text, int32 [tokens], which the model knows."""

    tokenizer: Any
    known: int | None

    def __call__(self, text: Text) -> np.ndarray:
        (ids,) = token_ids(self.tokenizer, [text.text], names=lambda _: text.name, error=InterventionError)
        if self.known is not None:
            refuse_unknown(ids, self.known, self.tokenizer, name=text.name, error=InterventionError)
        return ids


def _cut(texts: Sequence[Text], encode: _Encoder, *, count: int, length: int, where: str, least: int = 2) -> Part:
    """The beginnings of documents of at least two tokens, spread over sources by a hash."""
    documents = []
    for text in _in_order(texts):
        ids = encode(text)[:length]
        if len(ids) > 1:
            documents.append(ids)
        if len(documents) == count:
            break
    if len(documents) < least:
        raise InterventionError(f"domain {where}: {len(documents)} held-out documents of two tokens or more, at least {least} are needed")
    return _part(documents, [text_bytes(encode.tokenizer, ids[1:].tolist()) for ids in documents])


def _whole(texts: Sequence[Text], encode: _Encoder, *, tokens: int) -> Part:
    order = sorted(texts, key=lambda text: hashlib.sha256(text.id.encode()).digest())
    documents, total = [], 0
    for text in order:
        if total >= tokens:
            break
        documents.append(encode(text))
        total += len(documents[-1])
    return _part(documents, [len(text.text.encode()) for text in order[: len(documents)]])


def _part(documents: Sequence[np.ndarray], sizes: Sequence[int]) -> Part:
    starts = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return Part(tokens=np.concatenate(documents).astype(np.int32), starts=starts, bytes=np.maximum(np.asarray(sizes, np.int64), 1))


def training_batches(part: Part, settings: InterventionSettings, *, boundary: int, seed: int) -> list[np.ndarray]:
    """The batches of a run, int64 [sequences, length] each: documents in random order, joined, cut; the same for every arm of a seed."""
    random = np.random.default_rng([seed, 17])
    needed = settings.steps * settings.sequences * settings.length
    rows: list[np.ndarray] = []
    while sum(map(len, rows)) < needed:
        for index in random.permutation(len(part)):
            rows += [part.document(index), np.asarray([boundary], np.int32)]
    joined = np.concatenate(rows)[:needed].astype(np.int64).reshape(-1, settings.length)
    return list(joined[random.permutation(len(joined))].reshape(settings.steps, settings.sequences, settings.length))


def joined_rows(part: Part, *, length: int, boundary: int) -> list[Tensor]:
    """A part's documents one after the other, as batches of full rows, int64 [8 or fewer, length] each."""
    return cut_rows(np.concatenate([piece for index in range(len(part)) for piece in (part.document(index), [boundary])]), length=length)


def save_data(data: ExperimentData, path: Path) -> None:
    """Write the documents and items as one file, which the processes of an experiment read."""
    arrays = {}
    for (domain, name), part in data.parts.items():
        index = data.domains.index(domain)
        arrays |= {f"{index}.{name}.tokens": part.tokens, f"{index}.{name}.starts": part.starts, f"{index}.{name}.bytes": part.bytes}
    for domain, items in data.items.items():
        arrays |= {f"{data.domains.index(domain)}.items.{column}": getattr(items, column) for column in ITEM_COLUMNS}
    write_bytes(path, save(arrays))


def load_data(path: Path, *, domains: Sequence[str], boundary: int, digest: str) -> ExperimentData:
    """What ``save_data`` wrote.

    Raises:
        InterventionError: the file is damaged, or of other domains.
    """
    again = "remove it and run the same command again"
    arrays = read_safetensors(path, error=InterventionError, hint=again)[1]
    parts, items = {}, {}
    try:
        # safetensors gives them in another order each time; what is drawn from several domains depends on theirs
        for index, name, column in sorted((key.split(".") for key in arrays), key=lambda key: (int(key[0]), *key[1:])):
            domain = domains[int(index)]
            if name == "items":
                items[domain] = Items(**{column: arrays[f"{index}.items.{column}"] for column in ITEM_COLUMNS})
            elif column == "tokens":
                parts[domain, name] = Part(**{column: arrays[f"{index}.{name}.{column}"] for column in ("tokens", "starts", "bytes")})
    except (KeyError, IndexError, ValueError) as problem:
        raise InterventionError(f"{path}: not the data of this experiment ({clipped(str(problem))}); {again}") from None
    if digest_of(parts, items) != digest:
        raise InterventionError(f"{path}: other documents than experiment.json says; {again}")
    return ExperimentData(domains=tuple(domains), parts=parts, boundary=boundary, digest=digest, items=items)
