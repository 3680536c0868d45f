"""Where a token stands in its segment, and the rotary embedding of that place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opus_jax.models.precision import wide


def segment_positions(segment_ids: Int[Array, "N T"]) -> Int[Array, "N T"]:
    """Distance from the start of the run of equal segment ids: 0, 1, 2, ... and again 0 at the next segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def rotary_turns(positions: Int[Array, "N T"], head_dim: int, theta: float) -> Float[Array, "N T 2 half"]:
    """Cosine and sine of angle[t, i] = position[t] * theta^(-2 i / head_dim), RoPE (arXiv 2104.09864).

    The angles are alike in every block, so this is done once, outside the scan over blocks.
    """
    angles = positions[..., None] * theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2)


def rotate(x: Float[Array, "N T H d"], turns: Float[Array, "N T 2 half"]) -> Float[Array, "N T H d"]:
    """Turn the pairs (x[i], x[i + d/2]) by their angles, in float32 or wider."""
    cos, sin = turns[:, :, None, 0], turns[:, :, None, 1]
    first, second = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
