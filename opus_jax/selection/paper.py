"""The published selection rule as written (arXiv 2602.05400, eq. 23 to 25 and algorithm 1): a documented control.

    U_i = eta <phi_i, psi> - eta^2 <phi_i, sum over chosen phi_j>,    p ~ exp(U / 0.9), one draw after the other,

with phi the CountSketch of P g_i and psi that of the proxy gradient, per layer. P holds the learning rate already, as
in eq. 13, and temperature and scale are the paper's: utilities are then so small against 0.9 that rows are drawn
uniformly to within a percent. `opus.select` standardises them first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from opus_jax.selection.opus import Diagnostics, report, standardise
from opus_jax.selection.sampling import first_draw, one_by_one

TEMPERATURE = 0.9
SKETCH = 8192  # m, buckets for every layer


def select(
    alignment: Float[Array, " N"],
    gram: Float[Array, "N N"],
    k: int,
    *,
    learning_rate: Float[Array, ""] | float,
    key: Key[Array, ""],
    temperature: float = TEMPERATURE,
) -> tuple[Int[Array, " K"], Diagnostics]:
    """Choose k candidates on the raw scale.

    Args:
      alignment: [N], <phi_i, psi> summed over layers.
      gram: [N, N], <phi_i, phi_j> summed over layers.
      learning_rate: eta.
      temperature: 0 = greedy.

    Returns:
      As `opus.select`; `redundancy` is the second term when a row was chosen, or at the end; z standardises the first,
      and `degenerate` says that it is the same for all.

    Raises:
      UserError: k is not between 1 and N.
    """
    utility = (learning_rate * alignment).astype(jnp.float32)
    logits = jnp.where(jnp.isfinite(utility), utility, -jnp.inf)
    takes = (learning_rate**2 * gram).astype(jnp.float32)
    indices, taken = one_by_one(logits, takes, k, temperature=temperature, key=key)
    first = first_draw(jnp.where(jnp.all(logits == -jnp.inf), 0.0, logits), indices, temperature)
    found = report(standardise(utility), first, temperature)
    return indices, found | {"redundancy": jnp.where(jnp.isfinite(taken), taken, 0.0)}
