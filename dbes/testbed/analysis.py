"""What else held-out routing says: topic against syntax, what a probe could read, and the tokens that carry the decision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.special import entr
from transformers import PreTrainedTokenizerFast

from dbes.scoring.score import score
from dbes.testbed.heldout import Heldout
from dbes.trace.store import Trace
from dbes.trace.types import TokenRoutes

TOKEN_CLASSES = ("word start", "word piece", "digit", "punctuation", "white space", "other script")
"""Classes of tokens, read off the tokenizer's own vocabulary; there is no tagger in this."""

SHUFFLES = 5


def token_classes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Class of every vocabulary id, int [vocabulary], index into TOKEN_CLASSES."""
    classes = np.full(len(tokenizer), TOKEN_CLASSES.index("other script"))
    for token in range(len(tokenizer)):
        text = "".join(tokenizer.decode([token]))
        bare = text.strip()
        if not bare:
            name = "white space"
        elif not bare.isascii():
            name = "other script"
        elif bare.isdigit():
            name = "digit"
        elif bare[0].isalpha():
            name = "word start" if text[0].isspace() else "word piece"
        else:
            name = "punctuation"
        classes[token] = TOKEN_CLASSES.index(name)
    return classes


def conditional_information(experts: np.ndarray, labels: np.ndarray, given: np.ndarray) -> float:
    r"""I(expert; label | given) in nats, plug-in, over (token, slot) pairs.

    .. math:: \\sum_g p(g) [ H(E | g) - \\sum_c p(c | g) H(E | c, g) ]

    0 when the label says nothing about the expert once ``given`` is known.

    Args:
        experts: int [tokens, slots].
        labels, given: int [tokens].
    """
    width = int(experts.max()) + 1
    table = np.zeros((int(given.max()) + 1, int(labels.max()) + 1, width))
    np.add.at(table, (np.repeat(given, experts.shape[1]), np.repeat(labels, experts.shape[1]), experts.reshape(-1)), 1)
    table /= table.sum()
    joint = entr(table).sum()
    return float(entr(table.sum(1)).sum() - entr(table.sum((1, 2))).sum() - joint + entr(table.sum(2)).sum())


def topic_and_syntax(heldout: Heldout, classes: np.ndarray) -> dict[str, list[float]]:
    """How much of an expert's choice is topic and how much is syntax, by layer, in nats above chance.

    ``topic``: I(E; domain | token class), chance by shuffling the documents' domains; ``syntax``: I(E; token class | domain),
    chance by shuffling token classes inside documents. Each is conditional on the other, so that a class that only one domain
    has counts for neither.
    """
    generator = np.random.default_rng(0)
    (routes,) = heldout.trace.loaded
    assert routes.token_ids is not None
    document_domain = heldout.trace.shape.document_domain
    domain, kind = document_domain[routes.document], classes[routes.token_ids]
    # Sorting by (document, random) permutes the tokens inside every document.
    within = [np.lexsort((generator.random(len(kind)), routes.document)) for _ in range(SHUFFLES)]
    between = [generator.permutation(document_domain)[routes.document] for _ in range(SHUFFLES)]
    found: dict[str, list[float]] = {"topic": [], "syntax": []}
    for layer in range(routes.ids.shape[1]):
        experts = routes.ids[:, layer].astype(np.int64)
        topic = conditional_information(experts, domain, kind)
        syntax = conditional_information(experts, kind, domain)
        found["topic"].append(topic - float(np.mean([conditional_information(experts, other, kind) for other in between])))
        found["syntax"].append(syntax - float(np.mean([conditional_information(experts, kind[order], domain) for order in within])))
    return found


def domain_probe(heldout: Heldout) -> dict[str, list[float]]:
    """How well a token's domain can be told from the router's input, and from the experts it was sent to, by layer.

    ``input``: accuracy of a linear probe (ridge, penalty 1) on what the router sees; ``experts``: accuracy of naive Bayes on the chosen
    experts. Both learn on every other document of each domain and are tested on the rest; chance is ``chance``.
    """
    if heldout.inputs is None:
        raise ValueError("measure with keep_inputs=True first")
    (routes,) = heldout.trace.loaded
    shape = heldout.trace.shape
    rank = np.zeros(len(shape.document_domain), np.int64)
    for domain in range(len(shape.domains)):
        members = np.flatnonzero(shape.document_domain == domain)
        rank[members] = np.arange(len(members))
    domain, learning = shape.document_domain[routes.document], rank[routes.document] % 2 == 0
    targets = np.eye(len(shape.domains))[domain]
    found: dict[str, list[float]] = {"input": [], "experts": [], "chance": []}
    for layer in range(routes.ids.shape[1]):
        seen = heldout.inputs[:, layer].astype(np.float64)
        seen = np.concatenate([(seen - seen[learning].mean(0)) / (seen[learning].std(0) + 1e-9), np.ones((len(seen), 1))], axis=1)
        gram = seen[learning].T @ seen[learning] + np.eye(seen.shape[1])
        weights = np.linalg.solve(gram, seen[learning].T @ targets[learning])
        found["input"].append(float(((seen[~learning] @ weights).argmax(1) == domain[~learning]).mean()))
        counts = np.ones((len(shape.domains), shape.experts[layer]))
        experts = routes.ids[:, layer].astype(np.int64)
        np.add.at(counts, (domain[learning][:, None], experts[learning]), 1)
        likelihood = np.log(counts / counts.sum(1, keepdims=True))
        told = likelihood[:, experts[~learning]].sum(-1).argmax(0)
        found["experts"].append(float((told == domain[~learning]).mean()))
        found["chance"].append(float(np.bincount(domain[~learning]).max() / (~learning).sum()))
    return found


def forking_tokens(heldout: Heldout) -> dict[str, float]:
    """Normalised specialization (jackknifed) on the tokens of highest prediction entropy, and on as many of the others.

    The highest-entropy fifth is taken inside every domain, so that both sides hold each domain equally.
    """
    generator = np.random.default_rng(0)
    (routes,) = heldout.trace.loaded
    domain = heldout.trace.shape.document_domain[routes.document]
    forking, others = [], []
    for index in range(len(heldout.trace.shape.domains)):
        rows = np.flatnonzero(domain == index)
        rows = rows[np.argsort(-heldout.entropy[rows], kind="stable")]
        count = int(0.2 * len(rows))
        forking.append(rows[:count])
        others.append(generator.choice(rows[count:], count, replace=False))
    values = {}
    for name, rows in (("forking", np.concatenate(forking)), ("others", np.concatenate(others))):
        record = score(_rows_of(heldout.trace, routes, np.sort(rows)), permutations=0).record("specialization_normalized")
        values[name] = float(record.corrected)
    return values


def _rows_of(trace: Trace, routes: TokenRoutes, rows: np.ndarray) -> Trace:
    return replace(trace, loaded=(routes.take(rows),))
