r"""What the ideal domain router gives: the largest value that any router can reach, which every score is relative to.

A router that gives each token k of E distinct experts gives a domain a usage p with :math:`0 \le p_e \le 1/k`, and every such usage is
one of a router. Domains weigh the same. So the largest values are known, for texts of any length and without a draw:

* **Specialization** I(D;E) is convex in each domain's usage: it is largest where every domain uses exactly k experts, and then where all
  experts serve equally many domains, which blocks dealt round robin do (`dbes.trace.baselines.expert_blocks`). It is ln D where they do
  not overlap, and close to ln(E/k) where they do.
* **Domain isolation**: 1 - cosine is quasi-convex in each domain's usage, so the same holds: round robin again.
* **Effective rank**: the largest eigenvalue of the domains' Gram matrix has at least the share k/E of their sum, since no usage has a
  squared norm above 1/k and their mean has one of at least 1/E. All other eigenvalues equal give the most. This is 1 where blocks do not
  overlap; where they do, it is a bound that round robin and other arrangements do not always reach.
* **Of one domain**: the others may leave it alone as far as E - k experts hold them, the share min(1, (E - k)/k) of its slots.

No router exceeds these values, whatever it does with its domains; estimates do by chance only.
"""

from __future__ import annotations

import math

import numpy as np

from dbes.scoring.metrics import information_bound


def ideal_values(domains: int, experts: int, top_k: int) -> dict[str, np.ndarray]:
    """The largest value of each domain metric at a layer: [domains + 1] by domain and, last, of all; of ``der`` [1].

    ``specialization`` is in nats. The last row is what all domains reach together, not the mean of what each could reach alone. NaN with
    one domain, and where k = E leaves nothing to choose.
    """
    if domains < 2 or experts <= top_k:
        rows, rank = np.full(domains + 1, np.nan), np.full(1, np.nan)
        return {"specialization": rows, "specialization_normalized": rows, "domain_isolation": rows, "der": rank}
    often, more = divmod(domains * top_k, experts)
    served = np.full(experts, often) + (np.arange(experts) < more)  # domains by which each expert is used
    load = served[served > 0] / (domains * top_k)
    alone = min(1.0, (experts - top_k) / top_k)
    information = np.full(domains + 1, alone * math.log(domains))
    information[-1] = -(load * np.log(load)).sum() - math.log(top_k)
    isolation = np.full(domains + 1, alone)
    isolation[-1] = 1 - (served * (served - 1)).sum() / (top_k * domains * (domains - 1))
    return {
        "specialization": information,
        "specialization_normalized": information / information_bound(domains, np.asarray(experts), np.asarray(top_k)),
        "domain_isolation": isolation,
        "der": np.array([_rank(domains, experts, top_k)]),
    }


def _rank(domains: int, experts: int, top_k: int) -> float:
    most = min(domains, experts)
    first = max(top_k / experts, 1 / most)
    eigenvalues = np.r_[first, np.full(most - 1, (1 - first) / (most - 1))]
    return float((1 / (eigenvalues**2).sum() - 1) / (most - 1))
