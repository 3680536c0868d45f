"""Causal self-attention within segments, with grouped queries, in plain array operations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from opus_jax.distributed.axes import constrain
from opus_jax.models.initial_scale import input_std, output_std
from opus_jax.models.linear import block_map
from opus_jax.models.norms import Norm
from opus_jax.models.positions import rotate
from opus_jax.models.precision import wide
from opus_jax.models.presets import ModelSpec


def attention_mask(segment_ids: Int[Array, "N T"]) -> Bool[Array, "N T T"]:
    """[n, t, s] is true where token t may look at token s: s <= t, in the same segment.

    Padding (segment 0) looks at padding only; every token sees itself, so that no softmax is over nothing.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tri(length, dtype=bool)


def attend(
    queries: Float[Array, "N T H d"],
    keys: Float[Array, "N T G d"],
    values: Float[Array, "N T G d"],
    mask: Bool[Array, "N T T"],
    implementation: str = "xla",
) -> Float[Array, "N T H d"]:
    """softmax(q k^T / sqrt(d)) v, each of the G key heads serving H / G query heads; softmax in float32 or wider.

    Args:
      mask: where a query may look, of packed rows within the segment; both implementations take it as it is.
      implementation: 'xla', or 'cudnn', which keeps no [T, T] of every head, but has no forward-mode rule and takes
        even T only: of an odd T, as in text that is being generated, the product is XLA's.
    """
    if implementation == "cudnn" and queries.shape[1] % 2 == 0:
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None], implementation="cudnn")
    rows, length, heads, width = queries.shape
    groups = keys.shape[2]
    queries = queries.reshape(rows, length, groups, heads // groups, width)
    scores = jnp.einsum("ntgrd,nsgd->ngrts", queries, keys, preferred_element_type=wide(queries.dtype))
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("ngrts,nsgd->ntgrd", weights, values).reshape(rows, length, heads, width)


class Attention(nnx.Module):
    """Queries, keys and values are separate maps: SimpleNorm and Muon treat each by itself."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, depth: Float[Array, ""]):
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.implementation = spec.attention
        width, inner, kv_inner = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        std, per_head = input_std(spec, width), spec.qk_norm_axis == "head"
        q_groups, k_groups = (spec.heads, spec.kv_heads) if per_head else (1, 1)
        self.query = block_map(spec, rngs, (width, inner), ("embed", "heads"), std, q_groups)
        self.key = block_map(spec, rngs, (width, kv_inner), ("embed", "kv_heads"), std, k_groups)
        self.value = block_map(spec, rngs, (width, kv_inner), ("embed", "kv_heads"), std)
        self.output = block_map(spec, rngs, (inner, width), ("heads", "embed"), output_std(spec, inner, depth))
        self.query_norm = _qk_norm(spec, inner, "heads") if spec.norm == "prenorm_qk" else None
        self.key_norm = _qk_norm(spec, kv_inner, "kv_heads") if spec.norm == "prenorm_qk" else None

    def __call__(
        self, x: Float[Array, "N T D"], mask: Bool[Array, "N T T"], turns: Float[Array, "N T 2 half"] | None
    ) -> Float[Array, "N T D"]:
        queries = self._split(_normed(self.query(x), self.query_norm), self.heads, "heads")
        keys = self._split(_normed(self.key(x), self.key_norm), self.kv_heads, "kv_heads")
        values = self._split(self.value(x), self.kv_heads, "kv_heads")
        if turns is not None:
            queries, keys = rotate(queries, turns), rotate(keys, turns)
        mixed = attend(queries, keys, values, mask, self.implementation)
        return self.output(mixed.reshape(*x.shape[:2], self.heads * self.head_dim))

    def _split(self, x: Float[Array, "N T E"], heads: int, logical: str) -> Float[Array, "N T H d"]:
        return constrain(x.reshape(*x.shape[:2], heads, self.head_dim), ("batch", "length", logical, None))


def _qk_norm(spec: ModelSpec, inner: int, logical: str) -> Norm:
    """Over the whole width (SimpleGPT's baseline), or over each head with one gain for all heads (Qwen3)."""
    width, axis = (spec.head_dim, None) if spec.qk_norm_axis == "head" else (inner, logical)
    return Norm(width, spec.norm_kind, spec.norm_eps, bias=spec.bias, logical=axis)


def _normed(x: Float[Array, "N T E"], norm: Norm | None) -> Float[Array, "N T E"]:
    """Before the split into heads and before rotation: a gain per channel does not commute with a rotation."""
    if norm is None:
        return x
    width = norm.gain.shape[-1]
    slices = x if width == x.shape[-1] else x.reshape(*x.shape[:2], -1, width)
    return norm(slices).reshape(x.shape)
