"""What taps report of every row's gradient G_i = sum_t a_t b_t^T of one matrix, without G_i being kept.

Each rule is asked in the backward pass, where a and b lie at hand: for a product y = x W, and for a table's lookup,
whose a_t are unit vectors and are never written out.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from opus_jax.influence.sketch.family import Sketch
from opus_jax.models.precision import wide
from opus_jax.models.tapped import Rule
from opus_jax.optim.matrix_preconditioner import MatrixPreconditioner

Inputs = Float[Array, "N T D"]
Cotangents = Float[Array, "N T F"]


@dataclass(frozen=True)
class Alignment:
    """<G_i, v>, exact: sum_t b_t^T (v^T a_t), one more product of the forward pass's size. Constants: v [D, F]."""

    def of_product(self, inputs: Inputs, cotangents: Cotangents, constants: Float[Array, "D F"]) -> Float[Array, " N"]:
        moved = jnp.dot(inputs, constants.astype(inputs.dtype), preferred_element_type=wide(inputs.dtype))
        return jnp.einsum("ntf,ntf->n", moved, cotangents.astype(moved.dtype)).astype(constants.dtype)

    def of_lookup(
        self, ids: Int[Array, "N T"], cotangents: Cotangents, constants: Float[Array, "V F"]
    ) -> Float[Array, " N"]:
        return jnp.einsum("ntf,ntf->n", constants[ids], cotangents.astype(constants.dtype))


@dataclass(frozen=True)
class Sketched:
    """The sketch of P G_i. Constants: (P, seed).

    Attributes:
      sketch: the family.
      height: D, which a lookup does not show.
      axes: mesh axes over which D and F of activations are split.
      implementation: of the kernel; None = by the mesh's platform.
    """

    sketch: Sketch
    height: int
    axes: tuple[str | None, str | None] = (None, None)
    implementation: str | None = None

    def of_product(
        self, inputs: Inputs, cotangents: Cotangents, constants: tuple[MatrixPreconditioner, UInt32[Array, ""]]
    ) -> Float[Array, "N M"]:
        preconditioner, seed = constants
        return self.sketch.of_tokens(
            inputs, cotangents, seed, preconditioner, axes=self.axes, implementation=self.implementation
        )

    def of_lookup(
        self,
        ids: Int[Array, "N T"],
        cotangents: Cotangents,
        constants: tuple[MatrixPreconditioner, UInt32[Array, ""]],
    ) -> Float[Array, "N M"]:
        preconditioner, seed = constants
        return self.sketch.of_lookup(ids, cotangents, seed, preconditioner, height=self.height)


@dataclass(frozen=True)
class Factors:
    """a and b themselves, from which the gradient of any choice of rows follows. No constants.

    A table that is also the head is looked up and multiplied: each use leaves zeros in the other's place.

    Attributes:
      shape: (D, F) of the matrix.
      uses: 'lookup', 'product', or both.
      dtype: of activations.
    """

    shape: tuple[int, int]
    uses: tuple[str, ...]
    dtype: DTypeLike

    def answer(self, rows: int, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Ids are kept as float32, as only floating taps have cotangents; exact below 2^24."""
        wide_as = lambda width: jax.ShapeDtypeStruct((rows, tokens, width), jnp.dtype(self.dtype))  # noqa: E731
        product = {"inputs": wide_as(self.shape[0]), "cotangents": wide_as(self.shape[1])}
        found = {"ids": jax.ShapeDtypeStruct((rows, tokens), jnp.float32), "looked_up": wide_as(self.shape[1])}
        return (product if "product" in self.uses else {}) | (found if "lookup" in self.uses else {})

    def of_product(self, inputs: Inputs, cotangents: Cotangents, constants: None) -> dict[str, Array]:
        return self._filled(inputs=inputs, cotangents=cotangents)

    def of_lookup(self, ids: Int[Array, "N T"], cotangents: Cotangents, constants: None) -> dict[str, Array]:
        return self._filled(ids=ids, looked_up=cotangents)

    def _filled(self, **found: Array) -> dict[str, Array]:
        rows, tokens = next(iter(found.values())).shape[:2]
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in self.answer(rows, tokens).items()}
        return {name: found[name].astype(zero.dtype) if name in found else zero for name, zero in zeros.items()}


@dataclass(frozen=True)
class Together:
    """The answers of several rules, by name. Constants: theirs, by name."""

    rules: tuple[tuple[str, Rule], ...]

    def of_product(self, inputs: Inputs, cotangents: Cotangents, constants: dict[str, Any]) -> dict[str, Any]:
        return {name: rule.of_product(inputs, cotangents, constants[name]) for name, rule in self.rules}

    def of_lookup(self, ids: Int[Array, "N T"], cotangents: Cotangents, constants: dict[str, Any]) -> dict[str, Any]:
        return {name: rule.of_lookup(ids, cotangents, constants[name]) for name, rule in self.rules}
