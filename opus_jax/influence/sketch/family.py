"""What every sketch of a weight matrix's gradient can do, and what becomes of matrices too small to need one.

E <sketch x, sketch y> = <x, y> over seeds. Sketches are linear, so a sketch of P (sum_t a_t b_t^T) can be taken from
the tokens; it equals that of the gradient under the same seed.
"""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from opus_jax.optim.matrix_preconditioner import MatrixPreconditioner
from pallas_kernels.count_sketch.api import count_sketch
from pallas_kernels.sharding import batch_axes

Axes = tuple[str | None, str | None]

Gradient = Float[Array, "N D F"]
Inputs = Float[Array, "N T D"]
Cotangents = Float[Array, "N T F"]
Ids = Int[Array, "N T"]
Seed = UInt32[Array, ""]
Sketches = Float[Array, "N M"]


@runtime_checkable
class Sketch(Protocol):
    """A family of sketches; hashable, for it is part of the compiled program."""

    @property
    def width(self) -> int:
        """M, numbers for each matrix."""
        ...

    def of_gradient(
        self, gradient: Gradient, seed: Seed, *, axes: Axes = (None, None), implementation: str | None = None
    ) -> Sketches:
        """Of materialised gradients; a vector is [N, 1, F].

        Args:
          seed: the hash; see `pallas_kernels.count_sketch.hashing.fold_seed` for one of its own for each matrix.
          axes: mesh axes over which D and F are split.
          implementation: of the kernels; None = by the mesh's platform.
        """
        ...

    def of_tokens(
        self,
        inputs: Inputs,
        cotangents: Cotangents,
        seed: Seed,
        preconditioner: MatrixPreconditioner,
        *,
        axes: Axes = (None, None),
        implementation: str | None = None,
    ) -> Sketches:
        """Of P (sum_t a_t b_t^T), to rounding what `of_gradient` gives; the gradient is formed in tiles or not at all.

        Raises:
          UserError: this family cannot sketch under such a preconditioner, or not from tokens.
        """
        ...

    def of_lookup(
        self, ids: Ids, cotangents: Cotangents, seed: Seed, preconditioner: MatrixPreconditioner, *, height: int
    ) -> Sketches:
        """`of_tokens` for a lookup in a table of `height` rows: a_t is the unit vector of row ids[t], never written."""
        ...


def counted(
    gradient: Gradient,
    seed: Seed,
    m: int,
    *,
    form: str = "stride",
    axes: Axes = (None, None),
    implementation: str | None = None,
) -> Sketches:
    """`count_sketch` of any number of examples: the kernel wants a multiple of the mesh's batch shards, a proxy is one.

    A matrix of at most m entries is laid out as a vector first, so in the stride form it is kept whole.
    """
    rows, height, width = gradient.shape
    if fits((height, width), m):
        gradient, axes = gradient.reshape(rows, 1, height * width), (None, None)
    padded = jnp.pad(gradient, ((0, -rows % _batch_shards()), (0, 0), (0, 0)))
    return count_sketch(padded, seed, m, form=form, axes=axes, implementation=implementation)[:rows]


def fits(shape: tuple[int, int], m: int) -> bool:
    """Whether a matrix is kept whole, entry by entry: two-sided sketches gain nothing on what is no larger than they.

    A matrix of one row or column has no second side either: it is folded as the vector it is, of any length.
    """
    return min(shape) == 1 or shape[0] * shape[1] <= m


def whole_gradient(inputs: Inputs, cotangents: Cotangents, preconditioner: MatrixPreconditioner) -> Gradient:
    """P (sum_t a_t b_t^T), for matrices that fit: no larger than their sketch, or than the activations."""
    wide = jnp.promote_types(jnp.promote_types(inputs.dtype, cotangents.dtype), jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    gradient = jnp.einsum("ntd,ntf->ndf", inputs.astype(wide), cotangents.astype(wide), precision=precision)
    return preconditioner.apply(gradient)


def whole_gradient_of_lookup(
    ids: Ids, cotangents: Cotangents, preconditioner: MatrixPreconditioner, height: int
) -> Gradient:
    """`whole_gradient` with unit vectors for a_t."""
    wide = jnp.promote_types(cotangents.dtype, jnp.float32)
    summed = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=height))(cotangents.astype(wide), ids)
    return preconditioner.apply(summed)


def alike(inputs: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
    """Both in the wider of their types, as the kernel wants them."""
    dtype = jnp.promote_types(inputs.dtype, cotangents.dtype)
    return inputs.astype(dtype), cotangents.astype(dtype)


def _batch_shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in batch_axes())
