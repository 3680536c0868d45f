"""Batches of rows on the devices: their axes, their shapes, and taking parts of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key

from opus_jax.distributed.axes import constrain, sharding
from opus_jax.distributed.exchange import take_rows

Batch = dict[str, Any]  # tokens, segment_ids int32[N, T]; loss_mask float32[N, T]


def batch_axes(x: Any) -> tuple[str | None, ...]:
    """Rows are split over the data axes; everything else of a batch is whole."""
    return ("batch", *(None,) * (x.ndim - 1))


def abstract_batch(rows: int, row_tokens: int, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a batch of rows, as the step receives it."""
    shape, split = (rows, row_tokens), sharding(mesh, ("batch", None), (rows, row_tokens))
    types = {"tokens": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in types.items()}  # type: ignore[misc]


def take(rows: Batch, indices: Int[Array, " K"]) -> Batch:
    """The rows at these positions, in ascending order, spread again over the batch axis."""
    widths = [x.shape[1] for x in rows.values()]
    as_integers = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in rows.values()]  # one exchange for all fields
    taken = jnp.split(take_rows(jnp.concatenate(as_integers, axis=1), indices), np.cumsum(widths)[:-1], axis=1)
    return {
        name: constrain(jax.lax.bitcast_convert_type(part, x.dtype), batch_axes(x))
        for (name, x), part in zip(rows.items(), taken, strict=True)
    }


def without(rows: Batch, left_out: Bool[Array, "N S"]) -> Batch:
    """The rows, with no targets in the documents that are left out, column s for segment s + 1."""
    by_segment = jnp.pad(left_out, ((0, 0), (1, 0)))  # segment 0 is padding
    here = jnp.take_along_axis(by_segment, rows["segment_ids"], axis=1, mode="fill", fill_value=False)
    mask = jnp.where(here, 0, rows["loss_mask"])
    return rows | {"loss_mask": constrain(mask, batch_axes(mask))}


def is_unreadable(rows: Batch) -> Bool[Array, " N"]:
    """Rows that stand for a record that could not be read: any other begins with a document."""
    return rows["segment_ids"][:, 0] == 0


def window(rows: Batch, tokens: int | None, place: str = "prefix", key: Key[Array, ""] | None = None) -> Batch:
    """Rows cut to so many tokens; None = whole rows.

    Args:
      place: 'prefix', or 'random': each row from a place of its own, drawn with the key. The first token of a window
        has no context there and is no target.
    """
    length = rows["tokens"].shape[1]
    if tokens is None or tokens == length:
        return rows
    if place == "prefix":
        return {name: x[:, :tokens] for name, x in rows.items()}
    assert key is not None, "a random window needs a key"
    starts = jax.random.randint(key, (rows["tokens"].shape[0],), 0, length - tokens + 1)
    columns = starts[:, None] + jnp.arange(tokens)
    return {name: constrain(jnp.take_along_axis(x, columns, axis=1), batch_axes(x)) for name, x in rows.items()}
