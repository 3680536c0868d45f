"""Matrices with per-example factors, a seed's worth of everything, and means over many seeds."""

import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.optim.matrix_preconditioner import Diagonal, Factored, Identity, OutputSide


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def tokens(rows, count, height, width, seed=0):
    """(a [N, T, D], b [N, T, F], A^T B), float64."""
    a, b = drawn(seed, rows, count, height), drawn(seed + 1, rows, count, width)
    return a, b, np.einsum("ntd,ntf->ndf", a, b)


def preconditioners(height, width):
    """One of each form, float64, none of them close to the identity."""
    positive = lambda seed, *shape: np.abs(drawn(seed, *shape)) + 0.3  # noqa: E731
    return {
        "identity": Identity(),
        "diagonal": Diagonal(jnp.asarray(positive(11, height, width))),
        "factored": Factored(jnp.asarray(positive(12, height)), jnp.asarray(positive(13, width))),
        "output_side": OutputSide(jnp.asarray(drawn(14, width, width))),
    }


def products(sketch, pair, seeds):
    """<sketch x, sketch y> under each of so many seeds; pair is [2, D, F]."""
    pair = jnp.asarray(pair, jnp.float32)

    def one(seed):
        x, y = sketch.of_gradient(pair, seed)
        return jnp.sum(x * y)

    return np.asarray(
        jax.jit(lambda: jax.lax.map(one, jnp.arange(seeds, dtype=jnp.uint32), batch_size=50))(), np.float64
    )


def assert_right_on_average(found, exact):
    assert found.std() > 1e-3 * abs(exact)
    assert abs(found.mean() - exact) < 4.5 * found.std() / found.size**0.5
