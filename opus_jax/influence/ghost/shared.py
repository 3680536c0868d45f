"""One forward and one backward pass of activations for all candidates; weight gradients for the chosen rows only.

When whole rows are scored, the pass that scores them has done all of the update's work but the products a^T b that
make weight gradients. The factors a and b are kept, [L, N, T, D] and [L, N, T, F] of every matrix, and after the
choice the gradient of exactly the chosen rows is put together from theirs: (2 + rho) forward passes for each
candidate token, training included, against 3 + 3 rho for scoring and then training (a chosen share rho).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.influence.ghost.taps import Params, Path, is_stacked, leaf_at, paths


def gradient_of_rows(
    params: Params, factors: PyTree[Array], weights: Float[Array, " N"], indices: Int[Array, " K"]
) -> PyTree[Array]:
    """sum over chosen rows of weight_i grad loss_i, in the parameters' type: the ordinary gradient.

    Args:
      params: for shapes and types.
      factors: from `scores` with a `Recording`.
      weights: of every row.
      indices: the chosen rows.
    """
    chosen = weights[indices]

    def one(path: Path) -> Array:
        leaf = leaf_at(params, path)
        found = jax.tree.map(lambda x: jnp.take(x, indices, axis=int(is_stacked(path))), leaf_at(factors, path))
        if not isinstance(found, dict):
            return jnp.einsum("k,...kd->...d", chosen, found).astype(leaf.dtype)
        total = jnp.zeros(leaf.shape, leaf.dtype)
        if "inputs" in found:
            total += _of_products(found["inputs"], found["cotangents"], chosen, leaf.dtype)
        if "ids" in found:
            total = _of_lookups(total, found["ids"], found["looked_up"], chosen)
        return total

    return jax.tree.unflatten(jax.tree.structure(params), [one(path) for path in paths(params)])


def _of_products(inputs: Array, cotangents: Array, weights: Float[Array, " K"], dtype: Any) -> Array:
    weighted = cotangents * weights[:, None, None].astype(cotangents.dtype)
    return jnp.einsum("...ktd,...ktf->...df", inputs, weighted, preferred_element_type=dtype)


def _of_lookups(total: Array, ids: Array, cotangents: Array, weights: Float[Array, " K"]) -> Array:
    weighted = cotangents.astype(total.dtype) * weights[:, None, None].astype(total.dtype)
    return total.at[ids.astype(jnp.int32)].add(weighted)
