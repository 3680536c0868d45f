"""The proxy gradient: the gradient of the loss we want to fall, refreshed now and then, and averaged over the past."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Gradient = PyTree[Float[Array, "..."]]


def update_proxy_gradient(
    previous: Gradient,
    step: Int[Array, ""] | int,
    fresh: Callable[[], Gradient],
    *,
    refresh: int = 1,
    ema: float = 0.0,
    first_step: int = 0,
) -> Gradient:
    """The proxy gradient to use at this step.

    On steps first_step, first_step + refresh, ... it is renewed; in between it is kept and `fresh` is not computed.
    The average starts without bias: after refresh k (from 0) it is sum_j ema^(k-j) g_j / sum_j ema^(k-j), kept as
    (1 - a) g_k + a previous with a = ema (1 - ema^k) / (1 - ema^(k+1)), so nothing but the gradient itself is state
    and what lies in `previous` before the first refresh is ignored.

    Args:
      previous: the proxy gradient of the last step; anything finite before the first.
      step: number of this step.
      fresh: computes the gradient on this step's proxy rows.
      refresh: steps between fresh gradients.
      ema: weight of the past, in [0, 1).
      first_step: the first step that uses a proxy gradient.
    """
    since = jnp.asarray(step, jnp.int32) - first_step

    def renew() -> Gradient:
        keep = _weight_of_past(since // refresh, ema)
        return jax.tree.map(lambda old, new: _blend(old, new, keep), previous, fresh())

    compute = fresh if ema == 0 else renew
    return compute() if refresh == 1 else jax.lax.cond(since % refresh == 0, compute, lambda: previous)


def _weight_of_past(refreshes: Int[Array, ""], ema: float) -> Float[Array, ""]:
    past = jnp.asarray(ema, jnp.float32) ** refreshes
    return jnp.where(refreshes > 0, ema * (1 - past) / (1 - ema * past), 0.0)


def _blend(old: Any, new: Any, keep: Any) -> Any:
    keep = keep.astype(new.dtype)
    return (1 - keep) * new + keep * old
