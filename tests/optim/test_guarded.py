import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from opus_jax.optim.guarded import (
    FLOOR,
    clip_by_global_norm_guarded,
    scale_by_adam_guarded,
    second_moment_floor,
)
from opus_jax.optim.muon import layer_matrices, scale_by_muon

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)


def pull(transform, state, gradient, cotangent):
    return jax.vjp(lambda g: transform.update(g, state, None)[0], gradient)[1](cotangent)[0]


def test_clip_is_optax_clip_above_and_below_the_limit():
    for limit in (1.0, 100.0):
        ours, real = clip_by_global_norm_guarded(limit), optax.clip_by_global_norm(limit)
        tree = {"a": KERNEL, "b": KERNEL[0]}
        for a, b in zip(*(jax.tree.leaves(t.update(tree, t.init(tree))[0]) for t in (ours, real)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_clip_has_a_derivative_at_zero_where_optax_has_none():
    zero = jnp.zeros(3)
    ours, real = clip_by_global_norm_guarded(1.0), optax.clip_by_global_norm(1.0)
    assert np.all(np.isnan(pull(real, real.init(zero), zero, jnp.ones(3))))
    np.testing.assert_allclose(pull(ours, ours.init(zero), zero, jnp.ones(3)), jnp.ones(3))


def test_adam_is_optax_adam_but_for_its_floor():
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "mu_dtype": jnp.float32}
    ours, real = scale_by_adam_guarded(**settings), optax.scale_by_adam(**settings)
    tree = {"a": KERNEL, "b": 3 * KERNEL[0]}
    _, state = real.update(tree, real.init(tree))
    second = jax.tree.map(jnp.sin, tree)
    for a, b in zip(*(jax.tree.leaves(t.update(second, state)) for t in (ours, real)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_never_seen_row_counts_but_does_not_rule(scale):
    """Its real step saturates at the learning rate, so the weight of its gradient must stay within reach of others."""
    gradient = scale * jnp.ones((50, 4)).at[3].set(0)
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-12, "mu_dtype": jnp.float32}
    real, ours = optax.scale_by_adam(**settings), scale_by_adam_guarded(**settings)
    state = real.update(gradient, real.init(gradient))[1]
    other = scale * jnp.cos(jnp.arange(200.0)).reshape(50, 4).at[3].set(0)
    assert np.all(np.isnan(pull(real, state, other, jnp.ones((50, 4)))[3]))
    v = np.abs(pull(ours, state, other, jnp.ones((50, 4))))
    assert 10 * np.median(v) < v[3].min() < 1e4 * np.median(v)


def test_the_floor_is_a_constant_share_of_the_mean():
    nu = {"a": jnp.ones(3), "b": jnp.zeros(1)}
    assert float(second_moment_floor(nu)) == pytest.approx(0.75 * FLOOR)
    assert float(jax.grad(lambda x: second_moment_floor({"a": x}))(jnp.ones(3))[0]) == 0
    assert 0 < float(second_moment_floor({"a": optax.MaskedNode()})) < 1e-20


def muon_pair(guarded):
    settings = {"beta": 0.9, "mu_dtype": jnp.float32}
    real = contrib.scale_by_muon(**settings, weight_dimension_numbers=layer_matrices)
    return scale_by_muon(**settings, axes={}, guarded=guarded), real


@pytest.mark.parametrize("guarded", [True, False])
def test_muon_is_optax_muon_and_its_derivative_away_from_zero(guarded):
    ours, real = muon_pair(guarded)
    _, state = real.update(KERNEL, real.init(KERNEL))
    gradient = jnp.sin(KERNEL)
    results = [jax.jit(t.update)(gradient, state) for t in (ours, real)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    pulls = [jax.jit(lambda g, t=t: pull(t, state, g, KERNEL))(gradient) for t in (ours, real)]
    np.testing.assert_allclose(*pulls, rtol=1e-3, atol=1e-5)


def test_one_dead_layer_neither_spoils_nor_dominates():
    dead = KERNEL.at[1].set(0)
    ours, real = muon_pair(guarded=True)
    assert np.any(np.isnan(pull(real, real.init(dead), dead, KERNEL)))
    v = pull(ours, ours.init(dead), dead, KERNEL)
    assert np.all(np.isfinite(v))
    assert np.all(v[1] == 0)
    assert np.any(v[0] != 0)
