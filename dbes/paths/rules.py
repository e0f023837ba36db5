"""Rules that score the cells of a model for one domain; higher is chosen first, minus infinity never.

Every score is an array [layers, experts] over the model's MoE layers; cells that a narrow layer does not have are minus infinity.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from dbes.errors import PathError
from dbes.paths.evidence import Evidence
from dbes.paths.trajectories import best_through
from dbes.scoring.layer_counts import side_by_side
from dbes.scoring.specialists import RARE_HITS

Rule = Literal[
    "specialization",
    "trajectory",
    "lift",
    "esft-token",
    "esft-gate",
    "target-load",
    "load",
    "gradient",
    "gradient-contrast",
    "gradient-layer",
    "causal",
    "random",
    "random-load-matched",
    "bottom",
    "all",
]
RULES: tuple[Rule, ...] = get_args(Rule)

ESFT_SHARES = {"esft-token": 0.2, "esft-gate": 0.1}
"""Share p of a layer that ESFT's sets must reach (arXiv 2407.01906, section 4.1)."""

ESFT_DIGITS = 4
"""Decimals to which the released code rounds shares before it adds them up."""

NEED_MODEL = ("gradient", "gradient-contrast", "gradient-layer", "causal")
WITHOUT_TEXTS = ("random", "random-load-matched", "all", *NEED_MODEL)
"""Rules that do not look at single texts again, so that resampling these says nothing of their stability."""


def score_cells(evidence: Evidence, domain: int, rule: Rule, *, seed: int = 0) -> np.ndarray:
    """Score of every cell for a domain, float64 [layers, experts].

    * ``specialization``: the cell's part p ln(p / pbar) of the domain's specialization; only specialists (FDR test).
    * ``trajectory``: log-lift of the best chain through the cell, see ``trajectories``.
    * ``lift``: p / pbar, of cells that the domain would hit at least ``RARE_HITS`` times if it were like the mixture.
    * ``esft-token``, ``esft-gate``: ESFT's selection ratio and average gate, of the cells in its per-layer sets, see ``esft_share``.
    * ``target-load``: the domain's share of a layer's slots; ``load``: the same over all domains alike.
    * ``gradient``: squared norm of the cell's gradient on the domain; ``-contrast``: minus the mean over the other domains;
      ``-layer``: the same after both were divided by their sum over the layer's experts.
    * ``causal``: loss added on the domain when the cell is masked, minus the mean over the other domains.
    * ``random``, ``bottom`` (least target load first), ``all``.

    Raises:
        PathError: no cell can be chosen by the rule, or it needs what the evidence does not hold.
    """
    usage, mixture = evidence.usage[domain], np.nanmean(evidence.usage, axis=0)
    if rule == "specialization":
        chosen = evidence.specialists.at_least(1.0)[domain]
        if not chosen.any():
            raise PathError(
                f"no cell passes the test of specialists for domain {evidence.shape.domains[domain]!r} (false discovery rate 5 %): "
                "its routing does not differ from the other domains' beyond chance; choose another rule, or give more documents"
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            score = np.where(chosen, usage * np.log(usage / mixture), -np.inf)
    elif rule == "trajectory":
        score = best_through(evidence.transitions, evidence.hits, domain)
        if not np.isfinite(score).any():
            raise PathError("no trajectory: too few tokens for a chain of transitions common enough to tell; give more documents")
    elif rule == "lift":
        expected = mixture * evidence.hits[domain].sum(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            score = np.where(expected >= RARE_HITS, usage / mixture, -np.inf)
        if not np.isfinite(score).any():
            raise PathError("lift: every cell is seen too rarely to tell; give more documents")
    elif rule in ("esft-token", "esft-gate"):
        share = esft_share(evidence, domain, gate=rule == "esft-gate")
        compared = np.round(share, ESFT_DIGITS) if evidence.average == "tokens" else share
        score = np.where(smallest_sets(compared, ESFT_SHARES[rule]), share, -np.inf)
    elif rule == "target-load":
        score = usage
    elif rule == "load":
        score = mixture
    elif rule == "bottom":
        score = -usage
    elif rule in ("random", "all"):
        score = np.random.default_rng([seed, 5]).random(usage.shape) if rule == "random" else np.zeros(usage.shape)
    elif rule in NEED_MODEL:
        score = _of_model(evidence, domain, rule)
    else:
        raise PathError(f"rule {rule!r}: it is no score; see random_load_matched, or choose one of {', '.join(RULES)}")
    return np.where(evidence.exists & ~np.isnan(score), score, -np.inf)


def esft_share(evidence: Evidence, domain: int, *, gate: bool) -> np.ndarray:
    r"""ESFT's score of every expert of a layer (arXiv 2407.01906, eq. 6-7), [layers, experts].

    Selection ratio: share of the slots; average gate: mean over tokens of the expert's gate weight as the model used it, so that a
    layer's scores sum to 1 only where a token's gate weights do. Averaged as ``evidence.average`` says:

    * ``tokens``: all tokens of the domain alike, as in the released code, whose published lists and scores these are
      (github.com/deepseek-ai/ESFT: all 104 layers of DeepSeek-V2-Lite).
    * ``samples``: the mean over source texts of each one's mean over its tokens, as the paper has it.

    Counts without their trace know gate weights only as normalised to 1 over a token.

    Raises:
        PathError: the trace has no gate weights.
    """
    means = []
    for column, counts in enumerate(evidence.counts.layers()):
        sums = counts.mass if gate and evidence.gates is None else counts.hits
        if gate and evidence.gates is not None:
            sums = evidence.gates[:, column : column + 1, : counts.shape.width]
        if sums is None:
            raise PathError("esft-gate: this trace has no gate weights; use esft-token")
        members = counts.shape.document_domain == domain
        own, tokens = sums[members].astype(np.float64), counts.active[members][..., None]
        if evidence.average == "samples":
            own, tokens = np.divide(own, tokens, out=np.zeros_like(own), where=tokens > 0), tokens > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(own.sum(axis=0, keepdims=True) / tokens.sum(axis=0))
    mean = side_by_side(means)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean if gate else mean / mean.sum(axis=-1, keepdims=True)


def smallest_sets(share: np.ndarray, reach: float) -> np.ndarray:
    """In every layer the smallest set of experts, by descending share, whose shares sum to at least ``reach``: bool [layers, experts].

    Equal shares: the lower expert first. A layer without a token has no set.
    """
    order = np.argsort(-share, axis=-1, kind="stable")
    ranked = np.take_along_axis(share, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    chosen = np.zeros(share.shape, bool)
    # A rounding error of the sum must not add an expert.
    np.put_along_axis(chosen, order, before < reach - 1e-9, axis=-1)
    return chosen & ~np.isnan(share) & (share > 0)


def _of_model(evidence: Evidence, domain: int, rule: str) -> np.ndarray:
    table = evidence.effects if rule == "causal" else evidence.gradients
    if table is None:
        raise PathError(f"rule {rule!r} looks at the model itself: give it (--model)")
    others = [index for index in range(len(table)) if index != domain and np.isfinite(table[index]).any()]
    if rule == "gradient":
        return table[domain]
    if not others:
        raise PathError(f"rule {rule!r} compares with other domains, and there is none")
    if rule == "gradient-layer":
        with np.errstate(invalid="ignore", divide="ignore"):
            table = np.nan_to_num(table / table.sum(axis=-1, keepdims=True))
    return table[domain] - table[others].mean(axis=0)
