"""Sequential draws with redundancy in plain numpy, one candidate after the other, and the law they follow."""

import itertools

import jax
import numpy as np


def sequential(utilities, takes, k, temperature, key, *, self_term=True, scale=None):
    """Positions in the order drawn. The noise is the library's; everything else is worked out anew.

    takes[i, j] is what choosing j takes from i; scale None = the spread of the utilities.
    """
    u, takes = np.asarray(utilities, np.float64).copy(), np.asarray(takes, np.float64)
    if self_term:
        u -= np.diag(takes) / 2
    scale = u.std() if scale is None else scale
    order = []
    for t in range(k):
        worth = [u[i] - sum(takes[i, j] for j in order) for i in range(len(u))]
        noise = np.zeros(len(u))
        if temperature:
            noise = temperature * np.asarray(jax.random.gumbel(jax.random.fold_in(key, t), (len(u),)), np.float64)
        ranked = [worth[i] / scale + noise[i] if i not in order else -np.inf for i in range(len(u))]
        order.append(int(np.argmax(ranked)))
    return order


def subset_law(worth, k):
    """{subset: probability} of k draws without replacement, each from softmax(worth(chosen so far)) of the rest."""
    n = len(worth(()))
    law = dict.fromkeys(itertools.combinations(range(n), k), 0.0)
    for order in itertools.permutations(range(n), k):
        p = 1.0
        for t, i in enumerate(order):
            weights = np.exp(worth(order[:t]))
            p *= weights[i] / sum(weights[j] for j in range(n) if j not in order[:t])
        law[tuple(sorted(order))] += p
    return law
