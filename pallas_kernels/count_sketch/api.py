"""CountSketch of a stack of matrices."""

from functools import partial

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt32

from opus_jax.errors import UserError
from pallas_kernels.count_sketch import reference, tpu
from pallas_kernels.count_sketch.folding import fold_shape
from pallas_kernels.implementation import pallas_interpret, resolve
from pallas_kernels.sharding import (
    MatrixAxes,
    check_division,
    example_spec,
    global_size,
    offset,
    over_shards,
    sum_over,
)

FORMS = ("stride", "hash")


def count_sketch(
    x: Float[Array, "N D F"],
    seed: UInt32[Array, ""],
    m: int,
    *,
    form: str = "stride",
    axes: MatrixAxes = (None, None),
    implementation: str | None = None,
) -> Float[Array, "N m"]:
    """out[i, bucket(x, y)] += sign(x, y) X_i[x, y] (Charikar, Chen, Farach-Colton 2002): E <out_i, out_j> = <X_i, X_j>.

    Under a mesh (`jax.set_mesh`) the examples are split over its batch axes; signs and buckets are those of global
    coordinates, so the numbers are the same on every mesh, to the order of the sums.

    Args:
      x: matrices; a vector is [N, 1, F].
      seed: the hash; the same seed is the same hash at every call and in `ghost_sketch`'s CountFold.
      m: width of the sketch.
      form: 'stride', bucket (x mod r, y mod c) with r c = m by `fold_shape` from the whole matrix: a sum without
        scatter; 'hash', a bucket drawn for every entry: a scatter, XLA only.
      axes: mesh axes over which D and F are split.
      implementation: see `pallas_kernels.implementation.resolve`.

    Returns:
      [N, m], float32 or wider.

    Raises:
      UserError: m < 1, an unknown form, a form or type that the implementation has not, or sizes that the mesh does
        not divide.
    """
    if m < 1:
        raise UserError(f"count_sketch: m = {m}: must be at least 1")
    if form not in FORMS:
        raise UserError(f"count_sketch: form = {form!r}: must be one of {', '.join(FORMS)}")
    if form == "hash" and implementation in ("pallas", "interpret"):
        raise UserError(
            f"count_sketch: form 'hash' with implementation = {implementation!r}: a scatter has no TPU kernel; use "
            "form 'stride', or implementation 'xla'"
        )
    chosen = resolve(implementation)
    check_division("count_sketch", x.shape[0], (x.shape[1], x.shape[2]), axes)
    shape = fold_shape(global_size(x.shape[1], axes[0]), global_size(x.shape[2], axes[1]), m)
    local = _hashed if form == "hash" else partial(_folded, shape=shape, implementation=chosen)
    return over_shards(
        lambda x, seed: sum_over(local(x, seed, m=m, axes=axes), axes),
        (x, seed),
        (example_spec(*axes), PartitionSpec()),
        example_spec(None),
    )


def _hashed(x: Array, seed: Array, *, m: int, axes: MatrixAxes) -> Array:
    return reference.hash_sketch(x, seed, m, _first(x, axes))


def _folded(x: Array, seed: Array, *, m: int, axes: MatrixAxes, shape: tuple[int, int], implementation: str) -> Array:
    if implementation == "xla":
        return reference.stride_sketch(x, seed, *shape, _first(x, axes)).reshape(-1, m)
    interpret = pallas_interpret(implementation)
    return tpu.stride_sketch(x, seed, *shape, _first(x, axes), interpret=interpret).reshape(-1, m)


def _first(x: Array, axes: MatrixAxes) -> tuple[Array | int, Array | int]:
    return offset(x.shape[1], axes[0]), offset(x.shape[2], axes[1])
