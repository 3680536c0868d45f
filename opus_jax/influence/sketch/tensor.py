"""TensorSketch: the CountSketch of an outer product, out of the CountSketches of its two factors (Pham, Pagh 2013)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int, UInt32

from opus_jax.errors import UserError
from opus_jax.influence.sketch.family import (
    Axes,
    Cotangents,
    Gradient,
    Ids,
    Inputs,
    Seed,
    Sketches,
    counted,
    fits,
    whole_gradient,
    whole_gradient_of_lookup,
)
from opus_jax.optim.matrix_preconditioner import Factored, Identity, MatrixPreconditioner
from pallas_kernels.count_sketch.hashing import fold_seed, row_and_column_seeds, sign_word

SPECTRA_BYTES = 64 * 2**20  # of the tokens' Fourier transforms that exist at a time, a token of every example at least

Spectrum = Complex[Array, "N t K"]


@dataclass(frozen=True)
class TensorSketch:
    """Entry (x, y) goes to bucket h(x) + g(y) mod m with sign s(x) s(y): the circular convolution of two sketches.

    So a token costs two Fourier transforms of m and no product with D x F; tokens are summed in Fourier space and
    transformed back once, so inner products of the outputs are real and the estimate. Nothing is stored but two
    places for each row and column.

    Matrices of at most m entries, and vectors, are count sketched instead (exact where they fit).

    Attributes:
      m: buckets.

    Raises:
      UserError: m < 1.
    """

    m: int = 8192

    def __post_init__(self) -> None:
        if self.m < 1:
            raise UserError(f"TensorSketch: m = {self.m}: must be at least 1")

    @property
    def width(self) -> int:
        return self.m

    def of_gradient(
        self, gradient: Gradient, seed: Seed, *, axes: Axes = (None, None), implementation: str | None = None
    ) -> Sketches:
        """Rows of the gradient stand for tokens, whose a_t are the unit vectors."""
        rows, height, width = gradient.shape
        if fits((height, width), self.m):
            return counted(gradient, seed, self.m, implementation=implementation)
        ids = jnp.broadcast_to(jnp.arange(height), (rows, height))
        return self.of_lookup(ids, gradient, seed, Identity(), height=height)

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
        rank_one = _rank_one(preconditioner)
        if fits((inputs.shape[2], cotangents.shape[2]), self.m):
            gradient = whole_gradient(inputs, cotangents, preconditioner)
            return counted(gradient, seed, self.m, implementation=implementation)
        inputs, cotangents = rank_one.of_factors(inputs, cotangents)
        of_inputs = lambda chunk: self._spectrum(chunk, fold_seed(seed, 0))  # noqa: E731
        return self._convolved(inputs, of_inputs, cotangents, seed)

    def of_lookup(
        self, ids: Ids, cotangents: Cotangents, seed: Seed, preconditioner: MatrixPreconditioner, *, height: int
    ) -> Sketches:
        rank_one = _rank_one(preconditioner)
        if fits((height, cotangents.shape[2]), self.m):
            return counted(whole_gradient_of_lookup(ids, cotangents, preconditioner, height), seed, self.m)
        moved = rank_one.of_rows(ids, cotangents)
        kind = jnp.promote_types(cotangents.dtype, jnp.float32)

        def of_ids(chunk: Ids) -> Spectrum:
            sign, place = _drawn(chunk.astype(jnp.uint32), self.m, fold_seed(seed, 0))
            return jnp.fft.rfft(sign[..., None] * jax.nn.one_hot(place, self.m, dtype=kind))

        return self._convolved(ids, of_ids, moved, seed)

    def _convolved(
        self, inputs: Any, of_inputs: Callable[[Any], Spectrum], cotangents: Cotangents, seed: Seed
    ) -> Sketches:
        """Sum over tokens of the products of spectra, a few tokens at a time; tokens added to fill up are zeros."""
        rows, tokens, _ = cotangents.shape
        kind = jnp.promote_types(jnp.promote_types(cotangents.dtype, inputs.dtype), jnp.complex64)
        at_once = min(tokens, max(1, SPECTRA_BYTES // (2 * rows * self.m * kind.itemsize)))

        def chunks(x: Array) -> Array:
            padded = jnp.pad(x, ((0, 0), (0, -tokens % at_once), *((0, 0),) * (x.ndim - 2)))
            return padded.reshape(rows, -1, at_once, *x.shape[2:]).swapaxes(0, 1)

        def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
            product = of_inputs(chunk[0]) * self._spectrum(chunk[1], fold_seed(seed, 1))
            return total + product.sum(axis=1), None

        zero = jnp.zeros((rows, self.m // 2 + 1), kind)
        total, _ = jax.lax.scan(add, zero, (chunks(inputs), chunks(cotangents)))
        return jnp.fft.irfft(total, n=self.m)

    def _spectrum(self, x: Float[Array, "N t D"], seed: Seed) -> Spectrum:
        """Fourier transform of every token's CountSketch."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        sign, place = _drawn(jnp.arange(x.shape[2], dtype=jnp.uint32), self.m, seed)
        counts = jnp.zeros((*x.shape[:2], self.m), wide.dtype).at[..., place].add(sign * wide)
        return jnp.fft.rfft(counts)


def _drawn(index: UInt32[Array, "*n"], m: int, seed: Seed) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """(sign, bucket) of each index: the top bit of one word, and the others modulo m."""
    word = sign_word(index, jnp.uint32(0), row_and_column_seeds(seed))
    return jnp.where(word < 0, -1, 1), (word & 0x7FFFFFFF) % m


def _rank_one(preconditioner: MatrixPreconditioner) -> Identity | Factored:
    if not isinstance(preconditioner, Identity | Factored):
        raise UserError(
            f"TensorSketch under a {type(preconditioner).__name__} preconditioner: it takes factors apart, so P must "
            "be Identity or Factored; use KronSketch or CountSketch, or the preconditioner's factored form"
        )
    return preconditioner
