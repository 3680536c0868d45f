"""Work through the rows of a batch a chunk at a time, to bound memory."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from opus_jax.distributed.axes import constrain
from opus_jax.errors import UserError


def map_chunks(function: Callable[[PyTree[Any]], PyTree[Any]], batch: PyTree[Any], chunk: int | None) -> PyTree[Any]:
    """`function(batch)` for a function that treats rows independently, `chunk` rows at a time, one after the other.

    Chunks are interleaved: chunk c takes rows c, c + N / chunk, ..., so that each is spread over all shards of the
    batch axis instead of lying on one device.

    Args:
      function: rows in (first axis), rows out (first axis).
      batch: any pytree of arrays with the rows first.
      chunk: rows at a time; None = all at once.

    Raises:
      UserError: `chunk` does not divide the number of rows.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if chunk is None or chunk == rows:
        return function(batch)
    if chunk < 1 or rows % chunk:
        raise UserError(f"chunk = {chunk} does not divide the {rows} rows")
    return jax.tree.map(gather, jax.lax.map(function, deal(batch, chunk)))


def deal(batch: PyTree[Any], chunk: int) -> PyTree[Any]:
    """[N, ...] -> [N / chunk, chunk, ...], interleaved; `chunk` divides N."""
    return jax.tree.map(lambda x: _deal(x, chunk), batch)


def _deal(x: jax.Array, chunk: int) -> jax.Array:
    dealt = x.reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1)
    return constrain(dealt, (None, "batch", *(None,) * (x.ndim - 1)))


def gather(x: jax.Array) -> jax.Array:
    """[N / chunk, chunk, ...] -> [N, ...]: the rows that `deal` dealt, in their order."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
