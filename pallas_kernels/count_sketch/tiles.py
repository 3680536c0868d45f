"""Pieces of a kernel that hashes and folds one [rows, columns] tile of a matrix in VMEM."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.count_sketch.hashing import row_and_column_seeds, sign_word

SUBLANES, LANES = 8, 128


def whole_registers(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def kernel_fold(d: int, f: int, rows: int, columns: int) -> tuple[int, int]:
    """What a kernel folds a [d, f] matrix to: multiples of (rows, columns) that fill registers; XLA folds the rest.

    A side that is shorter than that is not folded at all.
    """
    return (
        min(math.lcm(rows, SUBLANES), whole_registers(d, SUBLANES)),
        min(math.lcm(columns, LANES), whole_registers(f, LANES)),
    )


def kernel_scalars(seed: Array, first: tuple[Array | int, Array | int]) -> Array:
    """What `tile_signs` reads from scalar memory: the halves of the seed, and the first global row and column."""
    halves = [jax.lax.bitcast_convert_type(half, jnp.int32) for half in row_and_column_seeds(seed)]
    return jnp.stack([*halves, *(jnp.asarray(x, jnp.int32) for x in first)])


def tile_signs(scalars: Any, shape: tuple[int, int], row: Array, column: Array) -> Array:
    """+1.0 or -1.0 for a tile whose first entry is entry (row, column) of this device's part."""
    seeds = tuple(jax.lax.bitcast_convert_type(scalars[i], jnp.uint32) for i in range(2))
    rows = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) + (scalars[2] + row)
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1) + (scalars[3] + column)
    word = sign_word(rows.astype(jnp.uint32), columns.astype(jnp.uint32), seeds)  # type: ignore[arg-type]
    return jnp.where(word < 0, -1.0, 1.0).astype(jnp.float32)


def inside(shape: tuple[int, int], row: Array, column: Array, limits: tuple[int, int]) -> Array | None:
    """Mask of the entries of a tile that lie within the matrix; None where the tiles divide it."""
    masks = [
        jax.lax.broadcasted_iota(jnp.int32, shape, axis) + start < limit
        for axis, (start, limit) in enumerate(zip((row, column), limits, strict=True))
        if limit % shape[axis]
    ]
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def add_tile(out: Any, example: Any, tile: Array, row: Array, column: Array) -> None:
    """Fold a tile that begins at (row, column) into out[example], a block [n, rows, columns] of `kernel_fold`."""
    rows, columns = out.shape[1:]
    high, wide = math.gcd(tile.shape[0], rows), math.gcd(tile.shape[1], columns)
    if high == rows:
        tile = tile.reshape(-1, rows, tile.shape[1]).sum(axis=0)
    if wide == columns:
        tile = tile.reshape(tile.shape[0], -1, wide).sum(axis=1)
    for i in range(0, tile.shape[0], high):
        for j in range(0, tile.shape[1], wide):
            here = (example, _chunk(row + i, high, rows), _chunk(column + j, wide, columns))
            out[here] += tile[i : i + high, j : j + wide]


def _chunk(start: Any, size: int, whole: int) -> Any:
    return slice(None) if size == whole else pl.ds(pl.multiple_of(jax.lax.rem(start, whole), size), size)
