"""Matrices that move along a direction of low rank: its derivative is two thin products instead of a whole one.

Forward mode along a whole matrix V spends a product x V beside x W. A `Thin` stands in the parameter tree where W
stood and holds V as left right; the one number that moves is the amount of it, so no product with a matrix of W's
size is spent on it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=["array", "left", "right", "amount"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Thin:
    """W + amount left right, at amount 0.

    The value of the product is x W and nothing else: only its derivative along `amount` knows of the factors, so finite
    amounts, and differences of them, have no meaning.

    Attributes:
      array: W, [D, F], or [L, D, F] before `scan` takes it apart; the same leading axis on all others.
      left: [D, r].
      right: [r, F].
      amount: 0; what is differentiated.
    """

    array: Float[Array, "*L D F"]
    left: Float[Array, "*L D r"]
    right: Float[Array, "*L r F"]
    amount: Float[Array, "*L"]

    def steer(self, y: Float[Array, "*rows F"], x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        """y = x W as it is, with the derivative along `amount`, x left right."""
        return _steered(y, x, self.left, self.right, self.amount)


def pays(shape: tuple[int, ...], rank: int) -> bool:
    """Whether two thin products cost less than one with the whole [..., D, F]."""
    height, width = shape[-2:]
    return rank * (height + width) < height * width


@jax.custom_jvp
def _steered(y: Array, x: Array, left: Array, right: Array, amount: Array) -> Array:
    del x, left, right, amount
    return y


@_steered.defjvp
def _steered_tangent(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    y, x, left, right, _ = primals
    to_y, *_, to_amount = tangents
    along = jnp.dot(x, left.astype(x.dtype))
    along = jnp.dot(along, right.astype(x.dtype), preferred_element_type=y.dtype)
    return y, to_y + to_amount.astype(y.dtype) * along
