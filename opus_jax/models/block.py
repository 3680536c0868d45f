"""One transformer block: attention and an MLP, each added to the residual stream."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from opus_jax.distributed.axes import constrain
from opus_jax.models.attention import Attention
from opus_jax.models.initial_scale import input_std, official_depth_std, output_std
from opus_jax.models.linear import block_map
from opus_jax.models.norms import Norm
from opus_jax.models.presets import ModelSpec


class MLP(nnx.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (arXiv 2002.05202), or down(gelu(up(x))) with the tanh form of GELU."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, depth: Float[Array, ""]):
        shape, axes, std = (spec.width, spec.hidden), ("embed", "mlp"), input_std(spec, spec.width)
        gated = spec.activation == "swiglu"
        # The official SimpleGPT code gives the map that is multiplied in, not the gate, the depth-scaled deviation.
        up_std = official_depth_std(depth) if gated and spec.init == "official" else std
        self.gate = block_map(spec, rngs, shape, axes, std) if gated else None
        self.up = block_map(spec, rngs, shape, axes, up_std)
        self.down = block_map(spec, rngs, shape[::-1], axes[::-1], output_std(spec, spec.hidden, depth))

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        up = self.up(x)
        hidden = jax.nn.gelu(up, approximate=True) if self.gate is None else jax.nn.silu(self.gate(x)) * up
        return self.down(constrain(hidden, ("batch", "length", "mlp")))


class Block(nnx.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); SimpleNorm has no norm there, as it norms every map's output."""

    def __init__(self, spec: ModelSpec, key: jax.Array, depth: Float[Array, ""]):
        rngs = nnx.Rngs(params=key)
        self.attention, self.mlp = Attention(spec, rngs, depth), MLP(spec, rngs, depth)
        self.attention_norm, self.mlp_norm = _pre_norm(spec), _pre_norm(spec)

    def __call__(
        self, x: Float[Array, "N T D"], mask: Bool[Array, "N T T"], turns: Float[Array, "N T 2 half"] | None
    ) -> Float[Array, "N T D"]:
        x = x + self.attention(x if self.attention_norm is None else self.attention_norm(x), mask, turns)
        x = x + self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        return constrain(x, ("batch", "length", "activation"))


def _pre_norm(spec: ModelSpec) -> Norm | None:
    return None if spec.norm == "simplenorm" else Norm(spec.width, spec.norm_kind, spec.norm_eps, bias=spec.bias)
