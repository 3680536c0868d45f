"""Utilities as directional derivatives: one forward-mode pass over the candidates, and no per-example gradients.

<grad loss_i, v> is the derivative of example i's loss along v, so `jax.jvp` of the vector of losses gives every
utility at once: about three forward passes of arithmetic, the memory of a forward pass, and no sketch. The same
derivative by central differences costs two forward passes and needs no derivative rule at all.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.errors import UserError
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.slopes import NoForwardRule, difference_slope, exact_slope

METHODS = ("jvp", "difference")

Params = PyTree[Any]
Batch = PyTree[Any]  # leaves with the candidates on their first axis


def utilities(
    loss_fn: Callable[[Params, Batch], Float[Array, " N"]],
    params: Params,
    direction: Params,
    batch: Batch,
    *,
    method: str = "jvp",
    chunk: int | None = None,
) -> Float[Array, " N"]:
    """Utility of every candidate, <grad loss_i, v>.

    Args:
      loss_fn: `loss_fn(params, batch) -> [N]`, one loss per candidate (nats per target token), traceable by JAX.
      params: where the gradients are taken.
      direction: v, a tree like the parameters, from `opus_jax.direction`.
      batch: any pytree of arrays with N first.
      method: 'jvp', exact to rounding; 'difference', central differences over a thousandth of the parameters' norm
        (approximate; see `slopes`). A loss with a `custom_vjp` on the way of v, such as a hand-written attention
        kernel, has no forward-mode rule: then 'jvp' takes differences by itself and logs a warning, once.
      chunk: candidates at a time; None = all. Must divide N.

    Returns:
      [N], float32 or wider: the first-order fall of the proxy loss per unit weight of the candidate in the batch.

    Raises:
      ValueError: the method does not exist.
      UserError: `chunk` does not divide N, the direction is no tree like the parameters, or differences are taken of
        parameters narrower than float32.
    """
    return _derivative(loss_fn, params, direction, batch, method, chunk)


def token_utilities(
    token_loss_fn: Callable[[Params, Batch], Float[Array, "N T"]],
    params: Params,
    direction: Params,
    batch: Batch,
    *,
    method: str = "jvp",
    chunk: int | None = None,
) -> Float[Array, "N T"]:
    """Utility of every target token, <grad of its own loss, v>, at no more cost than the rows'.

    Args: as `utilities`, but `token_loss_fn` gives the nats of each token, 0 where it is no target.

    Returns:
      [N, T]; a row's sum, over its number of targets, is the row's utility.
    """
    return _derivative(token_loss_fn, params, direction, batch, method, chunk)


def document_utilities(
    token_loss_fn: Callable[[Params, Batch], Float[Array, "N T"]],
    params: Params,
    direction: Params,
    batch: dict[str, Array],
    *,
    segments: int,
    method: str = "jvp",
    chunk: int | None = None,
) -> Float[Array, "N S"]:
    """Utility of every segment of every row: the sum over its target tokens.

    Args: as `token_utilities`; `batch["segment_ids"]` int32[N, T] counts segments from 1, 0 is padding.
      segments: S, the most segments in a row.

    Returns:
      [N, S], column s for segment s + 1; 0 where the row has fewer. Sums, not means: divide by the number of target
      tokens for a utility per token.
    """
    tokens = token_utilities(token_loss_fn, params, direction, batch, method=method, chunk=chunk)
    return sums_by_segment(tokens, batch["segment_ids"], segments)


def sums_by_segment(tokens: Float[Array, "N T"], segment_ids: Int[Array, "N T"], segments: int) -> Float[Array, "N S"]:
    """Sums over the tokens of every segment, column s for segment s + 1; padding, segment 0, is left out."""
    one_row = lambda values, ids: jax.ops.segment_sum(values, ids, num_segments=segments + 1)  # noqa: E731
    return jax.vmap(one_row)(tokens, segment_ids)[:, 1:]


def _derivative(
    function: Callable[[Params, Batch], Array],
    params: Params,
    direction: Params,
    batch: Batch,
    method: str,
    chunk: int | None,
) -> Array:
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    if jax.tree.structure(direction) != jax.tree.structure(params):  # type: ignore[operator]
        raise UserError("the direction is not a tree like the parameters: take it from opus_jax.direction")
    if method == "jvp":
        try:
            return map_chunks(exact_slope(function, params, direction), batch, chunk)
        except NoForwardRule:
            _say_differences()
    return map_chunks(difference_slope(function, params, direction), batch, chunk)


@functools.cache
def _say_differences() -> None:
    logging.getLogger("opus_jax").warning(
        "the loss holds a custom_vjp, which has no forward-mode rule: utilities are central differences, approximate"
    )
