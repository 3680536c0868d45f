"""What OPUS is compared with, behind the same interface: scores in; sorted positions and diagnostics out."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from opus_jax.errors import UserError
from opus_jax.selection import opus
from opus_jax.selection.opus import Diagnostics


def random(
    scores: Float[Array, " N"], k: int, *, temperature: float, key: Key[Array, ""], entropy: float | None = None
) -> tuple[Int[Array, " K"], Diagnostics]:
    """k of N uniformly, whatever the scores and the temperature. Not reported as degenerate: it was asked for.

    Raises:
      UserError: k is not between 1 and N.
    """
    indices, diagnostics = opus.select(jnp.zeros_like(scores), k, temperature=math.inf, key=key)
    return indices, diagnostics | {"degenerate": jnp.zeros((), bool)}


def high_loss(
    scores: Float[Array, " N"], k: int, *, temperature: float, key: Key[Array, ""], entropy: float | None = None
) -> tuple[Int[Array, " K"], Diagnostics]:
    """The candidates with the highest loss, drawn by the same law as utilities are; temperature 0 = the k highest.

    Args: as `opus.select`, with losses (nats per target token) for scores.
    """
    return opus.select(scores, k, temperature=temperature, key=key, entropy=entropy)


def mid_loss(
    scores: Float[Array, " N"], k: int, *, temperature: float, key: Key[Array, ""], entropy: float | None = None
) -> tuple[Int[Array, " K"], Diagnostics]:
    """The candidates whose loss lies nearest the buffer's median, neither learnt already nor out of reach.

    Args: as `opus.select`, with losses (nats per target token) for scores.
    """
    finite = jnp.isfinite(scores)
    middle = jnp.nanmedian(jnp.where(finite, scores, jnp.nan))
    nearness = jnp.where(finite, -jnp.abs(scores - middle), jnp.nan)
    return opus.select(nearness, k, temperature=temperature, key=key, entropy=entropy)


def none(
    scores: Float[Array, " N"], k: int, *, temperature: float, key: Key[Array, ""], entropy: float | None = None
) -> tuple[Int[Array, " K"], Diagnostics]:
    """Every row that was read, in order.

    Raises:
      UserError: k is not N.
    """
    candidates = scores.shape[0]
    if k != candidates:
        raise UserError(f"selection.method = none trains on all {candidates} rows it reads, not {k}: use random")
    return jnp.arange(k, dtype=jnp.int32), {
        "z": jnp.zeros(candidates, jnp.float32),
        "probability": jnp.full(candidates, 1 / candidates, jnp.float32),
        "degenerate": jnp.zeros((), bool),
        "nonfinite": jnp.zeros((), jnp.int32),
        "redundancy": jnp.zeros(candidates, jnp.float32),
        "temperature": jnp.asarray(math.inf, jnp.float32),
    }
