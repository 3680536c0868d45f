"""OPUS selection: a Boltzmann draw over standardised utilities (arXiv 2602.05400, with the temperature on z-scores).

The paper divides raw utilities by the temperature; at their size (about 4e-3) and its temperature (0.9) that is uniform
sampling to within a percent. Standardised per buffer, the temperature means the same at any rate, size and optimizer.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opus_jax.selection.sampling import boltzmann

Diagnostics = dict[str, Array]


def select(
    utilities: Float[Array, " N"], k: int, *, temperature: float, key: Key[Array, ""]
) -> tuple[Int[Array, " K"], Diagnostics]:
    """Choose k candidates without replacement, p ~ exp(z / temperature), z = (utility - mean) / sd over the buffer.

    Args:
      utilities: [N], higher is better, any scale. Values that are not finite are taken last and left out of the mean.
      k: how many to choose.
      temperature: 0 = top-k, infinite = random.
      key: typed key.

    Returns:
      int32[K] positions, sorted; and diagnostics:
        z: float32 [N]; not-finite candidates show the lowest.
        probability: float32 [N] of being drawn first.
        degenerate: bool, all finite utilities are equal (or none is finite), so the choice was random.
        nonfinite: int32, how many utilities were not finite.

    Raises:
      UserError: k is not between 1 and N, or the temperature is negative.
    """
    finite = jnp.isfinite(utilities)
    z, degenerate = standardise(utilities, finite)
    z_or_last = jnp.where(finite | ~jnp.any(finite), z, -jnp.inf)
    indices, probability = boltzmann(z_or_last, k, temperature=temperature, key=key)
    if temperature == 0:  # equal utilities would all fall to the first positions
        random, uniform = boltzmann(z_or_last, k, temperature=1.0, key=key)
        indices = jnp.where(degenerate, random, indices)
        probability = jnp.where(degenerate, uniform, probability)
    nonfinite = jnp.sum(~finite, dtype=jnp.int32)
    return indices, {"z": z, "probability": probability, "degenerate": degenerate, "nonfinite": nonfinite}


def standardise(utilities: Float[Array, " N"], finite: Bool[Array, " N"]) -> tuple[Float[Array, " N"], Bool[Array, ""]]:
    """(z-scores over the finite utilities, whether they are all equal to rounding, in which case z = 0)."""
    u = jnp.where(finite, utilities, 0).astype(jnp.float32)
    scale = jnp.max(jnp.abs(u))
    u = u / jnp.where(scale > 0, scale, 1.0)  # squares of tiny or huge utilities stay in float32's range
    count = jnp.maximum(jnp.sum(finite), 1)
    centred = jnp.where(finite, u - jnp.sum(u) / count, 0)
    sd = jnp.sqrt(jnp.sum(centred**2) / count)
    degenerate = sd <= jnp.finfo(jnp.float32).eps
    z = jnp.where(degenerate, 0.0, centred / jnp.where(degenerate, 1.0, sd))
    lowest = jnp.min(jnp.where(finite, z, jnp.inf))
    return jnp.where(finite | degenerate, z, lowest), degenerate
