"""How often the domain of an unseen text is named from its routing alone: out of sample, so that no plug-in bias is in it.

The rule is naive Bayes with the logarithm replaced by its first-order term. With h hits of a text, n their sum, p_d the shares of
experts in the training texts of domain d and q those in all of them, the text is given the domain of the largest

.. math:: s_d = \\sum_e h_e \\Big(\\frac{p_{de}}{q_e} - 1\\Big) - \\frac{n}{2} U_d, \\qquad
   U_d = \\frac{\\sum_{i \\ne j \\in d} \\langle r_i, r_j \\rangle}{\\sum_{i \\ne j \\in d} n_i n_j}, \\quad
   r_i = \\frac{h_i - n_i q}{\\sqrt q},

which is the nearest domain in chi-square distance, its squared norm estimated from pairs of different texts. Plain naive Bayes
names a domain less the more noise its estimated shares hold, and does so the more firmly the longer the text is: where the domains'
texts differ in length it is above chance without any difference in routing. The mean of U_d is 0 then, whatever the lengths.

s_d is additive over layers: of all layers only its running sum is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse, special

from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.sampling import TokenSample

FOLDS = 5

CALIBRATION_TEXTS = 4096
"""Texts at most that the one number of the calibration is fitted to."""

Z95 = 1.959963984540054
TIE = 1e-9
"""Scores per hit that differ by no more are equal: no rounding names a domain."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What was named right, of texts that the rule was not trained on. All is NaN where a domain has fewer than two texts.

    Attributes:
        accuracy: share of texts whose domain is named, mean of the domains; chance is 1 / domains. A tie counts as a draw by lot.
        accuracy_low, accuracy_high: 95 % interval over texts for the rules as they were trained: Wilson's in each domain, put
            together by MOVER (Zou & Donner 2008, doi:10.1002/sim.3095). Texts that one rule names err together: without any difference
            between domains it held chance in 65 to 96 % of simulated runs, least with few texts of unequal lengths. Whether there is
            a difference at all, the permutation test tells.
        bits: mean over domains and texts of log2(probability of the right domain x domains): 0 is chance, below 0 worse,
            log2(domains) the most. NaN where a domain has two texts.
        texts: how many there are.
    """

    accuracy: float = float("nan")
    accuracy_low: float = float("nan")
    accuracy_high: float = float("nan")
    bits: float = float("nan")
    texts: int = 0


class Decoder:
    """Names the domains of texts from one layer after the other, and from all that it saw.

    Texts are dealt out to ``FOLDS`` parts, fewer where a domain has fewer texts; each part is named by the others.

    Args:
        domain: int [texts], domain of each. What was cut from one source must be one text.
        domains: how many there are.
        seed: of the parts.
    """

    def __init__(self, domain: np.ndarray, domains: int, *, seed: int) -> None:
        self.domain, self.domains = domain, domains
        texts = np.bincount(domain, minlength=domains)
        self.folds = min(FOLDS, int(texts.min())) if domains > 1 else 0
        turn = turns(domain, seed=seed)
        self.fold = turn % max(self.folds, 1)
        # Enough texts to fit one number; their turns were drawn, so that they are spread over the parts evenly.
        self.chosen = np.flatnonzero(turn < max(FOLDS, CALIBRATION_TEXTS // domains))
        self.layers: list[Decoded] = []
        self.hits = np.zeros(len(domain))
        self.held = np.zeros((len(domain), domains))
        self.inner = np.zeros((len(self.chosen), max(self.folds, 1), domains))

    def watching(self, layers: Iterable[LayerCounts]) -> Iterator[LayerCounts]:
        """The same layers, each added as it passes."""
        for sums in layers:
            self.add(sums.hits[:, 0])
            yield sums

    def add(self, hits: np.ndarray | sparse.csr_matrix) -> Decoded:
        """What the hits [texts, experts] of one layer tell."""
        if self.folds < 2:
            found = Decoded(texts=len(self.domain))
        else:
            counts = hits.astype(np.float64) if isinstance(hits, np.ndarray) else hits
            size = np.asarray(counts.sum(axis=1)).ravel()
            held, inner = self._scores(counts, size)
            found = self._decoded(held, inner, size)
            self.hits, self.held, self.inner = self.hits + size, self.held + held, self.inner + inner
        self.layers.append(found)
        return found

    def together(self) -> Decoded:
        """What all layers tell that were added: their scores are added up."""
        return Decoded(texts=len(self.domain)) if self.folds < 2 else self._decoded(self.held, self.inner, self.hits)

    def _scores(self, hits: np.ndarray | sparse.csr_matrix, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of every text by the other parts, [texts, domains]; of chosen texts also without one further part at a time.

        The latter, [chosen, parts, domains], tell how far scores can be trusted on texts that had no part in the rule.
        """
        cells = self.folds * self.domains
        member = sparse.csr_matrix((np.ones(len(size)), (self.fold * self.domains + self.domain, np.arange(len(size)))), (cells, len(size)))
        squares = hits**2 if isinstance(hits, np.ndarray) else hits.multiply(hits)
        own, own_squares = (_dense(member @ each).reshape(self.folds, self.domains, -1) for each in (hits, squares))
        sizes = (member @ size**2).reshape(self.folds, self.domains)
        held, inner = np.zeros((len(size), self.domains)), np.zeros_like(self.inner)
        chosen_fold = self.fold[self.chosen]
        for first in range(self.folds):
            for second in range(first, self.folds if self.folds > 2 else first + 1):
                kept = ~np.isin(np.arange(self.folds), (first, second))
                weight, norm = rule(own[kept].sum(axis=0), own_squares[kept].sum(axis=0), sizes[kept].sum(axis=0))

                def scored(rows: np.ndarray, weight: np.ndarray = weight, norm: np.ndarray = norm) -> np.ndarray:
                    return np.asarray(hits[rows] @ weight.T) - size[rows, None] / 2 * norm

                if first == second:
                    rows = np.flatnonzero(self.fold == first)
                    held[rows] = scored(rows)
                else:
                    for fold, other in ((first, second), (second, first)):
                        among = np.flatnonzero(chosen_fold == fold)
                        inner[among, other] = scored(self.chosen[among])
        return held, inner

    def _decoded(self, held: np.ndarray, inner: np.ndarray, size: np.ndarray) -> Decoded:
        # Probabilities come from scores per hit: the tokens of a text depend on each other, so that ten times the tokens are not ten
        # times the evidence, and how long a text is must not tell how sure its domain is.
        each = 1 / np.maximum(size, 1)
        held, inner = held * each[:, None], inner * each[self.chosen, None, None]
        best = held >= held.max(axis=1, keepdims=True) - TIE
        right = best[np.arange(len(held)), self.domain] / best.sum(axis=1)
        accuracy, low, high = mean_share(right, self.domain, self.domains)
        if self.folds < 3:
            return Decoded(accuracy=accuracy, accuracy_low=low, accuracy_high=high, texts=len(held))
        gain = np.zeros(len(held))
        chosen_domain, chosen_fold = self.domain[self.chosen], self.fold[self.chosen]
        for fold in range(self.folds):
            others, rows = chosen_fold != fold, self.fold == fold
            scale = calibration(inner[others, fold], chosen_domain[others])
            chances = special.log_softmax(scale * held[rows], axis=1)
            gain[rows] = chances[np.arange(len(chances)), self.domain[rows]] / np.log(2) + np.log2(self.domains)
        bits = np.mean([gain[self.domain == each].mean() for each in range(self.domains)])
        return Decoded(accuracy=accuracy, accuracy_low=low, accuracy_high=high, bits=float(bits), texts=len(held))


def turns(domain: np.ndarray, *, seed: int) -> np.ndarray:
    """int [texts]: the place of each text in a random order of the texts of its domain."""
    generator = np.random.default_rng(seed)
    turn = np.empty(len(domain), dtype=np.int64)
    for each in np.unique(domain):
        members = np.flatnonzero(domain == each)
        turn[members] = generator.permutation(len(members))
    return turn


def rule(hits: np.ndarray, squares: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each expert p / q - 1, [domains, experts], and U, [domains], see the head of this file.

    U is 0 everywhere where a domain has no pair of texts with hits.

    Args:
        hits, squares: sums over the training texts of each domain of their hits and squared hits, [domains, experts].
        sizes: sums of the squared hits of whole texts, [domains].
    """
    total = hits.sum(axis=1)
    usage = hits.sum(axis=0) / max(hits.sum(), 1)
    expected = total[:, None] * usage
    weight = np.divide(hits, expected, out=np.ones_like(hits), where=expected > 0) - 1
    alone = np.divide(squares, usage, out=np.zeros_like(squares), where=usage > 0).sum(axis=1) - sizes
    pairs = total**2 - sizes
    if not (pairs > 0).all():
        return weight, np.zeros(len(hits))
    return weight, (total**2 * (usage * weight**2).sum(axis=1) - alone) / pairs


def calibration(scores: np.ndarray, domain: np.ndarray) -> float:
    """The number >= 0 by which scores are multiplied to be log-odds: the likeliest, each domain weighing the same.

    The labels are not taken for certain but as Platt (1999) has them, as if there were one more text of every domain, so that a few
    texts that happen to be told apart prove nothing.

    Args:
        scores: [texts, domains], of texts that had no part in the rule that gave them.
    """
    texts, domains = scores.shape
    largest = np.abs(scores - scores.mean(axis=1, keepdims=True)).max(initial=0)
    if largest <= 0:
        return 0.0
    scaled = (scores - scores.mean(axis=1, keepdims=True)) / largest
    weight = 1 / (domains * np.bincount(domain, minlength=domains)[domain])
    target = np.full(scores.shape, 1 / (texts + domains))
    target[np.arange(texts), domain] = (texts + 1) / (texts + domains)
    wanted = float(weight @ (target * scaled).sum(axis=1))

    def slope(scale: float) -> float:
        return wanted - float(weight @ (special.softmax(scale * scaled, axis=1) * scaled).sum(axis=1))

    if slope(0) <= 0:
        return 0.0
    high = 1.0
    while slope(high) > 0 and high < 2.0**60:
        high *= 2
    return high / largest if slope(high) > 0 else optimize.brentq(slope, 0, high) / largest


def mean_share(right: np.ndarray, domain: np.ndarray, domains: int) -> tuple[float, float, float]:
    """Mean over the domains of the share that is right, and its 95 % interval."""
    texts = np.bincount(domain, minlength=domains)
    share = np.bincount(domain, weights=right, minlength=domains) / texts
    middle = (share + Z95**2 / (2 * texts)) / (1 + Z95**2 / texts)
    half = Z95 / (1 + Z95**2 / texts) * np.sqrt(share * (1 - share) / texts + Z95**2 / (4 * texts**2))
    low = share.mean() - np.sqrt(((share - middle + half) ** 2).sum()) / domains
    high = share.mean() + np.sqrt(((middle + half - share) ** 2).sum()) / domains
    return float(share.mean()), float(max(low, 0)), float(min(high, 1))


def decoded_words(sample: TokenSample | None, domain: np.ndarray, domains: int, *, seed: int) -> Decoded:
    """The same rule with the tokens of the texts of a sample for experts: what the words alone tell. NaN without token ids.

    Args:
        sample: its ``document`` numbers the texts.
        domain: int [texts]. With a sample of all texts the parts are those of the routing.
    """
    if sample is None or sample.routes.token_ids is None:
        return Decoded()
    texts, row = np.unique(sample.routes.document, return_inverse=True)
    words, column = np.unique(sample.routes.token_ids, return_inverse=True)
    counts = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(texts), len(words)))
    return Decoder(domain[texts], domains, seed=seed).add(counts)


def _dense(sums: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    return sums if isinstance(sums, np.ndarray) else sums.toarray()
