import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.errors import UserError
from opus_jax.influence.per_example import per_example_gradients, utilities


def test_one_gradient_per_row_and_their_sum_is_the_batchs(mlp):
    loss, params, _, batch = mlp
    rows = per_example_gradients(loss, params, batch)
    third = jax.grad(lambda p: loss(p, jax.tree.map(lambda x: x[3:4], batch))[0])(params)
    whole = jax.grad(lambda p: jnp.sum(loss(p, batch)))(params)
    jax.tree.map(lambda r, t: np.testing.assert_allclose(r[3], t, rtol=1e-4, atol=1e-5), rows, third)
    jax.tree.map(lambda r, w: np.testing.assert_allclose(r.sum(0), w, rtol=1e-4, atol=1e-3), rows, whole)


def test_chunks_change_nothing(mlp):
    loss, params, v, batch = mlp
    whole, parts = (per_example_gradients(loss, params, batch, chunk=c) for c in (None, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, parts)
    np.testing.assert_allclose(
        utilities(loss, params, v, batch, chunk=4), utilities(loss, params, v, batch), rtol=1e-5, atol=1e-5
    )


def test_chunk_must_divide(mlp):
    loss, params, _, batch = mlp
    with pytest.raises(UserError, match="does not divide"):
        per_example_gradients(loss, params, batch, chunk=3)


def test_narrow_gradients_are_summed_in_float32():
    params, v = {"w": jnp.ones(4096, jnp.bfloat16)}, {"w": jnp.full(4096, 2**-8, jnp.bfloat16)}
    loss = lambda p, x: x[:, 0] * jnp.sum(p["w"])  # noqa: E731
    scores = utilities(loss, params, v, jnp.ones((2, 1), jnp.bfloat16))
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, jnp.full(2, 16.0))
