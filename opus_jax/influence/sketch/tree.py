"""Sketches of whole trees of gradients, one for each layer's matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt32

from opus_jax.errors import UserError
from opus_jax.influence.sketch.count import CountSketch
from opus_jax.influence.sketch.family import Axes, Sketch
from opus_jax.influence.sketch.kron import KronSketch
from opus_jax.influence.sketch.tensor import TensorSketch
from opus_jax.optim.matrix_preconditioner import is_stacked
from pallas_kernels.count_sketch.hashing import fold_seed

SIDE = 32  # of a Kron sketch's blocks


def sketch(
    gradients: PyTree[Float[Array, "N ..."]], *, method: str = "count", m: int = 8192, seed: int = 0
) -> Float[Array, "N S m"]:
    """Sketch every example's gradient: inner products of sketches, summed over matrices, estimate the gradients'.

    Args:
      gradients: leaves [N, ...], such as `per_example_gradients` gives; see `sketch_tree`.
      method: 'count' (any gradient), 'kron' (matrix products only), 'tensor' (Fourier transforms).
      m: numbers for each matrix; for 'kron' a multiple of 1024.
      seed: the same seed is the same hash: sketches under one seed have inner products with each other.

    Returns:
      [N, S, m], S the layer matrices of all leaves in their order; float32 or wider.

    Raises:
      UserError: an unknown method, or an m that it has not.
    """
    return sketch_tree(make_sketch(method, m), gradients, jnp.uint32(seed))


def make_sketch(method: str, m: int) -> Sketch:
    """The family called 'count', 'kron' or 'tensor', of width m.

    Raises:
      UserError: an unknown method, m < 1, or for 'kron' no multiple of a 32 x 32 block.
    """
    families: dict[str, Callable[[int], Sketch]] = {"count": CountSketch, "kron": _kron, "tensor": TensorSketch}
    if method not in families:
        raise UserError(f"sketch method = {method!r}: must be one of {', '.join(families)}")
    return families[method](m)


def sketch_tree(
    sketch: Sketch,
    tree: PyTree[Float[Array, "N ..."]],
    seed: UInt32[Array, ""],
    *,
    axes: tuple[tuple[str, Axes], ...] = (),
    implementation: str | None = None,
) -> Float[Array, "N S M"]:
    """Sketches of all layer matrices of a tree of per-example gradients.

    The last two axes of a leaf are a matrix, those between N and them count layers: [N, L, D, F] is L matrices. Under
    'blocks' the first axis after N is the layer's: [N, L, F] is L vectors there. A vector is a matrix of one row.

    Args:
      sketch: the family.
      tree: leaves [N, ...].
      seed: matrix `layer` of leaf number `leaf` is sketched under `fold_seed(seed, leaf, layer)`.
      axes: by the name of a leaf ("blocks.mlp.up.kernel"), mesh axes over which D and F are split; absent = gathered.
      implementation: of the kernels; None = by the mesh's platform.

    Returns:
      [N, S, M], leaf by leaf in the tree's order, layer by layer.
    """
    found, split = [], dict(axes)
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        matrices = _layer_matrices(leaf, is_stacked(path))
        where = split.get(jax.tree_util.keystr(path, simple=True, separator="."), (None, None))
        one = partial(sketch.of_gradient, axes=where, implementation=implementation)

        def of_layer(layer: Array, number: int = number, matrices: Array = matrices, one: Any = one) -> Array:
            return one(jax.lax.dynamic_index_in_dim(matrices, layer, 1, keepdims=False), fold_seed(seed, number, layer))

        found.append(jax.lax.map(of_layer, jnp.arange(matrices.shape[1], dtype=jnp.uint32)).swapaxes(0, 1))
    return jnp.concatenate(found, axis=1)


def _layer_matrices(leaf: Float[Array, "N ..."], stacked: bool) -> Float[Array, "N L D F"]:
    rows, *shape = leaf.shape
    if stacked and len(shape) == 2:
        return leaf[:, :, None, :]
    height, width = [1, 1, *shape][-2:]
    return leaf.reshape(rows, -1, height, width)


def _kron(m: int) -> Sketch:
    if m < 1 or m % SIDE**2:
        raise UserError(f"sketch m = {m}: 'kron' has blocks of {SIDE} x {SIDE}; m must be a multiple of {SIDE**2}")
    return KronSketch(m // SIDE**2, SIDE)
