"""Signs and buckets of a CountSketch, computed from indices: no table in memory, the same inside and outside a kernel.

A 32-bit integer is mixed by two multiplications and three shifts (the finaliser of MurmurHash3, Appleby 2008). Row and
column are mixed apart, each with its half of the seed, so that indices of a matrix of any size do not overflow.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

_FOR_ROWS, _FOR_COLUMNS, _FOR_BUCKETS = 0x9E3779B9, 0x85EBCA77, 0xC2B2AE3D


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit integers that spreads every input bit over all output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def fold_seed(seed: UInt32[Array, ""] | int, *numbers: UInt32[Array, ""] | int) -> UInt32[Array, ""]:
    """A seed of its own for every tuple of numbers, such as (leaf, layer); traced numbers are welcome."""
    folded = jnp.uint32(seed % 2**32) if isinstance(seed, int) else seed.astype(jnp.uint32)
    for number in numbers:
        word = jnp.uint32(number % 2**32) if isinstance(number, int) else jnp.asarray(number).astype(jnp.uint32)
        folded = mix(mix(folded + jnp.uint32(_FOR_ROWS)) ^ word)
    return folded


def row_and_column_seeds(seed: UInt32[Array, ""]) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """The two halves of a seed that `sign_word` takes."""
    seed = jnp.asarray(seed, jnp.uint32)
    return mix(seed ^ jnp.uint32(_FOR_ROWS)), mix(seed ^ jnp.uint32(_FOR_COLUMNS))


def sign_word(
    row: UInt32[Array, "..."], column: UInt32[Array, "..."], seeds: tuple[UInt32[Array, ""], UInt32[Array, ""]]
) -> Int32[Array, "..."]:
    """A word of 32 mixed bits for every entry of a tile, given its global rows and columns, broadcast against each
    other; its sign is the sign."""
    word = mix(mix(row ^ seeds[0]) + mix(column ^ seeds[1]))
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def signs(
    rows: int, columns: int, seed: UInt32[Array, ""], first: tuple[Array | int, Array | int] = (0, 0)
) -> Int32[Array, "rows columns"]:
    """+1 or -1 for the entries of a [rows, columns] part of a matrix whose first entry has global indices `first`."""
    word = sign_word(*_indices(rows, columns, first), row_and_column_seeds(seed))
    return jnp.where(word < 0, -1, 1).astype(jnp.int32)


def buckets(
    rows: int, columns: int, m: int, seed: UInt32[Array, ""], first: tuple[Array | int, Array | int] = (0, 0)
) -> Int32[Array, "rows columns"]:
    """A hashed bucket in [0, m) for every entry, independent of its sign."""
    seeds = row_and_column_seeds(fold_seed(seed, _FOR_BUCKETS))
    row, column = _indices(rows, columns, first)
    word = mix(mix(row ^ seeds[0]) + mix(column ^ seeds[1]))
    return (word % jnp.uint32(m)).astype(jnp.int32)


def _indices(rows: int, columns: int, first: tuple[Array | int, Array | int]) -> tuple[Array, Array]:
    row = jnp.arange(rows, dtype=jnp.uint32)[:, None] + jnp.asarray(first[0]).astype(jnp.uint32)
    column = jnp.arange(columns, dtype=jnp.uint32)[None, :] + jnp.asarray(first[1]).astype(jnp.uint32)
    return row, column
