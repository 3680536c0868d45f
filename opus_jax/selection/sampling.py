"""Drawing K of N without replacement: Boltzmann by Gumbel top-k, with its limits top-k and uniform; and one by one,
where every draw changes what the others are worth."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opus_jax.errors import UserError

Temperature = float | int | Float[Array, ""]


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
    scores: Float[Array, " N"], k: int, *, temperature: Temperature, key: Key[Array, ""]
) -> tuple[Int[Array, " K"], Float[Array, " N"]]:
    """Draw k positions without replacement with probability proportional to exp(score / temperature).

    Args:
      scores: [N]; -inf is never preferred to a finite score.
      k: how many.
      temperature: a Python number: 0 = the k largest, the earlier of equal ones; infinite = uniform. Or an array.
      key: typed key.

    Returns:
      (int32[K] sorted positions, probability [N] of being drawn first; at temperature 0, 1 / k on the chosen ones).

    Raises:
      UserError: the temperature is negative or NaN, or k is not between 1 and N.
    """
    check_temperature(temperature)
    indices = top_k(scores, k) if is_number(temperature, 0) else gumbel_top_k(tempered(scores, temperature), k, key)
    return indices, first_draw(scores, indices, temperature)


def first_draw(scores: Float[Array, " N"], indices: Int[Array, " K"], temperature: Temperature) -> Float[Array, " N"]:
    """Probability [N] of being drawn first; at temperature 0, 1 / k on the chosen ones."""
    if is_number(temperature, 0):
        return jnp.zeros_like(scores).at[indices].set(1.0 / indices.shape[0])
    return jax.nn.softmax(tempered(from_best(scores), temperature))


def one_by_one(
    scores: Float[Array, " N"], takes: Float[Array, "N N"], k: int, *, temperature: Temperature, key: Key[Array, ""]
) -> tuple[Int[Array, " K"], Float[Array, " N"]]:
    """Draw k positions one after the other, each draw taking from the scores of those that remain.

    Draw t takes i with probability proportional to exp((score_i - sum over chosen j of takes_ij) / temperature), over
    those not chosen yet, by Gumbel noise that is fresh at every draw: noise drawn once would not give this law where
    scores change.

    Args:
      scores: [N]; -inf is never preferred to a finite score.
      takes: [N, N], what choosing j takes from the score of i.
      temperature: as for `boltzmann`; 0 = greedy.

    Returns:
      (int32[K] sorted positions, [N] what had been taken from each score when it was chosen, or at the end).

    Raises:
      UserError: the temperature is negative or NaN, or k is not between 1 and N.
    """
    check_size(scores.shape[0], k)
    check_temperature(temperature)

    def draw(t: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chosen, taken, order = state
        pick = jnp.argmax(ranking(scores - taken, chosen, temperature=temperature, key=jax.random.fold_in(key, t)))
        chosen = chosen.at[pick].set(True)
        return chosen, jnp.where(chosen, taken, taken + takes[:, pick]), order.at[t].set(pick)

    start = (jnp.zeros(scores.shape, bool), jnp.zeros_like(scores), jnp.zeros((k,), jnp.int32))
    _, taken, order = jax.lax.fori_loop(0, k, draw, start)
    return jnp.sort(order), taken


def ranking(
    scores: Float[Array, " N"], chosen: Bool[Array, " N"], *, temperature: Temperature, key: Key[Array, ""]
) -> Float[Array, " N"]:
    """Noisy logits whose largest are the next draws; not-finite scores rank below all others, chosen ones are -inf."""
    if is_number(temperature, 0):
        noisy = scores
    else:
        noisy = tempered(scores, temperature) + jax.random.gumbel(key, scores.shape, scores.dtype)
    last = jnp.where(jnp.isfinite(noisy), noisy, -jnp.finfo(scores.dtype).max)
    return jnp.where(chosen, -jnp.inf, last)


def tempered(scores: Float[Array, " N"], temperature: Temperature) -> Float[Array, " N"]:
    """Logits of the law exp(score / temperature); infinite = all finite ones alike."""
    if is_number(temperature, math.inf):
        return jnp.where(scores > -jnp.inf, 0.0, -jnp.inf).astype(scores.dtype)
    return scores / temperature


def from_best(scores: Float[Array, " N"]) -> Float[Array, " N"]:
    """Scores less the highest: what sets the best apart outlives the rounding of a division by a small temperature."""
    return scores - jnp.max(scores)


def check_temperature(temperature: Temperature) -> None:
    if not isinstance(temperature, jax.Array) and not temperature >= 0:
        raise UserError(f"selection.temperature = {temperature}: must be at least 0 (0 = top-k, .inf = random)")


def check_size(candidates: int, k: int) -> None:
    if not 1 <= k <= candidates:
        raise UserError(f"cannot select {k} of {candidates} candidates: k must be between 1 and {candidates}")


def is_number(temperature: Temperature, value: float | int) -> bool:
    """Whether the temperature is known to be this value before the program runs."""
    return not isinstance(temperature, jax.Array) and temperature == value
