"""Drawing K of N without replacement: Boltzmann by Gumbel top-k, with its limits top-k and uniform."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from opus_jax.errors import UserError


def gumbel_top_k(logits: Float[Array, " N"], k: int, key: Key[Array, ""]) -> Int[Array, " K"]:
    """Draw k positions one after the other from the softmax of the logits over those that remain.

    Adding independent Gumbel noise to the logits and keeping the k largest gives exactly this law (arXiv 1903.06059).

    Args:
      logits: [N]; -inf is drawn only when nothing else remains, NaN counts as -inf.
      k: how many, at most N.
      key: typed key. The noise depends on the key and N alone, not on how the logits are sharded.

    Returns:
      int32[K] positions, sorted.

    Raises:
      UserError: k is not between 1 and N.
    """
    return top_k(logits + jax.random.gumbel(key, logits.shape, logits.dtype), k)


def top_k(scores: Float[Array, " N"], k: int) -> Int[Array, " K"]:
    """Positions of the k largest scores, sorted; of equal scores the earlier position wins. NaN counts as -inf.

    Raises:
      UserError: k is not between 1 and N.
    """
    check_size(scores.shape[0], k)
    _, indices = jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), k)
    return jnp.sort(indices).astype(jnp.int32)


def boltzmann(
    scores: Float[Array, " N"], k: int, *, temperature: float, key: Key[Array, ""]
) -> tuple[Int[Array, " K"], Float[Array, " N"]]:
    """Draw k positions without replacement with probability proportional to exp(score / temperature).

    Args:
      scores: [N]; -inf is never preferred to a finite score.
      k: how many.
      temperature: a Python number. 0 = the k largest, the earlier of equal ones; infinite = uniform.
      key: typed key.

    Returns:
      (int32[K] sorted positions, probability [N] of being drawn first; at temperature 0, 1 / k on the chosen ones).

    Raises:
      UserError: the temperature is negative or NaN, or k is not between 1 and N.
    """
    if not temperature >= 0:
        raise UserError(f"selection.temperature = {temperature}: must be at least 0 (0 = top-k, .inf = random)")
    if temperature == 0:
        indices = top_k(scores, k)
        return indices, jnp.zeros_like(scores).at[indices].set(1.0 / k)
    logits = _flat(scores) if math.isinf(temperature) else scores / temperature
    return gumbel_top_k(logits, k, key), jax.nn.softmax(logits)


def check_size(candidates: int, k: int) -> None:
    if not 1 <= k <= candidates:
        raise UserError(f"cannot select {k} of {candidates} candidates: k must be between 1 and {candidates}")


def _flat(scores: Float[Array, " N"]) -> Float[Array, " N"]:
    return jnp.where(scores == -jnp.inf, -jnp.inf, 0.0).astype(scores.dtype)
