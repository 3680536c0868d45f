"""CountSketch in XLA: the form for CPU and GPU, and what the kernel is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from pallas_kernels.count_sketch.folding import fold, shift
from pallas_kernels.count_sketch.hashing import buckets, signs

First = tuple[Array | int, Array | int]


def stride_sketch(
    x: Float[Array, "N D F"], seed: UInt32[Array, ""], rows: int, columns: int, first: First = (0, 0)
) -> Float[Array, "N rows columns"]:
    """Signed fold of a part of every matrix; `first` is the part's first entry in global coordinates."""
    return shift(fold(_signed(x, seed, first), rows, columns), first)


def hash_sketch(
    x: Float[Array, "N D F"], seed: UInt32[Array, ""], m: int, first: First = (0, 0)
) -> Float[Array, "N m"]:
    """Each entry added to a bucket drawn by itself: a scatter."""
    where = buckets(x.shape[1], x.shape[2], m, seed, first).reshape(-1)
    flat = _signed(x, seed, first).reshape(x.shape[0], -1)
    return jax.vmap(lambda row: jax.ops.segment_sum(row, where, num_segments=m))(flat)


def _signed(x: Array, seed: Array, first: First) -> Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x.astype(dtype) * signs(x.shape[1], x.shape[2], seed, first).astype(dtype)
