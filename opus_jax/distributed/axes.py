"""Logical axis rules: which mesh axes a named array dimension is split over. The only place that says so."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxes = tuple[str | None, ...]

RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("replica", "data", "fsdp"),  # rows: candidates, proxy rows, validation rows
    "length": None,
    "activation": None,  # the model width of an activation: whole on every device
    "layer": None,
    "embed": "fsdp",  # the model width of a parameter
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "candidate": None,  # what is known of every candidate: utilities, the sides of a Gram matrix
    "sketch_numbers": ("replica", "data", "fsdp"),  # of all candidates' sketches, while a Gram matrix is summed
    "dealt_layer": ("fsdp", "tensor"),  # whole matrices of a stack, some on each device: Muon's orthogonalisation
    "half_dealt_layer": "fsdp",  # on the way there
}


def partition_spec(axes: LogicalAxes) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have these logical names; None = not split."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in axes))


def sharding(mesh: Mesh, axes: LogicalAxes, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Sharding of one array; no axes = whole. A dimension that its mesh axes do not divide (`shape`) is left whole."""
    spec = partition_spec(axes)
    if shape is not None and axes:
        spec = PartitionSpec(*(_dividing(mesh, names, size) for names, size in zip(spec, shape, strict=True)))
    return NamedSharding(mesh, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place(x: np.ndarray, split: NamedSharding) -> jax.Array:
    """An array that every process has whole, on the devices of all of them."""
    return jax.make_array_from_callback(x.shape, split, lambda at: x[at])


def tree_shardings(mesh: Mesh, logical: Any, like: Any) -> Any:
    """Shardings for a tree of arrays (or shapes) `like`, named by an equal tree of logical axes."""
    return jax.tree.map(lambda x, axes: sharding(mesh, axes, x.shape), like, logical)


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Ask for a sharding of an activation inside a jitted function; nothing happens outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = PartitionSpec(
        *(_dividing(mesh, names, size) for names, size in zip(partition_spec(axes), x.shape, strict=True))
    )
    return jax.lax.with_sharding_constraint(x, spec)


def split_ways(name: str) -> int:
    """Over how many devices of the mesh in use a dimension of this name is split; 1 outside `jax.set_mesh`."""
    return _ways(jax.sharding.get_abstract_mesh(), RULES[name])


def _dividing(mesh: Any, names: tuple[str, ...] | str | None, size: int) -> tuple[str, ...] | str | None:
    ways = _ways(mesh, names)
    return names if ways > 1 and size % ways == 0 else None


def _ways(mesh: Any, names: tuple[str, ...] | str | None) -> int:
    axes = (names,) if isinstance(names, str) else (names or ())
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
