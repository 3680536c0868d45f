"""The type that sums are kept in: float32 at least, float64 for float64 inputs."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The type for statistics, softmax, logits and losses of values of type `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)
