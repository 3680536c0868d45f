"""Inner products among candidates, which redundancy needs: what two examples would both do to the model.

Exact, out of all per-example gradients at once: the oracle, whose memory is rows x parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from opus_jax.distributed.axes import constrain
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.per_example import LossFn, per_example_gradients

Params = PyTree[Any]
Batch = PyTree[Any]  # leaves with the candidates on their first axis
Precondition = Callable[[PyTree[Array]], PyTree[Array]]  # gradient -> P gradient, linear


def alignment_and_gram(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    proxy_gradient: PyTree[Array],
    precondition: Precondition,
    *,
    chunk: int | None = None,
    both_sides: bool = False,
) -> tuple[Float[Array, " N"], Float[Array, "N N"]]:
    """Alignment <P g_i, g_proxy> of every candidate, and the Gram matrix of all pairs.

    Args:
      loss_fn: `loss_fn(params, batch) -> [N]`.
      params: where the gradients g_i are taken.
      batch: any pytree of arrays with N first.
      proxy_gradient: tree like the parameters.
      precondition: P, applied to one gradient at a time (under `vmap`).
      chunk: rows whose backward passes and preconditioning run together; None = all. Must divide N.
      both_sides: what stands between two displacements. False: gram_ij = <P g_i, g_j>, the metric of the optimizer
        itself (H = P^-1); True: gram_ij = <P g_i, P g_j>, the paper's H = I (arXiv 2602.05400 eq. 22).

    Returns:
      [N] and [N, N], float32 or wider.

    Raises:
      UserError: `chunk` does not divide N.
    """

    def displaced(rows: Batch) -> tuple[PyTree[Array], PyTree[Array]]:
        gradients = per_example_gradients(loss_fn, params, rows)
        return gradients, jax.vmap(precondition)(gradients)

    gradients, displacements = map_chunks(displaced, batch, chunk)
    alignment = inner_products(displacements, jax.tree.map(lambda g: g[None], proxy_gradient))[:, 0]
    return alignment, inner_products(displacements, displacements if both_sides else gradients)


def gram_of_sketches(sketches: Float[Array, "N S M"]) -> Float[Array, "N N"]:
    """Inner products of all pairs of rows, the same on every device.

    Each device sums over a share of the numbers of all rows: it sends and receives no more than the sketches of the
    rows that it holds, and the sums.
    """
    numbers = constrain(sketches.reshape(sketches.shape[0], -1), ("candidate", "sketch_numbers"))
    return constrain(inner_products(numbers, numbers), ("candidate", "candidate"))


def inner_products(left: PyTree[Array], right: PyTree[Array]) -> Float[Array, "N K"]:
    """All inner products of the rows of two trees, such as gradients [N, ...] or sketches, in float32 or wider."""

    def leaf(a: Array, b: Array) -> Array:
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        a, b = (x.astype(dtype).reshape(x.shape[0], -1) for x in (a, b))
        return jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.reduce(jnp.add, jax.tree.map(leaf, left, right))
