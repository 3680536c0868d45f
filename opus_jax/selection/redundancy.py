"""Redundancy without inner products among candidates: choose in rounds, and score anew in between.

With H = lambda P^-1, what the chosen rows take from a candidate is linear in the sum of their gradients,

    (lambda / K) <P g_i, sum over chosen g_j> = <g_i, P^T (lambda / K) sum g_j>,

so one more direction and one more forward-mode pass give it for all candidates at once, after every round of picks.
Within a round the picks do not know of each other; with as many rounds as picks the law is that of `opus.select` with
a Gram matrix, but for the self term, which needs per-example gradients and is left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from opus_jax.errors import UserError
from opus_jax.selection.opus import Diagnostics, at_entropy, draw, report, standardise
from opus_jax.selection.sampling import check_size, first_draw, ranking, top_k

Penalty = Callable[[Int[Array, " c"]], Float[Array, " N"]]


def select_in_rounds(
    utilities: Float[Array, " N"],
    k: int,
    *,
    rounds: int,
    temperature: float,
    key: Key[Array, ""],
    entropy: float | None = None,
    penalty: Penalty,
) -> tuple[Int[Array, " K"], Diagnostics]:
    """Choose k candidates in rounds of k / rounds; after each round utilities lose what its picks have in common.

    Args:
      utilities, temperature, key, entropy: as for `opus.select`. z-scores keep the scale of the first utilities.
      rounds: divides k; 1 = `opus.select`.
      penalty: for the positions int32[k / rounds] that a round chose, what they take from every candidate, [N], in
        the utilities' unit. Called rounds - 1 times; may close over traced arrays.

    Returns:
      As `opus.select`; `redundancy` is what was taken from each candidate until it was chosen, or by the last round.

    Raises:
      UserError: rounds do not divide k, or k is not between 1 and N.
    """
    check_size(utilities.shape[0], k)
    if rounds < 1 or k % rounds:
        raise UserError(f"selection.redundancy_rounds = {rounds} does not divide the {k} rows to choose")
    buffer, in_use = at_entropy(standardise(utilities), temperature, entropy)
    at_once, probability = draw(buffer, k, in_use, key)
    if rounds == 1:
        return at_once, report(buffer, probability, in_use)
    share = k // rounds
    chosen, taken = jnp.zeros(utilities.shape, bool), jnp.zeros_like(buffer.z)
    order: list[Array] = []
    for number in range(rounds):  # written out, so that the compiler counts what every round costs
        if number:
            taken = jnp.where(chosen, taken, taken + penalty(order[-1]) / buffer.spread)
        round_key = jax.random.fold_in(key, number)
        order.append(top_k(ranking(buffer.logits - taken, chosen, temperature=in_use, key=round_key), share))
        chosen = chosen.at[order[-1]].set(True)
    indices = jnp.where(buffer.degenerate, at_once, jnp.sort(jnp.concatenate(order)))
    probability = jnp.where(buffer.degenerate, probability, first_draw(buffer.logits, indices, in_use))
    return indices, report(buffer, probability, in_use, taken)
