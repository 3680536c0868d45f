"""Exact inner products of all pairs of rows, <P G_i, G_j>, without per-example gradients and without a sketch.

With factors a, b and a preconditioner that acts on them, P (a b^T) = a' b'^T, the product of two gradients is a sum
over pairs of tokens, sum_ts (a'_it . a_js)(b'_it . b_js): the gradient itself is never formed. It costs less than
forming it where 2 T^2 < D F (research: GhostSuite's rule). Otherwise, and for the elementwise preconditioner of AdamW,
slices of the gradients of all rows are formed, multiplied and dropped.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opus_jax.influence.ghost.rules import Cotangents, Inputs
from opus_jax.models.precision import wide
from opus_jax.optim.matrix_preconditioner import Diagonal, MatrixPreconditioner

SLICE_BYTES = 64 * 2**20  # of the gradients that are formed at a time, all rows together


@dataclass(frozen=True)
class Pairs:
    """gram_ij = <P G_i, G_j>, [N, N]. Constants: P.

    Attributes:
      both_sides: <P G_i, P G_j> instead, the paper's H = I.
    """

    both_sides: bool = False

    def of_product(
        self, inputs: Inputs, cotangents: Cotangents, constants: MatrixPreconditioner
    ) -> Float[Array, "N N"]:
        tokens, area = inputs.shape[1], inputs.shape[2] * cotangents.shape[2]
        if isinstance(constants, Diagonal) or 2 * tokens**2 >= area:
            return self._by_slices(inputs, cotangents, constants)
        moved = constants.of_factors(inputs, cotangents)
        return _by_tokens(moved, moved if self.both_sides else (inputs, cotangents))

    def of_lookup(
        self, ids: Int[Array, "N T"], cotangents: Cotangents, constants: MatrixPreconditioner
    ) -> Float[Array, "N N"]:
        """Rows of a table meet where their ids are equal."""
        moved = constants.of_rows(ids, cotangents)
        other = moved if self.both_sides else cotangents

        def one(row: tuple[Array, Array]) -> Float[Array, " N"]:
            same = row[0][None, :, None] == ids[:, None, :]
            return jnp.sum(jnp.einsum("tf,jsf->jts", row[1], other) * same, axis=(1, 2))

        return jax.lax.map(one, (ids, moved))

    def _by_slices(
        self, inputs: Inputs, cotangents: Cotangents, preconditioner: MatrixPreconditioner
    ) -> Float[Array, "N N"]:
        rows, _, height = inputs.shape
        per_slice = max(1, SLICE_BYTES // (rows * cotangents.shape[2] * wide(inputs.dtype).itemsize))

        def of_slice(start: int) -> Float[Array, "N N"]:
            stop = min(start + per_slice, height)
            gradients = jnp.einsum(
                "ntd,ntf->ndf", inputs[:, :, start:stop], cotangents, preferred_element_type=wide(inputs.dtype)
            )
            moved = preconditioner.at_rows(start, stop).apply(gradients)
            return jnp.einsum("idf,jdf->ij", moved, moved if self.both_sides else gradients, precision="highest")

        return sum(
            (of_slice(start) for start in range(0, height, per_slice)), jnp.zeros((rows, rows), wide(inputs.dtype))
        )


def _by_tokens(
    left: tuple[Float[Array, "N T D"], Float[Array, "N T F"]],
    right: tuple[Float[Array, "N T D"], Float[Array, "N T F"]],
) -> Float[Array, "N N"]:
    """sum_ts (a_it . a'_js)(b_it . b'_js), one i at a time: [N, T, T] numbers exist at once."""
    kind = wide(left[0].dtype)

    def one(row: tuple[Array, Array]) -> Float[Array, " N"]:
        through_inputs = jnp.einsum("td,jsd->jts", row[0], right[0], preferred_element_type=kind)
        through_cotangents = jnp.einsum("tf,jsf->jts", row[1], right[1], preferred_element_type=kind)
        return jnp.sum(through_inputs * through_cotangents, axis=(1, 2))

    return jax.lax.map(one, left)
