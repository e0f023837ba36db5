r"""The metrics, as pure functions of routing statistics: one number per layer, domain or model.

Axes of every array: ``... domains layers experts``; leading axes (permutations, deleted documents) are carried along.
``usage`` is p[d,l,e], the share of the slots of domain d at layer l that expert e got; rows sum to 1. A domain without
tokens has NaN in its row, and NaN comes out wherever it would be needed. Layers narrower than the widest are padded with
zero columns, which change no value; sizes come in as ``experts`` and ``top_k`` [layers], from the model. Logarithms are
natural (nats). Domains weigh the same, so that the size of a domain cannot drive a value.

"Published" are the definitions of the DBES reference code (arXiv 2605.18498), kept exactly, so that numbers compare with it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from scipy.special import entr, gammaln

PUBLISHED_EPSILON = 1e-10
"""Added to every share before the logarithm in the published Routing Specialization."""

NGRAM_SIZES = (2, 5, 10, 20)
"""Window lengths of the n-gram metrics."""

GROUP_SHARE = 0.85
"""Share of a domain's gate mass that the expert group of the group n-gram metric has to reach."""


def usage_of(counts: np.ndarray) -> np.ndarray:
    """Shares of the experts: counts [..., experts] divided by their sum; NaN where nothing was counted."""
    totals = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals > 0, counts / totals, np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Published metrics (METRICS section 2)


def routing_specialization(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    r"""Published RS per domain and layer, [..., domains, layers], in nats.

    .. math:: RS_{d,l} = \sum_e q \ln(q E), \quad q = (p + 10^{-10}) / \sum_e (p + 10^{-10})

    0 when experts are used evenly; ln(E/k) when always the same k are used, whatever the domain: RS counts load imbalance
    as specialization. Source: arXiv 2605.18498, reference code.
    """
    real = np.arange(usage.shape[-1]) < np.asarray(experts)[:, None]
    shares = np.where(real, usage + PUBLISHED_EPSILON, 0.0)
    shares = shares / shares.sum(axis=-1, keepdims=True)
    return np.log(np.asarray(experts)) - np.asarray(entr(shares)).sum(axis=-1)


def normalized_effective_rank(usage: np.ndarray, experts: np.ndarray, *, entropy: bool = False) -> np.ndarray:
    r"""Published NER per domain, [..., domains]: effective rank of the [layers, experts] matrix over min(L, E), at most 1.

    .. math:: NER_d = \min\Bigl(1, \frac{(\sum s)^2}{\sum s^2} / \min(L, E)\Bigr)

    with s the singular values (a participation ratio); ``entropy=True`` uses Roy & Vetterli's (2007) exp-entropy of
    s / sum(s) instead, the definition the paper cites. Changes when the experts of one layer are renamed, although nothing
    in the model changed. NaN for a domain without tokens.
    """
    finite = np.asarray(np.isfinite(usage).all(axis=(-2, -1)))
    singular = np.linalg.svd(np.where(finite[..., None, None], usage, 0.0), compute_uv=False)
    with np.errstate(invalid="ignore", divide="ignore"):
        if entropy:
            rank = np.exp(entr(singular / singular.sum(axis=-1, keepdims=True)).sum(axis=-1))
        else:
            rank = singular.sum(axis=-1) ** 2 / (singular**2).sum(axis=-1)
    return np.where(finite, np.minimum(1.0, rank / min(usage.shape[-2], int(np.max(experts)))), np.nan)


def published_domain_isolation(usage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Published DI: per domain over all layers flattened, [domains], and per domain and layer, [domains, layers].

    .. math:: DI_d = 1 - \operatorname{mean}_{d' \ne d} \cos(p_d, p_{d'})

    0 when all domains route alike, 1 when no expert serves two domains; 0 by convention with one domain only. Plug-in
    norms: inflated in small samples.
    """
    domains, layers, _ = usage.shape
    if domains == 1:
        return np.zeros(1), np.zeros((1, layers))
    flat = usage.reshape(domains, 1, -1)
    return isolation_of(cosines(flat))[..., 0], isolation_of(cosines(usage))


def expert_group(mass: np.ndarray) -> np.ndarray:
    """Members of the smallest group of experts, by descending gate mass, whose cumulative share reaches GROUP_SHARE.

    Args:
        mass: [..., experts], gate mass of one domain at one layer. Ties go to the lower expert id.
    Returns:
        bool [..., experts]; all False where there is no mass.
    """
    order = np.argsort(-mass, axis=-1, kind="stable")
    ranked = np.take_along_axis(mass, order, axis=-1).astype(np.float64)
    total = ranked.sum(axis=-1, keepdims=True)
    before = np.cumsum(ranked, axis=-1) - ranked
    # An expert belongs to the group as long as those before it have not reached the share; the slack absorbs rounding.
    chosen = (before < GROUP_SHARE * total * (1 - 1e-12)) & (total > 0)
    members = np.zeros(mass.shape, bool)
    np.put_along_axis(members, order, chosen, axis=-1)
    return members


# ---------------------------------------------------------------------------------------------------------------------
# Calibrated metrics (METRICS section 4)


def mixture_of(usage: np.ndarray) -> np.ndarray:
    """pbar[..., layers, experts]: the usage of a text drawn from every domain with equal weight."""
    return usage.mean(axis=-3)


def domain_divergence(usage: np.ndarray, mixture: np.ndarray | None = None) -> np.ndarray:
    r"""How far each domain's usage is from the mixture, [..., domains, layers], in nats.

    .. math:: KL(p_d \,\|\, \bar p) = \sum_e p_{d,e} \ln (p_{d,e} / \bar p_e)

    0 when the domain routes like the mixture; ln D when no expert it uses serves another domain. NaN for every domain when
    one of them has no tokens: there is no mixture to compare with.
    """
    mixture = mixture_of(usage) if mixture is None else mixture
    with np.errstate(divide="ignore"):
        log_mixture = np.where(mixture == 0, 0.0, np.log(mixture))
    return -entr(usage).sum(axis=-1) - np.einsum("...dle,...le->...dl", usage, log_mixture)


def domain_information(usage: np.ndarray) -> np.ndarray:
    r"""Routing specialization: information one expert choice gives about the domain, [..., layers], in nats.

    .. math:: I_w(D;E) = \sum_d w_d\, KL(p_d \,\|\, \bar p) = H(\bar p) - \sum_d w_d H(p_d), \quad w_d = 1/D

    0 when every domain uses the experts alike; ln D when no expert serves two domains. Together with ``load_divergence``
    it is the epsilon-free RS, exactly. NaN with one domain.
    """
    if usage.shape[-3] == 1:
        return np.full((*usage.shape[:-3], usage.shape[-2]), np.nan)
    return entr(mixture_of(usage)).sum(axis=-1) - entr(usage).sum(axis=-1).mean(axis=-2)


def load_divergence(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    r"""Load imbalance, [..., layers], in nats: :math:`KL(\bar p \,\|\, u)`. 0 when all experts get equal load."""
    return np.log(np.asarray(experts)) - np.asarray(entr(mixture_of(usage))).sum(axis=-1)


def information_bound(domains: int, experts: np.ndarray, top_k: np.ndarray) -> np.ndarray:
    """Largest possible domain information per layer, min(ln D, ln(E/k)), in nats; NaN where k = E leaves no choice."""
    experts, top_k = np.asarray(experts, float), np.asarray(top_k, float)
    return np.where(experts > top_k, np.minimum(np.log(max(domains, 1)), np.log(experts / top_k)), np.nan)


def grams(usage: np.ndarray) -> np.ndarray:
    """Inner products of the domains' usage at each layer, [..., layers, domains, domains]."""
    rows = np.moveaxis(usage, -3, -2)
    return rows @ np.swapaxes(rows, -1, -2)


def effective_rank(gram: np.ndarray, experts: np.ndarray) -> np.ndarray:
    r"""DER: how many different routing profiles the domains have, [..., layers], scaled to 0..1.

    .. math:: DER = \Bigl(\frac{(\operatorname{tr} G)^2}{\sum_{d d'} G_{d d'}^2} - 1\Bigr) / (\min(D, E) - 1)

    the participation ratio of the Gram matrix of the domains' usage at one layer. 0 when all domains route alike; 1 for D orthogonal
    profiles of equal norm. Unlike the published NER it does not change when experts are renamed. It is a smooth function of inner
    products, so that it is estimated without bias at 0 too, where singular values are square roots of noise. NaN with one domain or
    a domain without tokens.

    Args:
        gram: [..., layers, domains, domains], see ``unbiased_grams``.
        experts: [layers], experts of each layer.
    """
    most = np.minimum(gram.shape[-1], experts)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = (gram**2).sum(axis=(-2, -1))
        ratio = np.trace(gram, axis1=-2, axis2=-1) ** 2 / np.where(squares > 0, squares, np.nan)
        return (ratio - 1) / np.where(most < 2, np.nan, most - 1)


def entropy_rank(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    r"""DER by the entropy of singular values, [layers] (Roy & Vetterli 2007); of the counts as they are, inflated in small samples.

    .. math:: \bigl(\exp(-\sum_i s_i \ln s_i) - 1\bigr) / (\min(D, E) - 1)

    with s the singular values, scaled to sum 1, of the uncentred [domains, experts] matrix. NaN as ``effective_rank``.
    """
    rows = np.moveaxis(usage, -3, -2)
    finite = np.asarray(np.isfinite(rows).all(axis=(-2, -1)))
    singular = np.linalg.svd(np.where(finite[..., None, None], rows, 0.0), compute_uv=False)
    most = np.minimum(usage.shape[-3], experts)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = singular / singular.sum(axis=-1, keepdims=True)
        rank = (np.exp(entr(shares).sum(axis=-1)) - 1) / np.where(most < 2, np.nan, most - 1)
    return np.where(finite, rank, np.nan)


def unbiased_norms(squared: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
    r"""Squared norm of the true usage estimated without bias from n independent tokens: [...].

    .. math:: |p|^2 = (|\hat p|^2 - 1/(nk)) / (1 - 1/n)

    Args:
        squared: plug-in squared norms.
        tokens, slots: n and n k, of the same shape. NaN where n < 2 or the estimate is not positive.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = (squared - 1.0 / slots) / (1.0 - 1.0 / tokens)
        return np.where((tokens > 1) & (estimate > 0), estimate, np.nan)


def unbiased_grams(usage: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """``grams`` with squared norms on the diagonal that are unbiased for independent tokens, see ``unbiased_norms``.

    Args:
        tokens, slots: [..., domains, layers].
    """
    gram = grams(usage)
    diagonal = np.arange(gram.shape[-1])
    squared = gram[..., diagonal, diagonal]
    gram[..., diagonal, diagonal] = unbiased_norms(squared, np.swapaxes(tokens, -1, -2), np.swapaxes(slots, -1, -2))
    return gram


def isolation_of_gram(gram: np.ndarray) -> np.ndarray:
    r"""Calibrated domain isolation, [..., domains, layers]: 1 - mean cosine with the other domains.

    Args:
        gram: [..., layers, domains, domains], inner products with unbiased norms on the diagonal.
    About 0 when all domains route alike (it can be below 0 by chance), 1 when no expert serves two domains. NaN with one domain.
    """
    return isolation_of(unbiased_cosines(gram))


def unbiased_cosines(gram: np.ndarray) -> np.ndarray:
    """Cosine similarity of the domains at each layer, [..., layers, domains, domains], from unbiased norms, 1 on the diagonal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = np.diagonal(gram, axis1=-2, axis2=-1)
        norms = np.sqrt(np.where(squared > 0, squared, np.nan))
        similarity = gram / (norms[..., :, None] * norms[..., None, :])
    diagonal = np.arange(gram.shape[-1])
    similarity[..., diagonal, diagonal] = 1.0
    return similarity


def cosines(usage: np.ndarray) -> np.ndarray:
    """Plug-in cosine similarity of the domains at each layer, [..., layers, domains, domains]."""
    return cosines_of_gram(grams(usage))


def cosines_of_gram(gram: np.ndarray) -> np.ndarray:
    """The same from ``grams``."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / (norms[..., :, None] * norms[..., None, :])


def isolation_of(similarity: np.ndarray) -> np.ndarray:
    """1 - mean similarity to the other domains, [..., domains, layers], from [..., layers, domains, domains]."""
    domains = similarity.shape[-1]
    if domains < 2:
        return np.full((*similarity.shape[:-3], domains, similarity.shape[-3]), np.nan)
    others = (similarity.sum(axis=-1) - np.diagonal(similarity, axis1=-2, axis2=-1)) / (domains - 1)
    return np.swapaxes(1.0 - others, -1, -2)


def shuffled_ratio(primaries: np.ndarray, size: int) -> np.ndarray:
    """Chance that ``size`` tokens drawn from a document without replacement all have the same primary expert, [...].

    This is the exact mean of the n-gram ratio over all shuffles of the tokens inside the document: it keeps the document's
    mix of experts and removes persistence. NaN when the document has fewer than ``size`` tokens. See ``shuffled_by_expert``.
    """
    return np.where(primaries.sum(axis=-1) >= size, shuffled_by_expert(primaries, size).sum(axis=-1), np.nan)


def shuffled_by_expert(primaries: np.ndarray, size: int) -> np.ndarray:
    r"""Chance that ``size`` tokens drawn from a document without replacement all have this primary expert, [..., experts].

    .. math:: \prod_{i<n} \frac{c_e - i}{N - i}, \quad N = \sum_e c_e

    Args:
        primaries: [..., experts], how many tokens of the document have each expert as primary.
    """
    total = primaries.sum(axis=-1).astype(np.float64)
    product = np.zeros(primaries.shape, np.float64)
    often = np.nonzero(primaries >= size)  # elsewhere a factor is 0
    count, tokens = primaries[often], total[often[:-1]]
    product[often] = math.prod(((count - index) / (tokens - index) for index in range(size)), start=np.ones(count.shape))
    return product


def above_chance(ratio: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(ratio - chance) / (1 - chance): 0 at chance, 1 when always; NaN where chance is 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (ratio - chance) / (1 - chance), np.nan)


def overlap_chance(experts: np.ndarray, top_k: np.ndarray) -> np.ndarray:
    """Chance that two independent uniform choices of k among E experts share one, 1 - C(E-k, k) / C(E, k), per layer."""
    experts, top_k = np.asarray(experts, float), np.asarray(top_k, float)
    disjoint = 2 * gammaln(np.maximum(experts - top_k, 0) + 1) - gammaln(np.maximum(experts - 2 * top_k, 0) + 1) - gammaln(experts + 1)
    return np.where(2 * top_k > experts, 1.0, 1.0 - np.exp(disjoint))


# ---------------------------------------------------------------------------------------------------------------------
# Companions: what users of MoE models ask for besides


def utilization(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    r"""Share of the capacity in use, [layers]: :math:`\sum_e \min(\bar p_e, 1/E)`; 1 when load is even (arXiv 2604.07030)."""
    return np.minimum(mixture_of(usage), 1.0 / np.asarray(experts)[:, None]).sum(axis=-1)


def max_violation(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """MaxVio, [layers]: (largest - mean) / mean load; 0 when load is even (arXiv 2408.15664)."""
    return mixture_of(usage).max(axis=-1) * np.asarray(experts) - 1.0


def load_entropy(usage: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Entropy of the load over ln E, [layers]; 1 when load is even."""
    return entr(mixture_of(usage)).sum(axis=-1) / np.log(experts)


def purity(usage: np.ndarray) -> np.ndarray:
    """How often the likeliest domain of an expert is right, [layers]: sum_e max_d w_d p[d,e]; chance is 1/D."""
    return usage.max(axis=0).sum(axis=-1) / usage.shape[0]


def mutual_information(table: np.ndarray) -> np.ndarray:
    """Plug-in mutual information of the last two axes of a table of counts, [...], in nats; NaN for an empty table."""
    total = table.sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        joint = table / total
    return entr(joint.sum(axis=-1)).sum(axis=-1) + entr(joint.sum(axis=-2)).sum(axis=-1) - entr(joint).sum(axis=(-2, -1))


def consecutive(flags: np.ndarray, length: int) -> np.ndarray:
    """Windows of ``length`` rows that are all True: result[t] is about rows t - length + 1 .. t (False where they start before 0).

    By doubling: a window of 2m rows is two windows of m, so n = 20 takes 6 passes instead of 19.
    """
    windows = flags.copy()
    sizes = [1]
    while sizes[-1] < length:
        sizes.append(min(2 * sizes[-1], length))
    for have, want in pairwise(sizes):
        step = want - have
        longer = np.zeros_like(windows)
        longer[step:] = windows[step:] & windows[:-step]
        windows = longer
    return windows
