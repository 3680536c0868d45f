"""CountSketch: every entry of a matrix is added, with a random sign, to one of m buckets."""

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
from opus_jax.optim.matrix_preconditioner import Diagonal, MatrixPreconditioner
from pallas_kernels.count_sketch.folding import fold_shape
from pallas_kernels.count_sketch.hashing import row_and_column_seeds, sign_word
from pallas_kernels.ghost_sketch.api import CountFold, ghost_sketch

FORMS = ("stride", "hash")


@dataclass(frozen=True)
class CountSketch:
    """out[bucket(x, y)] += sign(x, y) G[x, y] (Charikar, Chen, Farach-Colton 2002); signs come from indices, no table.

    Form 'hash' draws every bucket: Var <sketch x, sketch y> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_p x_p^2 y_p^2) / m.
    Form 'stride' takes buckets from positions, (row mod r, column mod c) with r c = m, so it needs no scatter. Signs
    alone make it unbiased; its variance is the sum over pairs p != q of one bucket of x_p^2 y_q^2 + x_p y_p x_q y_q,
    the formula above where large entries do not lie r or c apart. A matrix of at most m entries is kept whole by it.

    Attributes:
      m: buckets.
      form: 'stride' or 'hash'; 'hash' of materialised gradients only.

    Raises:
      UserError: m < 1, or an unknown form.
    """

    m: int = 8192
    form: str = "stride"

    def __post_init__(self) -> None:
        if self.m < 1:
            raise UserError(f"CountSketch: m = {self.m}: must be at least 1")
        if self.form not in FORMS:
            raise UserError(f"CountSketch: form = {self.form!r}: must be one of {', '.join(FORMS)}")

    @property
    def width(self) -> int:
        return self.m

    def of_gradient(
        self, gradient: Gradient, seed: Seed, *, axes: Axes = (None, None), implementation: str | None = None
    ) -> Sketches:
        return counted(gradient, seed, self.m, form=self.form, axes=axes, implementation=implementation)

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
        self._check_stride()
        shape = (inputs.shape[2], cotangents.shape[2])
        if fits(shape, self.m):
            gradient = whole_gradient(inputs, cotangents, preconditioner)
            return counted(gradient, seed, self.m, implementation=implementation)
        scale = None
        if isinstance(preconditioner, Diagonal):
            scale = preconditioner.scale
        else:
            inputs, cotangents = preconditioner.of_factors(inputs, cotangents)
        fold = CountFold(seed, *fold_shape(*shape, self.m))
        return ghost_sketch(*alike(inputs, cotangents), fold, scale=scale, axes=axes, implementation=implementation)[0]

    def of_lookup(
        self, ids: Ids, cotangents: Cotangents, seed: Seed, preconditioner: MatrixPreconditioner, *, height: int
    ) -> Sketches:
        self._check_stride()
        shape = (height, cotangents.shape[2])
        if fits(shape, self.m):
            return counted(whole_gradient_of_lookup(ids, cotangents, preconditioner, height), seed, self.m)
        rows, columns = fold_shape(*shape, self.m)
        folded = _signed_columns(ids, preconditioner.of_rows(ids, cotangents), seed, columns)
        add = lambda tokens, where: jax.ops.segment_sum(tokens, where, num_segments=rows)  # noqa: E731
        return jax.vmap(add)(folded, ids % rows).reshape(ids.shape[0], self.m)

    def _check_stride(self) -> None:
        if self.form != "stride":
            raise UserError(
                "CountSketch: form = 'hash' scatters entries of the gradient itself and cannot be taken from tokens; "
                "use form = 'stride', or per-example gradients"
            )


def _signed_columns(ids: Ids, cotangents: Cotangents, seed: Seed, columns: int) -> Float[Array, "N T c"]:
    """Each token's row of the gradient, signed and folded to so many columns, in float32 or wider."""
    rows, tokens, width = cotangents.shape
    across = jnp.arange(width, dtype=jnp.uint32)
    word = sign_word(ids[..., None].astype(jnp.uint32), across, row_and_column_seeds(seed))
    wide = cotangents.astype(jnp.promote_types(cotangents.dtype, jnp.float32))
    signed = jnp.pad(jnp.where(word < 0, -wide, wide), ((0, 0), (0, 0), (0, -width % columns)))
    return signed.reshape(rows, tokens, -1, columns).sum(axis=2)
