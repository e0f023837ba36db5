"""A tiny mix for tests: four domains of made-up words, no file needed."""

import numpy as np

from dbes.testbed.mix import DomainTokens, Mix

BOUNDARY = 0


def tiny_mix(domains=4, *, documents=24, length=90, vocabulary=300, seed=0):
    """Each domain has its own words and some that all share, so that a router can learn the difference in a few steps."""
    generator = np.random.default_rng(seed)
    shared = np.arange(2, 40)
    sides = {}
    for side, count in (("training", documents), ("heldout", documents // 2)):
        made = []
        for domain in range(domains):
            words = 40 + domain * 50 + np.arange(50)
            rows = [
                np.where(generator.random(length) < 0.7, generator.choice(words, length), generator.choice(shared, length))
                for _ in range(count)
            ]
            starts = np.cumsum([0, *(len(row) for row in rows)])
            made.append(DomainTokens(name=f"domain{domain}", tokens=np.concatenate(rows).astype(np.int32), starts=starts))
        sides[side] = tuple(made)
    return Mix(
        training=sides["training"],
        heldout=sides["heldout"],
        boundary=BOUNDARY,
        token_bytes=np.r_[0, 0, np.full(vocabulary - 2, 3)],
        digest=f"tiny-{domains}-{documents}-{length}-{seed}",
    )
