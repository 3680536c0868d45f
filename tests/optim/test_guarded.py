import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from opus_jax.optim.guarded import clip_by_global_norm_guarded, scale_by_muon_guarded
from opus_jax.optim.optimizers import layer_matrices

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


def test_muon_is_optax_muon_and_its_derivative_away_from_zero():
    settings = {"beta": 0.9, "mu_dtype": jnp.float32, "weight_dimension_numbers": layer_matrices}
    ours, real = scale_by_muon_guarded(**settings), contrib.scale_by_muon(**settings)
    _, state = real.update(KERNEL, real.init(KERNEL))
    gradient = jnp.sin(KERNEL)
    results = [jax.jit(t.update)(gradient, state) for t in (ours, real)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    pulls = [jax.jit(lambda g, t=t: pull(t, state, g, KERNEL))(gradient) for t in (ours, real)]
    np.testing.assert_allclose(*pulls, rtol=1e-3, atol=1e-5)


def test_one_dead_layer_neither_spoils_nor_dominates():
    settings = {"beta": 0.9, "mu_dtype": jnp.float32, "weight_dimension_numbers": layer_matrices}
    dead = KERNEL.at[1].set(0)
    real, ours = contrib.scale_by_muon(**settings), scale_by_muon_guarded(**settings)
    assert np.any(np.isnan(pull(real, real.init(dead), dead, KERNEL)))
    v = pull(ours, ours.init(dead), dead, KERNEL)
    assert np.all(np.isfinite(v))
    assert np.all(v[1] == 0)
    assert np.any(v[0] != 0)
