"""Full per-example gradients by `vmap(grad)`: the oracle for audits, small models and notebooks.

Memory is rows x parameters, so it is not the way to score a buffer; see `directional`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from opus_jax.influence.chunks import map_chunks

Params = PyTree[Any]
Batch = PyTree[Any]  # leaves with the rows on their first axis
LossFn = Callable[[Params, Batch], Float[Array, " N"]]


def per_example_gradients(loss_fn: LossFn, params: Params, batch: Batch, *, chunk: int | None = None) -> PyTree[Array]:
    """Gradient of every row's loss.

    Args:
      loss_fn: `loss_fn(params, batch) -> [N]`.
      params: where the gradients are taken.
      batch: any pytree of arrays with N first.
      chunk: rows whose backward passes run together; None = all. Must divide N.

    Returns:
      Tree like the parameters with leaves [N, ...].

    Raises:
      UserError: `chunk` does not divide N.
    """

    def gradient(row: Batch) -> PyTree[Array]:
        one = jax.tree.map(lambda x: x[None], row)
        return jax.grad(lambda p: loss_fn(p, one)[0])(params)

    return map_chunks(jax.vmap(gradient), batch, chunk)


def utilities(
    loss_fn: LossFn, params: Params, direction: Params, batch: Batch, *, chunk: int | None = None
) -> Float[Array, " N"]:
    """<grad loss_i, v> as an explicit dot product of each row's gradient with v, summed in float32 or wider.

    Args and raises: as `per_example_gradients`; `direction` is v, a tree like the parameters. Only one chunk's
    gradients exist at a time.
    """

    def dot(rows: Batch) -> Float[Array, " n"]:
        return along(per_example_gradients(loss_fn, params, rows), direction)

    return map_chunks(dot, batch, chunk)


def along(gradients: PyTree[Array], direction: Params) -> Float[Array, " N"]:
    """<g_i, v> of every row's gradient, leaves [N, ...], with a tree v like one of them, in float32 or wider."""
    return jax.tree.reduce(jnp.add, jax.tree.map(_row_dot, gradients, direction))


def _row_dot(gradients: Float[Array, "n ..."], v: Float[Array, "..."]) -> Float[Array, " n"]:
    dtype = jnp.promote_types(gradients.dtype, jnp.float32)
    products = gradients.astype(dtype) * v.astype(dtype)
    return products.reshape(gradients.shape[0], -1).sum(axis=1)
