"""Placebo comparisons: the texts of one domain, split in two and scored as if they were two domains.

Split at random the halves must show nothing: that the score is 0 and p is not small is shown on the very texts at hand. Its p is one
draw from the null by construction, whatever depends on what in the texts: it checks test and score, not the texts. Split into shorter and
longer texts they show what length, and with it the position, does to routing; texts of another length can also be of another kind.

Both are scored as the domains are: the corrected specialization as a share of the ideal router's for two domains, with the interval of
the jackknife over source texts, and the test of equal usage, all layers together. Running sums over layers are all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dbes.scoring.descriptive import random_halves
from dbes.scoring.equal_usage import UsageTest
from dbes.scoring.grouping import Grouping
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.permutation import permuted_labels
from dbes.scoring.reference import ideal_values
from dbes.scoring.resampling import Jackknife, document_scores, holm, jackknife
from dbes.scoring.resolution import SIGNIFICANCE, smallest_label_p
from dbes.wording import p_words

KINDS = ("random", "length")

FEWEST_TEXTS = 8
"""Source texts of a domain that is split: of fewer, no split could have a p below .05 but by accident of an odd number, and the
interval of so few holds too rarely."""

FEWEST_PERMUTATIONS = 199
PER_DOMAIN = 40
"""Permutations for every domain at least, so that one of them can be rejected after Holm."""

ORDER_SEED = 1
"""Added to the seed of the permutations, which must not be drawn from the numbers that the halves were drawn from."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the two halves of a domain show.

    Attributes:
        texts: source texts of both halves.
        score: corrected, as a share of the ideal router's for two domains; 0 is nothing. With its 95 % interval.
        p: one-sided, of the test that both halves use the experts alike. p_holm: adjusted over the domains.
        p_least: the smallest p that so many texts and permutations can give.
    """

    texts: int
    score: float
    score_low: float
    score_high: float
    p: float
    p_least: float
    p_holm: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Placebo:
    """The splits of one kind: of each domain with enough texts, and of all together.

    Attributes:
        score: mean of the domains' scores, with its 95 % interval. NaN without domains.
        p: the smallest of the domains' after Holm; p_least: the smallest it could have been. NaN without domains or permutations.
    """

    domains: dict[str, Split]
    score: float
    score_low: float
    score_high: float
    p: float
    p_least: float

    @property
    def rejected(self) -> tuple[str, ...]:
        """Domains whose halves are told apart."""
        return tuple(name for name, found in self.domains.items() if found.p_holm <= SIGNIFICANCE)


class Placebos:
    """Splits the texts of every domain and scores the halves, one layer after the other.

    Args:
        tokens, domain: int [texts]. What was cut from one source must be one text.
        names: of the domains.
        permutations: at least; 0 makes no test.
        seed: of the halves and the permutations.
        grouping: of the texts, where they are many: groups of them, inside the halves, are left out in turn.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        domain: np.ndarray,
        names: Sequence[str],
        *,
        permutations: int,
        seed: int,
        grouping: Grouping | None = None,
    ) -> None:
        half, self.seed = random_halves(domain, seed=seed), seed
        self.many = max(permutations, FEWEST_PERMUTATIONS, PER_DOMAIN * len(names) - 1) if permutations else 0
        members = {name: np.flatnonzero(domain == index) for index, name in enumerate(names)}
        self.halves = {
            name: _Halves(own, tokens[own], half[own], permutations=self.many, seed=seed, grouping=grouping)
            for name, own in members.items()
            if len(own) >= FEWEST_TEXTS
        }

    def watching(self, layers: Iterable[LayerCounts]) -> Iterator[LayerCounts]:
        """The same layers, each added as it passes."""
        for sums in layers:
            self.add(sums)
            yield sums

    def add(self, sums: LayerCounts) -> None:
        """Add a layer."""
        ideal = float(ideal_values(2, sums.shape.experts[0], sums.shape.top_k[0])["specialization"][-1])
        for each in self.halves.values():
            each.add(sums.hits[each.members], ideal)

    def found(self) -> dict[str, Placebo]:
        """What the splits of each kind show in all layers that were added."""
        splits: dict[str, dict[str, tuple[Jackknife, Split]]] = {kind: {} for kind in KINDS}
        blocks = {name: len(each.products) for name, each in self.halves.items()}
        for size in sorted({*blocks.values()}):  # one order of blocks for all domains of so many: the same numbers would be drawn for each
            orders = permuted_labels(np.arange(size), permutations=self.many, seed=self.seed + ORDER_SEED)
            for name, each in self.halves.items():
                if blocks[name] == size:
                    for kind in each.sides:
                        splits[kind][name] = each.found(kind, orders)
        return {kind: _together({name: found[name] for name in self.halves if name in found}) for kind, found in splits.items()}


def placebo_warnings(found: Mapping[str, Placebo]) -> Iterator[str]:
    """A line for each kind whose halves are told apart."""
    random, length = found.get("random"), found.get("length")
    if random is not None and random.rejected:
        yield (
            f"placebo: the texts of {', '.join(random.rejected)}, split in two at random, look like two domains ({p_words(random.p)} after "
            "Holm), which chance does in one of 20 evaluations; score with another seed, and if it stays trust no p here"
        )
    if length is not None and length.rejected:
        yield (
            f"placebo: shorter and longer texts of {', '.join(length.rejected)} are routed differently ({p_words(length.p)} after Holm): "
            "routing depends on the length or the position of text, or shorter texts are of another kind; where domains differ in "
            "length, look at `dbes score --match length`"
        )


class _Halves:
    """The two splits of one domain, and running sums over layers."""

    def __init__(
        self,
        members: np.ndarray,
        tokens: np.ndarray,
        random: np.ndarray,
        *,
        permutations: int,
        seed: int,
        grouping: Grouping | None,
    ) -> None:
        self.members = members
        self.sides = {"random": random} if tokens.min() == tokens.max() else {"random": random, "length": _longer(tokens, seed=seed)}
        # Products of texts know nothing of labels, so that both splits share them, and blocks where there are many texts.
        both = 2 * random + self.sides.get("length", 0)
        test = UsageTest.of(tokens, both, domains=4, permutations=0, seed=seed)
        self.test, self.least = test, {}
        self.blocks = {"random": test.labels[0] // 2, "length": test.labels[0] % 2}
        for kind in self.sides:
            least = smallest_label_p(np.bincount(self.blocks[kind]).tolist())
            self.least[kind] = max(least, 1 / (1 + permutations)) if permutations else np.nan
        self.products = np.zeros((1, 1))
        self.whole = dict.fromkeys(self.sides, 0.0)
        self.groups = {} if grouping is None else {kind: grouping.inside(members, side) for kind, side in self.sides.items()}
        self.left_out = {kind: np.zeros(len(self._labels(kind))) for kind in self.sides}
        self.ideal = 0.0

    def add(self, hits: np.ndarray, ideal: float) -> None:
        """Add the hits of its texts [texts, 1, experts] at a layer."""
        self.products = self.products + self.test.products(hits[:, 0])
        self.ideal += ideal
        for kind in self.sides:
            rows = self.groups[kind].add(hits) if self.groups else hits
            whole, left_out = document_scores(rows, self._labels(kind), 2)
            self.whole[kind] += float(whole.divergence.mean())
            self.left_out[kind] += left_out.divergence.mean(axis=(1, 2))

    def _labels(self, kind: str) -> np.ndarray:
        """Half of each text, or of each group of texts."""
        return self.groups[kind].label if self.groups else self.sides[kind]

    def found(self, kind: str, orders: np.ndarray) -> tuple[Jackknife, Split]:
        """What the split of one kind shows; ``orders`` [permutations, blocks] are those of the test."""
        block = self.blocks[kind]
        test = replace(self.test, labels=np.concatenate([block[None], block[orders]]), domains=2)
        score = jackknife(np.asarray(self.whole[kind] / self.ideal), self.left_out[kind] / self.ideal, self._labels(kind))
        value, reach = float(score.corrected), float(score.reach)
        p = float(test.p(self.products)[-1]) if not np.isnan(value) else float("nan")
        return score, Split(
            texts=len(self.members), score=value, score_low=value - reach, score_high=value + reach, p=p, p_least=self.least[kind]
        )


def _longer(tokens: np.ndarray, *, seed: int) -> np.ndarray:
    """1 for the longer half of the texts, int8 [texts]; equal lengths in random order."""
    order = np.lexsort((np.random.default_rng(seed).permutation(len(tokens)), tokens))
    longer = np.zeros(len(tokens), np.int8)
    longer[order[(len(tokens) + 1) // 2 :]] = 1
    return longer


def _together(splits: dict[str, tuple[Jackknife, Split]]) -> Placebo:
    p = holm([split.p for _, split in splits.values()])
    found = {name: replace(split, p_holm=float(each)) for (name, (_, split)), each in zip(splits.items(), p, strict=True)}
    if not found:
        return Placebo(domains={}, score=np.nan, score_low=np.nan, score_high=np.nan, p=np.nan, p_least=np.nan)
    # Domains are independent: variances add up, and Satterthwaite's degrees of freedom with them.
    variance = np.array([score.error**2 for score, _ in splits.values()]) / len(found) ** 2
    freedom = np.array([score.freedom for score, _ in splits.values()])
    spread = (variance**2 / freedom).sum()
    mean = Jackknife(
        corrected=np.asarray(np.mean([split.score for split in found.values()])),
        error=np.sqrt(variance.sum()),
        freedom=np.where(spread > 0, variance.sum() ** 2 / max(spread, np.finfo(float).tiny), np.inf),
    )
    return Placebo(
        domains=found,
        score=float(mean.corrected),
        score_low=float(mean.corrected - mean.reach),
        score_high=float(mean.corrected + mean.reach),
        p=float(p[~np.isnan(p)].min(initial=1.0)) if not np.isnan(p).all() else float("nan"),
        p_least=float(np.minimum(1.0, len(found) * np.min([split.p_least for split in found.values()]))),
    )
