"""How small a p the texts and the permutations of a result allow: below that nothing can be found, whatever a router does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dbes.results import Result

SIGNIFICANCE = 0.05

DOUBTFUL = "Nothing should be concluded from them: there are too few different texts to tell"
"""Stands beside specialists of a result that cannot tell anything from chance."""

EXACT = 40.0
"""Logarithm of the number of labelings up to which it is counted exactly."""

SIGN_FLIPPED = "ngram_expertise_"
"""Beginning of the names of metrics that are tested by flipping signs of texts, not by permuting labels."""


def smallest_label_p(units: Sequence[int], *, domain: int | None = None) -> float:
    r"""The smallest p that permuting the domain labels of texts can give.

    .. math:: p = \frac{\prod_s m_s! \; \prod_d n_d!}{(\sum_d n_d)!}

    for n_d texts in domain d: one over the number of labelings that differ. Labelings that only exchange the names of domains of
    equal size (m_s domains have s texts) give a statistic of all domains the same value.

    Args:
        units: texts of each domain; domains without any are left out.
        domain: index of the domain whose own statistic is tested; its name cannot be exchanged. None: a statistic of all domains.
    """
    sizes = [size for size in units if size > 0]
    fixed = [] if domain is None else [units[domain]]
    exchangeable = Counter(sizes) - Counter(fixed)
    logarithm = math.lgamma(sum(sizes) + 1) - sum(math.lgamma(size + 1) for size in sizes)
    logarithm -= sum(math.lgamma(many + 1) for many in exchangeable.values())
    if logarithm > EXACT:
        return math.exp(-logarithm)
    labelings, left = 1, sum(sizes)
    for size in sorted(sizes):
        labelings *= math.comb(left, size)
        left -= size
    return math.prod(math.factorial(many) for many in exchangeable.values()) / labelings


def texts_of(result: Result) -> dict[str, int]:
    """Different source texts of each domain: copies of one text tell no more than the text."""
    distinct = result.companions.get("distinct_texts", {})
    return {domain: min(facts.sources, int(distinct.get(domain, facts.sources))) for domain, facts in result.task.domains.items()}


def smallest_p(result: Result, metric: str = "specialization", domain: str | None = None) -> float:
    """The smallest p that a metric's test could give with the texts of a result and its number of permutations.

    NaN where the result does not say how many texts it has, or no permutation was run. The same for every layer.

    Args:
        domain: the metric of this domain; None: of all domains.
    """
    texts = texts_of(result)
    permutations = result.settings.get("permutations")
    drawn = 1 / (1 + permutations) if isinstance(permutations, int) and permutations > 0 else math.nan if permutations == 0 else 0.0
    if not texts or not sum(texts.values()) or math.isnan(drawn):
        return math.nan
    if metric.startswith(SIGN_FLIPPED):
        tested = sum(texts.values()) if domain is None else texts.get(domain, 0)
        return max(drawn, 0.5 ** min(tested, 1000))
    # Of two domains, what one differs from the mixture the other does too: the statistics of both are the same.
    index = None if domain is None or len(texts) == 2 else list(texts).index(domain)
    return max(drawn, smallest_label_p(list(texts.values()), domain=index))


def cannot_tell(result: Result, metric: str = "specialization", domain: str | None = None) -> bool:
    """Whether no outcome could have been significant, so that "not above chance" would say nothing about the router.

    Nothing is said of one domain either where nothing could be found in all of them together.
    """
    return _least(result, metric, domain) > SIGNIFICANCE


def why_not(result: Result, metric: str = "specialization", domain: str | None = None) -> str:
    """Why nothing could have been significant: too few texts, or too few permutations. Only where ``cannot_tell``."""
    permutations = result.settings.get("permutations")
    least = _least(result, metric, domain)
    by_draws = isinstance(permutations, int) and permutations > 0 and math.isclose(least, 1 / (1 + permutations))
    return f"too few {'permutations' if by_draws else 'texts'} to tell; the smallest possible p is {least:.2g}"


def _least(result: Result, metric: str, domain: str | None) -> float:
    return max(smallest_p(result, metric, domain), smallest_p(result, metric))
