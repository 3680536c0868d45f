"""RMSNorm and LayerNorm: statistics in float32, gains in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from opus_jax.models.precision import wide
from opus_jax.models.tapped import beside


def normalise(x: Float[Array, "*rows D"], kind: str, eps: float) -> Float[Array, "*rows D"]:
    """Unit root mean square over the last axis: (x - m) / sqrt(mean((x - m)^2) + eps), in float32 or wider.

    m is the mean for `layernorm` and 0 for `rmsnorm`. eps is inside the root, so an all-zero row stays zero.
    """
    x = x.astype(wide(x.dtype))
    if kind == "layernorm":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
    """A norm with a learned gain, and a learned bias for a LayerNorm that has one."""

    def __init__(self, width: int, kind: str, eps: float, *, bias: bool, logical: str | None = "embed"):
        self.kind, self.eps = kind, eps
        self.gain = nnx.Param(jnp.ones(width), logical=(logical,))
        self.bias = nnx.Param(jnp.zeros(width), logical=(logical,)) if bias and kind == "layernorm" else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = normalise(x, self.kind, self.eps) * beside(self.gain[...], x)
        if self.bias is not None:
            y = y + beside(self.bias[...], x)
        return y.astype(x.dtype)
