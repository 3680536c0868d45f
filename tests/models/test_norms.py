import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.models.norms import Norm, normalise

X = np.random.default_rng(0).standard_normal((4, 6)) + 2


def test_normalise_is_the_textbook_formula():
    centred = X - X.mean(-1, keepdims=True)
    for kind, z in (("rmsnorm", X), ("layernorm", centred)):
        expected = z / np.sqrt((z**2).mean(-1, keepdims=True) + 0.1)
        np.testing.assert_allclose(normalise(jnp.asarray(X, jnp.float32), kind, 0.1), expected, rtol=1e-5, atol=1e-6)


def test_a_zero_row_stays_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: normalise(x, "rmsnorm", 1e-5).sum())(jnp.zeros((1, 6)))
    assert value == 0
    assert np.isfinite(gradient).all()


def test_statistics_of_bfloat16_are_float32():
    """The squares of 1 + 1/128 are not bfloat16 numbers; a bfloat16 mean would be off by 1e-3."""
    x = jnp.full((1, 4096), 1 + 2**-7, jnp.bfloat16)
    y = normalise(x, "rmsnorm", 1e-9)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 1, rtol=1e-6)


def test_only_a_layernorm_that_should_has_a_bias():
    assert Norm(6, "layernorm", 1e-5, bias=True).bias is not None
    assert Norm(6, "layernorm", 1e-5, bias=False).bias is None
    assert Norm(6, "rmsnorm", 1e-5, bias=True).bias is None


def test_gain_and_bias_apply_after_the_norm_and_the_type_is_kept():
    norm = Norm(6, "layernorm", 1e-5, bias=True)
    norm.gain[...], norm.bias[...] = jnp.full(6, 2.0), jnp.full(6, 3.0)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(norm(x), 2 * normalise(x, "layernorm", 1e-5) + 3, rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
