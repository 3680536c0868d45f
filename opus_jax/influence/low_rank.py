"""Utilities along a direction whose every matrix is replaced by its best approximation of low rank.

Gradients of a few rows, and what an optimizer makes of them, have most of their length in few singular directions, so
utilities along the approximation rank examples almost as those along the whole do. With V of rank r the tangent x V is
(x left) right, 2 r (D + F) operations for each token instead of 2 D F: scoring falls from three forward passes towards
two. Vectors, tables that are looked up, and matrices for which two thin products cost no less keep their direction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from opus_jax.errors import UserError
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.slopes import NoForwardRule, exact_slope
from opus_jax.models.precision import wide
from opus_jax.models.thin import Thin, pays

OVERSAMPLING = 8  # directions drawn beyond the rank, so that the last ones kept are good too
POWER_ITERATIONS = 2
_MATRIX = "kernel"  # the name of what goes through models.tapped.product

Params = PyTree[Any]
Batch = PyTree[Any]  # leaves with the rows on their first axis


def utilities(
    loss_fn: Callable[[Params, Batch], Float[Array, "N ..."]],
    params: Params,
    direction: Params,
    batch: Batch,
    *,
    rank: int,
    chunk: int | None = None,
) -> Float[Array, "N ..."]:
    """<grad loss_i, v'>, v' the direction with each matrix at rank r, by forward mode through thin products.

    Args:
      loss_fn: `loss_fn(params, batch)`, one loss for each row [N] or for each token [N, T]; products with the leaves
        called 'kernel', [D, F] or stacked [L, D, F], must go through `opus_jax.models.tapped.product`.
      params: where the gradients are taken.
      direction: v, a tree like the parameters.
      batch: any pytree of arrays with N first.
      rank: r; a matrix for which `pays` is false keeps its exact direction.
      chunk: rows at a time; None = all. Must divide N.

    Returns:
      Of the losses' shape, float32 or wider.

    Raises:
      UserError: `chunk` does not divide N, or the loss holds a `custom_vjp`, which forward mode cannot pass.
    """
    placed = jax.tree_util.tree_map_with_path(lambda path, w, v: _placed(path, w, v, rank), params, direction)
    moving = jax.tree.map(lambda x: x.amount if _is_thin(x) else x, placed, is_leaf=_is_thin)
    along = jax.tree.map(
        lambda x, v: jnp.ones_like(x.amount) if _is_thin(x) else v, placed, direction, is_leaf=_is_thin
    )

    def losses(moving: Params, rows: Batch) -> Float[Array, "N ..."]:
        return loss_fn(jax.tree.map(_moved, placed, moving, is_leaf=_is_thin), rows)

    try:
        return map_chunks(exact_slope(losses, moving, along), batch, chunk)
    except NoForwardRule:
        raise UserError(
            "the loss holds a custom_vjp, which has no forward-mode rule, so a low rank saves nothing: set "
            "selection.rank=null selection.derivative=difference"
        ) from None


def thin_factors(matrix: Float[Array, "*L D F"], rank: int) -> tuple[Float[Array, "*L D r"], Float[Array, "*L r F"]]:
    """(left, right) with left right the best approximation of rank r, to within what random range finding leaves out.

    The range is found by `POWER_ITERATIONS` of subspace iteration from a fixed random start, `OVERSAMPLING` wider than
    r (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4), and the best r directions in it are kept. Columns of
    left are orthonormal.
    """
    height, width = matrix.shape[-2:]
    found = _range_width(matrix.shape, rank)
    v = matrix.astype(wide(matrix.dtype))
    largest = jnp.max(jnp.abs(v), axis=(-2, -1), keepdims=True)
    v = v / jnp.where(largest > 0, largest, 1)  # squares of small directions stay in range
    basis = _orthonormal(_dot(v, jax.random.normal(jax.random.key(0), (width, found), v.dtype)))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(_dot(v, _orthonormal(_dot(_transposed(v), basis))))
    within = _dot(_transposed(basis), v)
    _, vectors = jnp.linalg.eigh(_dot(within, _transposed(within)))
    best = vectors[..., found - min(rank, height, width) :]
    return _dot(basis, best), _dot(_transposed(best), within) * largest


def factor_flops(shape: tuple[int, ...], rank: int) -> int:
    """Matrix products of `thin_factors` on one [D, F]; orthonormal bases, of narrow matrices, are left out."""
    height, width = shape[-2:]
    found = _range_width(shape, rank)
    whole = 2 * height * width * found * (2 + 2 * POWER_ITERATIONS)
    return whole + 2 * found**2 * width + 2 * found * rank * (height + width)


# ------------------------------------------------------------------------------------------------ the tree


def _placed(path: Any, leaf: Array, v: Array, rank: int) -> Any:
    is_matrix = getattr(path[-1], "key", None) == _MATRIX
    if not is_matrix or not pays(leaf.shape, rank):
        return leaf
    left, right = thin_factors(v, rank)
    return Thin(leaf, left, right, jnp.zeros(leaf.shape[:-2], leaf.dtype))


def _moved(placed: Any, moving: Array) -> Any:
    return Thin(placed.array, placed.left, placed.right, moving) if _is_thin(placed) else moving


def _is_thin(x: Any) -> bool:
    return isinstance(x, Thin)


# ---------------------------------------------------------------------------------------------- arithmetic


def _range_width(shape: tuple[int, ...], rank: int) -> int:
    return min(rank + OVERSAMPLING, *shape[-2:])


def _orthonormal(columns: Float[Array, "*L D r"]) -> Float[Array, "*L D r"]:
    return jnp.linalg.qr(columns)[0]


def _transposed(x: Float[Array, "*L D F"]) -> Float[Array, "*L F D"]:
    return jnp.swapaxes(x, -2, -1)


def _dot(a: Float[Array, "*L D F"], b: Float[Array, "..."]) -> Float[Array, "*L D K"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
