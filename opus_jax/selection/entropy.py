"""A temperature for every buffer, such that the choice keeps a stated entropy."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opus_jax.errors import UserError
from opus_jax.selection.sampling import from_best

_LOWEST, _HIGHEST, _HALVINGS = -20.0, 12.0, 40  # of log temperature, on z-scores


def temperature_for(z: Float[Array, " N"], share: float) -> Float[Array, ""]:
    """The temperature T at which softmax(z / T) has the entropy share * log(n), n the number of finite scores.

    The entropy grows with T, so bisection finds it. Where equal best scores keep it above the target at any T, the
    lowest T is returned; for scores that are all equal any T will do.

    Args:
      z: [N] standardised scores; -inf = left out.
      share: of the entropy of a uniform draw, above 0 and at most 1.

    Raises:
      UserError: the share is out of its range.
    """
    if not 0 < share <= 1:
        raise UserError(f"selection.entropy = {share}: must be above 0 and at most 1 (1 = random)")
    z = from_best(z)
    finite = jnp.isfinite(z)
    wanted = share * jnp.log(jnp.maximum(jnp.sum(finite), 1))

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        above = entropy(jnp.where(finite, z / jnp.exp(middle), -jnp.inf)) > wanted
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    bounds = (jnp.asarray(_LOWEST, z.dtype), jnp.asarray(_HIGHEST, z.dtype))
    return jnp.exp(jnp.mean(jnp.stack(jax.lax.fori_loop(0, _HALVINGS, halve, bounds))))


def entropy(logits: Float[Array, " N"]) -> Float[Array, ""]:
    """Of softmax(logits), in nats; -inf logits have probability 0."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0))
