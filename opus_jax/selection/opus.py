"""OPUS selection: a Boltzmann draw over standardised utilities (arXiv 2602.05400, with the temperature on z-scores).

The paper divides raw utilities by the temperature; at their size (about 4e-3) and its temperature (0.9) that is uniform
sampling to within a percent (`paper.py`). Standardised per buffer, the temperature means the same at any rate, size and
optimizer.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opus_jax.selection.entropy import temperature_for
from opus_jax.selection.sampling import Temperature, boltzmann, first_draw, from_best, is_number, one_by_one

Diagnostics = dict[str, Array]


def select(
    utilities: Float[Array, " N"],
    k: int,
    *,
    temperature: float,
    key: Key[Array, ""],
    entropy: float | None = None,
    gram: Float[Array, "N N"] | None = None,
) -> tuple[Int[Array, " K"], Diagnostics]:
    """Choose k candidates without replacement, p ~ exp(z / temperature), z = (utility - mean) / sd over the buffer.

    With `gram`, candidates are drawn one after the other, and each takes from the utilities of the others what they
    have in common with it (H = lambda P^-1):

        K U_i = <P g_i, g_proxy - (lambda / K) sum over chosen g_j> - (lambda / 2K) <P g_i, g_i>

    Args:
      utilities: [N], higher is better, any scale. Values that are not finite are taken last and left out of the mean.
      k: how many to choose.
      temperature: 0 = top-k, infinite = random.
      key: typed key.
      entropy: instead of the temperature: the entropy of the first draw, as a share of that of a uniform one.
      gram: [N, N] with entries (lambda / K) <P g_i, g_j>, in the utilities' unit: what choosing j takes from i. Half
        its diagonal is taken from the start. It is exact, and costs per-example gradients; `redundancy` does without.

    Returns:
      int32[K] positions, sorted; and diagnostics:
        z: float32 [N]; not-finite candidates show the lowest.
        probability: float32 [N] of being drawn first; at temperature 0, 1 / k on the chosen ones.
        degenerate: bool, all finite utilities (less the self term) are equal, or none is finite: the choice was random.
        nonfinite: int32, how many utilities were not finite.
        redundancy: float32 [N], what chosen candidates took from each utility until it was itself chosen; 0 without
          `gram`, in a random choice, and where it is not finite.
        temperature: float32, the one in use.

    Raises:
      UserError: k is not between 1 and N, the temperature is negative, or the entropy is not above 0 and at most 1.
    """
    own = utilities if gram is None else utilities - jnp.diagonal(gram) / 2
    buffer, in_use = at_entropy(standardise(own), temperature, entropy)
    indices, probability = draw(buffer, k, in_use, key)
    if gram is None:
        return indices, report(buffer, probability, in_use)
    sequential, taken = one_by_one(buffer.logits, gram / buffer.spread, k, temperature=in_use, key=key)
    indices = jnp.where(buffer.degenerate, indices, sequential)
    probability = jnp.where(buffer.degenerate, probability, first_draw(buffer.logits, indices, in_use))
    return indices, report(buffer, probability, in_use, taken)


@dataclass(frozen=True)
class Standardised:
    """A buffer's scores over their spread.

    Attributes:
      z: float32 [N]; not-finite scores show the lowest.
      logits: z, with -inf for what is not finite (unless nothing is).
      spread: standard deviation of the finite scores, 1 where they are equal.
      degenerate: all finite scores are equal to rounding; then z = 0.
      nonfinite: int32.
    """

    z: Float[Array, " N"]
    logits: Float[Array, " N"]
    spread: Float[Array, ""]
    degenerate: Bool[Array, ""]
    nonfinite: Int[Array, ""]


def standardise(scores: Float[Array, " N"]) -> Standardised:
    """z-scores over the finite scores of a buffer."""
    finite = jnp.isfinite(scores)
    u = jnp.where(finite, scores, 0).astype(jnp.float32)
    scale = jnp.max(jnp.abs(u))
    scale = jnp.where(scale > 0, scale, 1.0)  # squares of tiny or huge utilities stay in float32's range
    u = u / scale
    count = jnp.maximum(jnp.sum(finite), 1)
    centred = jnp.where(finite, u - jnp.sum(u) / count, 0)
    sd = jnp.sqrt(jnp.sum(centred**2) / count)
    degenerate = sd <= jnp.finfo(jnp.float32).eps
    safe = jnp.where(degenerate, 1.0, sd)
    z = jnp.where(degenerate, 0.0, centred / safe)
    lowest = jnp.min(jnp.where(finite, z, jnp.inf))
    z = jnp.where(finite | degenerate, z, lowest)
    logits = jnp.where(finite | ~jnp.any(finite), z, -jnp.inf)
    spread = jnp.where(degenerate, 1.0, safe * scale)
    return Standardised(z, logits, spread, degenerate, jnp.sum(~finite, dtype=jnp.int32))


def at_entropy(
    buffer: Standardised, temperature: Temperature, entropy: float | None
) -> tuple[Standardised, Temperature]:
    """(the buffer, the temperature to use): as given, or such that the first draw has this share of log N."""
    if entropy is None:
        return buffer, temperature
    return replace(buffer, logits=from_best(buffer.logits)), temperature_for(buffer.logits, entropy)


def draw(
    buffer: Standardised, k: int, temperature: Temperature, key: Key[Array, ""]
) -> tuple[Int[Array, " K"], Float[Array, " N"]]:
    """As `boltzmann`, but equal scores at temperature 0 are drawn at random: all would fall to the first positions."""
    indices, probability = boltzmann(buffer.logits, k, temperature=temperature, key=key)
    if is_number(temperature, 0):
        random, uniform = boltzmann(buffer.logits, k, temperature=1.0, key=key)
        indices = jnp.where(buffer.degenerate, random, indices)
        probability = jnp.where(buffer.degenerate, uniform, probability)
    return indices, probability


def report(
    buffer: Standardised,
    probability: Float[Array, " N"],
    temperature: Temperature,
    taken: Float[Array, " N"] | None = None,
) -> Diagnostics:
    """The diagnostics of a choice; `taken` is what was taken from each candidate, on the scale of z."""
    redundancy = jnp.zeros_like(buffer.z)
    if taken is not None:
        shown = jnp.isfinite(taken) & ~buffer.degenerate
        redundancy = jnp.where(shown, taken * buffer.spread, 0.0).astype(jnp.float32)
    return {
        "z": buffer.z,
        "probability": probability.astype(jnp.float32),
        "degenerate": buffer.degenerate,
        "nonfinite": buffer.nonfinite,
        "redundancy": redundancy,
        "temperature": jnp.asarray(temperature, jnp.float32),
    }
