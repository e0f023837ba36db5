"""Documents of distinguishable domains, tokenized, and the batches that training draws from them.

A batch depends only on (mix, settings, seed, step): nothing about the data order has to be saved, every arm of a comparison
sees the same data, and a resumed run gives what an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from dbes.errors import MixError
from dbes.tasks import local
from dbes.tasks.documents import kind_of, plain_text
from dbes.tasks.entries import Item, multiple_choice
from dbes.testbed.settings import MixSettings


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text. ``source`` names what it was cut from: texts of one source never stand on both sides of a split.

    Attributes:
        item: the multiple-choice question in it, if any; not trained on by itself.
    """

    id: str
    domain: str
    source: str
    text: str
    item: Item | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"text {self.id!r} (domain {self.domain!r})"

    @property
    def source_document(self) -> str:
        """The name that a recording knows the source by, whose texts it counts as one document."""
        return self.source


@dataclass(frozen=True, kw_only=True)
class TokenDocuments:
    """Tokenized documents: document i is ``tokens[starts[i]:starts[i + 1]]``."""

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True, kw_only=True)
class DomainTokens(TokenDocuments):
    """The documents of one domain."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Tokenized domains for training and the held-out documents of the same domains.

    Attributes:
        boundary: token id that stands after every document.
        token_bytes: int [vocabulary], bytes of text that each token stands for.
        digest: sha256 over all tokens and names; part of every result's identity.
    """

    training: tuple[DomainTokens, ...]
    heldout: tuple[DomainTokens, ...]
    boundary: int
    token_bytes: np.ndarray
    digest: str

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.training)

    def only(self, names: Sequence[str]) -> Mix:
        """The same mix with some of its domains, in the order given; all of them for no names.

        Raises:
            MixError: a name that the mix does not have.
        """
        if not names:
            return self
        unknown = sorted(set(names) - set(self.domains))
        if unknown or len(set(names)) != len(names):
            raise MixError(f"domains {unknown or list(names)}: expected distinct names among {list(self.domains)}")
        training, heldout = (tuple(side[self.domains.index(name)] for name in names) for side in (self.training, self.heldout))
        return replace(self, training=training, heldout=heldout)


@dataclass(frozen=True, kw_only=True)
class DomainBatch:
    """One global batch: every sequence has one domain and no padding.

    Attributes:
        tokens: int64 [sequences, length].
        domain: int64 [sequences], index into the mix's domains.
    """

    tokens: np.ndarray
    domain: np.ndarray


def read_texts(path: Path) -> list[Text]:
    """The texts of a JSONL file (or .jsonl.gz) with id, domain, text and source_document; of other fields only question, choices and answer
    are read.

    Raises:
        MixError: unreadable file, a line that is not such an object, an empty text, no texts.
    """
    texts = []
    for number, row in local.rows(path, "jsonl", error=MixError):
        where = f"{path}:{number}"
        fields = {}
        for name in ("id", "domain", "text", "source_document"):
            if not isinstance(row.get(name), str):
                raise MixError(f"{where}: expected id, domain, text and source_document; {name} is {kind_of(row.get(name))}")
            fields[name] = plain_text(row[name], name, where, error=MixError)
        question = row.get("question")
        item = multiple_choice(question if isinstance(question, str) else "", row.get("choices"), row.get("answer"))
        if not fields["text"].strip():
            raise MixError(f"{where}: document {fields['id']} has no text")
        for choice in item.choices if item is not None else ():
            plain_text(choice, "choices", where, error=MixError)
        texts.append(Text(id=fields["id"], domain=fields["domain"], source=fields["source_document"], text=fields["text"], item=item))
    if not texts:
        raise MixError(f"{path}: no texts in it")
    return texts


def is_heldout(source: str, *, share: float) -> bool:
    """Whether texts of this source are held out: decided by a hash of the source alone, so it never changes."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8]) < share * 2**64


def token_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes of text behind each id of a byte-level tokenizer; 0 for special tokens."""
    lengths = np.zeros(len(tokenizer), np.int64)
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        # One character of a byte-level token is one byte of text.
        lengths[index] = 0 if index in special else len(token)
    return lengths


def tokenize_mix(texts: Mapping[str, Sequence[Text]], tokenizer: PreTrainedTokenizerFast, *, heldout_share: float) -> Mix:
    """The mix of some texts by domain, split by source before anything is tokenized.

    Raises:
        MixError: a domain without training or without held-out documents.
    """
    training, heldout = [], []
    for name, domain_texts in texts.items():
        sides: dict[bool, list[str]] = {False: [], True: []}
        for text in domain_texts:
            sides[is_heldout(text.source, share=heldout_share)].append(text.text)
        for side, found in (("training", sides[False]), ("held-out", sides[True])):
            if not found:
                raise MixError(f"domain {name}: no {side} documents among {len(domain_texts)}; add documents of other sources")
        training.append(_tokenize(name, sides[False], tokenizer))
        heldout.append(_tokenize(name, sides[True], tokenizer))
    digest = hashlib.sha256()
    for domain in (*training, *heldout):
        digest.update(domain.name.encode() + b"\0" + domain.starts.tobytes() + domain.tokens.tobytes())
    return Mix(
        training=tuple(training),
        heldout=tuple(heldout),
        boundary=int(tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
        token_bytes=token_lengths(tokenizer),
        digest=digest.hexdigest(),
    )


def _tokenize(name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> DomainTokens:
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    documents = [np.asarray(document.ids, np.int32) for document in encoded]
    return DomainTokens(name=name, tokens=np.concatenate(documents), starts=np.cumsum([0, *(len(document) for document in documents)]))


def cut_sequences(domain: DomainTokens, length: int, *, boundary: int, generator: np.random.Generator) -> np.ndarray:
    """One pass over a domain as int32 [sequences, length], in random order; every document's first window starts a sequence.

    A document is cut at multiples of ``length`` from its own beginning; what remains of documents (short ones whole) is
    joined, a boundary token after each, and cut again. The number of sequences is the same for every order.

    Raises:
        MixError: the domain has fewer tokens than one sequence.
    """
    windows, remainders = [], []
    for index in generator.permutation(len(domain)):
        document = domain.document(index)
        whole = len(document) // length * length
        if whole:
            windows.append(document[:whole].reshape(-1, length))
        remainders += [document[whole:], np.asarray([boundary], np.int32)]
    joined = np.concatenate(remainders)
    windows.append(joined[: len(joined) // length * length].reshape(-1, length))
    sequences = np.concatenate(windows)
    if not len(sequences):
        raise MixError(f"domain {domain.name}: {len(domain.tokens)} tokens are fewer than one sequence of {length}")
    return sequences[generator.permutation(len(sequences))]


class Batches:
    """The batches of a run by step; keeps the current pass over each domain, nothing that changes what a step returns."""

    def __init__(self, mix: Mix, settings: MixSettings, *, steps: int, seed: int) -> None:
        self.mix = mix.only(settings.domains)
        self.settings = settings
        self.seed = seed
        self._plan, self._index = _plan(len(self.mix.domains), settings, steps, seed)
        self._passes: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        for domain in range(len(self.mix.domains)):
            for length in set(settings.lengths):
                self._sequences(domain, length, 0)

    def __call__(self, step: int) -> DomainBatch:
        length = self.settings.lengths[step % len(self.settings.lengths)]
        rows = []
        for domain, index in zip(self._plan[step], self._index[step], strict=True):
            row = self._sequence(int(domain), length, int(index))
            rows.append(self._overlapped(row, int(domain), step, len(rows)) if self.settings.overlap else row)
        return DomainBatch(tokens=np.stack(rows).astype(np.int64), domain=self._plan[step].astype(np.int64))

    def _sequence(self, domain: int, length: int, index: int) -> np.ndarray:
        per_pass = len(self._passes[domain, length][1])
        turn, place = divmod(index, per_pass)
        return self._sequences(domain, length, turn)[place]

    def _sequences(self, domain: int, length: int, turn: int) -> np.ndarray:
        if (domain, length) not in self._passes or self._passes[domain, length][0] != turn:
            # Seeded by the name, so that leaving out another domain does not change this one's order.
            name = int.from_bytes(hashlib.sha256(self.mix.domains[domain].encode()).digest()[:4])
            generator = np.random.default_rng([self.seed, name, length, turn])
            sequences = cut_sequences(self.mix.training[domain], length, boundary=self.mix.boundary, generator=generator)
            self._passes[domain, length] = (turn, sequences)
        return self._passes[domain, length][1]

    def _overlapped(self, row: np.ndarray, domain: int, step: int, place: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, 1, step, place])
        return overlap_domains(row, self.mix.training, domain, self.settings, generator)


def overlap_domains(
    row: np.ndarray, domains: Sequence[DomainTokens], own: int, settings: MixSettings, generator: np.random.Generator
) -> np.ndarray:
    """A sequence in which a share of the spans was replaced by spans of other domains."""
    row = row.copy()
    others = [index for index in range(len(domains)) if index != own]
    for start in range(0, len(row), settings.span):
        if others and generator.random() < settings.overlap:
            other = domains[others[generator.integers(len(others))]]
            size = min(settings.span, len(row) - start, len(other.tokens))
            begin = int(generator.integers(len(other.tokens) - size + 1))
            row[start : start + size] = other.tokens[begin : begin + size]
    return row


def _plan(domains: int, settings: MixSettings, steps: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every step: the domain of each sequence, and how many sequences of this domain and length came before it."""
    weights = np.asarray(settings.weights or np.ones(domains)) / np.sum(settings.weights or np.ones(domains))
    if len(weights) != domains:
        raise MixError(f"{len(weights)} weights for {domains} domains")
    plan, index = [], []
    used = {length: np.zeros(domains, np.int64) for length in settings.lengths}
    owed = np.zeros(domains)
    for step in range(steps):
        generator = np.random.default_rng([seed, 2, step])
        length = settings.lengths[step % len(settings.lengths)]
        sequences = settings.tokens_per_step // length
        if settings.stratified:
            if not settings.weights and sequences % domains:
                raise MixError(f"a stratified batch of {sequences} sequences cannot hold {domains} domains equally often")
            owed = owed + sequences * weights
            counts = np.floor(owed + 1e-9).astype(np.int64)
            # What rounding leaves over goes to the domains that are owed most; the rest is carried to the next step.
            for late in np.argsort(-(owed - counts), kind="stable")[: sequences - counts.sum()]:
                counts[late] += 1
            owed = owed - counts
        else:
            counts = generator.multinomial(sequences, weights)
        shuffled = generator.permutation(domains)
        if settings.order == "one_domain":
            chosen = np.repeat(shuffled, counts[shuffled])
        else:
            rounds = [[domain for domain in shuffled if counts[domain] > turn] for turn in range(int(counts.max()))]
            chosen = np.concatenate([np.asarray(turn, np.int64) for turn in rounds])
        before = np.zeros(sequences, np.int64)
        for domain in range(domains):
            places = np.flatnonzero(chosen == domain)
            before[places] = used[length][domain] + np.arange(len(places))
            used[length][domain] += len(places)
        plan.append(chosen)
        index.append(before)
    return plan, index
