"""The stride form of a CountSketch: entry (x, y) of a matrix goes to bucket (x mod rows, y mod columns)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def fold_shape(d: int, f: int, m: int) -> tuple[int, int]:
    """(rows, columns) with rows * columns = m for a [d, f] matrix.

    Of all factorisations, one in which the fullest bucket holds the fewest entries, ceil(d / rows) * ceil(f / columns).
    So each entry has a bucket of its own, and the sketch is exact, wherever any factorisation allows that, and a
    vector (d = 1) gets (1, m). Ties go to whole TPU registers (columns a multiple of 128, rows of 8), then to the
    fewest rows.
    """
    pairs = [(rows, m // rows) for rows in range(1, m + 1) if m % rows == 0]
    return min(pairs, key=lambda pair: (_fullest(d, f, pair), bool(pair[1] % 128 or pair[0] % 8), pair[0]))


def fold(signed: Float[Array, "N D F"], rows: int, columns: int) -> Float[Array, "N rows columns"]:
    """Sum of the entries of every bucket; shapes need not divide."""
    n, d, f = signed.shape
    padded = jnp.pad(signed, ((0, 0), (0, -d % rows), (0, -f % columns)))
    return padded.reshape(n, -(-d // rows), rows, -(-f // columns), columns).sum(axis=(1, 3))


def shift(
    folded: Float[Array, "N rows columns"], first: tuple[Array | int, Array | int]
) -> Float[Array, "N rows columns"]:
    """The buckets of a part that was folded as if it began at (0, 0), when its first entry is global entry `first`."""
    if isinstance(first[0], int) and isinstance(first[1], int) and first == (0, 0):
        return folded
    rows, columns = folded.shape[1:]
    return jnp.roll(folded, jnp.stack([jnp.asarray(first[0]) % rows, jnp.asarray(first[1]) % columns]), axis=(1, 2))


def _fullest(d: int, f: int, pair: tuple[int, int]) -> int:
    return -(-d // pair[0]) * -(-f // pair[1])
