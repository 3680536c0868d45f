"""Optax steps whose derivative exists at zero, with the state of the originals.

The originals divide by a norm; its derivative at zero is infinite, and one such leaf turns a whole direction into NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

TINY = 1e-30  # squared norm below which a matrix counts as zero
FLOOR = 1e-5  # floor under a second moment, as a share of the mean of all


def clip_by_global_norm_guarded(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, differentiable at a zero gradient."""

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        square = sum(jnp.sum(jnp.square(u)) for u in jax.tree.leaves(updates))
        norm = jnp.sqrt(square + TINY)
        factor = jnp.where(norm < limit, 1.0, limit / jnp.maximum(norm, limit))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)

    return optax.stateless(clip)


def scale_by_adam_guarded(*, b1: float, b2: float, eps: float, mu_dtype: Any) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a floor under the second moment, inside the square root.

    At a parameter that has had no gradient yet (a never-seen embedding row) the plain derivative is NaN, and with a
    negligible floor it is 1e8 times the gradient, although the real step saturates at about the learning rate: one
    rare token would then decide every ranking. The floor is a share of the tree's mean second moment, because
    gradients shrink as models grow.
    """
    original = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        _, new_state = original.update(updates, state, params)
        count = state.count + 1
        mu = optax.tree.bias_correction(optax.tree.update_moment(updates, state.mu, b1, 1), b1, count)
        nu = optax.tree.bias_correction(optax.tree.update_moment(updates, state.nu, b2, 2), b2, count)
        floor = second_moment_floor(nu)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v + floor) + eps), mu, nu), new_state

    return optax.GradientTransformation(original.init, update)


def second_moment_floor(nu: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """FLOOR times the mean of all second moments; a constant to the derivative."""
    leaves = jax.tree.leaves(nu)
    total = sum((jnp.sum(v) for v in leaves), jnp.zeros(()))
    count = float(max(sum(v.size for v in leaves), 1))  # beyond int32 in models of billions of parameters
    return jax.lax.stop_gradient(FLOOR * total / count + TINY)
