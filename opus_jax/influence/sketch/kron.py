"""Two-sided sketches: small blocks S_in^T G S_out, matrix products alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opus_jax.errors import UserError
from opus_jax.influence.sketch.family import (
    Axes,
    Cotangents,
    Gradient,
    Ids,
    Inputs,
    Seed,
    Sketches,
    alike,
    counted,
    fits,
    whole_gradient,
    whole_gradient_of_lookup,
)
from opus_jax.optim.matrix_preconditioner import Diagonal, Factored, MatrixPreconditioner, OutputSide
from pallas_kernels.count_sketch.hashing import fold_seed, row_and_column_seeds, sign_word
from pallas_kernels.ghost_sketch.api import KronFold, ghost_sketch

LEFT, RIGHT = 0, 1  # which half of a seed


@dataclass(frozen=True)
class KronSketch:
    """out[r] = left_r^T G right_r / (sqrt(blocks) side), entries of left and right +-1: E <out x, out y> = <x, y>.

    The error of one block falls with its side, not with its area (sides are shared by all its entries), so several
    small blocks beat one large block of the same area. Entries are hashed from indices when a matrix is sketched:
    blocks side (D + F) numbers, by default a third of a 768 x 768 matrix, 21 % of a 768 x 3072 and 4 % of a
    4096 x 14336 one. They are kept for no longer than that, so under a scan over layers one layer's exist at a time.

    Matrices of at most `width` entries, and vectors, are count sketched instead (exact where they fit).

    Attributes:
      blocks: independent pairs of projections.
      side: a block is side x side.

    Raises:
      UserError: blocks or side below 1.
    """

    blocks: int = 4
    side: int = 32

    def __post_init__(self) -> None:
        for name, value in (("blocks", self.blocks), ("side", self.side)):
            if value < 1:
                raise UserError(f"KronSketch: {name} = {value}: must be at least 1")

    @property
    def width(self) -> int:
        return self.blocks * self.side**2

    def of_gradient(
        self, gradient: Gradient, seed: Seed, *, axes: Axes = (None, None), implementation: str | None = None
    ) -> Sketches:
        rows, height, width = gradient.shape
        if fits((height, width), self.width):
            return counted(gradient, seed, self.width, implementation=implementation)
        kind = jnp.promote_types(gradient.dtype, jnp.float32)
        left, right = (x.astype(kind) for x in self._projections(height, width, seed))
        exact = jax.lax.Precision.HIGHEST
        half = jnp.einsum("ndf,rdp->nrpf", gradient.astype(kind), left, precision=exact)
        return jnp.einsum("nrpf,rfq->nrpq", half, right, precision=exact).reshape(rows, self.width)

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
        shape = (inputs.shape[2], cotangents.shape[2])
        if fits(shape, self.width):
            gradient = whole_gradient(inputs, cotangents, preconditioner)
            return counted(gradient, seed, self.width, implementation=implementation)
        left, right = self._projections(*shape, seed)
        scale = preconditioner.scale if isinstance(preconditioner, Diagonal) else None
        fold = KronFold(*_with_preconditioner(left, right, preconditioner))
        return ghost_sketch(*alike(inputs, cotangents), fold, scale=scale, axes=axes, implementation=implementation)[0]

    def of_lookup(
        self, ids: Ids, cotangents: Cotangents, seed: Seed, preconditioner: MatrixPreconditioner, *, height: int
    ) -> Sketches:
        if fits((height, cotangents.shape[2]), self.width):
            return counted(whole_gradient_of_lookup(ids, cotangents, preconditioner, height), seed, self.width)
        kind = jnp.promote_types(cotangents.dtype, jnp.float32)
        moved = preconditioner.of_rows(ids, cotangents).astype(kind)
        across = jnp.arange(cotangents.shape[2], dtype=jnp.uint32)
        before = self._entries(ids.astype(jnp.uint32), seed, LEFT).astype(kind)
        exact = jax.lax.Precision.HIGHEST
        after = jnp.einsum("ntf,frq->ntrq", moved, self._entries(across, seed, RIGHT).astype(kind), precision=exact)
        return jnp.einsum("ntrp,ntrq->nrpq", before, after, precision=exact).reshape(ids.shape[0], self.width)

    def _projections(self, height: int, width: int, seed: Seed) -> tuple[Float[Array, "R D p"], Float[Array, "R F q"]]:
        sides = ((height, LEFT), (width, RIGHT))
        left, right = (self._entries(jnp.arange(n, dtype=jnp.uint32), seed, half) for n, half in sides)
        return left.swapaxes(0, 1), right.swapaxes(0, 1)

    def _entries(self, index: Array, seed: Seed, half: int) -> Float[Array, "*n R p"]:
        """Signs of every row of a projection, times what makes the blocks' sum unbiased, shared by the two sides."""
        across = jnp.arange(self.blocks * self.side, dtype=jnp.uint32)
        word = sign_word(index[..., None], across, row_and_column_seeds(fold_seed(seed, half)))
        size = (self.blocks**0.5 * self.side) ** -0.5
        return jnp.where(word < 0, -size, size).reshape(*index.shape, self.blocks, self.side)


def _with_preconditioner(
    left: Float[Array, "R D p"], right: Float[Array, "R F q"], preconditioner: MatrixPreconditioner
) -> tuple[Float[Array, "R D p"], Float[Array, "R F q"]]:
    """left^T (P G) right = left'^T G right', at no cost per token. A diagonal P stays where it is."""
    if isinstance(preconditioner, Factored):
        return preconditioner.rows[:, None] * left, preconditioner.columns[:, None] * right
    if isinstance(preconditioner, OutputSide):
        return left, jnp.einsum("fg,rgq->rfq", preconditioner.matrix, right, precision=jax.lax.Precision.HIGHEST)
    return left, right
