"""The linear maps of a block: a plain one, and SimpleNorm's, which is normalised after the map."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from opus_jax.models.norms import normalise
from opus_jax.models.presets import ModelSpec
from opus_jax.models.tapped import beside, product


class Linear(nnx.Module):
    """y = x W + b in the type of x. W may be `Tapped`, and b one vector for each row; see `models/tapped.py`."""

    def __init__(self, kernel: Float[Array, "D F"], logical: tuple[str, str], *, bias: bool):
        self.kernel = nnx.Param(kernel, logical=logical)
        self.bias = nnx.Param(jnp.zeros(kernel.shape[1]), logical=logical[1:]) if bias else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        y = product(x, self.kernel.get_value())
        return y if self.bias is None else y + beside(self.bias[...], y).astype(x.dtype)


class SimpleNormLinear(Linear):
    """y = gain * normalise(x W), invariant to the scale of W and of x (SimpleNorm, arXiv 2602.01212).

    `groups` > 1 normalises equal slices of the output, one per attention head, each by itself; the gain always has
    the output's width. W must not be zero: the gradient in W grows like 1 / sqrt(mean((x W)^2) + eps).
    """

    def __init__(
        self, kernel: Float[Array, "D F"], logical: tuple[str, str], *, kind: str, eps: float, groups: int = 1
    ):
        super().__init__(kernel, logical, bias=False)
        self.kind, self.eps, self.groups = kind, eps, groups
        self.gain = nnx.Param(jnp.ones(kernel.shape[1]), logical=logical[1:])

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        z = super().__call__(x)
        # A reshape to one slice would keep XLA from fusing the norm on CPU, at a tenth of a training step.
        slices = z if self.groups == 1 else z.reshape(*z.shape[:-1], self.groups, z.shape[-1] // self.groups)
        unit = normalise(slices, self.kind, self.eps).reshape(z.shape)
        return (unit * beside(self.gain[...], unit)).astype(x.dtype)


def block_map(
    spec: ModelSpec,
    rngs: nnx.Rngs,
    shape: tuple[int, int],
    logical: tuple[str, str],
    std: jax.Array | float,
    groups: int = 1,
) -> Linear:
    """A linear map of a block, normal with standard deviation `std`; `groups` is the slices SimpleNorm norms apart."""
    kernel = std * jax.random.normal(rngs.params(), shape)
    if spec.norm == "simplenorm":
        return SimpleNormLinear(kernel, logical, kind=spec.norm_kind, eps=spec.norm_eps, groups=groups)
    return Linear(kernel, logical, bias=spec.bias)
