"""Rank agreement between the utilities of the engine in use and the oracle's."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rank_agreement(first: Float[Array, " N"], second: Float[Array, " N"]) -> Float[Array, ""]:
    """Spearman's rank correlation, equal values sharing their average rank.

    Returns:
      In [-1, 1]. Where one side is constant, there is no order to compare: 1 if both are, otherwise 0. Values that are
      not finite count as lower than all others.
    """
    a, b = (_centred(average_ranks(x)) for x in (first, second))
    spread_a, spread_b = jnp.sum(a * a), jnp.sum(b * b)
    both_constant = (spread_a == 0) & (spread_b == 0)
    product = jnp.sqrt(spread_a * spread_b)
    agreement = jnp.sum(a * b) / jnp.where(product > 0, product, 1.0)
    return jnp.where(both_constant, 1.0, agreement)


def average_ranks(values: Float[Array, " N"]) -> Float[Array, " N"]:
    """Rank of each value from 0, equal values sharing their average; all pairs are compared, so for a few thousand."""
    values = jnp.where(jnp.isfinite(values), values, -jnp.inf)
    below = jnp.sum(values[None, :] < values[:, None], axis=1)
    equal = jnp.sum(values[None, :] == values[:, None], axis=1)
    return below + (equal - 1) / 2.0


def _centred(x: Float[Array, " N"]) -> Float[Array, " N"]:
    return x - jnp.mean(x)
