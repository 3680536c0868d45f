"""Small parameter trees with the names that the optimizers read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def normal(seed, params):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), params)


@pytest.fixture
def params():
    shapes = {
        "blocks": {"mlp": {"kernel": (2, 6, 8), "bias": (2, 8)}, "norm": {"gain": (2, 6)}},
        "embedding": {"embedding": (10, 6)},
        "head": {"kernel": (6, 10)},
        "final_norm": {"gain": (6,)},
    }
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    return normal(0, zeros)


@pytest.fixture
def random_like():
    return normal
