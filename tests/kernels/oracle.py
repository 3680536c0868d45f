"""Ghost and count sketches by definition, in float64 and entry by entry; only the signs are the library's."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.count_sketch.hashing import signs


def sign_matrix(d, f, seed):
    return np.asarray(signs(d, f, jnp.uint32(seed)), np.float64)


def folded(matrices, seed, rows, columns):
    n, d, f = matrices.shape
    signed = np.asarray(matrices, np.float64) * sign_matrix(d, f, seed)
    out = np.zeros((n, rows * columns))
    for x in range(d):
        for y in range(f):
            out[:, (x % rows) * columns + y % columns] += signed[:, x, y]
    return out


def two_sided(matrices, left, right):
    return np.einsum("rdp,ndf,rfq->nrpq", left, matrices, right).reshape(len(matrices), -1)


def gradients(inputs, cotangents):
    return np.einsum("ntd,ntf->ndf", inputs, cotangents)


def factors(d, f, blocks=3, p=4, q=5, seed=9):
    """Left and right of a Kron fold, with entries that every type holds exactly."""
    random = np.random.default_rng(seed)
    return tuple(random.choice([-1.0, 1.0], (blocks, width, sides)) for width, sides in ((d, p), (f, q)))
