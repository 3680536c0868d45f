"""Pairs by tokens and pairs by slices of gradients, against the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.influence.ghost import inner_products
from opus_jax.influence.ghost.inner_products import Pairs
from opus_jax.optim.matrix_preconditioner import Diagonal, Factored, Identity, OutputSide

N, D, F, V = 5, 24, 20, 11
DRAW = np.random.default_rng(0)
PRECONDITIONERS = {
    "identity": Identity(),
    "diagonal": Diagonal(jnp.asarray(DRAW.uniform(0.1, 2, (D, F)), jnp.float32)),
    "factored": Factored(
        jnp.asarray(DRAW.uniform(0.1, 2, D), jnp.float32), jnp.asarray(DRAW.uniform(0.1, 2, F), jnp.float32)
    ),
    "output side": OutputSide(jnp.asarray(DRAW.normal(size=(F, F)), jnp.float32)),
}


def factors(tokens):
    return (jnp.asarray(DRAW.normal(size=(N, tokens, width)), jnp.float32) for width in (D, F))


def expected(gradients, preconditioner, both_sides):
    moved = np.asarray(preconditioner.apply(gradients), np.float64).reshape(N, -1)
    return moved @ (moved if both_sides else np.asarray(gradients, np.float64).reshape(N, -1)).T


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("tokens", [4, 40])  # 2 T^2 below and above D F: by tokens, by slices
def test_products(monkeypatch, name, both_sides, tokens):
    monkeypatch.setattr(inner_products, "SLICE_BYTES", 7 * N * F * 4)  # several slices, the last one short
    a, b = factors(tokens)
    found = jax.jit(Pairs(both_sides).of_product)(a, b, PRECONDITIONERS[name])
    wanted = expected(jnp.einsum("ntd,ntf->ndf", a, b), PRECONDITIONERS[name], both_sides)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("both_sides", [False, True])
def test_lookups(both_sides):
    ids, b = jnp.asarray(DRAW.integers(0, V, (N, 6))), jnp.asarray(DRAW.normal(size=(N, 6, F)), jnp.float32)
    preconditioner = Diagonal(jnp.asarray(DRAW.uniform(0.1, 2, (V, F)), jnp.float32))
    found = jax.jit(Pairs(both_sides).of_lookup)(ids, b, preconditioner)
    gradients = jax.vmap(lambda ids, b: jnp.zeros((V, F)).at[ids].add(b))(ids, b)
    wanted = expected(gradients, preconditioner, both_sides)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_short_rows_form_no_gradient():
    """By tokens, the largest array is [N, T, T] for one row at a time."""
    a, b = (jnp.ones((8, 4, 256)) for _ in range(2))
    jaxpr = str(jax.make_jaxpr(Pairs().of_product)(a, b, Identity()))
    assert "256,256" not in jaxpr
    long = str(jax.make_jaxpr(Pairs().of_product)(*(jnp.ones((8, 256, 256)) for _ in range(2)), Identity()))
    assert "256,256" in long
