"""The ghost sketch in XLA: the form for CPU and GPU, and what the kernel is tested against."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.count_sketch.reference import First, stride_sketch
from pallas_kernels.ghost_sketch.fold import CountFold, KronFold

GRADIENT_BYTES = 2**27  # on one device, of the gradients that exist at a time; at least one example's

Result = tuple[Float[Array, "N M"], Float[Array, " N"] | None]


def ghost_sketch(
    inputs: Float[Array, "N T D"],
    cotangents: Float[Array, "N T F"],
    fold: KronFold | CountFold,
    scale: Float[Array, "D F"] | None,
    direction: Float[Array, "D F"] | None,
    first: First = (0, 0),
) -> Result:
    """As `api.ghost_sketch`, for a part of D and F whose first entry is `first`.

    A Kron fold without a scale needs no gradient: its factors project the tokens. Otherwise the gradients of a few
    examples are formed at a time, `GRADIENT_BYTES` of them.
    """
    if isinstance(fold, KronFold) and scale is None:
        aligned = None if direction is None else _contracted(inputs, cotangents, direction)
        return _projected(inputs, cotangents, fold), aligned
    return _by_gradients(inputs, cotangents, _folder(fold, scale, first), direction)


def _by_gradients(
    inputs: Array, cotangents: Array, folder: Callable[[Array], Array], direction: Array | None
) -> Result:
    def one(example: tuple[Array, Array]) -> tuple[Array, Array | None]:
        gradient = _products("td,tf->df", *example)
        aligned = None if direction is None else jnp.sum(gradient * direction.astype(gradient.dtype))
        return folder(gradient), aligned

    size = inputs.shape[2] * cotangents.shape[2] * _wide(inputs).itemsize
    at_once = max(1, GRADIENT_BYTES // size)
    if at_once >= inputs.shape[0]:
        return jax.vmap(one)((inputs, cotangents))
    return jax.lax.map(one, (inputs, cotangents), batch_size=at_once)


def _folder(fold: KronFold | CountFold, scale: Array | None, first: First) -> Callable[[Array], Array]:
    """Gradient [D, F] -> sketch [M]."""

    def scaled(gradient: Array) -> Array:
        return gradient if scale is None else gradient * scale.astype(gradient.dtype)

    if isinstance(fold, CountFold):
        seed, rows, columns = fold.seed, fold.rows, fold.columns
        return lambda gradient: stride_sketch(scaled(gradient)[None], seed, rows, columns, first).reshape(-1)
    return lambda gradient: _two_sided(scaled(gradient), fold)


def _two_sided(matrix: Array, fold: KronFold) -> Array:
    half = _products("df,rdp->rpf", matrix, fold.left)
    return _products("rpf,rfq->rpq", half, fold.right).reshape(-1)


def _projected(inputs: Array, cotangents: Array, fold: KronFold) -> Array:
    before = _products("ntd,rdp->ntrp", inputs, fold.left)
    after = _products("ntf,rfq->ntrq", cotangents, fold.right)
    return _products("ntrp,ntrq->nrpq", before, after).reshape(inputs.shape[0], -1)


def _contracted(inputs: Array, cotangents: Array, direction: Array) -> Array:
    """<G_i, V> = sum_t a_t^T V b_t."""
    moved = _products("ntd,df->ntf", inputs, direction)
    return jnp.sum(moved * cotangents.astype(moved.dtype), axis=(1, 2))


def _products(subscripts: str, first: Array, second: Array) -> Array:
    """Einstein sum in float32 or wider; two narrow arrays are multiplied as they are, and only summed so.

    Float32 is multiplied as such, also where the hardware would round it to something shorter.
    """
    if first.dtype != second.dtype:
        first, second = (x.astype(jnp.promote_types(_wide(first), _wide(second))) for x in (first, second))
    precision = jax.lax.Precision.HIGHEST if first.dtype == _wide(first) else None
    return jnp.einsum(subscripts, first, second, precision=precision, preferred_element_type=_wide(first))


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
