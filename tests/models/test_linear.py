"""SimpleNorm's algebra (arXiv 2602.01212) and the linear maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference_model import SPECS, quick_jit

from opus_jax.models.linear import Linear, SimpleNormLinear, block_map
from opus_jax.models.norms import normalise

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((5, 12)), jnp.float32)
W = jnp.asarray(RANDOM.standard_normal((12, 8)), jnp.float32)


def simple(kernel, kind="rmsnorm", groups=1, eps=1e-9):
    return SimpleNormLinear(kernel, ("embed", "heads"), kind=kind, eps=eps, groups=groups)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_output_has_unit_root_mean_square_at_init(kind, groups):
    y = np.asarray(simple(W, kind, groups)(X), np.float64).reshape(5, groups, -1)
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-5)
    if kind == "layernorm":
        np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)


def test_scales_of_the_weights_and_of_the_input_do_not_matter():
    y = simple(W)(X)
    for scale in (0.01, 30.0):
        np.testing.assert_allclose(simple(scale * W)(X), y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(simple(W)(scale * X), y, rtol=1e-4, atol=1e-5)


def test_a_norm_in_front_changes_nothing():
    np.testing.assert_allclose(simple(W)(normalise(X, "rmsnorm", 1e-9)), simple(W)(X), rtol=1e-5, atol=1e-5)


def test_gradient_is_orthogonal_to_the_weights():
    target = jnp.asarray(RANDOM.standard_normal((5, 8)), jnp.float32)
    gradient = jax.grad(lambda w: jnp.sum((simple(w)(X) - target) ** 2))(W)
    cosine = jnp.vdot(W, gradient) / (jnp.linalg.norm(W) * jnp.linalg.norm(gradient))
    assert abs(float(cosine)) < 1e-5
    assert float(jnp.linalg.norm(gradient)) > 0.1


def test_activation_hessian_matches_the_closed_form():
    """H_xx = J'HJ + C, C = -(sqrt(d)/r^2) W'[u a' + a u' + (g'Du) P]W, and it does not grow with the weights."""
    target = jnp.asarray(RANDOM.standard_normal(8))
    gain = jnp.asarray(RANDOM.standard_normal(8))

    def loss_of_y(y):
        return jnp.sum(jnp.cos(y) * target) + 0.1 * jnp.sum(y) ** 2

    def hessian(scale):
        layer = simple(scale * jnp.asarray(W, jnp.float64), eps=0.0)
        layer.gain[...] = gain
        return quick_jit(jax.hessian(lambda x: loss_of_y(layer(x))))(x)

    with jax.enable_x64(True):
        x, w = jnp.asarray(X[0], jnp.float64), np.asarray(W, np.float64).T
        measured, scaled = hessian(1.0), hessian(10.0)
        z = w @ x
        r, u = np.linalg.norm(z), z / np.linalg.norm(z)
        project, scale = np.eye(8) - np.outer(u, u), np.diag(np.asarray(gain, np.float64))
        y = np.sqrt(8) * scale @ u
        g, h = quick_jit(lambda y: (jax.grad(loss_of_y)(y), jax.hessian(loss_of_y)(y)))(jnp.asarray(y))
        jacobian = np.sqrt(8) / r * scale @ project @ w
        a = project @ scale @ g
        bend = np.outer(u, a) + np.outer(a, u) + (g @ scale @ u) * project
        expected = jacobian.T @ h @ jacobian - np.sqrt(8) / r**2 * w.T @ bend @ w
    np.testing.assert_allclose(measured, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(scaled, expected, rtol=1e-10, atol=1e-10)


def test_a_plain_kernel_is_a_plain_dot():
    for layer in (Linear(W, ("embed", "heads"), bias=True), simple(W)):
        text = str(jax.make_jaxpr(lambda x, layer=layer: layer(x))(X))
        assert "dot_general" in text
        assert "custom" not in text


def test_block_maps_take_the_norm_and_bias_of_the_model():
    def build(name):
        return block_map(SPECS[name], nnx.Rngs(params=0), (16, 8), ("embed", "mlp"), 0.5)

    assert isinstance(build("simplenorm"), SimpleNormLinear)
    assert type(build("Llama")) is Linear
    assert build("Llama").bias is None
    np.testing.assert_array_equal(build("GPT-2").bias[...], np.zeros(8))


def test_products_are_taken_in_the_type_of_the_input():
    layer = Linear(W, ("embed", "heads"), bias=True)
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.kernel[...].dtype == jnp.float32
