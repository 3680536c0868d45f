"""Sketches of per-example weight gradients G_i = A_i^T B_i that are never stored."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from opus_jax.errors import UserError
from pallas_kernels.ghost_sketch import reference, tpu
from pallas_kernels.ghost_sketch.fold import CountFold, KronFold
from pallas_kernels.implementation import pallas_interpret, resolve
from pallas_kernels.sharding import (
    MatrixAxes,
    check_division,
    example_spec,
    matrix_spec,
    offset,
    over_shards,
    sum_over,
)

__all__ = ["CountFold", "KronFold", "ghost_sketch"]


def ghost_sketch(
    inputs: Float[Array, "N T D"],
    cotangents: Float[Array, "N T F"],
    fold: KronFold | CountFold,
    *,
    scale: Float[Array, "D F"] | None = None,
    direction: Float[Array, "D F"] | None = None,
    axes: MatrixAxes = (None, None),
    implementation: str | None = None,
) -> tuple[Float[Array, "N M"], Float[Array, " N"] | None]:
    """fold(scale * G_i) for every example, G_i = sum_t a_t b_t^T, and <G_i, direction> out of the same tiles.

    On TPU each tile of G_i is formed, scaled and folded in VMEM; elsewhere the gradients of a few examples exist at a
    time, or none where the fold can be applied to the tokens. Under a mesh (`jax.set_mesh`) the examples are split
    over its batch axes and the parts along `axes` are summed; the numbers are the same on every mesh, to rounding.

    Args:
      inputs: a_t, what the weight matrix [D, F] multiplies; bfloat16 or float32 (float64 under XLA).
      cotangents: b_t, of the matrix's output; of the same type.
      fold: `KronFold` or `CountFold`.
      scale: elementwise preconditioner, such as AdamW's exact diagonal.
      direction: v; the inner product is of the unscaled gradient.
      axes: mesh axes over which D and F are split, for example (None, "tensor").
      implementation: see `pallas_kernels.implementation.resolve`. With None a Kron fold without scale or direction is
        left to XLA on every platform: its projections are plain matrix products and cheaper than any gradient.

    Returns:
      Sketches [N, M], M = `fold.width`, and the inner products [N] or None; float32 or wider.

    Raises:
      UserError: shapes that do not belong together, sizes that the mesh does not divide, or an implementation that
        cannot run here.
    """
    _check_shapes(inputs, cotangents, fold, scale, direction)
    check_division("ghost_sketch", inputs.shape[0], (inputs.shape[2], cotangents.shape[2]), axes)
    projects = isinstance(fold, KronFold) and scale is None and direction is None
    chosen = "xla" if implementation is None and projects else resolve(implementation)

    parts, structure = jax.tree.flatten(fold)

    def local(inputs: Array, cotangents: Array, parts: list[Array], *rest: Any) -> tuple[Array | None, ...]:
        first = (offset(inputs.shape[2], axes[0]), offset(cotangents.shape[2], axes[1]))
        results = _run(chosen)(inputs, cotangents, jax.tree.unflatten(structure, parts), *rest, first)
        return tuple(None if x is None else sum_over(x, axes) for x in results)

    whole = matrix_spec(*axes)
    specs = (example_spec(None, axes[0]), example_spec(None, axes[1]), _fold_specs(fold, axes), whole, whole)
    present = tuple(None if x is None else s for x, s in zip((scale, direction), specs[3:], strict=True))
    out = (example_spec(None), None if direction is None else example_spec())
    return over_shards(local, (inputs, cotangents, parts, scale, direction), (*specs[:3], *present), out)


def _run(implementation: str) -> Callable[..., tuple[Array, Array | None]]:
    if implementation == "xla":
        return reference.ghost_sketch
    return partial(tpu.ghost_sketch, interpret=pallas_interpret(implementation))


def _fold_specs(fold: KronFold | CountFold, axes: MatrixAxes) -> list[PartitionSpec]:
    """Of the fold's arrays: a seed is whole everywhere, factors lie as the matrix does."""
    if isinstance(fold, CountFold):
        return [PartitionSpec()]
    return [matrix_spec(None, axes[0], None), matrix_spec(None, axes[1], None)]


def _check_shapes(
    inputs: Array, cotangents: Array, fold: KronFold | CountFold, scale: Array | None, direction: Array | None
) -> None:
    matrix = (inputs.shape[2], cotangents.shape[2])
    if inputs.shape[:2] != cotangents.shape[:2]:
        raise UserError(
            f"ghost_sketch: inputs {inputs.shape} and cotangents {cotangents.shape}: must share examples and tokens"
        )
    if inputs.dtype != cotangents.dtype:
        raise UserError(
            f"ghost_sketch: inputs are {inputs.dtype}, cotangents {cotangents.dtype}: cast one to the other"
        )
    for name, array in (("scale", scale), ("direction", direction)):
        if array is not None and array.shape != matrix:
            raise UserError(f"ghost_sketch: {name} has shape {array.shape}: must be that of the weights, {matrix}")
    if isinstance(fold, CountFold):
        if fold.rows < 1 or fold.columns < 1:
            raise UserError(f"ghost_sketch: CountFold of {fold.rows} x {fold.columns}: both must be at least 1")
    elif (fold.left.shape[1], fold.right.shape[1]) != matrix or fold.left.shape[0] != fold.right.shape[0]:
        raise UserError(
            f"ghost_sketch: KronFold of {fold.left.shape} and {fold.right.shape}: must be [R, {matrix[0]}, p] and "
            f"[R, {matrix[1]}, q]"
        )
