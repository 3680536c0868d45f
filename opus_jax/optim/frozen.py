"""The paper's frozen preconditioners P, read from the optimizer state; kept for comparison with the exact derivative.

Both contain the learning rate once, leave out clipping, and are symmetric, so P^T g = P g. Second moments have the same
floor as in the exact derivative, so that a comparison is not decided by never-seen rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from optax import contrib

from opus_jax.optim.guarded import second_moment_floor
from opus_jax.optim.moments import find_states, muon_momentum, second_moments
from opus_jax.optim.optimizers import Optimizer, muon_scale

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of one step a X + b (X X^T) X + c (X X^T)^2 X
NO_MOMENTUM = 1e-7  # Frobenius norm of a momentum matrix below which S is the identity


def frozen_product(
    optimizer: Optimizer, opt_state: Any, params: PyTree[Array], gradient: PyTree[Float[Array, "..."]]
) -> PyTree[Float[Array, "..."]]:
    """P times a gradient: AdamW's diagonal where Adam holds the parameter, Muon's frozen S where Muon does.

    AdamW (arXiv 2602.05400 eq. 12-13): P = rate (1 - b1) / (1 - b1^t) Diag(1 / (sqrt(nu_hat) + eps)), nu_hat of step
    t - 1. Muon (eq. 5-7): P Z = rate (1 - mu^2) scale Z S, one Newton-Schulz step S = a I + b A + c A^2 with
    A = q^T q, q the momentum [in, out] over its Frobenius norm. The kernels here are the transposes of the paper's.

    Args:
      optimizer: made by `make_optimizer`.
      opt_state: its state before step t.
      params: the parameters.
      gradient: tree like the parameters.
    """
    factor, denominators = adam_parts(optimizer, opt_state, params)

    def product(g: Array, denominator: Array | None, side: Array | None) -> Array:
        if denominator is not None:
            return (factor * g / denominator).astype(g.dtype)
        assert side is not None, "a parameter belongs to AdamW or to Muon"
        return (g @ side).astype(g.dtype)

    return jax.tree.map(product, gradient, denominators, muon_output_sides(optimizer, opt_state, params))


def adam_parts(
    optimizer: Optimizer, opt_state: Any, params: PyTree[Array]
) -> tuple[Float[Array, ""], PyTree[Float[Array, "..."] | None]]:
    """(factor, denominators) of AdamW's P = factor / denominator, elementwise; None where Adam holds no parameter."""
    config, count = optimizer.config, find_states(opt_state, optax.ScaleByAdamState)[0].count
    weight = (1 - config.beta1) / (1 - jnp.asarray(config.beta1, jnp.float32) ** (count + 1))
    nu = second_moments(opt_state, params, config.beta2)
    floor = second_moment_floor(nu)
    return optimizer.rates["adam"](count) * weight, jax.tree.map(lambda v: jnp.sqrt(v + floor) + config.eps, nu)


def muon_output_sides(
    optimizer: Optimizer, opt_state: Any, params: PyTree[Array]
) -> PyTree[Float[Array, "L _ _"] | None]:
    """Matrices R of Muon's P G = G R, rate and scale included; None where Muon holds no parameter."""
    momentum = muon_momentum(opt_state, params)
    states = find_states(opt_state, contrib.MuonState)
    if not states:
        return momentum
    factor = optimizer.rates["muon"](states[0].count) * (1 - optimizer.config.momentum**2)
    return jax.tree.map(lambda q: factor * muon_scale(q.shape) * _one_step(q), momentum)


def _one_step(momentum: Float[Array, "L rows columns"]) -> Float[Array, "L columns columns"]:
    a, b, c = NEWTON_SCHULZ
    norm = jnp.linalg.norm(momentum, axis=(-2, -1), keepdims=True)
    q = momentum / jnp.maximum(norm, NO_MOMENTUM)
    gram = q.swapaxes(-2, -1) @ q
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return jnp.where(norm < NO_MOMENTUM, identity, a * identity + b * gram + c * gram @ gram)
