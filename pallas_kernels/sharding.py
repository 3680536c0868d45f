"""Run a kernel on every device's part of its arrays: examples over the batch axes, matrices over the axes given."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from opus_jax.distributed.axes import RULES
from opus_jax.errors import UserError

MatrixAxes = tuple[str | None, str | None]


def batch_axes() -> tuple[str, ...]:
    """Axes of the mesh in use over which examples are split by `over_shards`; those already manual are not."""
    return tuple(axis for axis in (RULES["batch"] or ()) if axis in _automatic_axes())


def over_shards(function: Callable[..., Any], arguments: tuple[Any, ...], specs: tuple[Any, ...], out: Any) -> Any:
    """`function(*arguments)` on each device's shards, or plainly where there is no mesh or all its axes are manual.

    Args:
      specs: a PartitionSpec (or a tree of them) for each argument.
      out: those of the results; what is not split is the same on all devices, which `function` sees to.
    """
    automatic = _automatic_axes()
    if not automatic:
        return function(*arguments)
    return jax.shard_map(function, in_specs=specs, out_specs=out, axis_names=set(automatic), check_vma=False)(
        *arguments
    )


def example_spec(*rest: str | None) -> PartitionSpec:
    """Examples first, over the batch axes, then the axes of the other dimensions."""
    return matrix_spec(batch_axes() or None, *rest)


def matrix_spec(*axes: Any) -> PartitionSpec:
    """A spec without axes that are manual already: of those the caller passes its own part."""
    automatic = _automatic_axes()
    return PartitionSpec(*(axis if isinstance(axis, tuple) or axis in automatic else None for axis in axes))


def check_division(name: str, examples: int, matrix: tuple[int, int], axes: MatrixAxes) -> None:
    """Raises UserError where examples or the matrix do not divide over their axes of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return
    shards = math.prod(mesh.shape[axis] for axis in batch_axes())
    if examples % shards:
        raise UserError(f"{name}: {examples} examples do not divide over {shards} batch shards; pass a multiple of it")
    for axis, size in zip(axes, matrix, strict=True):
        if axis is not None and (axis not in mesh.shape or axis in (RULES["batch"] or ())):
            allowed = [other for other in mesh.axis_names if other not in (RULES["batch"] or ())]
            raise UserError(f"{name}: axes = {axes}: {axis!r} must be None or one of {allowed}")
        if axis in _automatic_axes() and size % mesh.shape[axis]:
            raise UserError(f"{name}: {size} does not divide over the {mesh.shape[axis]} devices of axis {axis!r}")


def global_size(size: int, axis: str | None) -> int:
    """Size over the whole mesh of a dimension as `over_shards` is given it."""
    mesh = jax.sharding.get_abstract_mesh()
    split_by_caller = axis is not None and axis in mesh.shape and axis not in _automatic_axes()
    return size * mesh.shape[axis] if split_by_caller and axis is not None else size


def offset(size: int, axis: str | None) -> Array | int:
    """First global index of this device's part, inside `over_shards`; `size` is the part's."""
    if axis is None or jax.sharding.get_abstract_mesh().empty:
        return 0
    return jax.lax.axis_index(axis) * size


def sum_over(x: Array, axes: MatrixAxes) -> Array:
    """Sum of the parts along the matrix axes, inside `over_shards`."""
    names = tuple(axis for axis in axes if axis is not None)
    return jax.lax.psum(x, names) if names and not jax.sharding.get_abstract_mesh().empty else x


def _automatic_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    pairs = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    return tuple(name for name, kind in pairs if kind != AxisType.Manual)
