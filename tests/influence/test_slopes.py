import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opus_jax as oj
from opus_jax.errors import UserError
from opus_jax.influence import directional, slopes
from opus_jax.influence.directional import METHODS


@jax.custom_vjp
def opaque_sine(x):
    return jnp.sin(x)


opaque_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


def plain_losses(params, batch, sine=jnp.sin):
    def layer(x, w):
        return sine(x @ w), None

    return jnp.sum(jax.lax.scan(layer, batch, params["w"])[0], axis=1)


def opaque_losses(params, batch):
    return jax.checkpoint(lambda p, b: plain_losses(p, b, opaque_sine))(params, batch)


def small_case():
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    return {"w": array(2, 4, 4)}, {"w": array(2, 4, 4)}, array(6, 4)


@pytest.fixture
def warnings_heard(caplog):
    directional._say_differences.cache_clear()
    caplog.set_level(logging.WARNING, "opus_jax")
    yield caplog
    directional._say_differences.cache_clear()


def relative_error(found, exact):
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("chunk", [None, 2])
def test_differences_are_the_derivative_to_one_percent(language_model, chunk):
    _, loss, _, params, v, batch = language_model
    exact = jax.jit(lambda: oj.utilities(loss, params, v, batch))()
    found = jax.jit(lambda: oj.utilities(loss, params, v, batch, method="difference", chunk=chunk))()
    assert found.dtype == jnp.float32
    assert 0 < relative_error(found, exact) < 0.01


def test_the_step_is_near_the_best_one(monkeypatch):
    """Larger ones meet curvature, smaller ones rounding."""
    params, v, batch = small_case()
    exact = oj.utilities(plain_losses, params, v, batch)
    errors = {}
    for step in (1e-6, 1e-3, 1e-1):
        monkeypatch.setattr(slopes, "RELATIVE_STEP", step)
        errors[step] = relative_error(oj.utilities(plain_losses, params, v, batch, method="difference"), exact)
    assert 20 * errors[1e-3] < min(errors[1e-6], errors[1e-1])


def test_along_the_gradient_where_the_loss_bends_most_the_error_is_two_percent(language_model):
    _, loss, _, params, _, batch = language_model
    v = jax.jit(jax.grad(lambda p: loss(p, batch).mean()))(params)
    exact, found = (jax.jit(lambda v, m=m: oj.utilities(loss, params, v, batch, method=m))(v) for m in METHODS)
    assert relative_error(found, exact) < 0.025


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_differences_do_not_depend_on_the_scale_of_the_direction(scale):
    params, v, batch = small_case()
    one = oj.utilities(plain_losses, params, v, batch, method="difference")
    scaled = jax.tree.map(lambda x: x * scale, v)
    found = oj.utilities(plain_losses, params, scaled, batch, method="difference")
    np.testing.assert_allclose(np.asarray(found, np.float64) / scale, one, rtol=1e-2, atol=1e-2)


def test_no_direction_and_no_parameters_are_zero_not_nan():
    params, v, batch = small_case()
    nowhere = jax.tree.map(jnp.zeros_like, v)
    np.testing.assert_array_equal(oj.utilities(plain_losses, params, nowhere, batch, method="difference"), jnp.zeros(6))
    origin = jax.tree.map(jnp.zeros_like, params)
    linear = lambda p, b: b @ p["w"][0, 0]  # noqa: E731
    found = oj.utilities(linear, origin, v, batch, method="difference")
    np.testing.assert_allclose(found, batch @ v["w"][0, 0], rtol=1e-3, atol=1e-5)


def test_narrow_losses_are_subtracted_in_float32():
    params, v, batch = small_case()
    narrow = lambda p, b: plain_losses(p, b).astype(jnp.bfloat16)  # noqa: E731
    assert oj.utilities(narrow, params, v, batch, method="difference").dtype == jnp.float32


def test_narrow_parameters_are_refused():
    params, v, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_case())
    with pytest.raises(UserError, match="float32 or wider, not bfloat16"):
        oj.utilities(plain_losses, params, v, batch, method="difference")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_custom_vjp_is_scored_by_differences_and_said_once(warnings_heard, compiled, chunk):
    params, v, batch = small_case()
    score = lambda p, v, b: oj.utilities(opaque_losses, p, v, b, chunk=chunk)  # noqa: E731
    found = (jax.jit(score) if compiled else score)(params, v, batch)
    oj.token_utilities(lambda p, b: opaque_losses(p, b)[:, None], params, v, batch)
    assert relative_error(found, oj.utilities(plain_losses, params, v, batch)) < 0.01
    assert len(warnings_heard.messages) == 1
    assert "custom_vjp" in warnings_heard.messages[0]


def test_nothing_falls_back_where_forward_mode_works(warnings_heard):
    params, v, batch = small_case()
    # The custom_vjp stands beside the way of v, not on it.
    beside = lambda p, b: plain_losses(p, opaque_sine(b))  # noqa: E731
    oj.utilities(beside, params, v, batch)
    oj.utilities(plain_losses, params, v, batch, method="difference")
    assert warnings_heard.messages == []


def test_differences_cost_two_passes_and_forward_mode_three():
    params, v = {"w": jnp.zeros((64, 64))}, {"w": jnp.ones((64, 64))}
    rows = jnp.zeros((32, 64))

    def flops(function):
        return jax.jit(function).lower(params, v, rows).compile().cost_analysis()["flops"]

    loss = lambda p, b: ((b @ p["w"]) @ p["w"]).sum(1)  # noqa: E731
    once = flops(lambda p, v, b: loss(p, b))
    assert flops(lambda p, v, b: oj.utilities(loss, p, v, b, method="difference")) == pytest.approx(2 * once, rel=0.1)
    both = lambda p, v, b: (loss(p, b), oj.utilities(loss, p, v, b))  # noqa: E731
    assert flops(both) > 2.3 * once
