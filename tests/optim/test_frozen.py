import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from opus_jax.config import OptimizerConfig
from opus_jax.optim.frozen import frozen_product
from opus_jax.optim.moments import find_states, second_moments
from opus_jax.optim.optimizers import make_optimizer

ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="linear", clip=None)
MUON = dataclasses.replace(ADAMW, name="muon", adam_learning_rate=5e-3)


def trained(config, params, random_like, steps=3):
    optimizer = make_optimizer(config, 10, params)
    state = optimizer.transform.init(params)
    update = jax.jit(optimizer.transform.update)
    for seed in range(steps):
        _, state = update(random_like(seed + 1, params), state, params)
    return optimizer, state


def compiled(optimizer, state, params, proxy):
    return jax.jit(lambda *args: frozen_product(optimizer, *args))(state, params, proxy)


def diagonal_stopped(optimizer, state, nu):
    """Adam's update as a function of the gradient with the second moment of the past held fixed (eq. 8-11)."""
    (adam,) = find_states(state, optax.ScaleByAdamState)
    rate, t = optimizer.rates["adam"](adam.count), adam.count + 1

    def update(gradient):
        m_hat = jax.tree.map(lambda m, g: (0.9 * m + 0.1 * g) / (1 - 0.9**t), adam.mu, gradient)
        return jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + 1e-8), m_hat, nu)

    return update


def test_adamw_is_the_vjp_with_the_diagonal_stopped(params, random_like):
    optimizer, state = trained(ADAMW, params, random_like)
    proxy, reference = random_like(8, params), random_like(9, params)
    update = diagonal_stopped(optimizer, state, second_moments(state, params, 0.95))
    (pulled,) = jax.jit(lambda g: jax.vjp(update, g)[1](proxy))(reference)
    product = compiled(optimizer, state, params, proxy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-3), product, pulled)


def test_learning_rate_enters_once(params, random_like):
    proxy = random_like(8, params)
    products = [
        compiled(*trained(dataclasses.replace(ADAMW, learning_rate=rate), params, random_like), params, proxy)
        for rate in (1e-2, 3e-2)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-5), *products)


def test_muon_is_one_newton_schulz_step_from_the_momentum(params, random_like):
    optimizer, state = trained(MUON, params, random_like)
    proxy = random_like(8, params)
    product = compiled(optimizer, state, params, proxy)["blocks"]["mlp"]["kernel"]
    (muon,) = find_states(state, contrib.MuonState)
    for layer in range(2):
        # The paper's matrices are [out, in]: S = a I + b q q^T + c (q q^T)^2 multiplies from the left.
        q = np.asarray(muon.mu["blocks"]["mlp"]["kernel"][layer], np.float64).T
        q = q / np.linalg.norm(q)
        gram = q @ q.T
        s = 3.4445 * np.eye(8) - 4.7750 * gram + 2.0315 * gram @ gram
        kappa = float(optimizer.schedule(3)) * (1 - 0.95**2) * 0.2 * 8**0.5
        expected = kappa * s @ np.asarray(proxy["blocks"]["mlp"]["kernel"][layer], np.float64).T
        np.testing.assert_allclose(product[layer], expected.T, rtol=1e-4, atol=1e-8)


def test_muons_other_leaves_take_adams_diagonal_at_their_own_rate(params, random_like):
    proxy = random_like(8, params)
    muon = compiled(*trained(MUON, params, random_like), params, proxy)
    adam = compiled(*trained(ADAMW, params, random_like), params, proxy)
    np.testing.assert_allclose(muon["head"]["kernel"], 0.5 * adam["head"]["kernel"], rtol=1e-4)


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_before_the_first_update_it_is_finite(config, params, random_like):
    product = compiled(*trained(config, params, random_like, steps=0), params, random_like(8, params))
    assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in jax.tree.leaves(product))
